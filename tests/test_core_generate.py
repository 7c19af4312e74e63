"""Which cell leaves while generating, compared with the slow oracle."""

from __future__ import annotations

import numpy as np
import pytest
from elastic_llama import _core
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import oracle_generate as oracle

core = _core.core

RULES = ("keep", "distance", "score")
TEXT, IMAGE, GENERATED = 0, 1, 2


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
        "total": rng.integers(0, draw(st.sampled_from([1, 3, 1000])), n_cells).astype(np.float32),
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
def test_leaving_cell_equals_oracle(problem):
    assert core.leaving_cell(**problem) == oracle.leaving_cell(**problem)


@settings(deadline=None, max_examples=300)
@given(problems())
def test_sinks_pinned_and_newest_cells_stay(problem):
    i = core.leaving_cell(**problem)
    if i != -1:
        assert problem["n_sink"] <= i < len(problem["kind"]) - 1
        assert not problem["pinned"][i]


@pytest.mark.parametrize(
    ("n_cells", "n_prompt", "offset", "n_sink", "leaves"),
    [
        (101, 100, 25, 1, 75),
        (101, 50, 25, 1, 25),
        (101, 25, 25, 1, 1),  # clamped to the first that may leave
        (101, 20, 25, 4, 4),
        (101, 100, 0, 1, 99),  # clamped to the last that may leave
        (101, 500, 25, 1, 99),
        (3, 2, 25, 1, 1),
        (3, 2, 25, 0, 0),
        (2, 1, 25, 1, -1),  # a sink and the newest
        (2, 1, 25, 0, 0),
        (1, 1, 25, 0, -1),
        (0, 0, 25, 0, -1),
    ],
)
def test_distance(n_cells, n_prompt, offset, n_sink, leaves):
    changes = {"n_prompt": n_prompt, "offset": offset, "n_sink": n_sink}
    assert core.leaving_cell(**make_problem("distance", n_cells, **changes)) == leaves


def test_a_pinned_place_moves_later_then_earlier():
    problem = make_problem("distance", 101)
    problem["pinned"][75:80] = 1
    assert core.leaving_cell(**problem) == 80
    problem["pinned"][75:] = 1
    assert core.leaving_cell(**problem) == 74


def test_score_order():
    problem = make_problem("score", 12, n_prompt=8)
    problem["kind"][:] = [0, 1, 1, 1, 0, 1, 0, 0, 2, 2, 2, 2]
    problem["total"][:] = [0, 5, 3, 4, 0, 3, 0, 0, 9, 1, 1, 1]
    left = []
    while (i := core.leaving_cell(**problem)) != -1:
        left.append(problem["total"][i])
        for name in ("kind", "pinned", "total"):
            problem[name] = np.delete(problem[name], i)
    # images from the lowest on, generated tokens from the oldest on, then the rest
    assert left == [3, 3, 4, 5, 9, 1, 1, 0, 0, 0]


def test_equal_scores_leave_from_the_earliest():
    problem = make_problem("score", 9)
    problem["kind"][2:7] = IMAGE
    assert core.leaving_cell(**problem) == 2


def test_keep_keeps():
    assert core.leaving_cell(**make_problem("keep", 10)) == -1


def test_nothing_leaves_when_all_is_pinned():
    for rule in RULES:
        assert core.leaving_cell(**make_problem(rule, 10, pinned=np.ones(10, np.uint8))) == -1


@pytest.mark.parametrize(
    "changes", [{"total": np.zeros(9, np.float32)}, {"pinned": np.zeros(11, np.uint8)}]
)
def test_lengths_that_do_not_agree_are_refused(changes):
    with pytest.raises(ValueError, match="one entry per cell"):
        core.leaving_cell(**make_problem("score", 10, **changes))


def test_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"\[rule\] got"):
        core.leaving_cell(**make_problem("nothing", 10))
