"""Which cell is evicted while generating, compared with the slow oracle."""

from __future__ import annotations

import numpy as np
import pytest
from elastic_llama import _core
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import oracle_generate as oracle

core = _core.core

RULES = ("keep", "distance", "lowest")
GENERATED = 2
RECOMPRESS = "recompress"


@st.composite
def problems(draw, rules=RULES):
    n_cells = draw(st.integers(0, 60))
    chance = draw(st.sampled_from([0.0, 0.0, 0.2, 0.9, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = draw(st.sampled_from([[0], [0, 1], [0, 2], [0, 1, 2], [2]]))
    return {
        "rule": draw(st.sampled_from(rules)),
        "kind": rng.choice(kinds, n_cells).astype(np.uint8),
        "pinned": (rng.random(n_cells) < chance).astype(np.uint8),
        "n_prompt": draw(st.integers(0, n_cells + 5)),
        "offset": draw(st.sampled_from([0, 1, 25, 1000])),
        "n_sink": draw(st.sampled_from([0, 1, 4, 59, 100])),
        "total": np.where(
            rng.random(n_cells) < draw(st.sampled_from([0.0, 0.5, 1.0])),
            np.inf,
            rng.integers(0, draw(st.sampled_from([1, 3, 1000])), n_cells),
        ).astype(np.float32),
    }


def make_problem(rule, n_cells, **changes):
    problem = {
        "rule": rule,
        "kind": np.zeros(n_cells, np.uint8),
        "pinned": np.zeros(n_cells, np.uint8),
        "n_prompt": n_cells - 1,
        "offset": 25,
        "n_sink": 1,
        "total": np.zeros(n_cells, np.float32),
    }
    return {**problem, **changes}


@settings(deadline=None, max_examples=1000)
@given(problems())
def test_cell_to_evict_equals_oracle(problem):
    assert core.cell_to_evict(**problem) == oracle.cell_to_evict(**problem)


@pytest.mark.parametrize("rule", ["heavy", "per_head", RECOMPRESS])
@settings(deadline=None, max_examples=200)
@given(problem=problems())
def test_candidates_equal_oracle(rule, problem):
    for name in ("n_prompt", "offset"):
        del problem[name]
    problem["rule"] = rule
    assert core.eviction_candidates(**problem) == oracle.eviction_candidates(**problem)


@pytest.mark.parametrize("rule", ["per_head", RECOMPRESS])
def test_newest_tokens_and_in_short_answers_whole_text_are_spared(rule):
    kind = np.array([0, 1, 1, 0, 1] + [0] * 12 + [2] * 4, np.uint8)
    total = np.full(21, INF, np.float32)
    args = {"rule": rule, "pinned": np.zeros(21, np.uint8), "n_sink": 1, "total": total}
    assert core.eviction_candidates(kind=kind, **args) == [1, 2, 4]
    total[3] = 1.0  # text of which some had to go: the rest may follow
    assert core.eviction_candidates(kind=kind, **args) == [1, 2, 3, 4]
    kind[:5], total[:] = 0, INF  # nothing else is left
    assert core.eviction_candidates(kind=kind, **args) == [1, 2, 3, 4]
    kind[1:5], kind[16] = [1, 1, 0, 1], 2  # the answer is long
    assert core.eviction_candidates(kind=kind, **args) == [1, 2, 3, 4]


@settings(deadline=None, max_examples=300)
@given(problems())
def test_sinks_pinned_and_newest_cells_stay(problem):
    i = core.cell_to_evict(**problem)
    if i != -1:
        assert problem["n_sink"] <= i < len(problem["kind"]) - 1
        assert not problem["pinned"][i]


@pytest.mark.parametrize(
    ("n_cells", "n_prompt", "offset", "n_sink", "evicted"),
    [
        (101, 100, 25, 1, 75),
        (101, 50, 25, 1, 25),
        (101, 25, 25, 1, 1),  # clamped to the first that may be evicted
        (101, 20, 25, 4, 4),
        (101, 100, 0, 1, 99),  # clamped to the last that may be evicted
        (101, 500, 25, 1, 99),
        (3, 2, 25, 1, 1),
        (3, 2, 25, 0, 0),
        (2, 1, 25, 1, -1),  # a sink and the newest
        (2, 1, 25, 0, 0),
        (1, 1, 25, 0, -1),
        (0, 0, 25, 0, -1),
    ],
)
def test_distance(n_cells, n_prompt, offset, n_sink, evicted):
    changes = {"n_prompt": n_prompt, "offset": offset, "n_sink": n_sink}
    assert core.cell_to_evict(**make_problem("distance", n_cells, **changes)) == evicted


def test_a_pinned_place_moves_later_then_earlier():
    problem = make_problem("distance", 101)
    problem["pinned"][75:80] = 1
    assert core.cell_to_evict(**problem) == 80
    problem["pinned"][75:] = 1
    assert core.cell_to_evict(**problem) == 74


def eviction_order(rule, kind, total):
    problem = make_problem(rule, len(kind), n_prompt=8)
    problem["kind"][:], problem["total"][:] = kind, total
    left = []
    while (i := core.cell_to_evict(**problem)) != -1:
        left.append(problem["total"][i])
        for name in ("kind", "pinned", "total"):
            problem[name] = np.delete(problem[name], i)
    return left


INF = np.inf


def test_lowest_order():
    kind = [0, 1, 1, 1, 0, 1, 0, 0, 2, 2, 2, 2]
    total = [INF, 5, 3, 4, 2, 3, INF, 1, INF, INF, INF, INF]
    assert eviction_order("lowest", kind, total) == [1, 2, 3, 3, 4, 5, INF, INF, INF, INF]


def test_heavy_spares_sinks_pinned_cells_and_the_recent_half():
    problem = {name: make_problem("heavy", 9)[name] for name in ("rule", "kind", "pinned", "total")}
    problem["pinned"][3] = 1
    assert core.eviction_candidates(**problem, n_sink=1) == [1, 2, 4]


def test_equal_scores_are_evicted_from_the_earliest():
    problem = make_problem("lowest", 9)
    problem["total"][:2] = INF
    assert core.cell_to_evict(**problem) == 2


def test_keep_keeps():
    assert core.cell_to_evict(**make_problem("keep", 10)) == -1


def test_nothing_is_evicted_when_all_is_pinned():
    for rule in RULES:
        assert core.cell_to_evict(**make_problem(rule, 10, pinned=np.ones(10, np.uint8))) == -1


@pytest.mark.parametrize(
    "changes", [{"total": np.zeros(9, np.float32)}, {"pinned": np.zeros(11, np.uint8)}]
)
def test_lengths_that_do_not_agree_are_refused(changes):
    with pytest.raises(ValueError, match="one entry per cell"):
        core.cell_to_evict(**make_problem("lowest", 10, **changes))


def test_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"\[rule\] got"):
        core.cell_to_evict(**make_problem("nothing", 10))
