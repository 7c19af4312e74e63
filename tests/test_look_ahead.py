"""Answers that are tried before a prompt of text is compressed, and taken back."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any

import elastic_llama as el
import llama_cpp
import numpy as np
import pytest
from elastic_llama import lib_dir

from tests.support.engine import N_GPU_LAYERS, Engine, random_tokens
from tests.support.oracle_plan import left_free
from tests.test_oracles import N_VOCAB, feed, image_rows

ELASTIC: dict[str, Any] = {"policy": "elastic", "budget": 0.2, "min_cells": 8}
N = 300  # tokens of a prompt, of which 240 leave: ten for trying
N_TRIED = 10


def prompt(e: Engine, seq: int = 0, n: int = N) -> int:
    e.prompt(random_tokens(n, N_VOCAB, 1 + seq), seq=seq, logits=False)
    return n


def tried_by_hand(e: Engine, first: int, n: int, n_tries: int, seq: int = 0) -> list[int]:
    """The likeliest answer, decoded as more of the prompt, and taken back."""
    vocab = llama_cpp.llama_model_get_vocab(e.model)
    tokens = [first]
    e.session.hold(True)
    for i in range(n_tries):
        tokens.append(int(e.token(tokens[-1], n + i, seq).argmax()))
        if llama_cpp.llama_vocab_is_eog(vocab, tokens[-1]):
            break
    e.session.hold(False)
    assert e.session.can_cut(n, seq) < n  # a removal would have to undo what they looked at
    e.session.take_back(n, seq)
    return tokens[:-1]


def state(e: Engine, seq: int = 0) -> tuple[np.ndarray, ...]:
    cells = e.session.cells(seq)
    return e.session.mass(seq), e.session.recent(seq)[0], cells["pos"], cells["kind"]


@pytest.mark.usefixtures("attention_op")
@pytest.mark.parametrize("flash_attn", [False, True])
def test_as_if_it_had_been_prompt(tiny_gqa: Path, flash_attn: bool) -> None:
    """The importance and the plan of a caller who decodes the likeliest tokens and removes them."""
    with Engine(tiny_gqa, elastic=ELASTIC, flash_attn=flash_attn) as e:
        n = prompt(e)
        alone = e.session.recent(0)[0]
        assert len(tried_by_hand(e, 20, n, N_TRIED)) == N_TRIED
        expected = state(e)
        expected_answer = e.forced([20, 21, 22], n)
        plan = e.session.last_plan()
    with Engine(tiny_gqa, elastic=ELASTIC, flash_attn=flash_attn) as e:
        prompt(e)
        keys, values = e.session.read_kv(0, 0)
        assert e.session.look_ahead([20]) == N_TRIED
        for ours, theirs in zip(state(e), expected):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(e.session.read_kv(0, 0)[0], keys)
        np.testing.assert_array_equal(e.session.read_kv(0, 0)[1], values)
        assert (e.session.recent(0)[0] != alone).any()
        assert e.session.n_tokens(0) == n
        assert e.session.stats()["tried"] == N_TRIED
        assert e.session.stats()["look_us"] > 0
        assert e.session.stats()["compressions"] == 0
        np.testing.assert_array_equal(e.forced([20, 21, 22], n), expected_answer)
        np.testing.assert_array_equal(e.session.last_plan()["kept"], plan["kept"])
        assert e.session.n_cells(0) == N // 5 - left_free(N // 5) + 3


def test_what_is_tried_decides(tiny_gqa: Path) -> None:
    """Another first token, another plan; without it, a third."""
    plans = []
    for first in (20, 200, None):
        with Engine(tiny_gqa, elastic=ELASTIC) as e:
            prompt(e)
            if first is not None:
                e.session.look_ahead([first])
            e.session.compress(0)
            plans.append(e.session.last_plan()["kept"])
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert (plans[a] != plans[b]).any()


@pytest.mark.usefixtures("attention_op")
@pytest.mark.parametrize("unified", [True, False])
def test_several_at_once(tiny_gqa: Path, unified: bool) -> None:
    """Sequences with prompts of different lengths, each as alone."""
    options: dict[str, Any] = {"n_seq_max": 3, "unified": unified, "n_ctx": 3072}
    sizes, first = {0: N, 1: 200, 2: 25}, [20, 21, 22]
    alone = []
    for seq, n in sizes.items():
        with Engine(tiny_gqa, elastic=ELASTIC, **options) as e:
            prompt(e, seq, n)
            e.session.look_ahead([first[seq]], [seq])
            alone.append(state(e, seq))
    with Engine(tiny_gqa, elastic=ELASTIC, **options) as e:
        for seq, n in sizes.items():
            prompt(e, seq, n)
        assert e.session.look_ahead(first, [0, 1, 2]) == N_TRIED
        for seq, expected in enumerate(alone):
            for ours, theirs in zip(state(e, seq), expected):
                np.testing.assert_allclose(
                    ours, theirs, rtol=2e-3 if N_GPU_LAYERS else 5e-4, atol=1e-6
                )


@pytest.mark.parametrize(
    ("elastic", "n_tries"),
    [
        ({}, N_TRIED),
        ({"lookahead": 3}, 3),
        ({"lookahead": 20}, 20),
        ({"lookahead": 2, "budget": 0.95}, 2),
        ({"lookahead": 2, "budget": 300.0}, 0),
        ({"lookahead": 0}, 0),
        ({"budget": 0.9}, 1),
        ({"budget": 0.95}, 0),  # 15 cells leave
        ({"delay": 1}, 0),
        ({"policy": "h2o"}, 0),
        ({"policy": "h2o", "lookahead": 7}, 7),
        ({"policy": "elastic-evict"}, N_TRIED),
        ({"policy": "local", "lookahead": 7}, 0),  # looks at no attention
        ({"policy": "full", "lookahead": 7}, 0),
        ({"budget": 1.0}, 0),
        ({"max_cells": 280}, N_TRIED),
    ],
)
def test_how_many(tiny_gqa: Path, elastic: dict[str, Any], n_tries: int) -> None:
    with Engine(tiny_gqa, elastic={**ELASTIC, **elastic}) as e:
        n = prompt(e)
        assert e.session.look_ahead([20]) == n_tries
        assert e.session.n_cells(0) == n
        e.token(20, n)
        assert e.session.look_ahead([21]) == 0  # the prompt does not wait any more
        assert e.session.stats()["tried"] == n_tries


def test_no_images(tiny_gqa: Path) -> None:
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        feed(e)
        e.prompt(random_tokens(N, N_VOCAB, 4), 260)
        assert e.session.look_ahead([20]) == 0
        e.clear()
        e.image(image_rows(200, e.n_embd), 0)
        assert e.session.look_ahead([20]) == 0


def test_an_end_ends_it(tiny_gqa: Path) -> None:
    """Nothing is tried behind an end of turn; the tiny model's is found by asking many tokens."""
    vocab = None
    for first in range(10, N_VOCAB):
        with Engine(tiny_gqa, elastic={**ELASTIC, "lookahead": 4}, n_ctx=512) as e:
            vocab = vocab or llama_cpp.llama_model_get_vocab(e.model)
            n = prompt(e, n=300)
            by_hand = tried_by_hand(e, first, n, 4)
            if len(by_hand) < 4:
                e.clear()
                prompt(e, n=300)
                assert e.session.look_ahead([first]) == len(by_hand)
                return
    pytest.fail("no answer of the tiny model ends")


