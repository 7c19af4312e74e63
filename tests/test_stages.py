"""Stages, budgets and memory operations, for a caller that knows only llama.cpp's C API."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from elastic_llama import lib_dir

from tests.support.engine import N_GPU_LAYERS, Engine, nmse, random_tokens
from tests.support.oracle_plan import left_free
from tests.support.tiny_archs import write_tiny
from tests.test_oracles import N_VOCAB, feed, image_rows

ELASTIC: dict[str, Any] = {"policy": "elastic", "budget": 0.3, "min_cells": 8}
POLICIES = ["local", "elastic-paper", "elastic-evict", "elastic"]


def test_first_token_sees_the_whole_prompt(tiny_gqa: Path) -> None:
    """Nothing is compressed before the first token after the prompt is decoded."""
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        n = feed(e)
        assert e.session.n_cells(0) == n
        e.token(20, n)
        kept = math.ceil(0.3 * n)
        assert e.session.stats()["cells_after"] == kept - left_free(kept)
        assert e.session.n_cells(0) == kept - left_free(kept) + 1


@pytest.mark.parametrize(("budget", "free"), [(100.0, 4), (24.0, 3), (7.0, 0)])
def test_room_for_the_answer(tiny_gqa: Path, budget: float, free: int) -> None:
    """Cells stay free where an answer comes next, and not where an image's question does."""
    elastic = {"policy": "elastic", "budget": budget, "min_cells": 2}
    with Engine(tiny_gqa, elastic=elastic) as e:
        e.prompt(random_tokens(40, N_VOCAB, 1))
        assert e.session.compress(0) == (40 if budget >= 40 else budget - free)
        e.image(image_rows(200, e.n_embd), 40)
        assert e.session.compress(0) == budget  # its question is still to come
        e.prompt(random_tokens(8, N_VOCAB, 2), 240)
        assert e.session.compress(0) == budget - free


@pytest.mark.parametrize(("budget", "free"), [(100.0, 20), (200.0, 24), (24.0, 4)])
def test_room_for_a_question(tiny_gqa: Path, budget: float, free: int) -> None:
    """What comes after an image has cells of its own, so that nothing is compressed for it."""
    elastic = {"policy": "elastic", "budget": budget, "min_cells": 2, "n_question": 24}
    with Engine(tiny_gqa, elastic=elastic) as e:
        e.image(image_rows(240, e.n_embd), 0)
        assert e.session.compress(0) == budget - free
        e.prompt(random_tokens(free, N_VOCAB, 2), 240)
        n = e.session.stats()["compressions"]
        e.token(20, 240 + free)
        assert e.session.stats()["compressions"] == n
        assert e.session.n_cells(0) == budget + 1
        assert e.session.can_cut(240) == 240  # another question about the image
        e.seq_rm(0, 240, -1)
        e.prompt(random_tokens(free + 1, N_VOCAB, 3), 240)
        e.token(20, 241 + free)
        assert e.session.stats()["compressions"] == n + 1
        e.clear()
        e.prompt(random_tokens(300, N_VOCAB, 1))  # no image, no question to come
        assert e.session.compress(0) == budget - {24.0: 3}.get(budget, 4)


@pytest.mark.parametrize("n_batch", [17, 64, 512])
def test_batches_do_not_matter(tiny_gqa: Path, n_batch: int) -> None:
    """One prompt in any number of decode calls makes one plan, once."""
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        n = feed(e)
        e.token(20, n)
        expected = e.session.last_plan()["kept"]
    with Engine(tiny_gqa, elastic=ELASTIC, n_batch=n_batch, n_ubatch=min(n_batch, 512)) as e:
        first, last = random_tokens(40, N_VOCAB, 1), random_tokens(20, N_VOCAB, 2)
        for start in range(0, 40, n_batch):
            e.prompt(first[start : start + n_batch], start, logits=False)
        e.image(image_rows(200, e.n_embd), 40)
        for start in range(0, 20, n_batch):
            e.prompt(last[start : start + n_batch], 240 + start)
        e.token(20, n)
        assert e.session.stats()["compressions"] == 1
        # summing in another order may swap cells of nearly the same importance
        same = (e.session.last_plan()["kept"] == expected).mean()
        assert same > 0.97


