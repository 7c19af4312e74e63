"""Keys and values on a device of this machine: the answers of the host, as near as stock comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import engine
from tests.support.device_cases import POLICIES
from tests.support.engine import N_GPU_LAYERS, Engine, nmse, random_tokens
from tests.support.splits import Splits
from tests.support.tiny_llama import write_tiny_llama

N_VOCAB, N_PROMPT, N_ANSWER = 384, 260, 24
FUSED, FUSED_STREAMS = "fused op, a mask per head", "fused op, a head as a stream"
# times stock's difference between host and device: fewer cells average less of it out
AS_STOCK = 5
# What rounding alone may do: patches that differ by 1e-5 of themselves change stock's answer in
# q8_0 by 1.7e-6, on the host and with all cells.
AT_LEAST = {"f16": 1e-6, "q8_0": 1e-5}
# Of a random model's scores many are nearly equal; q8_0 rounds more on either side.
SAME_CHOICE = {"f16": 0.9, "q8_0": 0.5}
# These evict, head by head, by what was summed up since: compared are tokens before that counts.
SUMMED = {"h2o", "elastic-evict"}

pytestmark = pytest.mark.skipif(
    N_GPU_LAYERS == 0, reason="for builds with a device: ELASTIC_TEST_GPU_LAYERS=99"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("device") / "model.gguf"
    write_tiny_llama(path, n_layer=3, head_dim=64)  # CUDA has no fused op for smaller heads
    return path


def on(
    n_gpu_layers: int, monkeypatch: pytest.MonkeyPatch, model: Path, given: dict[str, Any]
) -> Engine:
    monkeypatch.setattr(engine, "N_GPU_LAYERS", n_gpu_layers)
    return Engine(model, flash_attn=True, **given)


def feed(e: Engine, with_image: bool, seq: int) -> int:
    tokens = random_tokens(N_PROMPT, N_VOCAB, 5 + seq)
    e.prompt(tokens[:20], 0, seq, logits=False)
    if with_image:
        image = np.random.default_rng(seq).normal(scale=0.5, size=(200, e.n_embd))
        e.image(image.astype(np.float32), 20, seq)
    else:
        e.prompt(tokens[20:220], 20, seq, logits=False)
    e.prompt(tokens[220:], 220, seq)
    return N_PROMPT


def start(e: Engine, with_image: bool) -> list[np.ndarray]:
    """A prompt and a first token in each sequence, which compresses it.

    Returns the logits of the prompts, and the attention that their cells have received.
    """
    first = []
    for seq in range(e.n_seq_max):
        n = feed(e, with_image, seq)
        first.append(e.logits(-1))
        if e.session is not None and (sums := e.session.importance(seq)).any():
            first.append(sums)
        e.token(20, n, seq)
    return first


def joined(plan: dict[str, Any]) -> np.ndarray:
    """The cell that each cell of a plan is merged into, -1 for none: [layer, head, cell]."""
    bucket = np.asarray(plan["bucket"])
    anchors = np.take_along_axis(np.asarray(plan["kept"]), np.maximum(bucket, 0), axis=-1)
    return np.where(bucket >= 0, anchors, -1)


def go_on(e: Engine) -> np.ndarray:
    tokens = random_tokens(N_ANSWER, N_VOCAB, 3)
    return np.stack(
        [
            e.token(t, N_PROMPT + 1 + i, seq)
            for i, t in enumerate(tokens)
            for seq in range(e.n_seq_max)
        ]
    )


@pytest.mark.parametrize("type_kv", ["f16", "q8_0"])
@pytest.mark.parametrize(
    ("with_image", "n_seq", "unified"),
    [(False, 1, True), (True, 1, True), (True, 3, True), (True, 3, False)],
    ids=["text", "image", "unified", "streams"],
)
def test_answers_are_those_of_the_host(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    type_kv: str,
    with_image: bool,
    n_seq: int,
    unified: bool,
) -> None:
    """The same choice of cells; and over the same cells, the answer as near as stock's.

    A device that rounds otherwise may choose otherwise where two scores are nearly equal. So the
    host's cells are given to the device, as a saved state.
    """
    monkeypatch.setenv("ELASTIC_ATTENTION", "graph")  # on the host, the ops that a device gets
    given: dict[str, Any] = {"type_k": type_kv, "type_v": type_kv, "n_seq_max": n_seq}
    given.update(unified=unified, n_ctx=512 * n_seq)
    stock = 0.0
    for policy in (None, *(POLICIES if n_seq == 1 else ("elastic", "h2o"))):
        given["elastic"] = policy and {"policy": policy, "budget": 0.2, "min_cells": 8}
        with on(0, monkeypatch, model, given) as e:
            first, state = start(e, with_image), e.save()
            plan = policy and e.session.last_plan()
            expected = go_on(e)
        with on(99, monkeypatch, model, given) as e:
            for here, there in zip(first, start(e, with_image)):
                assert nmse(here, there) <= 1e-4
            if policy:
                assert set(e.session.attention()) <= {FUSED, FUSED_STREAMS}
                same = np.mean(joined(e.session.last_plan()) == joined(plan))
                assert same >= SAME_CHOICE[type_kv], (policy, same)
        with on(99, monkeypatch, model, given) as e:
            e.load(state)
            n = n_seq if policy in SUMMED else len(expected)
            got = go_on(e)
            differs = nmse(expected[:n], got[:n])
            assert nmse(expected, got) <= 1e-2
        print(f"{policy}: {differs:.1e}" + (f", choice {same:.4f} the same" if policy else ""))
        stock = stock or differs
        assert stock > 0, "equal to the last bit: no device took part"
        assert differs <= max(AS_STOCK * stock, AT_LEAST[type_kv]), (policy, differs, stock)


def answers(model: Path, elastic: dict[str, Any] | None, type_kv: str, n_seq: int = 1) -> Any:
    """Logits of two turns with an image in each sequence, and how each graph was cut."""
    same = {"type_k": type_kv, "type_v": type_kv, "n_seq_max": n_seq, "n_ctx": 512 * n_seq}
    tokens = random_tokens(50, N_VOCAB, 3)
    with Splits() as splits, Engine(model, elastic, flash_attn=True, unified=False, **same) as e:
        logits = start(e, with_image=True)
        logits += list(e.forced(tokens[:35], N_PROMPT + 1))
        e.prompt(tokens[:40], N_PROMPT + 36)
        logits += list(e.forced(tokens[40:46], N_PROMPT + 76))
    return np.concatenate([x.ravel() for x in logits]), splits.graphs


@pytest.mark.parametrize("type_kv", ["f16", "q8_0"])
def test_no_op_goes_through_the_host(model: Path, type_kv: str) -> None:
    """Every graph is cut into the parts that stock's are: what a device lacks would be one more."""
    stock = set(answers(model, None, type_kv)[1])
    assert stock, "no graph was seen"
    assert all(len(parts) <= 2 and parts[-1] != "CPU" for parts in stock), stock
    for policy in POLICIES:
        elastic = {"policy": policy, "budget": 0.2, "min_cells": 8}
        assert set(answers(model, elastic, type_kv)[1]) <= stock, policy


@pytest.mark.parametrize("type_kv", ["f16", "q8_0"])
def test_keeping_all_is_off_to_the_last_bit(model: Path, type_kv: str) -> None:
    stock, ours = (answers(model, x, type_kv, n_seq=2)[0] for x in (None, {"budget": 1.0}))
    np.testing.assert_array_equal(stock, ours)
