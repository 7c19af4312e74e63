"""What an answer looks at, found before a prompt of text is compressed, and taken back."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import elastic_llama as el
import llama_cpp
import numpy as np
import pytest
from elastic_llama import lib_dir
from elastic_llama import probe as probe_module
from elastic_llama.stats import TurnStats

from tests.support.engine import Engine, random_tokens
from tests.support.oracle_plan import left_free
from tests.test_oracles import N_VOCAB, feed, image_rows

ELASTIC: dict[str, Any] = {"policy": "elastic", "budget": 0.2, "min_cells": 8}
N = 300  # tokens of a prompt, of which 240 are dropped
N_STEPS = 10


def prompt(e: Engine, seq: int = 0, n: int = N, logits: bool = False) -> int:
    e.prompt(random_tokens(n, N_VOCAB, 1 + seq), seq=seq, logits=logits)
    return n


def config_of(options: dict[str, Any], probe: int | None = None) -> el.ElasticConfig:
    """As `ElasticConfig` says what the arguments of a session say."""
    names = {"max_cells": "kv_cells"}
    given = {names.get(name, name): value for name, value in options.items()}
    return el.ElasticConfig(probe=probe, **given)


def run(e: Engine, first: dict[int, int], probe: int | None = N_STEPS, **more: Any) -> int:
    return probe_module.probe(e.ctx, e.session, config_of({**ELASTIC, **more}, probe), first)


def interrupted(error: type[BaseException]) -> Callable[[Any, Any], int]:
    """A `llama_decode` whose fourth call raises."""
    real, calls = llama_cpp.llama_decode, 0

    def decode(ctx: Any, batch: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise error
        return int(real(ctx, batch))

    return decode


def by_hand(e: Engine, first: int, n: int, n_steps: int, seq: int = 0) -> list[int]:
    """The likeliest answer, decoded as more of the prompt, and taken back."""
    vocab = llama_cpp.llama_model_get_vocab(e.model)
    tokens = [first]
    e.session.begin_probe()
    for i in range(n_steps):
        tokens.append(int(e.token(tokens[-1], n + i, seq).argmax()))
        if llama_cpp.llama_vocab_is_eog(vocab, tokens[-1]):
            break
    e.session.end_probe()
    return tokens[:-1]


def attended(e: Engine, first: int, n: int, n_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The importance of the prompt's cells after the likeliest answer was decoded as a part of it.

    What is removed afterwards was looked at, too: its columns are left out.
    """
    e.session.set_prefill(True)
    token = first
    for i in range(n_steps):
        token = int(e.token(token, n + i).argmax())
    e.session.set_prefill(False)
    return e.session.importance(0)[..., :n], e.session.recent(0)[0][..., :n]


def state(e: Engine, seq: int = 0) -> tuple[np.ndarray, ...]:
    cells = e.session.cells(seq)
    return e.session.importance(seq), e.session.recent(seq)[0], cells["pos"], cells["kind"]


def test_as_if_it_had_been_prompt(tiny_gqa: Path) -> None:
    """The importance and the plan of a caller who decodes the likeliest tokens and removes them."""
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        n = prompt(e)
        alone = e.session.recent(0)[0]
        assert len(by_hand(e, 20, n, N_STEPS)) == N_STEPS
        expected = state(e)
        expected_answer = e.forced([20, 21, 22], n)
        plan = e.session.last_plan()
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        prompt(e)
        keys, values = e.session.read_kv(0, 0)
        assert run(e, {0: 20}) == N_STEPS
        for ours, theirs in zip(state(e), expected):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(e.session.read_kv(0, 0)[0], keys)
        np.testing.assert_array_equal(e.session.read_kv(0, 0)[1], values)
        assert (e.session.recent(0)[0] != alone).any()
        assert e.session.n_tokens(0) == n
        assert e.session.stats()["compressions"] == 0
        np.testing.assert_array_equal(e.forced([20, 21, 22], n), expected_answer)
        np.testing.assert_array_equal(e.session.last_plan()["kept"], plan["kept"])
        assert e.session.n_cells(0) == N // 5 - left_free(N // 5) + 3
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        prompt(e)
        for ours, theirs in zip(expected, attended(e, 20, n, N_STEPS)):
            np.testing.assert_array_equal(ours, theirs)


def test_what_is_probed_decides(tiny_gqa: Path) -> None:
    """Another first token, another plan; without it, a third."""
    plans = []
    for first in (20, 200, None):
        with Engine(tiny_gqa, elastic=ELASTIC) as e:
            prompt(e)
            if first is not None:
                run(e, {0: first})
            e.session.compress(0)
            plans.append(e.session.last_plan()["kept"])
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert (plans[a] != plans[b]).any()