def test_a_last_token_alone_is_of_the_prompt(tiny_gqa: Path) -> None:
    """Nobody could choose it as an answer, as no logits were asked for before it."""
    text = random_tokens(65, N_VOCAB, 1)
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        e.prompt(text)
        expected = e.logits(-1)
    with Engine(tiny_gqa, elastic=ELASTIC, n_batch=64, n_ubatch=64) as e:
        e.prompt(text[:64], logits=False)
        assert nmse(e.token(text[64], 64), expected) < (1e-6 if N_GPU_LAYERS else 1e-9)
        assert e.session.n_cells(0) == 65
        e.token(20, 65)
        assert e.session.stats()["compressions"] == 1


@pytest.mark.parametrize("seq", [None, 0])
def test_a_state_says_whether_a_prompt_is_over(tiny_gqa: Path, seq: int | None) -> None:
    text = random_tokens(65, N_VOCAB, 1)
    for wants, n_compressions in ((False, 0), (True, 1)):
        with Engine(tiny_gqa, elastic=ELASTIC) as e:
            e.prompt(text[:64], logits=wants)
            state = e.save(seq)
        with Engine(tiny_gqa, elastic=ELASTIC) as e:
            assert e.load(state, seq) == len(state)
            e.token(text[64], 64)
            assert e.session.stats()["compressions"] == n_compressions


def test_a_saved_checkpoint_knows_when_attention_was_added(tiny_gqa: Path) -> None:
    """It is that of every fourth token, also behind a checkpoint between two of these."""
    answer = random_tokens(16, N_VOCAB, 3)

    def goes_on(e: Engine, end: int) -> np.ndarray:
        e.forced(answer[11:14], end)
        assert e.seq_rm(0, end, -1)
        e.forced(answer[13:16], end)
        return np.asarray(e.session.importance(0))

    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        end = feed(e) + 11
        e.forced(answer[:11], end - 11)
        e.session.compress(0)
        assert e.session.stats()["compressions"] == 2
        state = e.save(0)
        expected = goes_on(e, end)
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        assert e.load(state, 0) == len(state)
        np.testing.assert_array_equal(goes_on(e, end), expected)


@pytest.mark.parametrize("seq", [None, 1], ids=["context", "sequence"])
def test_a_copy_is_saved_and_loaded_over_at_once(tiny_gqa: Path, seq: int | None) -> None:
    """llama.cpp copies the rows of a stream at the next decode only."""
    text, other = random_tokens(65, N_VOCAB, 1), random_tokens(40, N_VOCAB, 2)
    kw = {"elastic": ELASTIC, "n_seq_max": 2, "unified": False}
    with Engine(tiny_gqa, **kw) as e:
        e.prompt(text)
        e.prompt(other, seq=1)
        before = e.save(seq)
        llama_cpp.llama_memory_seq_cp(e.memory, 0, 1, -1, -1)
        copied = e.save(seq)
        assert e.load(before, seq) == len(before)
        loaded = e.token(20, 40, seq=1)
    with Engine(tiny_gqa, **kw) as e:
        assert e.load(copied, seq) == len(copied)
        got = e.token(20, 65, seq=1)
    with Engine(tiny_gqa, **kw) as e:
        e.prompt(text)
        e.prompt(other, seq=1)
        assert nmse(e.token(20, 40, seq=1), loaded) < 1e-9
        assert nmse(e.token(20, 65), got) < 1e-9


def test_single_prompt_tokens(tiny_gqa: Path) -> None:
    """A lone token belongs to the prompt when it wants no logits, or while the caller holds."""
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        n = feed(e)
        e.prompt([20], n, logits=False)
        assert e.session.stats()["compressions"] == 0
        e.session.set_prefill(True)
        e.token(21, n + 1)
        assert e.session.stats()["compressions"] == 0
        e.session.set_prefill(False)
        e.token(22, n + 2)
        assert e.session.stats()["compressions"] == 1
        assert e.session.stats()["cells_before"] == n + 2


