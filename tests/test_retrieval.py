"""The layers that look tokens up, and where their scores are kept."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from elastic_llama import ElasticConfig, ElasticLlama, _core, retrieval, session
from elastic_llama.errors import UnsupportedModelError

from tests.support.engine import N_GPU_LAYERS, random_tokens
from tests.support.tiny_archs import write_tiny
from tests.support.tiny_llama import write_tiny_llama

THREADS = {"n_threads": 1, "n_threads_batch": 1, "n_gpu_layers": N_GPU_LAYERS}
LOOKING_UP = [17, 18, 23]  # of SmolLM2-135M's 30 layers

linux = pytest.mark.skipif(
    not sys.platform.startswith("linux") or N_GPU_LAYERS > 0, reason="memory follows the layers"
)

N_TOKENS, N_BEFORE, N_QUERIES = 48, 8, 32  # as the native measure


def load(path: Path, **kwargs: Any) -> ElasticLlama:
    config = ElasticConfig(layers="even")
    return ElasticLlama(path, **{"elastic": config, "n_ctx": 256, **THREADS, **kwargs})


def address(pointer: Any) -> int:
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0


def measure(llm: ElasticLlama) -> list[float]:
    return _core.measure_layers(address(llm._model.model), 1)


@pytest.fixture
def tiny(tiny_gqa: Path) -> Iterator[ElasticLlama]:
    with load(tiny_gqa) as llm:
        yield llm


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ELASTIC_LLAMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "retrieval"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A measure of made-up scores, and the models that it was asked for."""
    calls: list[int] = []

    def scores(model: int, n_threads: int) -> list[float]:
        calls.append(model)
        return [0.0, 0.2, 0.02]

    monkeypatch.setattr(_core, "measure_layers", scores)
    return calls


# -- shares


def oracle_shares(scores: list[float]) -> np.ndarray:
    x = np.asarray(scores, np.float64)
    if x.max() < 0.015:  # noise
        return np.ones(len(x))
    share = 1 + 3 * np.sqrt(np.where(x < 0.015, 0, x) / x.max())
    return share / share.mean()