def test_a_sequence_that_begins_in_it_is_taken_back_too(tiny_gqa: Path) -> None:
    with Engine(tiny_gqa, elastic=ELASTIC, n_seq_max=2) as e:
        n = prompt(e)
        e.session.begin_probe()
        e.prompt(random_tokens(20, N_VOCAB, 5), seq=1)
        e.token(20, n)
        e.session.end_probe()
        assert [e.session.n_cells(seq) for seq in (0, 1)] == [n, 0]
        assert [e.session.n_tokens(seq) for seq in (0, 1)] == [n, 0]


@pytest.mark.parametrize("unified", [True, False])
def test_several_at_once(tiny_gqa: Path, unified: bool) -> None:
    """Sequences with prompts of different lengths, each as alone."""
    options: dict[str, Any] = {"n_seq_max": 3, "unified": unified, "n_ctx": 3072}
    sizes, first = {0: N, 1: 200, 2: 25}, [20, 21, 22]
    alone = []
    for seq, n in sizes.items():
        with Engine(tiny_gqa, elastic=ELASTIC, **options) as e:
            prompt(e, seq, n)
            run(e, {seq: first[seq]})
            alone.append(state(e, seq))
    with Engine(tiny_gqa, elastic=ELASTIC, **options) as e:
        for seq, n in sizes.items():
            prompt(e, seq, n)
        assert run(e, dict(enumerate(first))) == N_STEPS
        for seq, expected in enumerate(alone):
            for ours, theirs in zip(state(e, seq), expected):
                np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("elastic", "given", "n_steps"),
    [
        ({}, None, N_STEPS),  # one for 24 cells
        ({}, 10, 10),
        ({"budget": 0.9}, None, 1),
        ({"budget": 0.95}, None, 0),  # 15 cells are dropped
        ({"policy": "h2o"}, None, 0),
        ({}, 3, 3),
        ({}, 20, 20),
        ({"budget": 0.95}, 2, 2),
        ({"budget": 300}, 2, 0),
        ({}, 0, 0),
        ({"policy": "h2o"}, 7, 7),
        ({"policy": "elastic-evict"}, 10, 10),
        ({"policy": "local"}, 7, 0),  # looks at no attention
        ({"policy": "random"}, 7, 0),
        ({"policy": "full"}, 7, 0),
        ({"budget": 1.0}, 10, 0),
        ({"max_cells": 280}, 10, 10),
    ],
)
def test_how_many(tiny_gqa: Path, elastic: dict[str, Any], given: int | None, n_steps: int) -> None:
    with Engine(tiny_gqa, elastic={**ELASTIC, **elastic}) as e:
        n = prompt(e, logits=True)  # an answer may follow without a probe
        assert run(e, {0: 20}, given, **elastic) == n_steps
        assert e.session.n_cells(0) == n
        e.token(20, n)
        assert e.session.n_to_drop(0) == 0
        assert run(e, {0: 21}, given, **elastic) == 0  # the prompt does not wait any more


def test_no_images(tiny_gqa: Path) -> None:
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        feed(e)
        e.prompt(random_tokens(N, N_VOCAB, 4), 260)
        assert run(e, {0: 20}) == 0
        e.clear()
        e.image(image_rows(200, e.n_embd), 0)
        assert run(e, {0: 20}) == 0


def test_an_end_ends_it(tiny_gqa: Path) -> None:
    """Nothing is decoded behind an end of turn; the tiny model's is found by asking many tokens."""
    vocab = None
    for first in range(10, N_VOCAB):
        with Engine(tiny_gqa, elastic=ELASTIC, n_ctx=512) as e:
            vocab = vocab or llama_cpp.llama_model_get_vocab(e.model)
            n = prompt(e, n=300)
            tokens = by_hand(e, first, n, 4)
            if len(tokens) < 4:
                e.clear()
                prompt(e, n=300)
                assert run(e, {0: first}, 4) == len(tokens)
                return
    pytest.fail("no answer of the tiny model ends")


def test_an_end_that_is_sampled_is_the_whole_answer(tiny_gqa: Path) -> None:
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        prompt(e)
        vocab = llama_cpp.llama_model_get_vocab(e.model)
        assert run(e, {0: llama_cpp.llama_vocab_eos(vocab)}) == 0


def test_shared_cells_are_not_dropped(tiny_gqa: Path) -> None:
    """Of a prompt that another sequence uses too nothing is compressed, so there is no probe."""
    with Engine(tiny_gqa, elastic=ELASTIC, n_seq_max=2, unified=True) as e:
        n = prompt(e)
        llama_cpp.llama_memory_seq_cp(e.memory, 0, 1, -1, -1)
        assert run(e, {0: 20, 1: 21}) == 0
        e.prompt(random_tokens(60, N_VOCAB, 3), n, seq=1)  # all but one of these are dropped
        assert e.session.n_to_drop(1) == 59
        assert run(e, {1: 20}) == N_STEPS
        assert e.session.n_cells(0) == n
        assert e.session.n_cells(1) == n + 60


