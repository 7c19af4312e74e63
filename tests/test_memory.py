"""Resident memory follows the cells in use; a hard cap holds while a prompt is read."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from elastic_llama import ElasticConfig, ElasticLlama, _core
from elastic_llama.errors import ConfigError
from elastic_llama.images import to_data_uri
from PIL import Image

from tests.support.engine import N_GPU_LAYERS, Engine, held_after, random_tokens
from tests.support.oracle_plan import left_free
from tests.test_oracles import N_VOCAB, feed, image_rows

pytestmark = pytest.mark.skipif(N_GPU_LAYERS > 0, reason="resident memory is the host's")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

ELASTIC: dict[str, Any] = {"policy": "elastic", "budget": 0.1, "min_cells": 8}
MIB = 1 << 20


def resident() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(x for x in status.splitlines() if x.startswith("VmRSS:"))
    return 1024 * int(line.split()[1])


@contextmanager
def lazy() -> Iterator[None]:
    _core.lazy_buffers(True)
    try:
        yield
    finally:
        _core.lazy_buffers(False)


def kv_bytes(e: Engine) -> int:
    """K and V of the whole context: 3 layers, 2 KV heads of 64, f16."""
    return 2 * 3 * 2 * 64 * 2 * llama_cpp.llama_n_ctx(e.ctx)


@linux
def test_a_long_context_costs_nothing_before_it_is_used(tiny_gqa: Path) -> None:
    before = resident()
    with lazy(), Engine(tiny_gqa, n_ctx=65536, elastic=ELASTIC) as e:
        size = kv_bytes(e)
        assert size >= 96 * MIB
        assert resident() - before < size // 4
        e.clear()  # with its data: llama.cpp would write zeros
        feed(e)
        assert resident() - before < size // 4
    for flash_attn in (False, True):
        before = resident()
        with Engine(tiny_gqa, n_ctx=65536, flash_attn=flash_attn) as e:  # off is off
            assert resident() - before > 0.9 * size


@linux
@pytest.mark.parametrize("kind", ["f16", pytest.param("q8_0", marks=pytest.mark.slow)])
def test_freed_rows_are_given_back(tiny_gqa: Path, kind: str) -> None:
    """At least 90 % of the bytes of the cells that a compression frees."""
    kinds = {"type_k": kind, "type_v": kind}
    config = {**ELASTIC, "policy": "h2o"}
    with Engine(tiny_gqa, n_ctx=8192, n_ubatch=1024, elastic=config, **kinds) as e:
        n = feed(e, 7000)
        size = e.session.kv_bytes_per_cell()
        before = resident()
        kept = e.session.compress(0)
        freed = (n - kept) * size
        assert freed > 4 * MIB
        assert e.session.stats()["bytes_released"] > 0.9 * freed
        assert before - resident() > 0.7 * freed  # what compressing itself took is not all back
        assert np.isfinite(e.forced([20, 21, 22], n)).all()


def test_giving_back_changes_no_answer(tiny_gqa: Path) -> None:
    """Two prompts one after the other, so that given-back rows are taken again: the same bits."""
    said = []
    for release in (False, True):
        config = {**ELASTIC, "release_memory": release}
        with lazy(), Engine(tiny_gqa, n_ctx=4096, elastic=config) as e:
            for n_image in (3000, 3200):
                n = feed(e, n_image)
                said.append(e.forced([20, 21, 22, 23], n))
                llama_cpp.llama_memory_clear(e.memory, False)
            given_back = e.session.stats()["bytes_released"]
            assert given_back > 0 if release and sys.platform == "linux" else given_back == 0
    np.testing.assert_array_equal(said[0], said[2])
    np.testing.assert_array_equal(said[1], said[3])


@linux
def test_removed_sequences_are_given_back(tiny_gqa: Path) -> None:
    """Rows that are free at the end go back when the next batch comes."""
    two = {"n_seq_max": 2, "n_ctx": 8192, "unified": False, "flash_attn": True}
    with Engine(tiny_gqa, elastic={**ELASTIC, "budget": 0.9}, **two) as e:
        prompt = random_tokens(2000, N_VOCAB, 1)
        for seq in (0, 1):
            e.prompt(prompt, seq=seq)
        released = e.session.stats()["bytes_released"]
        assert e.seq_rm(1, -1, -1)
        e.token(20, len(prompt), seq=0)
        assert e.session.stats()["bytes_released"] - released > 1 * MIB


@pytest.mark.parametrize("policy", ["elastic", "elastic-paper", "h2o", "snapkv", "local"])
def test_a_cap_holds_while_a_prompt_is_read(tiny_gqa: Path, policy: str) -> None:
    """Images one after another that are many times the cap; never more than it and one ubatch."""
    cap, n_ubatch = 200, 64
    config = {"policy": policy, "budget": 1.0, "max_cells": cap}
    with Engine(tiny_gqa, elastic=config, n_ctx=512, n_ubatch=n_ubatch, n_batch=n_ubatch) as e:
        pos = 0
        for k in range(5):
            e.prompt(random_tokens(20, N_VOCAB, k), pos, logits=False)
            pos += 20
            for part in range(0, 300, n_ubatch):
                rows = image_rows(300, e.n_embd)[part : part + n_ubatch]
                e.image(rows, pos)
                pos += len(rows)
                assert e.session.n_cells(0) <= cap + n_ubatch
        assert e.session.stats()["compressions"] > 4
        e.prompt(random_tokens(30, N_VOCAB, 9), pos)
        pos += 30
        for i in range(300):
            assert np.isfinite(e.token(20 + i % 100, pos + i)).all()
            assert e.session.n_cells(0) <= cap
        assert e.session.cells(0)["pos"][-1] == pos + 299
        # the first cell stayed through all of it, and positions ascend
        found = e.session.cells(0)["pos"]
        assert found[0] == 0
        assert (np.diff(found) > 0).all()


def test_a_cap_and_batches_larger_than_an_ubatch(tiny_gqa: Path) -> None:
    """What was read before a large batch stays up to the cap."""
    config = {"policy": "local", "budget": 1.0, "max_cells": 100}
    with Engine(tiny_gqa, elastic=config, n_ubatch=32, n_batch=256) as e:
        e.prompt(random_tokens(150, N_VOCAB, 1), logits=False)
        e.prompt(random_tokens(250, N_VOCAB, 2), 150, logits=False)
        assert e.session.n_cells(0) == 350
        # small parts do not compress again and again
        for i in range(32):
            e.prompt([20], 400 + i, logits=False)
            assert e.session.n_cells(0) == 101 + i
        assert e.session.stats()["compressions"] == 2


def test_without_a_cap_the_same_prompt_finds_no_place(tiny_gqa: Path) -> None:
    with Engine(tiny_gqa, n_ctx=512) as e:
        e.prompt(random_tokens(500, N_VOCAB, 1))
        rows = [(20, 500 + i, 0, False) for i in range(100)]
        assert e.decode(rows) == 1


def test_a_cap_that_is_not_reached_changes_nothing(tiny_gqa: Path) -> None:
    said = []
    for cap in (0, 1000):
        with Engine(tiny_gqa, elastic={**ELASTIC, "budget": 0.3, "max_cells": cap}) as e:
            n = feed(e)
            said.append(e.forced([20, 21, 22], n))
    np.testing.assert_array_equal(said[0], said[1])


def test_a_cap_limits_a_budget(tiny_gqa: Path) -> None:
    """The smaller of both counts after the prompt and while generating."""
    config = {**ELASTIC, "budget": 0.5, "max_cells": 100, "overdraft": 0}
    with Engine(tiny_gqa, elastic=config) as e:
        n = feed(e)
        assert math.ceil(0.5 * n) > 100
        assert e.session.compress(0) == 100 - left_free(100)
        e.forced([20, 21, 22, 23, 24, 25], n)
        assert e.session.n_cells(0) == 100


@pytest.mark.parametrize("overdraft", [-1, 9])
@pytest.mark.parametrize(
    ("budget", "cap"),
    [(0.5, 100), (0.2, 60), (0.2, 80), (0.2, 200), (70, 90), (0.5, 20)],
    ids=["smaller", "above", "within", "far", "cells", "all"],  # the cap and budget + overdraft
)
def test_an_overdraft_is_a_part_of_a_cap(
    tiny_gqa: Path, budget: float, cap: int, overdraft: int
) -> None:
    """It grows to the cap at most, and then falls to what leaves the overdraft below it."""
    n_more = 32 if overdraft < 0 else overdraft
    config = {**ELASTIC, "budget": budget, "max_cells": cap, "overdraft": overdraft}
    with Engine(tiny_gqa, elastic=config) as e:
        n = feed(e)
        promised = [
            min(budget if budget > 1 else math.ceil(budget * (n + i)), cap) for i in range(121)
        ]
        held = e.session.compress(0)
        assert held == promised[0] - left_free(promised[0])
        found = []
        expected = []
        for i in range(120):
            assert np.isfinite(e.token(20 + i, n + i)).all()
            found.append(e.session.n_cells(0))
            held = held_after(held, promised[i + 1], n_more, cap)
            expected.append(held)
        assert found == expected
        assert max(found) <= cap
        assert e.session.stats()["compressions"] > 2
        assert e.session.stats()["evictions"] == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"policy": "local", "max_cells": 2}, "n_sink"),
        ({"policy": "full", "max_cells": 100}, "keeps every cell"),
        ({"policy": "local", "max_cells": -1}, "max_cells"),
    ],
)
def test_impossible_caps_are_refused(tiny_gqa: Path, config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(tiny_gqa, elastic={"budget": 1.0, **config})


@pytest.mark.parametrize(
    "config", [{"kv_cells": 2}, {"kv_cells": 2.5}, {"kv_cells": 100, "policy": "full"}]
)
def test_impossible_caps_are_refused_in_python(config: dict) -> None:
    with pytest.raises(ConfigError):
        ElasticConfig(**config)


def test_a_cap_for_chat_handlers(tiny_vlm: tuple[Path, Path]) -> None:
    """Many images, more tokens than the context has cells, through llama-cpp-python's handlers."""
    config = ElasticConfig(budget=1.0, kv_cells=64)
    options = {"mmproj_path": tiny_vlm[1], "n_threads": 1, "n_threads_batch": 1, "n_ubatch": 32}
    picture = to_data_uri(Image.new("RGB", (30, 20), "red"))
    content: list[dict] = [{"type": "image_url", "image_url": {"url": picture}}] * 20
    content.append({"type": "text", "text": "the heat"})
    with ElasticLlama(tiny_vlm[0], elastic=config, **options) as llm:
        out: Any = llm.create_chat_completion(
            [{"role": "user", "content": content}], max_tokens=4, temperature=0
        )
        assert out["usage"]["prompt_tokens"] > llm.n_ctx()
        assert llm.session.n_cells(0) <= 64


