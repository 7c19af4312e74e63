"""Policies that score by the last queries of a prompt: whose queries these are, and how long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from tests.support.engine import Engine, nmse, random_tokens
from tests.test_oracles import N_VOCAB, close

POLICIES = ["snapkv", "pyramidkv", "expected-attention"]
N_WINDOW = 32
N = 90  # tokens of the prompt whose plan is looked at
N_LATER = 10  # of them in a batch of their own
TEXT = random_tokens(N, N_VOCAB, 1)
OTHER = random_tokens(70, N_VOCAB, 2)
ANSWER = random_tokens(4, N_VOCAB, 3)


def options(policy: str, **more: Any) -> dict[str, Any]:
    return {"policy": policy, "budget": 0.3, "min_cells": 8, **more}


def answered(e: Engine, pos: int = N) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits of an answer of sequence 0, and the plan that was made for it."""
    logits = e.forced(ANSWER, pos)
    plan = e.session.last_plan()
    return logits, [np.asarray(plan[key]) for key in ("kept", "bucket")]


def same_plan(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    for ours, theirs in zip(a, b):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -- other sequences


def alone(path: Path, policy: str) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """The window before the answer, its logits, and the plan."""
    with Engine(path, elastic=options(policy)) as e:
        e.prompt(TEXT[:-N_LATER], logits=False)
        e.prompt(TEXT[-N_LATER:], N - N_LATER)
        window = e.session.recent(0)[1]
        return (window, *answered(e))


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_queries_of_others_are_not_its_own(
    tiny_gqa: Path, policy: str, unified: bool, attention_op: str
) -> None:
    """What another sequence reads between and behind two parts of a prompt changes no bit."""
    window, logits, plan = alone(tiny_gqa, policy)
    with Engine(tiny_gqa, elastic=options(policy), n_seq_max=2, unified=unified) as e:
        e.prompt(TEXT[:-N_LATER], logits=False)
        e.prompt(OTHER[:20], seq=1)
        e.prompt(TEXT[-N_LATER:], N - N_LATER)
        e.prompt(OTHER[20:], 20, seq=1)
        exact = attention_op == "own"  # the others depend on how many cells there are
        if exact:
            np.testing.assert_array_equal(e.session.recent(0)[1], window)
        got, got_plan = answered(e)
    same_plan(got_plan, plan)
    assert (got == logits).all() if exact else nmse(logits, got) < 1e-6


def test_queries_of_one_batch(tiny_gqa: Path, policy: str, attention_op: str) -> None:
    """Tokens of two sequences take turns in one batch; each sequence has a window of its own."""
    window, logits, plan = alone(tiny_gqa, policy)
    with Engine(tiny_gqa, elastic=options(policy), n_seq_max=2, n_ubatch=64) as e:
        rows = []
        for i, token in enumerate(TEXT):
            rows.append((token, i, 0, i == N - 1))
            rows += [(OTHER[i], i, 1, False)] if i < len(OTHER) else []
        assert e.decode(rows) == 0
        # llama.cpp's fused op adds up values in f16, and nearly equal cells may change places
        exact = attention_op == "own"
        close(e.session.recent(0)[1], window, rtol=1e-3 if exact else 3e-3)
        assert np.abs(e.session.recent(1)[1]).sum() > 0
        got, got_plan = answered(e)
    if exact:
        same_plan(got_plan, plan)
        assert nmse(logits, got) < 1e-6


def test_queries_that_come_one_by_one(tiny_gqa: Path, policy: str, attention_op: str) -> None:
    """A device hands the sums of a batch of one token over in a place of its own."""
    window, _, _ = alone(tiny_gqa, policy)
    with Engine(tiny_gqa, elastic=options(policy), n_seq_max=2) as e:
        e.prompt(TEXT[:-N_LATER], logits=False)
        for i in range(N - N_LATER, N):
            e.prompt(TEXT[i : i + 1], i, logits=i == N - 1)
            e.prompt([20 + i], i - N + N_LATER, seq=1, logits=False)
        # K and V are f16, and llama.cpp's fused op adds up values in f16
        close(e.session.recent(0)[1], window, rtol=1e-3 if attention_op == "own" else 3e-3)


def test_queries_of_sequences_that_share_cells(tiny_gqa: Path, policy: str) -> None:
    """A copy goes on from the window of its source, and each has its own from there on."""
    window, logits, plan = alone(tiny_gqa, policy)
    with Engine(tiny_gqa, elastic=options(policy), n_seq_max=3) as e:
        e.prompt(TEXT[:-N_LATER], logits=False)
        for seq in (1, 2):
            llama_cpp.llama_memory_seq_cp(e.memory, 0, seq, -1, -1)
        e.prompt(OTHER, N - N_LATER, seq=1)
        assert e.seq_rm(1, -1, -1)
        e.prompt(TEXT[-N_LATER:], N - N_LATER, seq=2)
        assert e.seq_rm(2, -1, -1)
        e.prompt(TEXT[-N_LATER:], N - N_LATER)
        np.testing.assert_array_equal(e.session.recent(0)[1], window)
        got, got_plan = answered(e)
    same_plan(got_plan, plan)
    assert (got == logits).all()


@pytest.mark.parametrize("policy", ["elastic", "elastic-evict"])
def test_decay_counts_own_queries_only(tiny_gqa: Path, policy: str, attention_op: str) -> None:
    """A query of another sequence between two of its own is none of its own."""

    def read(n_seq_max: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        with Engine(tiny_gqa, elastic=options(policy), n_seq_max=n_seq_max) as e:
            for i in range(0, N, 15):
                e.prompt(TEXT[i : i + 15], i, logits=i + 15 == N)
                if n_seq_max > 1:
                    e.prompt(OTHER[i // 3 : i // 3 + 5], i // 3, seq=1)
            recent = e.session.recent(0)[0]
            return (recent, *answered(e))

    recent, logits, plan = read(1)
    got_recent, got, got_plan = read(2)
    if attention_op == "own":
        np.testing.assert_array_equal(got_recent, recent)
    close(got_recent, recent, rtol=3e-3, atol=1e-5)
    same_plan(got_plan, plan)
    assert nmse(logits, got) < 1e-6


# -- saved states


@pytest.mark.parametrize("seq", [None, 0], ids=["context", "sequence"])
def test_a_prompt_goes_on_after_loading(
    tiny_gqa: Path, policy: str, seq: int | None, attention_op: str
) -> None:
    """Queries that leave the window after a load had come before it."""
    with Engine(tiny_gqa, elastic=options(policy)) as e:
        e.prompt(TEXT[:-N_LATER], logits=False)
        saved = e.session.recent(0)[1]
        state = e.save(seq)
        e.prompt(TEXT[-N_LATER:], N - N_LATER)
        window = e.session.recent(0)[1]
        logits, plan = answered(e)
    with Engine(tiny_gqa, elastic=options(policy)) as e:
        assert e.load(state, seq) == len(state)
        np.testing.assert_array_equal(e.session.recent(0)[1], saved)
        e.prompt(TEXT[-N_LATER:], N - N_LATER)
        np.testing.assert_array_equal(e.session.recent(0)[1], window)
        got, got_plan = answered(e)
    same_plan(got_plan, plan)
    np.testing.assert_array_equal(got, logits)


def test_a_recorded_prompt_goes_on_under_a_policy(tiny_gqa: Path, policy: str) -> None:
    with Engine(tiny_gqa, elastic=options(policy)) as e:
        e.prompt(TEXT[:-N_LATER], logits=False)
        e.prompt(TEXT[-N_LATER:], N - N_LATER)
        logits, plan = answered(e)
    with Engine(tiny_gqa, elastic={"policy": "full", "budget": 1.0, "record": True}) as e:
        e.prompt(TEXT[:-N_LATER], logits=False)
        state = e.save(0)
    with Engine(tiny_gqa, elastic=options(policy)) as e:
        assert e.load(state, 0) == len(state)
        e.prompt(TEXT[-N_LATER:], N - N_LATER)
        got, got_plan = answered(e)
    same_plan(got_plan, plan)
    np.testing.assert_array_equal(got, logits)


# -- later prompts


@pytest.mark.parametrize("loads", [False, True], ids=["same", "loaded"])
def test_a_later_prompt_begins_a_window(tiny_gqa: Path, policy: str, loads: bool) -> None:
    """Also where the one before was small enough to stay as it is."""
    elastic = options(policy, budget=60.0, checkpoints=0)
    with Engine(tiny_gqa, elastic=elastic) as e:
        e.prompt(TEXT[:50])
        size = len(e.save(0))
        e.session.compress(0)
        n_maps = e.session.importance(0).shape[0] * e.session.importance(0).shape[1]
        assert size - len(e.save(0)) == N_WINDOW * n_maps * 50 * 4  # f32, while it is pending
        e.forced(ANSWER, 50)
        state = e.save(0)
    with Engine(tiny_gqa, elastic=elastic) as e:
        if loads:
            assert e.load(state, 0) == len(state)
        else:
            e.prompt(TEXT[:50])
            e.forced(ANSWER, 50)
        before = e.session.importance(0)
        e.prompt(OTHER[:12], 54)
        gained = e.session.importance(0)
        gained[..., : before.shape[-1]] -= before
        close(e.session.recent(0)[1], gained, rtol=1e-3, atol=1e-5)


def test_back_at_a_checkpoint_a_window_begins(tiny_gqa: Path, policy: str) -> None:
    """A second prompt is taken back, and comes again in other batches."""
    elastic = options(policy, budget=60.0)
    with Engine(tiny_gqa, elastic=elastic) as e:
        e.prompt(TEXT[:50])
        e.forced(ANSWER, 50)
        e.prompt(OTHER[:40], 54)
        logits, plan = answered(e, 94)
        assert e.seq_rm(0, 54, -1)
        e.prompt(OTHER[:25], 54, logits=False)
        assert e.seq_rm(0, 54, -1)
        e.prompt(OTHER[:40], 54)
        got, got_plan = answered(e, 94)
    same_plan(got_plan, plan)
    np.testing.assert_array_equal(got, logits)


@pytest.mark.parametrize("copied", [False, True])
def test_a_probe_leaves_nothing_for_the_next_cells(
    tiny_gqa: Path, policy: str, copied: bool
) -> None:
    """Its own cells are taken back, and a prompt that goes on gets their rows."""

    def later_cells(probes: bool) -> np.ndarray:
        with Engine(tiny_gqa, elastic=options(policy), n_seq_max=2) as e:
            e.prompt(TEXT[:40])
            if probes:
                e.session.begin_probe()
                e.forced(ANSWER, 40)
                e.session.end_probe()
            if copied:
                llama_cpp.llama_memory_seq_cp(e.memory, 0, 1, -1, -1)
            other = e.session.recent(1)[1]
            assert np.abs(other).sum() > 0 or not copied
            e.prompt(TEXT[40:52], 40)
            np.testing.assert_array_equal(e.session.recent(1)[1], other)
            return e.session.recent(0)[1][..., 40:]

    np.testing.assert_array_equal(later_cells(True), later_cells(False))


def test_a_state_of_an_earlier_version_is_refused(tiny_gqa: Path, policy: str) -> None:
    """It has the sum over the window instead of its queries."""
    with Engine(tiny_gqa, elastic=options(policy)) as e:
        e.prompt(TEXT)
        state = bytearray(e.save(0))
        at = state.index(b"ELS5") + 7 * 4  # the last flag of the header
        assert state[at : at + 4] == (2).to_bytes(4, "little")
        state[at] = 1
        assert e.load(bytes(state), 0) == 0
        assert e.session.n_cells(0) == 0
        e.prompt(TEXT)  # and the context can be used