@pytest.mark.parametrize(
    ("policy", "overdraft"), [*((policy, 0) for policy in POLICIES), ("elastic", 20)]
)
@pytest.mark.parametrize("budget", [0.2, 150.0])
def test_long_generation_holds_its_cells(
    tiny_gqa: Path, policy: str, overdraft: int, budget: float
) -> None:
    """2000 tokens: at every step the number of cells the budget promises, densely packed.

    With an overdraft that many more at most, and when it is used up the promised ones again.
    """
    elastic = {
        "policy": policy,
        "budget": budget,
        "min_cells": 8,
        "n_sink": 4,
        "overdraft": overdraft,
    }
    with Engine(tiny_gqa, elastic=elastic, n_ctx=2560, type_k="f32", type_v="f32") as e:
        n = feed(e, 300)
        expected = math.ceil(0.2 * n) if budget < 1 else 150
        expected -= left_free(expected) if policy == "elastic" else 0
        for i in range(2000):
            assert np.isfinite(e.token(10 + i % 300, n + i)).all()
            held = e.session.n_cells(0)
            promised = math.ceil(0.2 * (n + i + 1)) if budget < 1 else 150
            if expected + 1 > promised + overdraft:  # one is evicted, or all above are merged
                expected = promised - (overdraft == 0)
            expected += 1
            assert held == expected
            if i % 100 == 0:
                cells = e.session.cells(0)
                assert cells["index"].max() < held  # rows beyond are never touched again
                assert cells["pos"][-1] == n + i
                assert cells["pos"][:4].tolist() == [0, 1, 2, 3]
        assert e.session.n_tokens(0) == n + 2000


@pytest.mark.usefixtures("attention_op")
@pytest.mark.parametrize("policy", ["snapkv", "elastic-paper", "h2o"])
def test_what_comes_before_the_compression_is_scored(tiny_gqa: Path, policy: str) -> None:
    """By every policy that looks at attention; the newest cell draws some of its own."""
    with Engine(tiny_gqa, elastic={**ELASTIC, "policy": policy}) as e:
        n = feed(e)
        e.prompt([20, 21, 22, 23, 24], n)
        assert (e.session.importance(0)[..., -5:] > 0).all()


@pytest.mark.usefixtures("attention_op")
def test_a_prompt_that_is_not_compressed_is_saved(tiny_gqa: Path) -> None:
    tokens = random_tokens(7, N_VOCAB, 3)
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        n = feed(e)
        state = e.save()
        expected = e.forced(tokens, n)
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        assert e.load(state) == len(state)
        np.testing.assert_array_equal(e.forced(tokens, n), expected)
        assert e.session.stats()["compressions"] == 1


def test_short_prompts_are_left_alone(tiny_gqa: Path) -> None:
    with Engine(tiny_gqa, elastic={**ELASTIC, "min_cells": 100}) as e:
        e.prompt(random_tokens(80, N_VOCAB, 1))
        e.token(20, 80)
        assert e.session.n_cells(0) == 81
        assert e.session.stats()["compressions"] == 0