def test_logits_of_all_tokens_and_a_cap_are_refused(tiny_gqa: Path) -> None:
    with pytest.raises(ConfigError, match="logits_all"):
        ElasticLlama(tiny_gqa, elastic=ElasticConfig(kv_cells=128), logits_all=True)


def test_a_cap_in_python(tiny_gqa: Path) -> None:
    """A completion of a prompt many times the cap, and longer than the context."""
    config = ElasticConfig(budget=1.0, kv_cells=128)
    options = {"n_threads": 1, "n_threads_batch": 1, "n_ubatch": 64}
    with pytest.raises(ConfigError, match="192"):
        ElasticLlama(tiny_gqa, elastic=config, n_ctx=150, **options)
    with ElasticLlama(tiny_gqa, elastic=config, **options) as llm:
        assert llm.n_ctx() == 256  # 192, as llama.cpp rounds it
        out: Any = llm.create_completion(random_tokens(700, N_VOCAB, 1), max_tokens=1)
        assert out["usage"]["prompt_tokens"] == 700
        for i, _ in enumerate(llm.generate(random_tokens(700, N_VOCAB, 2))):
            if i == 300:
                break
        assert llm.n_tokens == 1000
        assert llm.session.n_cells(0) <= 128
        assert llm.stats.compressions > 5
