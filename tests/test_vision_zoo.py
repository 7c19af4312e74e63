"""Image to answer with the projector of every family on a language model of its own architecture.

The files are tiny and random (`tests.support.mmproj_zoo`). What is compared is exact: libmtmd's own
helper on a context that knows nothing of us gives the logits. docs/models.md names these tests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from elastic_llama import ConfigError, Conversation, ElasticConfig, ElasticLlama
from elastic_llama.vision import MARKER

from tests.support.engine import nmse
from tests.support.mmproj_zoo import FAMILIES, TEXT_VARIANTS, write_mmproj
from tests.support.mtmd_plain import PlainVision
from tests.support.oracle_plan import left_free
from tests.support.vision_text import N_EMBD, WIDTHS, write_text_model

N_CTX, N_BATCH = 1024, 512
N_ANSWER, N_LONG = 3, 12
CAP = 64
#: Families whose language model reads an image without a causal mask, so all of it at once.
AT_ONCE = ("gemma3", "gemma4", "gemma4-moe", "gemma4-unified")
QUESTIONS = ("what is it? ", "and this one? ")
SHAPES = (((56, 56), (56, 112)), ((90, 70),))  # height and width of the images of each question


def image(seed: int, height: int, width: int) -> np.ndarray:
    """Smooth colours with noise, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 112
    base = np.stack([x, y, 0.5 + 0.5 * np.sin(seed + 9 * x + 4 * y)], axis=-1)
    return np.clip(255 * (base + rng.uniform(-0.2, 0.2, base.shape)), 0, 255).astype(np.uint8)


IMAGES = [[image(10 * i + j, *size) for j, size in enumerate(s)] for i, s in enumerate(SHAPES)]


def prompt(turn: int) -> str:
    """What the chat template of the files makes of a question and its images."""
    asked = MARKER * len(IMAGES[turn]) + QUESTIONS[turn]
    begin = "<|im_end|>\n" if turn else ""
    return f"{begin}<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Files:
    name: str
    model: Path
    mmproj: Path


@pytest.fixture(scope="module", params=[*FAMILIES, *TEXT_VARIANTS])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    name = request.param
    family_name, text = TEXT_VARIANTS.get(name, (name, ""))
    family = FAMILIES[family_name]
    folder = tmp_path_factory.mktemp("family")
    text = text or family.text
    model = write_text_model(folder / "text.gguf", text, family.tokens)
    n_embd = WIDTHS.get(text, N_EMBD)
    return Files(name, model, write_mmproj(folder / "mmproj.gguf", family, n_embd))


@dataclass(frozen=True)
class Expected:
    """By libmtmd's helper: two questions, and an answer of the second one that is forced."""

    n_cells: list[int]  # of each prompt
    logits: list[np.ndarray]  # at the end of each prompt
    answer: list[int]
    answer_logits: np.ndarray


def plain_turns(vision: PlainVision) -> Expected:
    """Both questions as a caller of libmtmd decodes them."""
    n_cells, logits = [], []
    for turn, images in enumerate(IMAGES):
        sizes = vision.sizes(prompt(turn), images, first=turn == 0)
        n_cells.append(sum(n for n, _, _ in sizes))
        logits.append(vision.prompt(prompt(turn), images, first=turn == 0))
    answer = [int(i) for i in np.argsort(logits[1])[-N_ANSWER:]]
    return Expected(n_cells, logits, answer, vision.forced(answer))


@pytest.fixture(scope="module")
def expected(files: Files) -> Expected:
    with plain(files) as vision:
        return plain_turns(vision)


def plain(files: Files, **context: object) -> PlainVision:
    shape = {"n_ctx": N_CTX, "n_batch": N_BATCH, "flash_attn": True, **context}
    return PlainVision(files.model, files.mmproj, **shape)


class Opened:
    """A model and a conversation with it."""

    def __init__(self, files: Files, elastic: ElasticConfig | None, n_batch: int = N_BATCH) -> None:
        self.llm = ElasticLlama(
            str(files.model),
            mmproj_path=str(files.mmproj),
            elastic=elastic,
            n_ctx=N_CTX,
            n_batch=n_batch,
            n_ubatch=n_batch,
            n_threads=1,
            n_threads_batch=1,
            flash_attn=True,
        )
        self.chat = Conversation(self.llm)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *exc: object) -> None:
        self.chat.close()
        self.llm.close()

    def logits(self) -> np.ndarray:
        row = llama_cpp.llama_get_logits_ith(self.llm._ctx.ctx, -1)
        return np.ctypeslib.as_array(row, (self.llm.n_vocab(),)).copy()

    def answer_of(self, question: str, images: list[np.ndarray]) -> None:
        """Greedy, `N_LONG` tokens at most; every token's logits are numbers."""
        for _ in self.chat.ask(question, images, max_tokens=N_LONG):
            assert np.isfinite(self.logits()).all()
        assert np.isfinite(self.logits()).all()

    def turns(self, answer: list[int]) -> tuple[list[np.ndarray], np.ndarray]:
        """Logits behind each question, none but the last answered, and of the answer's tokens."""
        logits = []
        for question, images in zip(QUESTIONS, IMAGES):
            assert "".join(self.chat.ask(question, images, max_tokens=0)) == ""
            logits.append(self.logits())
        rows = []
        for token in answer:
            self.llm.eval([token])
            rows.append(self.logits())
        return logits, np.stack(rows)