def test_an_end_that_is_sampled_is_the_whole_answer(tiny_gqa: Path) -> None:
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        prompt(e)
        vocab = llama_cpp.llama_model_get_vocab(e.model)
        assert e.session.look_ahead([llama_cpp.llama_vocab_eos(vocab)]) == 0


def test_shared_cells_do_not_leave(tiny_gqa: Path) -> None:
    """Of a prompt that another sequence uses too nothing is compressed, so nothing is tried."""
    with Engine(tiny_gqa, elastic=ELASTIC, n_seq_max=2, unified=True) as e:
        n = prompt(e)
        llama_cpp.llama_memory_seq_cp(e.memory, 0, 1, -1, -1)
        assert e.session.look_ahead([20, 21], [0, 1]) == 0
        e.prompt(random_tokens(60, N_VOCAB, 3), n, seq=1)  # all but one of these leave
        assert e.session.look_ahead([20], [1]) == 59 // 24
        assert e.session.n_cells(0) == n
        assert e.session.n_cells(1) == n + 60


def test_an_answer_under_way_is_not_tried(tiny_gqa: Path) -> None:
    """A prompt that waits, from a cache with a delay, in one without."""
    with Engine(tiny_gqa, elastic={**ELASTIC, "delay": 8}) as e:
        n = prompt(e)
        e.forced([20, 21], n)
        saved = e.save()
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        e.load(saved)
        assert e.session.is_waiting(0)
        assert e.session.look_ahead([22]) == 0
        assert e.session.n_cells(0) == n + 2


