"""A scorer written in Python as a policy: what it decides, and what comes of what it raises."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import elastic_llama
import numpy as np
import pytest
from elastic_llama import ConfigError, Conversation, ElasticConfig, ElasticError, ElasticLlama

from tests.support.engine import random_tokens

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "snapkv_scorer.py"


class OwnError(Exception):
    pass


def by_importance(view: Any) -> np.ndarray:
    return np.asarray(view.importance)


@elastic_llama.scorer(like="h2o")
def received(view: Any) -> np.ndarray:
    return np.asarray(view.importance)


def load(path: Path, policy: Any, **config: Any) -> ElasticLlama:
    config = {"layers": "even", "min_cells": 8, "budget": 0.25, **config}
    return ElasticLlama(path, elastic=ElasticConfig(policy=policy, **config), n_ctx=512)


def answer(llm: ElasticLlama, n_prompt: int = 120, n: int = 12) -> list[int]:
    out: list[int] = []
    for token in llm.generate(random_tokens(n_prompt, llm.n_vocab(), 1), temp=0.0):
        out.append(token)
        if len(out) == n:
            break
    return out


# -- the configuration


def test_a_plain_callable_is_a_scorer_of_elastic() -> None:
    config = ElasticConfig(policy=by_importance)
    assert (config.policy, config.scorer) == ("elastic", by_importance)
    assert "scorer=<function by_importance" in repr(config)
    assert replace(config, budget=0.5).scorer is by_importance
    assert config == ElasticConfig(scorer=by_importance)
    assert config != ElasticConfig()


def test_a_marked_one_says_whose_parts_are_used() -> None:
    config = ElasticConfig(policy=received)
    assert (config.policy, config.scorer) == ("h2o", received)
    assert pickle.loads(pickle.dumps(config)) == config
    assert ElasticConfig(policy="snapkv", scorer=received).policy == "snapkv"


def test_without_a_scorer_nothing_shows() -> None:
    config = ElasticConfig()
    assert config.scorer is None
    assert "scorer" not in repr(config)
    assert eval(repr(config)) == config == pickle.loads(pickle.dumps(config))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ElasticConfig(policy=received, scorer=by_importance), "pass one of them"),
        (lambda: replace(ElasticConfig(policy=received), policy=by_importance), "pass one of them"),
        (lambda: ElasticConfig(scorer=3), "a callable or None"),
        (lambda: ElasticConfig(policy="full", scorer=received), "keeps every cell"),
        (lambda: elastic_llama.scorer(like="nope"), "elastic-paper"),
        (lambda: elastic_llama.scorer(by_importance), "name of a policy"),
    ],
)
def test_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# -- what it decides


def test_the_importance_is_h2o(tiny_gqa: Path) -> None:
    found = []
    for policy in (received, "h2o"):
        with load(tiny_gqa, policy) as llm:
            tokens = answer(llm)
            found.append((tokens, llm.session.last_plan()["kept"], llm.session.cells(0)["pos"]))
    assert found[0][0] == found[1][0]
    for ours, theirs in zip(found[0][1:], found[1][1:]):
        np.testing.assert_array_equal(ours, theirs)


def test_called_once_per_compression(tiny_gqa: Path) -> None:
    calls = []

    def count(view: Any) -> np.ndarray:
        calls.append(view.importance.shape[-1])
        return np.asarray(view.importance)

    with load(tiny_gqa, count, overdraft=8) as llm:
        answer(llm, n=30)
        assert len(calls) == llm.stats.compressions > 1
        assert calls[0] == 120


def example() -> Any:
    spec = importlib.util.spec_from_file_location("snapkv_scorer", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_snapkv_in_numpy_is_snapkv(tiny_gqa: Path) -> None:
    module = example()
    kept, tokens = module.run(module.snapkv, str(tiny_gqa))
    expected, expected_tokens = module.run("snapkv", str(tiny_gqa))
    assert kept.shape[-1] > 16
    np.testing.assert_array_equal(kept, expected)
    assert tokens == expected_tokens


@pytest.mark.slow
@pytest.mark.model
def test_the_example_runs(embedded_model: Path) -> None:
    """On the embedded model: it says that cells and answers are the built-in's."""
    run = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=True)
    assert run.stdout.count(": True") == 2, run.stdout


