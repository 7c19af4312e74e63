"""A scorer written in Python takes the place of a policy's own."""

from __future__ import annotations

import numpy as np
import pytest
from elastic_llama import _core

from tests.test_core_plan import POLICIES, make_problem

core = _core.core

SELECTING = [name for name, p in POLICIES.items() if not p["keeps_all"]]


@pytest.mark.parametrize("policy", SELECTING)
def test_the_importance_as_scores_is_the_frequency_scorer(policy):
    """What a callable returns goes the way of scores from C++, under every policy."""
    problem = make_problem(policy, n_cells=40, n_keep=17)
    calls = []

    def scorer(view):
        calls.append(view)
        return view.importance

    plan = core.make_plan(**problem, scorer=scorer, n_threads=2)
    assert len(calls) == 1
    assert (plan["bucket"] >= -1).all()
    if policy == "h2o":  # whose own scores these are
        for name, value in core.make_plan(**problem).items():
            np.testing.assert_array_equal(plan[name], value)


def test_the_view_shows_what_was_given():
    problem = make_problem("snapkv", n_cells=12, n_keep=5)
    problem["pinned"][3] = 1
    seen = []

    def scorer(view):
        for name in ("importance", "recent", "kind", "pinned"):
            np.testing.assert_array_equal(getattr(view, name), problem[name])
            assert not getattr(view, name).flags.writeable
        for layer, head in np.ndindex(2, 3):
            np.testing.assert_array_equal(view.keys(layer, head), problem["keys"][layer, head])
            np.testing.assert_array_equal(view.values(layer, head), problem["values"][layer, head])
        seen.append(view)
        return -np.linalg.norm(problem["keys"].astype(np.float64), axis=-1)

    plan = core.make_plan(**problem, scorer=scorer)
    expected = core.make_plan(**{**problem, "policy": "knorm"})
    assert (plan["kept"][..., -1] == 11).all()
    assert expected["kept"].shape == plan["kept"].shape
    # what it holds outlives the call, keys and values do not
    np.testing.assert_array_equal(seen[0].importance, problem["importance"])
    with pytest.raises(ValueError, match="has returned already"):
        seen[0].keys(0, 0)


def test_a_scorer_can_be_one_that_there_is():
    """Knorm in two lines, on the parts of another policy."""
    problem = make_problem("random", n_cells=40, n_keep=17)

    def scorer(view):
        heads = np.ndindex(*view.importance.shape[:2])
        norms = [-np.linalg.norm(view.keys(*at).astype(np.float64), axis=1) for at in heads]
        return np.reshape(norms, view.importance.shape)

    plan = core.make_plan(**problem, scorer=scorer)
    expected = core.make_plan(**{**problem, "policy": "knorm"})
    np.testing.assert_array_equal(plan["kept"], expected["kept"])
    np.testing.assert_array_equal(plan["bucket"], expected["bucket"])


def test_what_a_scorer_raises_arrives():
    class OwnError(Exception):
        pass

    def scorer(view):
        raise OwnError("no scores today")

    with pytest.raises(OwnError, match="no scores today"):
        core.make_plan(**make_problem("h2o"), scorer=scorer)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.zeros((2, 3, 9)), r"got \[2, 3, 9\], expected .* \[2, 3, 10\]"),
        (np.zeros(10), "got 1 dimensions"),
        (np.full((2, 3, 10), np.nan), "got -?nan, expected finite values"),
        (np.full((2, 3, 10), np.inf), "got inf, expected finite values"),
        (None, "got .*, expected an array of numbers"),
        ("text", "got .*, expected an array of numbers"),
    ],
)
@pytest.mark.parametrize("policy", ["h2o", "elastic"])
def test_bad_scores_are_refused(policy, scores, message):
    with pytest.raises(ValueError, match=message):
        core.make_plan(**make_problem(policy), scorer=lambda view: scores)


def test_keys_are_not_there_after_a_scorer_raised():
    seen = []

    def scorer(view):
        seen.append(view)
        raise KeyError

    with pytest.raises(KeyError):
        core.make_plan(**make_problem("h2o"), scorer=scorer)
    with pytest.raises(ValueError, match="has returned already"):
        seen[0].values(0, 0)


def test_policies_that_merge_by_scores_refuse_negative_ones():
    scores = np.full((2, 3, 10), -1.0)
    core.make_plan(**make_problem("h2o"), scorer=lambda view: scores)
    with pytest.raises(ValueError, match="expected finite values >= 0"):
        core.make_plan(**make_problem("elastic"), scorer=lambda view: scores)


def test_keys_of_no_layer_and_without_any():
    def scorer(view):
        return view.keys(2, 0)

    with pytest.raises(IndexError, match="got layer 2"):
        core.make_plan(**make_problem("h2o"), scorer=scorer)
    with pytest.raises(ValueError, match="none were given"):
        core.make_plan(**make_problem("h2o", keys=None, values=None), scorer=scorer)
