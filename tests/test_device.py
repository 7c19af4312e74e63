"""Keys and values on a device of this machine: the answers of the host, as near as stock comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.device_cases import POLICIES, case, run
from tests.support.engine import N_GPU_LAYERS, Engine, random_tokens
from tests.support.splits import Splits
from tests.support.tiny_llama import write_tiny_llama

IMAGE, TEXT = 0, 1  # what the first sequence is given
MORE_THAN_STOCK = 10  # times its error: a softmax of fewer cells averages less of it out

pytestmark = pytest.mark.skipif(
    N_GPU_LAYERS == 0, reason="for builds with a device: ELASTIC_TEST_GPU_LAYERS=99"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("device") / "model.gguf"
    write_tiny_llama(path, n_layer=3)
    return path


GIVEN = [{"image_in": TEXT}, {"image_in": IMAGE}, {"n_seq": 3}, {"n_seq": 3, "unified": False}]


@pytest.mark.parametrize("type_kv", ["f16", "q8_0"])
@pytest.mark.parametrize("given", GIVEN, ids=["text", "image", "unified", "streams"])
def test_answers_are_those_of_the_host(model: Path, type_kv: str, given: dict[str, Any]) -> None:
    policies = [None, *(POLICIES if "n_seq" not in given else ("elastic", "h2o"))]
    stock, *ours = run(model, [], [case(policy, type=type_kv, **given) for policy in policies])
    assert stock["nmse"] > 0, "equal to the last bit: no device took part"
    for policy, got in zip(policies[1:], ours, strict=True):
        print(f"{policy}: {got['nmse']:.1e}, stock {stock['nmse']:.1e}, by {got['ways']}")
        assert got["same_cells"], (policy, got)
        assert got["nmse"] <= max(MORE_THAN_STOCK * stock["nmse"], 1e-6), (policy, got, stock)


N_VOCAB, N_PROMPT = 384, 260


def answers(model: Path, elastic: dict[str, Any] | None, type_kv: str, n_seq: int = 1) -> Any:
    """Logits of two turns with an image in each sequence, and how each graph was cut."""
    tokens = random_tokens(N_PROMPT, N_VOCAB, 5)
    image = np.random.default_rng(0).normal(scale=0.5, size=(200, 128)).astype(np.float32)
    same = {"type_k": type_kv, "type_v": type_kv, "n_seq_max": n_seq, "n_ctx": 512 * n_seq}
    logits = []
    with Splits() as splits, Engine(model, elastic, flash_attn=True, unified=False, **same) as e:
        for seq in range(n_seq):
            e.prompt(tokens[:20], 0, seq, logits=False)
            e.image(image[:, : e.n_embd], 20, seq)
            e.prompt(tokens[220:], 220, seq)
        logits += e.forced(tokens[:36], N_PROMPT)
        e.prompt(tokens[100:140], N_PROMPT + 36)
        logits += e.forced(tokens[:6], N_PROMPT + 76)
    return np.stack(logits), splits.graphs


@pytest.mark.parametrize("type_kv", ["f16", "q8_0"])
def test_no_op_goes_through_the_host(model: Path, type_kv: str) -> None:
    """Every graph is cut into the parts that stock's are: what a device lacks would be one more."""
    stock = set(answers(model, None, type_kv)[1])
    assert all(len(parts) <= 2 and parts[-1] != "CPU" for parts in stock), stock
    for policy in POLICIES:
        elastic = {"policy": policy, "budget": 0.2, "min_cells": 8}
        assert set(answers(model, elastic, type_kv)[1]) <= stock, policy


@pytest.mark.parametrize("type_kv", ["f16", "q8_0"])
def test_keeping_all_is_off_to_the_last_bit(model: Path, type_kv: str) -> None:
    stock, ours = (answers(model, x, type_kv, n_seq=2)[0] for x in (None, {"budget": 1.0}))
    np.testing.assert_array_equal(stock, ours)