# -- what it raises


def ask(llm: ElasticLlama) -> None:
    "".join(Conversation(llm).ask("word " * 30, max_tokens=4))


def complete(llm: ElasticLlama) -> None:
    llm.create_completion(random_tokens(120, llm.n_vocab(), 1), max_tokens=4)


def by_hand(llm: ElasticLlama) -> None:
    llm.eval(random_tokens(120, llm.n_vocab(), 1))
    llm.eval([20])


CALLS = [by_hand, answer, complete, ask]


ERRORS = [
    OwnError("no scores today"),
    KeyboardInterrupt(),
    ValueError("these exceed me"),
    RuntimeError("returned 1"),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("like", "error"),
    [
        *(("elastic", error) for error in ERRORS[:3]),
        pytest.param("elastic", ERRORS[3], marks=pytest.mark.slow),
        *(pytest.param("h2o", error, marks=pytest.mark.slow) for error in ERRORS),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_what_it_raises_arrives_and_all_cells_stay(
    tiny_gqa: Path, like: str, error: BaseException, call: Callable[[ElasticLlama], Any]
) -> None:
    broken = [True]

    @elastic_llama.scorer(like=like)
    def score(view: Any) -> np.ndarray:
        if broken[0]:
            raise error
        return np.asarray(view.importance)

    with load(tiny_gqa, score) as llm:
        with pytest.raises(type(error)) as caught:
            call(llm)
        assert caught.value is error
        assert llm.stats.compressions == llm.stats.evictions == 0
        assert llm.session.n_cells(0) == llm.session.n_tokens(0) == llm.n_tokens
        broken[0] = False
        llm.reset()
        call(llm)
        assert llm.stats.compressions > 0


def test_what_a_later_compression_raises_arrives(tiny_gqa: Path) -> None:
    """Of an answer beyond its overdraft; one cell left instead, and the answer can go on."""
    broken: list[int] = []

    def score(view: Any) -> np.ndarray:
        broken.append(1)
        if len(broken) == 2:
            raise OwnError
        return np.asarray(view.importance)

    with load(tiny_gqa, score, overdraft=8) as llm:
        with pytest.raises(OwnError):
            answer(llm, n=30)
        assert (llm.stats.compressions, llm.stats.evictions) == (1, 1)
        for _ in range(4):
            llm.eval([20])
        assert llm.stats.compressions == 2


def test_under_a_cap_it_arrives_in_the_prompt(tiny_gqa: Path) -> None:
    def score(view: Any) -> np.ndarray:
        raise OwnError

    config = ElasticConfig(policy=score, kv_cells=32, min_cells=8)
    with ElasticLlama(tiny_gqa, elastic=config, n_ubatch=32) as llm:
        with pytest.raises(OwnError):
            llm.eval(random_tokens(200, llm.n_vocab(), 1))
        llm.reset()
        llm.eval(random_tokens(20, llm.n_vocab(), 1))
        assert llm.session.n_cells(0) == 20


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda shape: np.zeros(shape[1:]), r"got \[2, 120\], expected .* = \[3, 2, 120\]"),
        (lambda shape: np.full(shape, np.nan), "got nan, expected finite values >= 0"),
        (lambda shape: np.full(shape, 1e300), "got inf, expected finite values >= 0"),
        (lambda shape: np.full(shape, -1.0), "got -1.0, expected finite values >= 0"),
        (lambda shape: None, "got None, expected an array"),
        (lambda shape: "text", "got str, expected an array"),
        (lambda shape: [[1.0], [1.0, 2.0]], "got list, expected an array"),
    ],
)
@pytest.mark.parametrize("call", [by_hand, complete])
def test_bad_scores_arrive(
    tiny_gqa: Path, scores: Any, message: str, call: Callable[[ElasticLlama], Any]
) -> None:
    with load(tiny_gqa, lambda view: scores(view.importance.shape)) as llm:
        with pytest.raises(ElasticError, match=message) as caught:
            call(llm)
        assert isinstance(caught.value, ConfigError)
        assert llm.session.n_cells(0) == 120
