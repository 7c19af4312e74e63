"""ElasticConfig: what it takes, what it refuses, what it shows."""

from __future__ import annotations

import ast
import dataclasses
import re

import numpy as np
import pytest
from elastic_llama import ConfigError, ElasticConfig, ElasticLlama, _core, cli
from elastic_llama.cli import options
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


# names of elastic_params -> of ElasticConfig
RENAMED = {"max_cells": "kv_cells"}
NOT_SET = {"max_cells": 0, "overdraft": -1}  # None in ElasticConfig


def test_defaults_are_those_of_the_c_interface():
    native = _core.default_params()
    names = {RENAMED.get(name, name): name for name in native if name != "record"}
    fields = {f.name: f.default for f in dataclasses.fields(ElasticConfig)}
    assert set(fields) - set(names) == {"probe", "scorer"}  # a caller's business
    for ours, name in names.items():
        default = None if native[name] == NOT_SET.get(name) else native[name]
        assert fields[ours] == default, ours


def test_defaults_of_a_native_session_are_those_of_the_c_interface():
    first = _core.Session.__init__.__doc__.splitlines()[0]
    found = dict(re.findall(r"(\w+): [^=,]* = ('[^']*'|[^,)]+)", first))
    native = _core.default_params()
    native["auto_layers"] = native.pop("layers") == "auto"
    assert {name: ast.literal_eval(found[name]) for name in native} == native


def test_what_was_resolved_can_be_read(tiny_gqa):
    config = ElasticConfig(budget=0.5, policy="snapkv", checkpoints=1)
    with ElasticLlama(tiny_gqa, elastic=config, n_ctx=256) as llm:
        resolved = llm.elastic_resolved
        row = next(row for row in _core.core.policies() if row["name"] == "snapkv")
        for part in ("scorer", "selector", "combiner", "evictor", "overdraft"):
            assert getattr(resolved, part) == row[part]
        assert (resolved.policy, resolved.budget, resolved.checkpoints) == ("snapkv", 0.5, 1)
        assert (resolved.kv_cells, resolved.layer_share) == (None, ())
        assert isinstance(resolved.frees_layers, bool)
        with pytest.raises(dataclasses.FrozenInstanceError):
            resolved.budget = 1.0
    assert llm.elastic_resolved is None  # closed


def test_nothing_is_resolved_while_it_is_off(tiny_gqa):
    with ElasticLlama(tiny_gqa, elastic=None, n_ctx=256) as llm:
        assert llm.elastic_resolved is None


def test_a_scorer_in_python_and_given_layers_are_resolved(tiny_gqa):
    def mine(view):
        return view.importance

    config = ElasticConfig(policy=mine, layers=[1.0, 2.0, 3.0], overdraft=7)
    with ElasticLlama(tiny_gqa, elastic=config, n_ctx=256) as llm:
        resolved = llm.elastic_resolved
        assert (resolved.policy, resolved.scorer, resolved.overdraft) == ("elastic", "mine", 7)
        assert resolved.layer_share == (1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("mode", "way"),
    [
        ("own", "own op"),
        ("graph", "fused op, a mask per head"),
        ("streams", "fused op, a head as a stream"),
        ("plain", "plain ops"),
    ],
)
def test_whose_attention_is_resolved(tiny_gqa, monkeypatch, mode, way):
    monkeypatch.setenv("ELASTIC_ATTENTION", mode)
    with ElasticLlama(tiny_gqa, n_ctx=256, n_gpu_layers=0) as llm:
        assert set(llm.elastic_resolved.attention) == {way}


def test_defaults_of_the_command_line_are_those_of_the_config():
    args = cli.build_parser().parse_args(["describe", "image.png"])
    assert options.elastic_config(args) == ElasticConfig()