def test_off_is_libmtmd(files: Files, expected: Expected) -> None:
    """Two turns, an image that is not square, and three images: the same bits."""
    with Opened(files, None) as ours:
        logits, rows = ours.turns(expected.answer)
        assert ours.chat.stats.n_text + ours.chat.stats.n_image == expected.n_cells[1]
    np.testing.assert_array_equal(logits, expected.logits)
    np.testing.assert_array_equal(rows, expected.answer_logits)


def test_other_pixels_other_logits(files: Files, expected: Expected) -> None:
    """Else nothing above would say that an image is seen."""
    upside_down = [np.ascontiguousarray(pixels[::-1]) for pixels in IMAGES[0]]
    with plain(files) as vision:
        assert nmse(expected.logits[0], vision.prompt(prompt(0), upside_down)) > 1e-5


def test_all_cells_kept_is_libmtmd(files: Files, expected: Expected) -> None:
    """A caller of the C interface with a budget of 1.0: the same bits."""
    with plain(files, elastic={"policy": "elastic", "budget": 1.0}) as vision:
        ours = plain_turns(vision)
        assert vision.engine.session.n_cells(0) == sum(expected.n_cells) + N_ANSWER
    np.testing.assert_array_equal(ours.logits, expected.logits)
    np.testing.assert_array_equal(ours.answer_logits, expected.answer_logits)


def test_scored_but_not_compressed(files: Files, expected: Expected) -> None:
    """A budget that no prompt reaches: attention is summed, and the answers stay the same."""
    with Opened(files, ElasticConfig(budget=N_CTX)) as ours:
        logits, rows = ours.turns(expected.answer)
        assert ours.llm.session.n_cells(0) == sum(expected.n_cells) + N_ANSWER
    assert nmse(np.stack(expected.logits), np.stack(logits)) < 1e-4
    assert nmse(expected.answer_logits, rows) < 1e-4


def test_compressed(files: Files, expected: Expected) -> None:
    """Two answers over fewer cells: as many as promised, and no NaN."""
    with Opened(files, ElasticConfig(budget=0.3, min_cells=8, overdraft=4)) as ours:
        for turn in range(2):
            ours.answer_of(QUESTIONS[turn], IMAGES[turn])
            stats = ours.chat.stats
            if turn == 0:
                budget = -(-3 * expected.n_cells[0] // 10)
                assert stats.cells_prompt == expected.n_cells[0]
                assert stats.cells_kept == budget - left_free(budget)
            n_seen = sum(expected.n_cells[: turn + 1]) + (turn + 1) * N_LONG
            assert stats.cells_kept <= 0.3 * n_seen + 1
            assert ours.llm.session.n_per_layer(0) <= 0.3 * n_seen + 1 + 4


def test_cap(files: Files, expected: Expected) -> None:
    """A prompt that is longer than the cap is compressed on the way, also inside an image."""
    if files.name == "llama4":
        with pytest.raises(ConfigError, match="sliding window"):  # of 8192 cells
            Opened(files, ElasticConfig(budget=0.3, kv_cells=CAP))
        return
    n_batch = N_BATCH if files.name in AT_ONCE else CAP // 2
    elastic = ElasticConfig(budget=0.3, min_cells=8, kv_cells=CAP)
    with Opened(files, elastic, n_batch) as ours:
        for question, images in zip(QUESTIONS, IMAGES):
            ours.answer_of(question, images)
            assert ours.llm.session.n_cells(0) <= CAP


def test_the_page_names_these_tests() -> None:
    """29 files, and every id is a family here."""
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    table = page.partition("## Vision files")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\S+) \| `(\S+)` \| `(\S+)` \| yes \| `\[(\S+)\]` \|$", table, re.M)
    assert len(rows) == len({name for name, *_ in rows}) == 29
    for _, projector, text, name in rows:
        family, variant = TEXT_VARIANTS.get(name, (name, ""))
        assert FAMILIES[family].projector == projector
        assert (variant or FAMILIES[family].text).partition("-")[0] == text
    named = set(re.findall(r"`\[(\S+?)\]`", table))
    assert named == {*FAMILIES, *TEXT_VARIANTS}