def test_what_fails_leaves_no_trace(tiny_gqa: Path) -> None:
    """A decode that is aborted ends the probe; cells and positions are as before."""
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
        assert 0 < run(e, {0: 20}) < N_STEPS
        llama_cpp.llama_set_abort_callback(e.ctx, llama_cpp.ggml_abort_callback(0), None)
        np.testing.assert_array_equal(e.session.cells(0)["pos"], pos)
        assert e.session.n_tokens(0) == n
        e.token(20, n)
        assert e.session.stats()["compressions"] == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_ends_the_probe(
    tiny_gqa: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        n = prompt(e)
        with monkeypatch.context() as patch:
            patch.setattr(llama_cpp, "llama_decode", interrupted(error))
            with pytest.raises(error):
                run(e, {0: 20})
        assert e.session.n_cells(0) == e.session.n_tokens(0) == n
        assert run(e, {0: 20}) == N_STEPS  # none is running
        e.token(20, n)
        assert e.session.stats()["compressions"] == 1


def test_only_one_at_a_time(tiny_gqa: Path) -> None:
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        n = prompt(e)
        e.session.begin_probe()
        e.token(20, n)
        with pytest.raises(ValueError, match="a probe is running"):
            run(e, {0: 20})
        assert e.session.n_cells(0) == n + 1  # the first one goes on
        e.session.end_probe()
        e.session.end_probe()
        assert e.session.n_cells(0) == n


def test_as_many_as_fit(tiny_gqa: Path) -> None:
    with Engine(tiny_gqa, elastic=ELASTIC, n_ctx=512) as e:
        e.prompt(random_tokens(509, N_VOCAB, 1))
        assert run(e, {0: 20}) == 3
        assert e.session.n_cells(0) == 509
        e.token(20, 509)
    with Engine(tiny_gqa, elastic={**ELASTIC, "max_cells": 300}, n_ctx=1024, n_ubatch=128) as e:
        n = 0
        while n < 427:
            e.prompt(random_tokens(61, N_VOCAB, n), n)
            n += 61
        assert e.session.n_cells(0) == 427
        assert run(e, {0: 20}, max_cells=300) == 1
        assert e.session.stats()["compressions"] == 0


def test_without_memory_of_it_off_is_off(tiny_gqa: Path) -> None:
    """A cache that keeps everything decodes nothing more than llama.cpp."""
    said = []
    for elastic in (None, {"policy": "full"}, {**ELASTIC, "budget": 1.0}):
        with Engine(tiny_gqa, elastic=elastic, flash_attn=True) as e:
            n = prompt(e)
            if elastic is not None:
                assert run(e, {0: 20}, **elastic) == 0
            said.append(e.forced([20, 21], n))
    np.testing.assert_array_equal(said[0], said[1])
    np.testing.assert_array_equal(said[0], said[2])


@pytest.mark.parametrize(
    ("first", "words"),
    [
        ({0: N_VOCAB}, str(N_VOCAB)),
        ({0: -1}, "-1"),
        ({1: 20}, "seq_id: got 1"),
        ({-1: 20}, "seq_id: got -1"),
        (dict.fromkeys(range(65), 20), "at most n_batch = 64"),
    ],
)
def test_bad_arguments(tiny_gqa: Path, first: dict[int, int], words: str) -> None:
    with Engine(tiny_gqa, elastic=ELASTIC, n_batch=64) as e:
        tokens = random_tokens(N, N_VOCAB, 1)
        for i in range(0, N, 64):
            e.prompt(tokens[i : i + 64], i, logits=False)
        with pytest.raises(ValueError, match=words):
            run(e, first)
        assert e.session.n_cells(0) == N
        assert run(e, {0: 20}) == N_STEPS


def test_from_c(tiny_gqa: Path) -> None:
    """A program that has never heard of Python, as elastic.h says."""
    lib = ctypes.CDLL(str(next(lib_dir().glob("libllama.*"))))
    lib.elastic_last_error.restype = ctypes.c_char_p
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        prompt(e)
        assert run(e, {0: 20}) == N_STEPS
        expected = state(e)
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        ctx = ctypes.cast(e.ctx, ctypes.c_void_p)
        n = prompt(e)
        assert lib.elastic_n_to_drop(ctx, 0) == N - N // 5  # without what stays free for an answer
        assert lib.elastic_begin_probe(ctx) == 0
        assert lib.elastic_begin_probe(ctx) == -1
        assert b"a probe is running" in lib.elastic_last_error()
        token = 20
        for i in range(N_STEPS):
            token = int(e.token(token, n + i).argmax())
        lib.elastic_end_probe(ctx)
        assert lib.elastic_n_cells(ctx, 0) == n
        for ours, theirs in zip(state(e), expected):
            np.testing.assert_array_equal(ours, theirs)
    with Engine(tiny_gqa) as e:
        assert lib.elastic_begin_probe(ctypes.cast(e.ctx, ctypes.c_void_p)) == -1
        assert b"attach" in lib.elastic_last_error()


# -- through llama-cpp-python


def answer(path: Path, evaluated: bool, **options: Any) -> tuple[list[int], el.ElasticStats]:
    tokens = random_tokens(N, N_VOCAB, 1)
    config = el.ElasticConfig(**{"min_cells": 8, "probe": N_STEPS, **options})
    with el.ElasticLlama(path, n_ctx=1024, n_threads=1, elastic=config) as llm:
        out: list[int] = []
        if evaluated:
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


def test_llama_probes(tiny_gqa: Path) -> None:
    """Whether tokens come from `generate` or are evaluated by hand; the first is as without."""
    said, stats = answer(tiny_gqa, evaluated=False)
    assert stats.probe_ms > 0
    assert "probe" in str(stats)
    assert stats.compressions == 1
    assert stats.cells_before == N
    again, others = answer(tiny_gqa, evaluated=True)
    assert again == said
    assert others.probe_ms > 0
    plain, without = answer(tiny_gqa, evaluated=False, probe=0)
    assert plain[0] == said[0]
    assert without.probe_ms == 0
    assert "probe" not in str(without)


def test_conversation_probes(tiny_gqa: Path) -> None:
    words = "the heat on the earth " * 60
    for probe in (N_STEPS, 0):
        config = el.ElasticConfig(min_cells=8, probe=probe)
        with el.ElasticLlama(tiny_gqa, n_ctx=1024, n_threads=1, elastic=config) as llm:
            talk = el.Conversation(llm)
            assert "".join(talk.ask(words, max_tokens=8)) or talk.stats.n_answer
            assert (talk.stats.probe_ms > 0) == (probe == N_STEPS)
            kept = math.ceil(0.2 * talk.stats.cells_prompt)
            assert talk.stats.cells_kept == kept - left_free(kept)


def test_logits_of_a_probe_are_never_sampled(tiny_gqa: Path) -> None:
    """An answer of one token has a probe and decodes nothing more; the same prompt comes again."""
    first = []
    for probe in (N_STEPS, 0):
        config = el.ElasticConfig(min_cells=8, probe=probe)
        with el.ElasticLlama(tiny_gqa, n_ctx=1024, n_threads=1, elastic=config) as llm:
            talk = el.Conversation(llm)
            list(talk.ask("the heat on the earth " * 60, max_tokens=1))
            tokens = llm.input_ids[: llm.n_tokens].tolist()
            first.append(next(llm.generate(tokens, temp=0.0, repeat_penalty=1.0)))
    assert first[0] == first[1]


def test_an_interrupted_probe_leaves_no_logits(
    tiny_gqa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of its last step are not the prompt's."""
    config = el.ElasticConfig(min_cells=8, probe=N_STEPS)
    with el.ElasticLlama(tiny_gqa, n_ctx=1024, n_threads=1, elastic=config) as llm:
        tokens = random_tokens(N, N_VOCAB, 1)
        llm.eval(tokens)
        first = llm.sample(temp=0.0, repeat_penalty=1.0)
        with monkeypatch.context() as patch:
            patch.setattr(llama_cpp, "llama_decode", interrupted(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                llm.eval([first])
        with pytest.raises(el.StateError, match="no logits"):
            llm.sample()
        assert llm.session.n_cells(0) == N
        assert next(llm.generate(tokens, temp=0.0, repeat_penalty=1.0)) == first


# -- names of before


def test_lookahead_is_taken_for_probe(tiny_gqa: Path) -> None:
    with pytest.warns(DeprecationWarning, match="lookahead is now probe"):
        config = el.ElasticConfig(**{"lookahead": 3})
    assert config == el.ElasticConfig(probe=3)
    with pytest.warns(DeprecationWarning):
        assert config.lookahead == 3
    with pytest.warns(DeprecationWarning):
        assert replace(config, **{"lookahead": 5}).probe == 5
    with pytest.warns(DeprecationWarning):
        assert el.ElasticConfig(**{"lookahead": None}).probe is None
    with pytest.warns(DeprecationWarning), pytest.raises(el.ConfigError, match="probe"):
        el.ElasticConfig(**{"lookahead": -1})
    assert replace(config, probe=7).probe == 7
    assert "lookahead" not in repr(config)


def test_look_ms_is_probe_ms() -> None:
    for stats in (el.ElasticStats(probe_ms=2.5), TurnStats(probe_ms=2.5)):
        with pytest.warns(DeprecationWarning, match="probe_ms"):
            assert stats.look_ms == 2.5