def test_what_fails_leaves_no_trace(tiny_gqa: Path) -> None:
    """A decode that is aborted ends the trying; cells and positions are as before."""
    calls = 0

    @llama_cpp.ggml_abort_callback
    def abort(data: Any) -> bool:
        nonlocal calls
        calls += 1
        return calls > 200

    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        n = prompt(e)
        pos = e.session.cells(0)["pos"]
        llama_cpp.llama_set_abort_callback(e.ctx, abort, None)
        assert 0 < e.session.look_ahead([20]) < N_TRIED
        llama_cpp.llama_set_abort_callback(e.ctx, llama_cpp.ggml_abort_callback(0), None)
        np.testing.assert_array_equal(e.session.cells(0)["pos"], pos)
        assert e.session.n_tokens(0) == n
        e.token(20, n)
        assert e.session.stats()["compressions"] == 1


def test_as_many_as_fit(tiny_gqa: Path) -> None:
    with Engine(tiny_gqa, elastic=ELASTIC, n_ctx=512) as e:
        e.prompt(random_tokens(509, N_VOCAB, 1))
        assert e.session.look_ahead([20]) == 3
        assert e.session.n_cells(0) == 509
        e.token(20, 509)
    with Engine(tiny_gqa, elastic={**ELASTIC, "max_cells": 300}, n_ctx=1024, n_ubatch=128) as e:
        n = 0
        while n < 427:
            e.prompt(random_tokens(61, N_VOCAB, n), n)
            n += 61
        assert e.session.n_cells(0) == 427
        assert e.session.look_ahead([20]) == 1
        assert e.session.stats()["compressions"] == 0


def test_without_memory_of_it_off_is_off(tiny_gqa: Path) -> None:
    """A cache that keeps everything decodes nothing more than llama.cpp."""
    said = []
    for elastic in (None, {"policy": "full"}, {**ELASTIC, "budget": 1.0}):
        with Engine(tiny_gqa, elastic=elastic) as e:
            n = prompt(e)
            if elastic is not None:
                assert e.session.look_ahead([20]) == 0
            said.append(e.forced([20, 21], n))
    np.testing.assert_array_equal(said[0], said[1])
    np.testing.assert_array_equal(said[0], said[2])


@pytest.mark.parametrize(
    ("tokens", "seq_ids", "words"),
    [
        ([N_VOCAB], [0], str(N_VOCAB)),
        ([-1], [0], "-1"),
        ([20], [1], "seq_id: got 1"),
        ([20], [-1], "seq_id: got -1"),
        ([20, 21], [0], "1 sequences and 2 tokens"),
        ([20, 21], [0, 0], "more than once"),
    ],
)
def test_bad_arguments(tiny_gqa: Path, tokens: list[int], seq_ids: list[int], words: str) -> None:
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        n = prompt(e)
        with pytest.raises(ValueError, match=words):
            e.session.look_ahead(tokens, seq_ids)
        assert e.session.n_cells(0) == n
        assert e.session.stats()["tried"] == 0


