"""An elastic cache that keeps everything, or is detached again: the same bits as llama.cpp's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from tests.support.engine import Engine, random_tokens
from tests.test_oracles import N_VOCAB, feed

KEEPING: dict[str, Any] = {"policy": "local", "budget": 100000.0}
# decodes as stock does
SNAPKV: dict[str, Any] = {"policy": "snapkv", "budget": 0.1, "min_cells": 8}
N_CTX = 8192

Steps = Callable[[Engine], list[np.ndarray]]


def one_sequence(e: Engine) -> list[np.ndarray]:
    """A prompt, an answer, much of which is removed, and another; then all anew."""
    said = []
    e.prompt(random_tokens(1100, N_VOCAB, 1))
    said.append(e.logits(-1))
    said.append(e.forced(random_tokens(80, N_VOCAB, 2), 1100))
    assert e.seq_rm(0, 300, -1)
    said.append(e.forced(random_tokens(220, N_VOCAB, 3), 300))
    e.prompt(random_tokens(700, N_VOCAB, 4), 520)
    said.append(e.logits(-1))
    e.clear()
    said.append(e.forced(random_tokens(20, N_VOCAB, 5), 0))
    return said


def streams(e: Engine) -> list[np.ndarray]:
    """A long one, a short one, and a copy."""
    said = []
    e.prompt(random_tokens(700, N_VOCAB, 1), seq=0)
    e.prompt(random_tokens(30, N_VOCAB, 2), seq=1)
    said.append(e.forced(random_tokens(5, N_VOCAB, 3), 30, seq=1))
    llama_cpp.llama_memory_seq_cp(e.memory, 0, 2, -1, -1)
    said += [e.forced(random_tokens(5, N_VOCAB, 4), 700, seq=seq) for seq in (0, 2)]
    assert e.seq_rm(0, -1, -1)
    assert e.seq_rm(2, 100, -1)
    said += [e.forced(random_tokens(5, N_VOCAB, 5), n, seq) for n, seq in ((100, 2), (35, 1))]
    return said


def saved(e: Engine) -> list[np.ndarray]:
    """All sequences and one of them go to a file and come back, into other cells."""
    e.prompt(random_tokens(900, N_VOCAB, 1), seq=0)
    e.prompt(random_tokens(400, N_VOCAB, 2), seq=1)
    whole, one = e.save(), e.save(1)
    e.clear()
    assert e.load(whole) == len(whole)
    said = [e.token(20, 900, 0), e.token(21, 400, 1)]
    e.clear()
    assert e.load(one, 2) == len(one)
    said.append(e.token(22, 400, 2))
    e.clear()
    e.prompt(random_tokens(100, N_VOCAB, 3), seq=0)  # a longer one comes after it
    e.prompt(random_tokens(900, N_VOCAB, 4), seq=1)
    whole = e.save()
    e.clear()
    assert e.load(whole) == len(whole)
    return [*said, e.token(20, 100, 0), e.token(21, 900, 1)]


@pytest.mark.parametrize("type_v", ["f16", pytest.param("f32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("steps", [one_sequence, streams, saved])
def test_same_bits_as_stock(tiny_gqa: Path, steps: Steps, unified: bool, type_v: str) -> None:
    """Against a context of our own libraries without an elastic cache, which is stock."""
    kw: dict[str, Any] = {
        "n_ctx": N_CTX,
        "n_batch": 4096,
        "n_seq_max": 1 if steps is one_sequence else 3,
        "unified": unified,
        "type_v": type_v,
        "flash_attn": True,
    }
    said = []
    for elastic in (None, KEEPING):
        with Engine(tiny_gqa, elastic=elastic, **kw) as e:
            said.append(steps(e))
    for stock, ours in zip(*said):
        np.testing.assert_array_equal(stock, ours)


@pytest.mark.parametrize("n_ctx", [600, N_CTX])
def test_the_context_changes_nothing(tiny_gqa: Path, n_ctx: int) -> None:
    """Compression and an answer in a small context and in a large one."""
    elastic = {"policy": "elastic", "budget": 0.3, "min_cells": 8}
    said = []
    for n in (512, n_ctx):
        with Engine(tiny_gqa, n_ctx=n, n_ubatch=64, elastic=elastic) as e:
            n_prompt = feed(e, 400)
            said.append(e.forced(random_tokens(40, N_VOCAB, 3), n_prompt))
    np.testing.assert_array_equal(*said)


def test_detached_while_a_copy_waits(tiny_gqa: Path) -> None:
    """llama.cpp copies between streams at the next batch, when the source may be gone."""
    said = []
    for elastic in (None, KEEPING):
        with Engine(
            tiny_gqa, n_ctx=N_CTX, n_seq_max=2, unified=False, elastic=elastic, flash_attn=True
        ) as e:
            e.prompt(random_tokens(300, N_VOCAB, 1))
            llama_cpp.llama_memory_seq_cp(e.memory, 0, 1, -1, -1)
            assert e.seq_rm(0, -1, -1)
            if elastic:
                e.session.detach()
            said.append(e.token(20, 300, 1))
    np.testing.assert_array_equal(*said)


def test_detached_with_its_cells(tiny_gqa: Path) -> None:
    """llama.cpp goes on with what the elastic cache held."""
    said = []
    for detach in (False, True):
        with Engine(tiny_gqa, n_ctx=N_CTX, elastic=SNAPKV) as e:
            e.prompt(random_tokens(700, N_VOCAB, 1))
            e.session.compress(0)
            if detach:
                e.session.detach()
            said.append(e.token(20, 700))
    np.testing.assert_array_equal(*said)
