"""The layers that look tokens up, and where their scores are kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from elastic_llama import ElasticConfig, ElasticLlama, retrieval
from elastic_llama.errors import ConfigError, StateError, UnsupportedModelError

from tests.support.engine import N_GPU_LAYERS, random_tokens
from tests.support.tiny_llama import write_tiny_llama

THREADS = {"n_threads": 1, "n_threads_batch": 1, "n_gpu_layers": N_GPU_LAYERS}
LOOKING_UP = [17, 18, 23]  # of SmolLM2-135M's 30 layers


def load(path: Path, **kwargs: Any) -> ElasticLlama:
    config = ElasticConfig(layers="even")
    return ElasticLlama(path, **{"elastic": config, "n_ctx": 256, **THREADS, **kwargs})


@pytest.fixture
def tiny(tiny_gqa: Path) -> Iterator[ElasticLlama]:
    with load(tiny_gqa) as llm:
        yield llm


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ELASTIC_LLAMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "retrieval"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[ElasticLlama]:
    """A measure of made-up scores, and whom it was asked for."""
    calls: list[ElasticLlama] = []

    def scores(llm: ElasticLlama) -> np.ndarray:
        calls.append(llm)
        return np.array([0.0, 0.2, 0.02])

    monkeypatch.setattr(retrieval, "retrieval_scores", scores)
    return calls


# -- shares


@pytest.mark.parametrize(
    ("scores", "shares"),
    [
        ([0.2, 0.0], [8 / 5, 2 / 5]),
        ([0.32, 0.0, 0.02, 0.08], [4 / 2.3125, 1 / 2.3125, 1.75 / 2.3125, 2.5 / 2.3125]),
        ([1.0, 0.014, 0.0], [2.0, 0.5, 0.5]),  # noise
        ([0.014, 0.0, 0.003], [1.0, 1.0, 1.0]),
        ([0.5], [1.0]),
    ],
)
def test_shares_by_hand(scores: list[float], shares: list[float]) -> None:
    np.testing.assert_allclose(retrieval.layer_shares(scores), shares, rtol=1e-12)
    assert retrieval.layer_shares(np.array(scores)) == retrieval.layer_shares(scores)


@pytest.mark.parametrize("scores", [[], [0.1, -0.1], [float("nan")], [float("inf")], [[0.1]]])
def test_bad_scores(scores: list[float]) -> None:
    with pytest.raises(ConfigError, match="scores"):
        retrieval.layer_shares(scores)


# -- the measure


@pytest.mark.parametrize("model", ["tiny_gqa", "tiny_mha"])
def test_random_weights_look_nothing_up(model: str, request: pytest.FixtureRequest) -> None:
    with load(request.getfixturevalue(model)) as llm:
        scores = retrieval.retrieval_scores(llm)
        assert (scores >= 0).all()
        assert retrieval.layer_shares(scores) == [1.0] * len(scores)


class Attention:
    """A session of 2 layers and 1 KV head whose queries attend as they are told."""

    def __init__(self, first: int, paid: Callable[[int], np.ndarray]) -> None:
        self.first, self.paid, self.n = first, paid, 0
        self.sum = np.zeros((2, 1, 128), np.float32)

    def decode(self, ctx: Any, tokens: list[int], past: int) -> None:
        assert past == self.n
        self.n += len(tokens)
        if len(tokens) == 1:
            i = past - self.first - retrieval.N_TOKENS  # the query's place in the repetition
            self.sum[:, 0, : self.n] += self.paid(i)[:, : self.n]

    def importance(self, seq: int) -> np.ndarray:
        return self.sum[..., : self.n].copy()

    def set_prefill(self, value: bool) -> None:
        assert value

    def forget(self) -> None:
        pass


@pytest.mark.parametrize("add_bos", [True, False])
def test_what_counts(tiny: ElasticLlama, monkeypatch: pytest.MonkeyPatch, add_bos: bool) -> None:
    """The cell after the one that was the same; neither flat attention nor sinks."""
    first = int(add_bos)

    def paid(i: int) -> np.ndarray:
        out = np.full((2, 128), 0.004)
        out[0, first + i + 1] += 0.25
        out[1, first + i] += 0.25  # the same token, not the next
        out[:, 0] += 0.5
        return out

    told = Attention(first, paid)
    monkeypatch.setattr(llama_cpp, "llama_vocab_get_add_bos", lambda vocab: add_bos)
    monkeypatch.setattr(retrieval, "_decode", told.decode)
    with monkeypatch.context() as m:
        m.setattr(retrieval._core, "Session", lambda *args, **kwargs: told)
        scores = retrieval.retrieval_scores(tiny)
    assert told.n == first + retrieval.N_TOKENS + retrieval.N_BEFORE + retrieval.N_QUERIES
    np.testing.assert_allclose(scores, [0.25, 0.0], atol=1e-5)


@pytest.mark.model
def test_the_embedded_model(embedded_model: Path) -> None:
    with load(embedded_model) as llm:
        scores = retrieval.retrieval_scores(llm)
        assert scores.shape == (30,)
        assert sorted(np.argsort(scores)[-3:]) == LOOKING_UP
        assert scores.max() > 0.1
        assert scores[:17].max() < scores.max() / 10
        shares = retrieval.layer_shares(scores)
        assert sorted(np.argsort(shares)[-3:]) == LOOKING_UP
        np.testing.assert_array_equal(retrieval.retrieval_scores(llm), scores)


def test_the_context_of_the_user_is_left_alone(tiny_gqa: Path) -> None:
    def answer(measure: bool) -> tuple[Any, ...]:
        with load(tiny_gqa) as llm:
            llm.eval(random_tokens(150, llm.n_vocab(), 3))
            if measure:
                retrieval.retrieval_scores(llm)
            seen = [llm.n_tokens, *llm.session.cells(0).values(), llm.session.importance(0)]
            for _ in range(8):  # the first one compresses
                logits = llm._ctx.get_logits_ith(-1)
                row = np.ctypeslib.as_array(logits, (llm.n_vocab(),)).copy()
                seen.append(row)
                llm.eval([int(row.argmax())])
            return (*seen, llm.stats.compressions, *llm.session.cells(0).values())

    for ours, alone in zip(answer(True), answer(False)):
        np.testing.assert_array_equal(ours, alone)


def test_nothing_is_left_behind(tiny: ElasticLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    freed, free = [], llama_cpp.llama_free

    def count(ctx: Any) -> None:
        freed.append(ctx)
        free(ctx)

    monkeypatch.setattr(llama_cpp, "llama_free", count)
    retrieval.retrieval_scores(tiny)
    assert len(freed) == 1
    with monkeypatch.context() as m:
        m.setattr(llama_cpp, "llama_decode", lambda *args: 1)
        with pytest.raises(StateError, match="llama_decode"):
            retrieval.retrieval_scores(tiny)
    assert len(freed) == 2
    with monkeypatch.context() as m:
        m.setattr(llama_cpp, "llama_vocab_n_tokens", lambda vocab: 40)
        with pytest.raises(UnsupportedModelError, match="vocabulary"):
            retrieval.retrieval_scores(tiny)
    assert len(freed) == 3
    assert tiny.session.is_attached


def test_other_memory_is_refused(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "windows.gguf", arch="cohere2")
    with load(model, elastic=None) as llm, pytest.raises(NotImplementedError, match="plain KV"):
        retrieval.retrieval_scores(llm)


def test_random_tokens_are_text(tiny: ElasticLlama) -> None:
    vocab = llama_cpp.llama_model_get_vocab(tiny._model.model)
    tokens = retrieval._random_tokens(vocab)
    assert len(set(tokens)) == retrieval.N_TOKENS
    assert min(tokens) >= 5 + 256  # behind the control and the byte tokens
    assert tokens == retrieval._random_tokens(vocab)


# -- the file


def test_measured_once(tiny: ElasticLlama, folder: Path, measured: list[ElasticLlama]) -> None:
    shares = retrieval.cached_shares(tiny)
    assert shares == retrieval.layer_shares([0.0, 0.2, 0.02])
    assert retrieval.cached_shares(tiny) == shares
    assert measured == [tiny]
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
        b'{"version": 1, "model": PATH}',
        b'{"version": 1, "model": PATH, "scores": null}',
        b'{"version": 1, "model": PATH, "scores": []}',
        b'{"version": 1, "model": PATH, "scores": [0.1, 0.1]}',
        b'{"version": 1, "model": PATH, "scores": [NaN, 0.1, 0.1]}',
        b'{"version": 1, "model": PATH, "scores": ["a", 0.1, 0.1]}',
        b'{"version": 1, "model": "another", "scores": [0.1, 0.1, 0.1]}',
        b'{"version": 0, "model": PATH, "scores": [0.1, 0.1, 0.1]}',
    ],
)
def test_a_broken_file_is_written_anew(
    tiny: ElasticLlama, folder: Path, measured: list[ElasticLlama], broken: bytes
) -> None:
    shares = retrieval.cached_shares(tiny)
    (file,) = folder.iterdir()
    good = file.read_bytes()
    file.write_bytes(broken.replace(b"PATH", json.dumps(tiny.model_path).encode()))
    assert retrieval.cached_shares(tiny) == shares
    assert len(measured) == 2
    assert file.read_bytes() == good
    assert list(folder.iterdir()) == [file]


def test_another_file_is_measured_anew(
    tmp_path: Path, folder: Path, measured: list[ElasticLlama]
) -> None:
    path = write_tiny_llama(tmp_path / "a.gguf")
    for seed in (1, 2):
        write_tiny_llama(path, seed=seed)
        with load(path) as llm:
            retrieval.cached_shares(llm)
    assert len(measured) == 2
    assert len(list(folder.iterdir())) == 2


def test_without_a_cache(
    tiny: ElasticLlama,
    tmp_path: Path,
    measured: list[ElasticLlama],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A folder that cannot be made, none at all, a full disk, and a model file that is gone."""
    shares = retrieval.layer_shares([0.0, 0.2, 0.02])
    (tmp_path / "file").touch()
    monkeypatch.setenv("ELASTIC_LLAMA_CACHE", str(tmp_path / "file"))
    assert retrieval.cached_shares(tiny) == shares

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    with monkeypatch.context() as m:
        m.setattr(retrieval, "cache_dir", no_home)
        assert retrieval.cached_shares(tiny) == shares

    def full(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setenv("ELASTIC_LLAMA_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as m:
        m.setattr(retrieval.os, "replace", full)
        assert retrieval.cached_shares(tiny) == shares
    assert list((tmp_path / "cache" / "retrieval").iterdir()) == []

    monkeypatch.setattr(tiny, "model_path", str(tmp_path / "gone.gguf"))
    assert retrieval.cached_shares(tiny) == shares
    assert len(measured) == 4
