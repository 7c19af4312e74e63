"""Later turns about an image: what the image, earlier text and the present question get."""

from __future__ import annotations

import numpy as np
import pytest
from elastic_llama import _core
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import oracle_plan as oracle
from tests.test_core_plan import check_plan, kinds, make_problem, oracle_score, problems

core = _core.core

BY_KIND = ("elastic", "elastic-evict")


@st.composite
def later_turns(draw):
    """Some old text and some image, and cells that are masked in layers or not."""
    n_cells = draw(st.integers(2, 90))
    kind = draw(kinds(n_cells))
    i, j = draw(st.permutations(range(n_cells)))[:2]
    kind[i], kind[j] = oracle.IMAGE, oracle.TEXT
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    old = rng.random(n_cells) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    old[j] = True
    old &= kind != oracle.IMAGE
    most = draw(st.sampled_from([1, 1, 4, 300]))
    n_layer = draw(st.integers(0, 3))
    masked = rng.random((n_layer, n_cells)) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    return {
        "n_keep": draw(st.integers(0, n_cells)),
        "kind": kind,
        "old": old.astype(np.uint8),
        "tokens": rng.integers(1, most + 1, n_cells).tolist(),
        "masked": masked.astype(np.uint8) if n_layer else None,
    }


def image_held(turn) -> int:
    """Cells of the image that a layer has, on average, rounded up."""
    image = turn["kind"] == oracle.IMAGE
    if turn["masked"] is None:
        return int(image.sum())
    rows = (turn["masked"][:, image] == 0).sum(axis=1)
    return -(-int(rows.sum()) // len(rows))


@settings(deadline=None, max_examples=300)
@given(later_turns())
def test_split_equals_oracle(turn):
    assert core.split_with_past(**turn) == oracle.split_later(**turn)


@settings(deadline=None, max_examples=300)
@given(later_turns())
def test_split_properties(turn):
    n_text, n_image = core.split_with_past(**turn)
    n_keep, tokens = turn["n_keep"], np.array(turn["tokens"])
    image, old = turn["kind"] == oracle.IMAGE, turn["old"] == 1
    assert n_text + n_image == n_keep
    assert 0 <= n_text <= (~image).sum()
    assert 0 <= n_image <= image.sum()
    # half of its share at least
    assert n_image >= min(image.sum(), n_keep * tokens[image].sum() // (2 * tokens.sum()))
    # it keeps what it holds where the question and the share of older text leave as much, and gets
    # more only where there is no other way to fill the budget
    room = n_keep - (~image & ~old).sum() - n_keep * tokens[old].sum() // tokens.sum()
    if room >= image_held(turn):
        assert n_image >= image_held(turn)
    if n_image > max(image_held(turn), n_keep * tokens[image].sum() // (2 * tokens.sum())):
        assert n_text == (~image).sum()


@settings(deadline=None, max_examples=80)
@given(later_turns())
def test_a_larger_budget_takes_from_nobody(turn):
    splits = [core.split_with_past(**{**turn, "n_keep": n}) for n in range(len(turn["kind"]) + 1)]
    steps = np.diff(splits, axis=0)
    assert ((steps >= 0) & (steps <= 1)).all()


@settings(deadline=None, max_examples=200)
@given(later_turns(), st.data())
def test_what_stands_for_more_gets_no_less(turn, data):
    before = core.split_with_past(**turn)
    i = data.draw(
        st.sampled_from(np.flatnonzero((turn["kind"] == 1) | (turn["old"] == 1)).tolist())
    )
    turn["tokens"][i] += data.draw(st.sampled_from([1, 50, 10**6]))
    after = core.split_with_past(**turn)
    if turn["kind"][i] == oracle.IMAGE:
        assert after[1] >= before[1]
    else:
        assert after[0] >= before[0]


def turn_of(n_old, n_image, n_new, **changes):
    """Old text, an image, a question."""
    kind = np.array([0] * n_old + [1] * n_image + [0] * n_new, np.uint8)
    old = (np.arange(len(kind)) < n_old).astype(np.uint8)
    return {"kind": kind, "old": old, "tokens": [1] * len(kind), **changes}


@pytest.mark.parametrize(
    ("turn", "n_keep", "expected"),
    [
        (turn_of(40, 40, 10), 50, (32, 18)),  # 10 new, 50 * 40 / 90 = 22 old
        (turn_of(10, 20, 10), 39, (19, 20)),  # 10 new, 9 old: all of the image
        (turn_of(10, 20, 10), 40, (20, 20)),
        (turn_of(10, 40, 80), 40, (34, 6)),  # the question leaves nothing: half of 40 * 40 / 130
        (turn_of(1, 40, 1), 20, (1, 19)),  # 20 * 1 / 42 = 0 for the old
        (turn_of(1, 1, 0), 1, (0, 1)),
        (turn_of(1, 1, 1), 1, (1, 0)),
        # compressed before: 10 new, 20 * 40 / 250 = 3 old, but half of 20 * 200 / 250 is 8
        (turn_of(10, 10, 10, tokens=[4] * 10 + [20] * 10 + [1] * 10), 20, (12, 8)),
        # and of half its share no more than there are
        (turn_of(10, 4, 30, tokens=[1] * 10 + [200] * 4 + [1] * 30), 30, (26, 4)),
        # layers hold 3 of 6 cells of the image on average, or 2.5
        (turn_of(6, 6, 6, masked=[[0] * 6 + [1] * 3 + [0] * 9] * 2), 15, (12, 3)),
        (
            turn_of(6, 6, 6, masked=[[0] * 6 + [1] * 4 + [0] * 8, [0] * 6 + [1] * 3 + [0] * 9]),
            15,
            (12, 3),
        ),
        # cells that text cannot fill go to the image, whatever it holds
        (turn_of(6, 6, 2, masked=[[0] * 6 + [1] * 6 + [0] * 2]), 12, (8, 4)),
    ],
)
def test_split_by_hand(turn, n_keep, expected):
    turn = {**turn, "masked": np.array(turn["masked"], np.uint8)} if "masked" in turn else turn
    assert core.split_with_past(n_keep=n_keep, **turn) == expected
    assert oracle.split_later(n_keep=n_keep, **turn) == expected


def n_of_runs(plan, kind) -> list[int]:
    """Kept cells of each run, which no head may have another number of."""
    runs = oracle.segments(kind)
    counts = np.stack([np.isin(plan["kept"], run).sum(axis=2) for run in runs], axis=-1)
    assert (counts == counts[0, 0]).all()
    return counts[0, 0].tolist()


PAST = problems(policies=BY_KIND).filter(lambda p: oracle.has_past(p["kind"], p["old"]))


@settings(deadline=None, max_examples=15)
@given(PAST)
def test_plan_equals_oracle(problem):
    check_plan(problem)


@pytest.mark.slow
@settings(deadline=None, max_examples=80)
@given(PAST)
def test_more_plans_equal_oracle(problem):
    check_plan(problem)


@settings(deadline=None, max_examples=150)
@given(problems(policies=BY_KIND))
def test_run_shares_add_up(problem):
    rule = "coverage" if problem["policy"] == "elastic" else "image_first"
    names = ("kind", "pinned", "n_keep", "n_sink", "old")
    stay = oracle.protected(rule, **{name: problem[name] for name in names})
    if len(stay) > problem["n_keep"]:
        return
    got = n_of_runs(core.make_plan(**problem), problem["kind"])
    assert sum(got) == problem["n_keep"]
    names = ("kind", "n_keep", "old", "tokens")
    quotas = oracle.quotas(rule, stay=stay, **{name: problem[name] for name in names})
    assert got == [n for _, n in sorted(quotas)]
    for (run, _), n in zip(sorted(quotas), got):
        assert len(stay & set(run)) <= n <= len(run)


@pytest.mark.parametrize("policy", BY_KIND)
def test_nothing_old_and_a_token_each_change_nothing(policy):
    problem = make_problem(policy, n_cells=40, n_keep=17)
    expected = core.make_plan(**problem)
    for past in ({"old": np.zeros(40, np.uint8)}, {"tokens": [1] * 40}, {"tokens": [3] * 40}):
        plan = core.make_plan(**problem, **past)
        for name, value in expected.items():
            np.testing.assert_array_equal(plan[name], value)


@pytest.mark.parametrize("policy", BY_KIND)
def test_old_text_without_an_image_is_text(policy):
    problem = make_problem(policy, n_cells=40, n_keep=17, kind=np.zeros(40, np.uint8))
    expected = core.make_plan(**problem)
    plan = core.make_plan(**problem, old=np.array([1] * 30 + [0] * 10, np.uint8))
    for name, value in expected.items():
        np.testing.assert_array_equal(plan[name], value)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        # 4 new, 30 * 16 / 60 = 8 old, 18 of the image; what is left over goes to the first
        ([1] * 60, [5, 5, 5, 13, 2]),
        # the first image has fewer cells than its part of 23, 90 / 120, and keeps all
        ([1] * 8 + [9] * 10 + [1] * 42, [3, 10, 3, 13, 1]),
        # the second text has said twice as much
        ([1] * 18 + [2] * 8 + [1] * 34, [4, 4, 8, 12, 2]),
        # as much that text would keep more than its cells: the image gets those
        ([1] * 18 + [9] * 8 + [1] * 34, [8, 3, 8, 7, 4]),
    ],
)
def test_runs_share_by_tokens(tokens, expected):
    kind = np.array([0] * 8 + [1] * 10 + [0] * 8 + [1] * 30 + [0] * 4, np.uint8)
    old = np.array([1] * 8 + [0] * 10 + [1] * 8 + [0] * 34, np.uint8)
    past = {"old": old, "tokens": tokens}
    plan = core.make_plan(**make_problem("elastic-evict", 60, 30, kind=kind, n_sink=0), **past)
    assert n_of_runs(plan, kind) == expected


def later_problem(n_old, n_image, n_new, n_keep, **changes):
    """A later turn whose question is looked at least of all."""
    turn = turn_of(n_old, n_image, n_new)
    problem = make_problem("elastic", len(turn["kind"]), n_keep, kind=turn["kind"])
    problem["importance"][:, :, n_old + n_image :] = 0
    problem["recent"][:, :, n_old + n_image :] = 0
    return {**problem, "old": turn["old"], **changes}


def test_the_present_question_stays_and_none_joins_it():
    problem = later_problem(30, 40, 24, 50)
    plan = core.make_plan(**problem)
    asked = range(70, 94)
    for row, bucket in zip(plan["kept"].reshape(-1, 50), plan["bucket"].reshape(-1, 94)):
        assert set(asked) <= set(row)
        joined = {int(row[j]) for i, j in enumerate(bucket) if j >= 0 and row[j] != i}
        assert joined
        assert not joined & set(asked)
    first_turn = core.make_plan(**{**problem, "old": None})
    assert not np.isin(list(asked), first_turn["kept"][0, 0]).all()


def test_a_long_question_takes_half_its_newest_cells():
    problem = later_problem(30, 40, 60, 50)
    protected = oracle.protected(
        "coverage", problem["kind"], problem["pinned"], 50, 1, problem["old"]
    )
    assert {i for i in protected if i >= 70} == set(range(105, 130))
    kept = core.make_plan(**problem)["kept"]
    for row in kept.reshape(-1, 50):
        assert set(range(105, 130)) <= set(row)


@pytest.mark.parametrize("seed", range(8))
def test_layers_that_do_without_cells_of_the_image(seed):
    """The budget holds on average, the question stays whole, and the image has what was split."""
    rng = np.random.default_rng(seed)
    problem = later_problem(30, 40, 12, 60)
    masked = np.zeros((2, 82), np.uint8)
    masked[:, 33:70] = rng.random((2, 37)) < rng.uniform(0.3, 0.95)
    problem["tokens"] = rng.integers(1, 4, 82).tolist()
    plan = core.make_plan(**problem, masked=masked)
    held = plan["kept"] >= 0
    assert (held == held[:, :1]).all()
    assert held[:, 0].sum() <= 2 * 60
    n_image = sum(np.isin(plan["kept"][il, 0], np.arange(30, 70)).sum() for il in range(2))
    turn = {name: problem[name] for name in ("kind", "old", "tokens")}
    most = oracle.split_later(60, **turn, masked=masked)[1]
    assert n_image == min(2 * most, (masked[:, 30:70] == 0).sum())
    for il, ih in np.ndindex(2, 3):
        assert set(range(70, 82)) <= set(plan["kept"][il, ih])
        assert not set(np.flatnonzero(masked[il])) & set(plan["kept"][il, ih])


def test_an_images_cells_weigh_their_score():
    """The score of an image cell is the root of the one that `elastic-evict` has."""
    problem = make_problem("elastic", n_cells=40, n_keep=17)
    weight = core.make_plan(**problem)["weight"]
    undamped = oracle_score({**problem, "policy": "elastic-evict"})
    image = problem["kind"] == oracle.IMAGE
    np.testing.assert_allclose(weight[..., image] ** 2, undamped[..., image], rtol=1e-5)
    np.testing.assert_allclose(weight[..., ~image], undamped[..., ~image], rtol=1e-6)
