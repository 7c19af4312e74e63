"""ElasticConfig: what it takes, what it refuses, what it shows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from elastic_llama import ConfigError, ElasticConfig, ElasticLlama
from elastic_llama.config import policy_names


@pytest.mark.parametrize(
    "budget", [0.2, 1, 1.0, 1e-6, 2, 300, 300.0, np.float32(0.5), np.int64(64)]
)
def test_budgets_taken(budget):
    config = ElasticConfig(budget=budget)
    assert config.budget == pytest.approx(float(budget))
    assert isinstance(config.budget, int) == (float(budget) > 1)


@pytest.mark.parametrize(
    "budget",
    [
        0,
        0.0,
        -0.1,
        -5,
        1.5,
        2.5,
        float("nan"),
        float("inf"),
        -float("inf"),
        True,
        "0.2",
        None,
        2**40,
    ],
)
def test_budgets_refused(budget):
    with pytest.raises(ConfigError, match="budget"):
        ElasticConfig(budget=budget)


def test_a_percentage_gets_a_hint():
    with pytest.raises(ConfigError, match=r"did you mean 0\.025"):
        ElasticConfig(budget=2.5)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("n_sink", -1),
        ("offset", -1),
        ("min_cells", 0),
        ("n_threads", -1),
        ("probe", -1),
        ("n_sink", 1.5),
        ("offset", "25"),
        ("min_cells", True),
        ("n_threads", 2**31),
    ],
)
def test_whole_numbers(name, bad):
    with pytest.raises(ConfigError, match=name):
        ElasticConfig(**{name: bad})


def test_unknown_policy_lists_the_table():
    with pytest.raises(ConfigError, match="elastic-paper"):
        ElasticConfig(policy="nope")


def test_every_policy_of_the_table_is_taken():
    assert {"full", "local", "elastic", "elastic-paper"} <= set(policy_names())
    for name in policy_names():
        assert ElasticConfig(policy=name).policy == name


def test_repr_can_be_typed_back():
    config = ElasticConfig(budget=np.float64(0.5), n_sink=np.int32(4))
    assert eval(repr(config)) == config


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ElasticConfig().budget = 0.5


def test_off_keeps_everything():
    assert ElasticConfig.off().policy == "full"
    assert ElasticConfig.off().budget == 1.0


def test_kv_budget_is_short_for_the_config(tiny_gqa):
    with ElasticLlama(tiny_gqa, kv_budget=0.5, elastic=ElasticConfig(n_sink=3), n_ctx=256) as llm:
        assert llm.elastic == ElasticConfig(budget=0.5, n_sink=3)
    with pytest.raises(ConfigError, match="kv_budget"):
        ElasticLlama(tiny_gqa, kv_budget=0.5, elastic=None)