@pytest.mark.usefixtures("attention_op")
@pytest.mark.parametrize("policy", ["elastic", "elastic-paper"])
def test_second_prompt_compresses_again(tiny_gqa: Path, policy: str) -> None:
    """Merged cells go in with the weight of what they stand for."""
    elastic = {**ELASTIC, "policy": policy, "budget": 0.4}
    with Engine(tiny_gqa, elastic=elastic, n_ctx=2048) as e:
        n = feed(e)
        e.session.compress(0)
        first_importance = e.session.importance(0).sum(-1)
        count = e.session.count(0)
        if policy == "elastic-paper":
            assert (count.sum(-1) == n).all()
        e.prompt(random_tokens(30, N_VOCAB, 6), n, logits=False)
        e.image(image_rows(200, e.n_embd, 7), n + 30)
        e.prompt(random_tokens(10, N_VOCAB, 8), n + 230)
        importance, recent, cells = (
            e.session.importance(0),
            e.session.recent(0)[0],
            e.session.cells(0),
        )
        assert (importance.sum(-1) > first_importance).all()
        held = e.session.compress(0)
        kept = math.ceil(0.4 * (n + 240))
        assert held == kept - (left_free(kept) if policy == "elastic" else 0)
        if policy == "elastic-paper":
            assert (e.session.count(0).sum(-1) == n + 240).all()
        else:
            lost = e.session.last_plan()["bucket"] == -1  # text of the earlier turn, nothing else
            is_old = (cells["kind"] != 1) & (cells["pos"] < n)
            assert lost.any()
            assert not lost[..., ~is_old].any()
            for was, now in (
                (importance, e.session.importance(0)),
                (recent, e.session.recent(0)[0]),
            ):
                expected = np.where(lost, 0, was).sum(-1)
                np.testing.assert_allclose(now.sum(-1), expected, rtol=1e-4)
            cells = e.session.cells(0)
            text = cells["pos"][cells["kind"] != 1]
            assert (text >= n).sum() == 40  # all text of the new prompt is kept
            assert held * 60 // (n + 240) <= (text < n).sum() <= 60  # and its share of the old one
        assert np.isfinite(e.token(20, n + 240)).all()


def test_partial_removal_is_refused_where_cells_stand_for_others(tiny_gqa: Path) -> None:
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        n = feed(e)
        e.session.compress(0)
        e.forced(random_tokens(10, N_VOCAB, 3), n)
        cells = e.session.cells(0)["pos"].tolist()
        for p0 in (100, n - 1, n + 1, n + 5, n + 7):  # n + 3 and n + 7 were added to the scores
            assert not e.seq_rm(0, p0, -1)
            assert not e.seq_rm(-1, p0, -1)
            assert e.session.can_cut(p0) == (0 if p0 < n else n)
        assert not e.seq_rm(0, 50, 60)  # rows there stand for others
        assert e.session.cells(0)["pos"].tolist() == cells
        assert e.seq_rm(0, n + 8, -1)
        assert e.session.cells(0)["pos"].max() == n + 7
        assert e.session.n_tokens(0) == n + 8
        assert e.seq_rm(0, n, -1)
        assert e.session.cells(0)["pos"].max() == n - 1
        assert e.session.n_tokens(0) == n
        assert e.seq_rm(0, -1, -1)
        assert e.session.n_cells(0) == 0
        assert e.session.n_tokens(0) == 0
        feed(e)  # starts afresh
        kept = math.ceil(0.3 * n)
        assert e.session.compress(0) == kept - left_free(kept)


def test_shared_cells_are_never_touched(tiny_gqa: Path) -> None:
    """A sequence copied inside a unified cache keeps its cells when the other one is compressed."""
    forced = random_tokens(6, N_VOCAB, 3)
    with Engine(tiny_gqa, elastic=ELASTIC, n_seq_max=2, unified=True, n_ctx=2048) as e:
        system = random_tokens(60, N_VOCAB, 9)
        e.prompt(system, 0, 0, logits=False)
        llama_cpp.llama_memory_seq_cp(e.memory, 0, 1, -1, -1)
        shared = e.session.read_kv(1, 0)
        e.image(image_rows(200, e.n_embd), 60, 0)
        e.prompt(random_tokens(20, N_VOCAB, 2), 260, 0)
        e.forced(forced, 280, 0)
        assert e.session.n_cells(0) < 100
        assert e.session.n_cells(1) == 60
        np.testing.assert_array_equal(e.session.read_kv(1, 0)[0], shared[0])
        np.testing.assert_array_equal(e.session.read_kv(1, 0)[1], shared[1])