def test_from_c(tiny_gqa: Path) -> None:
    lib = ctypes.CDLL(str(next(lib_dir().glob("libllama.*"))))
    lib.elastic_last_error.restype = ctypes.c_char_p
    seq, token = (ctypes.c_int32 * 1)(0), (ctypes.c_int32 * 1)(20)
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        ctx = ctypes.cast(e.ctx, ctypes.c_void_p)
        assert lib.elastic_look_ahead(ctx, seq, token, 0) == 0
        assert lib.elastic_look_ahead(ctx, None, token, 1) == -1
        assert b"NULL" in lib.elastic_last_error()
        prompt(e)
        assert lib.elastic_look_ahead(ctx, seq, token, 1) == N_TRIED
    with Engine(tiny_gqa) as e:
        assert lib.elastic_look_ahead(ctypes.cast(e.ctx, ctypes.c_void_p), seq, token, 1) == -1
        assert b"attach" in lib.elastic_last_error()


# -- through llama-cpp-python


def answer(path: Path, by_hand: bool, **options: Any) -> tuple[list[int], el.ElasticStats]:
    tokens = random_tokens(N, N_VOCAB, 1)
    config = el.ElasticConfig(min_cells=8, **options)
    with el.ElasticLlama(path, n_ctx=1024, n_threads=1, elastic=config) as llm:
        out: list[int] = []
        if by_hand:
            llm.eval(tokens)
            while len(out) < 6:
                out.append(llm.sample(temp=0.0, repeat_penalty=1.0))
                llm.eval(out[-1:])
        else:
            for token in llm.generate(tokens, temp=0.0, repeat_penalty=1.0):
                out.append(token)
                if len(out) == 6:
                    break
        return out, llm.stats


def test_llama_looks_ahead(tiny_gqa: Path) -> None:
    """Whether tokens come from `generate` or are evaluated by hand; the first is as without."""
    said, stats = answer(tiny_gqa, by_hand=False)
    assert stats.look_ms > 0
    assert "look ahead" in str(stats)
    assert stats.compressions == 1
    assert stats.cells_before == N
    again, by_hand = answer(tiny_gqa, by_hand=True)
    assert again == said
    assert by_hand.look_ms > 0
    plain, without = answer(tiny_gqa, by_hand=False, lookahead=0)
    assert plain[0] == said[0]
    assert without.look_ms == 0
    assert "look ahead" not in str(without)


def test_conversation_looks_ahead(tiny_gqa: Path) -> None:
    words = "the heat on the earth " * 60
    for lookahead in (None, 0):
        config = el.ElasticConfig(min_cells=8, lookahead=lookahead)
        with el.ElasticLlama(tiny_gqa, n_ctx=1024, n_threads=1, elastic=config) as llm:
            talk = el.Conversation(llm)
            assert "".join(talk.ask(words, max_tokens=8)) or talk.stats.n_answer
            assert (talk.stats.look_ms > 0) == (lookahead is None)
            kept = math.ceil(0.2 * talk.stats.cells_prompt)
            assert talk.stats.cells_kept == kept - left_free(kept)
            list(talk.ask("and", max_tokens=2))
            assert talk.stats.look_ms == 0  # too few leave


def test_logits_of_what_was_tried_are_never_sampled(tiny_gqa: Path) -> None:
    """An answer of one token looks ahead and decodes nothing more; the same prompt comes again."""
    first = []
    for lookahead in (None, 0):
        config = el.ElasticConfig(min_cells=8, lookahead=lookahead)
        with el.ElasticLlama(tiny_gqa, n_ctx=1024, n_threads=1, elastic=config) as llm:
            talk = el.Conversation(llm)
            list(talk.ask("the heat on the earth " * 60, max_tokens=1))
            tokens = llm.input_ids[: llm.n_tokens].tolist()
            first.append(next(llm.generate(tokens, temp=0.0, repeat_penalty=1.0)))
    assert first[0] == first[1]
