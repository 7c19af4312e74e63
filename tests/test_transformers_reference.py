"""Image to answer against ``transformers``: Qwen2.5-VL, Qwen3-VL and Gemma 3.

The files are tiny and random, and llama.cpp's converter made them (tests/reference/vlm_reference.py
says how). So the converter, the vision tower, the positions of an image and the language model have
to agree with the authors' code. Images have a size that no side resizes.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from elastic_llama import Conversation, ElasticConfig, ElasticLlama
from elastic_llama.vision import MARKER

from tests.support.engine import nmse
from tests.support.mtmd_plain import PlainVision

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
N_CTX = 256
NAMES = ("qwen2.5vl", "qwen3vl", "gemma3")
BEFORE, QUESTION = "look at", "what is in the second row ?"
PROMPT = BEFORE + MARKER + QUESTION
#: of 16-bit weights against the double precision of the reference; 2e-6 on a CPU
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Reference:
    """A model as files, and what ``transformers`` computed with it."""

    name: str
    model: Path
    mmproj: Path
    image: np.ndarray
    tokens: list[list[int]]  # before and behind the image
    answer: list[int]
    features: np.ndarray  # [n_token, n_float]
    logits: np.ndarray  # [1 + n_answer, n_vocab]


@pytest.fixture(scope="module", params=NAMES)
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    folder = tmp_path_factory.mktemp(request.param)
    with np.load(DATA / f"vlm_{request.param}.npz") as data:
        files = {}
        for part in ("text", "mmproj"):
            files[part] = folder / f"{part}.gguf"
            files[part].write_bytes(data[part].tobytes())
        return Reference(
            request.param,
            files["text"],
            files["mmproj"],
            data["image"],
            [data["before"].tolist(), data["after"].tolist()],
            data["answer"].tolist(),
            data["features"],
            data["logits"],
        )


@pytest.fixture(scope="module")
def plain(reference: Reference) -> Iterator[PlainVision]:
    with PlainVision(reference.model, reference.mmproj, flash_attn=True) as vision:
        yield vision


def test_tokens_are_those_of_the_reference(reference: Reference, plain: PlainVision) -> None:
    """Each side of the image there is one more token, a marker of the family."""
    before, after = plain.tokens(PROMPT, [reference.image])
    assert [before[:-1], after[1:]] == reference.tokens


def test_features(reference: Reference, plain: PlainVision) -> None:
    ours, right = plain.features(PROMPT, [reference.image])[0], reference.features
    assert ours.shape == right.shape
    cosines = (
        (ours * right).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(right, axis=-1)
    )
    assert cosines.min() >= 0.999
    assert nmse(right, ours) <= TOLERANCE
    # the places of two neighbours matter: such an exchange does not pass
    assert nmse(right, ours[[1, 0, *range(2, len(ours))]]) > 10 * TOLERANCE


def test_answer_of_libmtmd(reference: Reference, plain: PlainVision) -> None:
    plain.clear()
    first = plain.prompt(PROMPT, [reference.image])
    ours = np.stack([first, *plain.forced(reference.answer)])
    assert nmse(reference.logits, ours) <= TOLERANCE


def test_one_position_more_does_not_pass(reference: Reference, plain: PlainVision) -> None:
    """Where the text behind an image begins is a part of what is compared."""
    if not reference.name.startswith("qwen"):
        pytest.skip("llama.cpp takes a gap in the positions with M-RoPE only")
    plain.clear()
    plain.prompt(BEFORE + MARKER, [reference.image])
    plain.n_past += 1
    ours = plain.prompt(QUESTION, [], first=False)
    assert nmse(reference.logits[0], ours) > 10 * TOLERANCE


def test_reference_can_be_made_again(reference: Reference) -> None:
    for module in ("torch", "transformers", "sentencepiece"):
        pytest.importorskip(module, reason=f"{module} is needed to run the reference again")
    said = subprocess.run(
        [sys.executable, "cmake/prepare_llama_cpp.py"], cwd=ROOT, capture_output=True, text=True
    )
    tree = next(line for line in said.stdout.splitlines() if line.startswith("tree="))
    spec = importlib.util.spec_from_file_location("vlm", ROOT / "tests/reference/vlm_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fresh = module.reference(reference.name, Path(tree.partition("=")[2]))
    np.testing.assert_allclose(fresh["features"], reference.features, atol=1e-5)
    np.testing.assert_allclose(fresh["logits"], reference.logits, atol=1e-5)


@pytest.mark.parametrize("cache", ["off", "all cells kept"])
def test_answer(reference: Reference, cache: str) -> None:
    """All cells are kept, and their attention is summed, since no prompt reaches the budget."""
    elastic = None if cache == "off" else ElasticConfig(budget=N_CTX)
    llm = ElasticLlama(
        str(reference.model),
        mmproj_path=str(reference.mmproj),
        elastic=elastic,
        n_ctx=N_CTX,
        n_threads=1,
        n_threads_batch=1,
    )
    chat = Conversation(llm)
    try:
        chat.prefill(QUESTION, [reference.image])
        ours = [logits_of(llm)]
        for token in reference.answer:
            llm.eval([token])
            ours.append(logits_of(llm))
        if elastic is not None:
            n_cells = sum(map(len, reference.tokens)) + 2 + len(reference.features)
            assert llm.session.n_cells(0) == n_cells + len(reference.answer)
    finally:
        chat.close()
        llm.close()
    assert nmse(reference.logits, np.stack(ours)) <= TOLERANCE


def logits_of(llm: ElasticLlama) -> np.ndarray:
    row = llama_cpp.llama_get_logits_ith(llm._ctx.ctx, -1)
    return np.ctypeslib.as_array(row, (llm.n_vocab(),)).copy()