def test_copied_stream_goes_on_alike(tiny_gqa: Path) -> None:
    """Copying a compressed sequence to another stream takes its biases along."""
    with Engine(tiny_gqa, elastic=ELASTIC, n_seq_max=2, unified=False, n_ctx=2048) as e:
        n = feed(e)
        e.token(20, n)
        llama_cpp.llama_memory_seq_cp(e.memory, 0, 1, -1, -1)
        assert e.decode([(21, n + 1, 0, True), (21, n + 1, 1, True)]) == 0
        np.testing.assert_allclose(e.logits(0), e.logits(1), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(e.session.bias(0), e.session.bias(1))
        assert np.abs(e.session.bias(0)).max() > 0


@pytest.mark.parametrize("seq", [0, None], ids=["sequence", "context"])
def test_a_load_that_fails(tiny_gqa: Path, seq: int | None) -> None:
    """A state that ends early, in llama.cpp's part or in ours, leaves no cells behind."""
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        n = feed(e)
        expected = e.token(20, n)
        kept = e.session.n_cells(0)
        data = e.save(seq)
        with Engine(tiny_gqa, elastic=ELASTIC, n_seq_max=2, unified=False) as other:
            feed(other)
            assert e.load(other.save(seq), seq) == 0  # refused before anything is read
        assert (e.session.n_cells(0), e.session.n_tokens(0)) == (kept, n + 1)

        for size in (len(data) // 20, len(data) // 2, len(data) - 1):
            assert e.load(data[:size], seq) == 0
            assert (e.session.n_cells(0), e.session.n_tokens(0)) == (0, 0)
            feed(e)
            np.testing.assert_allclose(e.token(20, n), expected, rtol=1e-5, atol=1e-5)
            assert e.session.n_cells(0) == kept


def test_no_context_shift(tiny_gqa: Path) -> None:
    """Who asks is about to remove cells in the middle, which merged ones may not allow."""
    for elastic, can in ((ELASTIC, False), ({**ELASTIC, "budget": 1.0}, True), (None, True)):
        with Engine(tiny_gqa, elastic=elastic) as e:
            assert llama_cpp.llama_memory_can_shift(e.memory) is can


def test_copied_stream_leaves_no_old_bias(tiny_gqa: Path) -> None:
    """Cells of the destination that the source does not use are ordinary when they are used."""
    with Engine(tiny_gqa, elastic=ELASTIC, n_seq_max=2, unified=False, n_ctx=2048) as e:
        e.token(20, feed(e, seq=1), seq=1)
        assert np.abs(e.session.bias(1)).max() > 0
        assert e.seq_rm(1, -1, -1)
        e.prompt(random_tokens(10, N_VOCAB, 4), seq=0)
        llama_cpp.llama_memory_seq_cp(e.memory, 0, 1, -1, -1)
        e.prompt(random_tokens(70, N_VOCAB, 5), 10, seq=1)
        assert np.abs(e.session.bias(1)).max() == 0


def test_clear_starts_afresh(tiny_gqa: Path) -> None:
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        n = feed(e)
        first = e.forced([20, 21, 22], n)
        e.clear()
        assert e.session.n_cells(0) == 0
        feed(e)
        np.testing.assert_array_equal(e.forced([20, 21, 22], n), first)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("policy", "nonsense", "elastic-paper"),
        ("budget", 0.0, "0 < f <= 1"),
        ("budget", -0.5, "-0.5"),
        ("budget", 1.5, "1.5"),
        ("budget", math.nan, "nan"),
        ("n_sink", -1, "n_sink"),
        ("offset", -3, "offset"),
        ("min_cells", 0, "min_cells"),
        ("n_threads", -1, "n_threads"),
    ],
)
def test_bad_parameters(tiny_gqa: Path, name: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Engine(tiny_gqa, elastic={**ELASTIC, name: value})


def test_bad_calls(tiny_gqa: Path) -> None:
    from elastic_llama import _core

    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        for seq_id in (-1, 1, 999):
            with pytest.raises(ValueError, match="seq_id"):
                e.session.n_cells(seq_id)
        n = feed(e)
        with pytest.raises(RuntimeError, match="clear"):
            _core.Session(ctypes.cast(e.ctx, ctypes.c_void_p).value, policy="elastic", budget=0.5)
        e.token(20, n)
        with pytest.raises(RuntimeError, match="bias"):
            e.session.detach()
        e.clear()
        e.session.detach()
        with pytest.raises(ValueError, match="detached"):
            e.session.n_cells(0)
        assert np.isfinite(e.token(20, 0)).all()  # the context goes on without it
        e.session = None


@pytest.mark.parametrize("keeps_all", [{"policy": "full", "budget": 0.5}, {"budget": 1.0}])
def test_a_cache_that_drops_nothing_counts_no_tokens(tiny_gqa: Path, keeps_all: Any) -> None:
    with Engine(tiny_gqa, elastic=keeps_all) as e:
        n = feed(e)
        assert (e.session.n_cells(0), e.session.n_tokens(0), e.session.n_to_drop(0)) == (n, 0, 0)


def test_other_memories_are_refused(tmp_path: Path) -> None:
    """A recurrent model: a clear refusal, and the context still works."""
    path = write_tiny(tmp_path / "mamba.gguf", "mamba")
    with pytest.raises(NotImplementedError, match="recurrent"):
        Engine(path, elastic=ELASTIC)
    with Engine(path) as e:
        assert np.isfinite(e.token(20, 0)).all()


def test_a_transposed_v_is_refused(tiny_gqa: Path) -> None:
    """A context without flash attention, from Python and from C; it goes on without the cache."""
    with pytest.raises(NotImplementedError, match="V is stored transposed"):
        Engine(tiny_gqa, elastic=ELASTIC, flash_attn=False)
    lib = ctypes.CDLL(str(next(lib_dir().glob("libllama.*"))))
    lib.elastic_default_params.restype = Params
    lib.elastic_last_error.restype = ctypes.c_char_p
    with Engine(tiny_gqa, flash_attn=False) as e:
        ctx = ctypes.cast(e.ctx, ctypes.c_void_p)
        params = lib.elastic_default_params()
        assert lib.elastic_attach(ctx, ctypes.byref(params)) == -2
        assert b"V is stored transposed" in lib.elastic_last_error()
        assert not lib.elastic_is_attached(ctx)
        assert np.isfinite(e.token(20, 0)).all()


class Params(ctypes.Structure):
    """struct elastic_params of elastic.h."""

    _fields_ = [
        ("policy", ctypes.c_char_p),
        ("budget", ctypes.c_double),
        ("n_sink", ctypes.c_int32),
        ("offset", ctypes.c_int32),
        ("min_cells", ctypes.c_int32),
        ("n_threads", ctypes.c_int32),
        ("max_cells", ctypes.c_int32),
        ("overdraft", ctypes.c_int32),
        ("n_checkpoints", ctypes.c_int32),
        ("layers", ctypes.c_int32),
        ("layer_share", ctypes.POINTER(ctypes.c_float)),
        ("n_layer_share", ctypes.c_int32),
        ("record", ctypes.c_bool),
        ("release_memory", ctypes.c_bool),
        ("n_question", ctypes.c_int32),
    ]


class Stats(ctypes.Structure):
    """struct elastic_stats of elastic.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "n_compressions",
            "n_evictions",
            "n_cells_before",
            "n_cells_after",
            "n_bytes_before",
            "n_bytes_after",
            "n_bytes_released",
            "t_score_us",
            "t_plan_us",
            "t_merge_us",
            "n_bytes_checkpoints",
            "n_bytes_other",
        )
    ]


def test_c_interface(tiny_gqa: Path) -> None:
    """elastic.h from a program that has never heard of Python: the same cells as the binding's."""
    lib = ctypes.CDLL(str(next(lib_dir().glob("libllama.*"))))
    lib.elastic_default_params.restype = Params
    lib.elastic_last_error.restype = ctypes.c_char_p
    lib.elastic_get_stats.restype = Stats
    with Engine(tiny_gqa, flash_attn=True) as e:
        ctx = ctypes.cast(e.ctx, ctypes.c_void_p)
        params = lib.elastic_default_params()
        assert (params.policy, params.budget) == (b"elastic", 0.2)
        assert (params.overdraft, params.n_checkpoints) == (-1, 2)
        assert not params.layer_share
        params.budget, params.min_cells = -1.0, 8
        assert lib.elastic_attach(ctx, ctypes.byref(params)) == -1
        assert b"-1" in lib.elastic_last_error()
        params.budget = 0.3
        assert lib.elastic_attach(ctx, ctypes.byref(params)) == 0
        n = feed(e)
        assert lib.elastic_n_cells(ctx, 0) == n
        ours = e.forced([20, 21, 22], n)
        kept = math.ceil(0.3 * n)
        assert lib.elastic_n_cells(ctx, 0) == kept - left_free(kept) + 3
        assert lib.elastic_attach(ctx, ctypes.byref(params)) == -3
        stats = lib.elastic_get_stats(ctx)
        assert (stats.n_compressions, stats.n_evictions, stats.n_cells_before) == (1, 0, n)
        assert stats.n_cells_after == kept - left_free(kept)
        assert stats.n_bytes_checkpoints > 0
    with Engine(tiny_gqa, flash_attn=True) as e:
        ctx = ctypes.cast(e.ctx, ctypes.c_void_p)
        params.n_layer_share = 3
        assert lib.elastic_attach(ctx, ctypes.byref(params)) == -1
        assert b"NULL" in lib.elastic_last_error()
        params.layer_share = (ctypes.c_float * 3)(0.5, 2.0, 0.5)
        assert lib.elastic_attach(ctx, ctypes.byref(params)) == 0
        feed(e)
        assert lib.elastic_compress(ctx, 0) == lib.elastic_n_cells(ctx, 0)
        assert lib.elastic_n_per_layer(ctx, 0) <= kept
        # on a device all layers keep as many
        assert (kept < lib.elastic_n_cells(ctx, 0)) == (N_GPU_LAYERS == 0)
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        feed(e)
        np.testing.assert_array_equal(e.forced([20, 21, 22], n), ours)


@pytest.mark.usefixtures("attention_op")
@pytest.mark.parametrize(("policy", "interval"), [("h2o", 1), ("elastic", 4)])
def test_generated_tokens_are_scored_now_and_then(
    tiny_gqa: Path, policy: str, interval: int
) -> None:
    """A step that is scored adds a softmax, 1 in sum, for each token since the last such step."""
    config = {"policy": policy, "budget": 0.99, "min_cells": 500}  # nothing is dropped
    with Engine(tiny_gqa, elastic=config, type_k="f32", type_v="f32") as e:
        n = feed(e)
        before = e.session.importance(0).sum(axis=-1)
        for i in range(13):
            e.token(20 + i, n + i)
            after = e.session.importance(0).sum(axis=-1)
            added = interval if (i + 1) % interval == 0 else 0
            np.testing.assert_allclose(after - before, added, atol=2e-3 if N_GPU_LAYERS else 1e-4)
            before = after


@pytest.mark.usefixtures("attention_op")
def test_sequences_that_generate_together_are_scored_as_alone(tiny_gqa: Path) -> None:
    """Each at every fourth token of its own, whatever else is in the batch."""
    config = {"policy": "elastic", "budget": 0.99, "min_cells": 500}
    with Engine(tiny_gqa, elastic=config, n_seq_max=2, unified=False) as e:
        n = feed(e, seq=0)
        feed(e, seq=1)
        for i in range(2):
            e.token(20, n + i, seq=0)
        before = [e.session.importance(seq).sum(axis=-1) for seq in (0, 1)]
        for i in range(4):
            assert e.decode([(20, n + 2 + i, 0, True), (20, n + i, 1, True)]) == 0
            for seq, added in ((0, 4 if i >= 1 else 0), (1, 4 if i == 3 else 0)):
                after = e.session.importance(seq).sum(axis=-1)
                tol = 2e-2 if N_GPU_LAYERS else 1e-4
                np.testing.assert_allclose(after - before[seq], added, atol=tol)