@pytest.mark.parametrize(
    ("scores", "shares"),
    [
        ([0.2, 0.0], [8 / 5, 2 / 5]),
        ([0.32, 0.0, 0.02, 0.08], [4 / 2.3125, 1 / 2.3125, 1.75 / 2.3125, 2.5 / 2.3125]),
        ([1.0, 0.014, 0.0], [2.0, 0.5, 0.5]),  # noise
    ],
)
def test_shares_by_hand(scores: list[float], shares: list[float]) -> None:
    np.testing.assert_allclose(_core.layer_shares(scores), shares, rtol=1e-6)
    np.testing.assert_allclose(oracle_shares(scores), shares, rtol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_the_oracles(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = (rng.random(rng.integers(2, 40)) ** 4 * 0.4).astype(np.float32).tolist()
    np.testing.assert_allclose(_core.layer_shares(scores), oracle_shares(scores), rtol=1e-5)


@pytest.mark.parametrize("scores", [[0.014, 0.0, 0.003], [0.5], [0.3, 0.3], [0.0], []])
def test_layers_that_are_alike_have_no_shares(scores: list[float]) -> None:
    assert list(_core.layer_shares(scores)) == []


@pytest.mark.parametrize("scores", [[0.1, -0.1], [float("nan")], [float("inf"), 0.1]])
def test_bad_scores(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="scores"):
        _core.layer_shares(scores)


# -- the measure


def ordinary_tokens(vocab: Any) -> list[int]:
    """The native measure's choice: Fisher-Yates over the tokens of text, by Knuth's generator."""
    tokens = []
    for token in range(llama_cpp.llama_vocab_n_tokens(vocab)):
        attr = llama_cpp.llama_vocab_get_attr(vocab, token)
        is_text = attr & llama_cpp.LLAMA_TOKEN_ATTR_NORMAL
        if is_text and not attr & llama_cpp.LLAMA_TOKEN_ATTR_BYTE:
            ends = llama_cpp.llama_vocab_is_eog(vocab, token)
            if not ends and not llama_cpp.llama_vocab_is_control(vocab, token):
                tokens.append(token)
    seed = 1
    for i in range(N_TOKENS):
        seed = (seed * 6364136223846793005 + 1442695040888963407) % 2**64
        j = i + (seed >> 33) % (len(tokens) - i)
        tokens[i], tokens[j] = tokens[j], tokens[i]
    return tokens[:N_TOKENS]


def measure_by_hand(llm: ElasticLlama) -> np.ndarray:
    """What the queries of a repetition pay the cells that they look up, step by step.

    In the context of the model itself, in which nothing is compressed.
    """
    vocab = llama_cpp.llama_model_get_vocab(llm._model.model)
    start = [llama_cpp.llama_vocab_bos(vocab)] * llama_cpp.llama_vocab_get_add_bos(vocab)
    tokens = ordinary_tokens(vocab)
    first = len(start)
    with llm.prompt_phase():
        llm.eval(start + tokens + tokens[:N_BEFORE])
        before = llm.session.importance(0).astype(np.float64)
        scores = []
        for i in range(N_BEFORE, N_BEFORE + N_QUERIES):
            llm.eval([tokens[i]])
            after = llm.session.importance(0).astype(np.float64)
            paid = (after[..., : before.shape[2]] - before)[..., first : first + N_TOKENS]
            before = after
            others = np.delete(paid, [0, i + 1], axis=2).mean(axis=2)
            scores.append((paid[..., i + 1] - others).mean(axis=1))
    return np.maximum(np.mean(scores, axis=0), 0)


@pytest.mark.parametrize("model", ["tiny_gqa", "tiny_mha"])
def test_random_weights_look_nothing_up(model: str, request: pytest.FixtureRequest) -> None:
    with load(request.getfixturevalue(model)) as llm:
        scores = np.array(measure(llm))
        assert (scores >= 0).all()
        assert list(_core.layer_shares(scores)) == []
        np.testing.assert_allclose(scores, measure_by_hand(llm), atol=1e-6)


@pytest.mark.model
def test_the_embedded_model(embedded_model: Path) -> None:
    with load(embedded_model) as llm:
        scores = np.array(measure(llm))
        assert scores.shape == (30,)
        assert sorted(np.argsort(scores)[-3:]) == LOOKING_UP
        assert scores.max() > 0.1
        assert scores[:17].max() < scores.max() / 10
        shares = _core.layer_shares(scores)
        assert sorted(np.argsort(shares)[-3:]) == LOOKING_UP
        assert measure(llm) == scores.tolist()
        np.testing.assert_allclose(scores, measure_by_hand(llm), atol=1e-4)


def test_the_context_of_the_user_is_left_alone(tiny_gqa: Path) -> None:
    def answer(measures: bool) -> tuple[Any, ...]:
        with load(tiny_gqa) as llm:
            llm.eval(random_tokens(150, llm.n_vocab(), 3))
            if measures:
                measure(llm)
            seen = [llm.n_tokens, *llm.session.cells(0).values(), llm.session.importance(0)]
            for _ in range(8):  # the first one compresses
                logits = llm._ctx.get_logits_ith(-1)
                row = np.ctypeslib.as_array(logits, (llm.n_vocab(),)).copy()
                seen.append(row)
                llm.eval([int(row.argmax())])
            return (*seen, llm.stats.compressions, *llm.session.cells(0).values())

    for ours, alone in zip(answer(True), answer(False)):
        np.testing.assert_array_equal(ours, alone)


def test_other_memory_is_refused(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "mamba.gguf", "mamba")
    with load(model, elastic=None) as llm:
        assert not _core.frees_layers(address(llm._ctx.ctx))
        with pytest.raises(NotImplementedError, match="recurrent"):
            measure(llm)
    with pytest.raises(UnsupportedModelError, match="recurrent"):
        load(model, elastic=ElasticConfig())


# -- attaching


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Keywords of every native session that is opened."""
    calls: list[dict[str, Any]] = []
    native = _core.Session

    def opened(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return native(*args, **kwargs)

    monkeypatch.setattr(session._core, "Session", opened)
    return calls


@linux
def test_a_session_is_opened_once_with_the_shares(
    tiny_gqa: Path, folder: Path, measured: list[int], sessions: list[dict[str, Any]]
) -> None:
    with load(tiny_gqa, elastic=ElasticConfig()) as llm:
        shares = _core.layer_shares([0.0, 0.2, 0.02])
        np.testing.assert_allclose(llm.session.layer_share(), shares)
        assert llm.elastic_resolved is not None
        assert llm.elastic_resolved.layer_share == tuple(shares)
    assert len(measured) == len(sessions) == 1


@pytest.mark.parametrize(
    "config",
    [{"layers": "even"}, {"policy": "h2o"}, {"release_memory": False}, {"kv_cells": 100}],
)
def test_measured_only_where_it_is_used(
    tiny_gqa: Path,
    folder: Path,
    measured: list[int],
    sessions: list[dict[str, Any]],
    config: dict[str, Any],
) -> None:
    n_ctx = None if "kv_cells" in config else 256
    with load(tiny_gqa, elastic=ElasticConfig(**config), n_ctx=n_ctx) as llm:
        assert llm.session.layer_share() == []
    assert measured == []
    assert len(sessions) == 1


def test_not_measured_where_memory_cannot_follow(
    tiny_gqa: Path, folder: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core, "frees_layers", lambda ctx: False)
    with load(tiny_gqa, elastic=ElasticConfig()) as llm:
        assert llm.session.layer_share() == []
    assert measured == []


@linux
@pytest.mark.parametrize("error", [NotImplementedError, ValueError, RuntimeError])
def test_a_measure_that_fails_means_even_layers_and_a_warning(
    tiny_gqa: Path,
    folder: Path,
    sessions: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: type[Exception],
) -> None:
    def fail(model: int, n_threads: int) -> list[float]:
        raise error("too few tokens")

    monkeypatch.setattr(_core, "measure_layers", fail)
    caplog.set_level(logging.WARNING, "elastic_llama")
    with load(tiny_gqa, elastic=ElasticConfig()) as llm:
        assert llm.session.layer_share() == []
    assert "too few tokens" in caplog.text
    assert len(sessions) == 1
    assert not folder.exists()


@linux
def test_layers_that_are_alike_are_not_measured_again(
    tiny_gqa: Path, folder: Path, sessions: list[dict[str, Any]]
) -> None:
    with load(tiny_gqa, elastic=ElasticConfig()) as llm:
        assert llm.session.layer_share() == []
    assert [call["auto_layers"] for call in sessions] == [False]
    assert len(list(folder.iterdir())) == 1


# -- the file


def test_measured_once(tiny: ElasticLlama, folder: Path, measured: list[int]) -> None:
    scores = retrieval.measured_scores(tiny)
    assert scores == [0.0, 0.2, 0.02]
    assert retrieval.measured_scores(tiny) == scores
    assert measured == [address(tiny._model.model)]
    (file,) = folder.iterdir()
    assert json.loads(file.read_text()) == {
        "version": retrieval.VERSION,
        "model": os.path.abspath(tiny.model_path),
        "scores": [0.0, 0.2, 0.02],
    }


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1, 2]",
        b"{}",
        b'{"version": 2, "model": PATH}',
        b'{"version": 2, "model": PATH, "scores": null}',
        b'{"version": 2, "model": PATH, "scores": []}',
        b'{"version": 2, "model": PATH, "scores": [0.1, 0.1]}',
        b'{"version": 2, "model": PATH, "scores": [NaN, 0.1, 0.1]}',
        b'{"version": 2, "model": PATH, "scores": ["a", 0.1, 0.1]}',
        b'{"version": 2, "model": "another", "scores": [0.1, 0.1, 0.1]}',
        b'{"version": 1, "model": PATH, "scores": [0.1, 0.1, 0.1]}',
    ],
)
def test_a_broken_file_is_written_anew(
    tiny: ElasticLlama, folder: Path, measured: list[int], broken: bytes
) -> None:
    scores = retrieval.measured_scores(tiny)
    (file,) = folder.iterdir()
    good = file.read_bytes()
    file.write_bytes(broken.replace(b"PATH", json.dumps(tiny.model_path).encode()))
    assert retrieval.measured_scores(tiny) == scores
    assert len(measured) == 2
    assert file.read_bytes() == good
    assert list(folder.iterdir()) == [file]


def test_another_file_is_measured_anew(tmp_path: Path, folder: Path, measured: list[int]) -> None:
    path = write_tiny_llama(tmp_path / "a.gguf")
    for seed in (1, 2):
        write_tiny_llama(path, seed=seed)
        with load(path) as llm:
            retrieval.measured_scores(llm)
    assert len(measured) == 2
    assert len(list(folder.iterdir())) == 2


@linux
def test_the_layers_of_a_part_are_measured_once(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of eight layers have no sliding window, and only those are measured."""
    n_calls = []
    monkeypatch.setattr(
        retrieval._core, "measure_layers", lambda *args: n_calls.append(args) or [0.5, 0.1]
    )
    path = write_tiny_llama(tmp_path / "windows.gguf", arch="cohere2", n_layer=8, n_embd=64)
    for _ in range(2):
        with load(path, elastic=ElasticConfig()) as llm:
            assert len(llm.session.layer_share()) == 2
    assert len(n_calls) == 1


def test_without_a_cache(
    tiny: ElasticLlama,
    tmp_path: Path,
    measured: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A folder that cannot be made, none at all, a full disk, and a model file that is gone."""
    scores = [0.0, 0.2, 0.02]
    (tmp_path / "file").touch()
    monkeypatch.setenv("ELASTIC_LLAMA_CACHE", str(tmp_path / "file"))
    assert retrieval.measured_scores(tiny) == scores

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    with monkeypatch.context() as m:
        m.setattr(retrieval, "cache_dir", no_home)
        assert retrieval.measured_scores(tiny) == scores

    def full(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setenv("ELASTIC_LLAMA_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as m:
        m.setattr(retrieval.os, "replace", full)
        assert retrieval.measured_scores(tiny) == scores
    assert list((tmp_path / "cache" / "retrieval").iterdir()) == []

    monkeypatch.setattr(tiny, "model_path", str(tmp_path / "gone.gguf"))
    assert retrieval.measured_scores(tiny) == scores
    assert len(measured) == 4
