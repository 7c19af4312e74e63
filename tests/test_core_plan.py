"""Plans compared with the slow oracle, for every policy in the table."""

from __future__ import annotations

import numpy as np
import pytest
from elastic_llama import _core
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import oracle_plan as oracle

core = _core.core

POLICIES = {p["name"]: p for p in core.policies()}
NEEDS_IMPORTANCE = sorted(name for name, p in POLICIES.items() if p["needs"]["sum"])
RANKED = {name for name, p in POLICIES.items() if p["evictor"] == "lowest"}
# layers keep as many cells each, unless shares are given
EVEN = [name for name, p in POLICIES.items() if p["layer_budget"] != "pyramid"]
D = 8


@st.composite
def kinds(draw, n_cells):
    """Runs of text, image and generated cells, several images among them."""
    out: list[int] = []
    while len(out) < n_cells:
        out += [draw(st.integers(0, 2))] * draw(st.integers(1, 12))
    return np.array(out[:n_cells], dtype=np.uint8)


@st.composite
def pasts(draw, kind):
    """Text of earlier turns, and tokens that cells stand for; mostly neither."""
    n_cells = len(kind)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    said = draw(st.sampled_from(["none", "none", "before", "here and there"]))
    old = None
    if said != "none":
        first = rng.integers(0, n_cells + 1)
        is_old = np.arange(n_cells) < first if said == "before" else rng.random(n_cells) < 0.5
        old = (is_old & (kind != oracle.IMAGE)).astype(np.uint8)
    most = draw(st.sampled_from([0, 0, 1, 4, 300]))
    tokens = rng.integers(1, most + 1, n_cells).tolist() if most else []
    return {"old": old, "tokens": tokens}


@st.composite
def problems(draw, policies=tuple(EVEN)):
    n_cells = draw(st.one_of(*[st.integers(1, 60)] * 7, st.integers(61, 100)))
    n_layer, n_head = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    kind = draw(kinds(n_cells))
    n_pinned = draw(st.sampled_from([0, 0, 0, 1, 3]))
    pinned = np.zeros(n_cells, dtype=np.uint8)
    for i in draw(st.lists(st.integers(0, n_cells - 1), max_size=n_pinned)):
        pinned[i] = 1
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # whole numbers: sums are exact and ties are many
    levels = draw(st.sampled_from([1, 3, 20, 1 << 20]))
    importance = rng.integers(0, levels, size=(n_layer, n_head, n_cells)).astype(np.float32)
    recent = rng.integers(0, levels, size=importance.shape).astype(np.float32)
    keys = rng.standard_normal((n_layer, n_head, n_cells, D)).astype(np.float32)
    if draw(st.booleans()):  # equal keys, and some of length zero
        keys = keys[:, :, rng.integers(0, n_cells, n_cells)]
        keys[:, :, rng.random(n_cells) < 0.1] = 0
    values = rng.standard_normal(keys.shape).astype(np.float32)
    return {
        "policy": draw(st.sampled_from(sorted(policies))),
        "n_keep": draw(st.integers(1, n_cells)),
        "n_sink": draw(st.sampled_from([0, 1, 1, 4, 100])),
        "kind": kind,
        "pinned": pinned,
        "importance": importance,
        "recent": recent,
        "keys": keys,
        "values": values,
        **draw(pasts(kind)),
    }


def make_problem(policy="elastic", n_cells=10, n_keep=5, **changes):
    rng = np.random.default_rng(0)
    problem = {
        "policy": policy,
        "n_keep": n_keep,
        "n_sink": 1,
        "kind": np.array(([0, 1, 1, 1] * n_cells)[:n_cells], dtype=np.uint8),
        "pinned": np.zeros(n_cells, dtype=np.uint8),
        "importance": rng.random((2, 3, n_cells), dtype=np.float32),
        "recent": rng.random((2, 3, n_cells), dtype=np.float32),
        "keys": rng.standard_normal((2, 3, n_cells, D)).astype(np.float32),
        "values": rng.standard_normal((2, 3, n_cells, D)).astype(np.float32),
    }
    return {**problem, **changes}


def oracle_score(problem):
    rules = POLICIES[problem["policy"]]
    names = ("kind", "importance", "recent", "keys", "values")
    return oracle.scores(rules["scorer"], **{name: problem[name] for name in names})


def oracle_kept(problem, score=None):
    return oracle.select(
        POLICIES[problem["policy"]]["selector"],
        problem["policy"] in RANKED,
        problem["kind"],
        problem["pinned"],
        oracle_score(problem) if score is None else score,
        problem["n_keep"],
        problem["n_sink"],
        problem["old"],
        problem["tokens"],
    )


def check_plan(problem):
    """The plan, or the refusal, is the oracle's."""
    score = oracle_score(problem)
    kept = oracle_kept(problem, score)
    if kept is None:
        with pytest.raises(ValueError, match=r"\[select\] \d+ cells must stay"):
            core.make_plan(**problem)
        return
    plan = core.make_plan(**problem)
    rules = POLICIES[problem["policy"]]
    found = np.full(score.shape, -1)
    if rules["selector"] == "coverage":
        names = ("kind", "pinned", "keys", "values", "n_sink", "old")
        own = {name: problem[name] for name in names}
        kept, found = oracle.coverage(**own, score=score, kept=kept)
    np.testing.assert_array_equal(plan["kept"], kept)
    bucket = oracle.buckets(rules["combiner"], kept, problem["kind"], problem["pinned"], found)
    np.testing.assert_array_equal(plan["bucket"], bucket)
    if rules["combiner"] == "merge_biased":
        keys = np.where(problem["kind"] == oracle.IMAGE, np.float32(0.4), 0)
        np.testing.assert_array_equal(plan["key_weight"], keys)
        weights = score.astype(np.float64)
        np.testing.assert_allclose(plan["weight"], weights, rtol=1e-6)
    np.testing.assert_array_equal(plan["positions"], np.sort(kept, axis=2).max(axis=(0, 1)))
    if rules["selector"] != "all":  # nothing is dropped there
        names = ("kind", "pinned", "n_sink", "old", "tokens")
        own = {name: problem[name] for name in names}
        ranks = oracle.rank_scores(rules["selector"], score=score, kept=kept, **own)
        np.testing.assert_allclose(plan["rank_score"], ranks, rtol=1e-5)


@settings(deadline=None, max_examples=100)
@given(problems())
def test_plan_equals_oracle(problem):
    check_plan(problem)


@pytest.mark.slow
@settings(deadline=None, max_examples=500)
@given(problems())
def test_more_plans_equal_oracle(problem):
    check_plan(problem)


@settings(deadline=None, max_examples=50)
@given(problems())
def test_invariants(problem):
    check_invariants(problem)


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(problems())
def test_more_invariants(problem):
    check_invariants(problem)


def check_invariants(problem):
    if oracle_kept(problem) is None:
        return
    plan = core.make_plan(**problem)
    kept, bucket = plan["kept"], plan["bucket"]
    n_cells, n_keep = bucket.shape[2], kept.shape[2]
    assert n_keep == (n_cells if problem["policy"] == "full" else problem["n_keep"])
    assert (np.diff(np.sort(kept, axis=2), axis=2) > 0).all()
    assert kept.min() >= 0
    assert (kept[..., -1] == n_cells - 1).all()
    n_sink, n_last = oracle.ends(POLICIES[problem["policy"]]["selector"], n_keep, problem["n_sink"])
    assert (kept[..., :n_sink] == np.arange(n_sink)).all()
    assert (np.sort(kept, axis=2)[..., n_keep - n_last :] >= n_cells - n_last).all()
    assert bucket.min() >= -1
    assert bucket.max() < n_keep
    own = np.take_along_axis(bucket, kept.astype(np.int64), axis=2)
    assert (own == np.arange(n_keep)).all()
    for i in np.flatnonzero(problem["pinned"]):
        assert (kept == i).any(axis=2).all()
        assert all((row == row[i]).sum() == 1 for row in bucket.reshape(-1, n_cells))
    assert (np.diff(plan["positions"]) > 0).all()
    if POLICIES[problem["policy"]]["selector"] in ("image_first", "coverage"):
        # rank j is of one kind in all layers and heads
        is_image = problem["kind"][kept] == oracle.IMAGE
        assert (is_image == is_image[0, 0]).all()


def check_layers(problem, plan, n_of_layer=None):
    """Each layer keeps what stays in any case, and of the rest the highest scores."""
    kept = plan["kept"]
    n_of_layer = (kept[:, 0] >= 0).sum(axis=1) if n_of_layer is None else n_of_layer
    score = oracle_score(problem)
    names = ("kind", "pinned", "n_keep", "n_sink")
    selector = POLICIES[problem["policy"]]["selector"]
    stay = oracle.protected(selector, **{name: problem[name] for name in names})
    for layer, head in np.ndindex(*kept.shape[:2]):
        row = score[layer, head]
        order = sorted(range(len(row)), key=lambda i: (i not in stay, -row[i], i))
        held = kept[layer, head][kept[layer, head] >= 0]
        assert sorted(held) == sorted(order[: n_of_layer[layer]])


@pytest.mark.parametrize("seed", range(40))
def test_pyramid_equals_oracle(seed):
    rng = np.random.default_rng(seed)
    n_layer, n_cells = int(rng.integers(1, 9)), int(rng.integers(40, 200))
    shape = (n_layer, 2, n_cells)
    n_keep = int(rng.integers(8, n_cells))
    problem = make_problem("pyramidkv", n_cells, n_keep, n_sink=0)
    problem["kind"][:] = 0
    problem["importance"], problem["recent"] = rng.random((2, *shape), dtype=np.float32)
    problem["keys"] = problem["values"] = np.zeros((*shape, D), np.float32)
    plan = core.make_plan(**problem)
    got = (plan["kept"][:, 0] >= 0).sum(axis=1)
    check_layers(problem, plan, got)

    n_window = oracle.ends("window_top", n_keep, 0)[1]
    room = n_cells - n_window
    expected = oracle.pyramid(n_layer, n_keep - n_window, room)
    assert got.sum() == n_layer * n_keep
    assert (np.diff(got) <= 0).all()
    if max(expected) < room - n_layer:  # nothing was left over for others
        assert np.abs(got - n_window - expected).max() <= n_layer  # rounding
    if n_layer == 1:
        assert got == n_keep


TOP = [n for n, p in POLICIES.items() if p["selector"] in ("top", "heavy_recent", "window_top")]


@pytest.mark.parametrize("policy", TOP)
def test_layers_keep_the_shares_that_are_given(policy):
    problem = make_problem(policy, n_cells=60, n_keep=24)
    plan = core.make_plan(**problem, layer_share=[1.0, 3.0])
    held = (plan["kept"][:, 0] >= 0).sum(axis=1)
    assert held.sum() == 2 * 24
    assert held[1] > held[0]
    check_layers(problem, plan)


def test_a_policy_that_keeps_every_cell_refuses_shares():
    with pytest.raises(ValueError, match="layer_share: got it with the policy full"):
        core.make_plan(**make_problem("full"), layer_share=[1.0, 3.0])


@settings(deadline=None, max_examples=25)
@given(problems())
def test_threads_do_not_matter(problem):
    if oracle_kept(problem) is None:
        return
    one, four = (core.make_plan(**problem, n_threads=n) for n in (1, 4))
    for name in one:
        np.testing.assert_array_equal(one[name], four[name])


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 400), st.integers(0, 400), st.data())
def test_split_budget(n_text, n_image, data):
    n_keep = data.draw(st.integers(0, n_text + n_image))
    text, image = core.split_budget(n_keep, n_text, n_image)
    assert (text, image) == oracle.split(n_keep, n_text, n_image)
    assert text + image == n_keep
    assert 0 <= text <= n_text
    assert 0 <= image <= n_image


@pytest.mark.parametrize("policy", NEEDS_IMPORTANCE)
@pytest.mark.parametrize("bad", [np.nan, -1.0, -1e-30, np.inf, -np.inf])
def test_bad_importance_is_refused(policy, bad):
    problem = make_problem(policy)
    problem["importance"][1, 2, 3] = bad
    with pytest.raises(ValueError, match="expected finite values >= 0"):
        core.make_plan(**problem)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_keep": 0}, "n_keep: got 0"),
        ({"n_keep": -1}, "n_keep: got -1"),
        ({"n_keep": 11}, "n_keep: got 11"),
        ({"n_sink": -1}, "n_sink: got -1"),
        ({"pinned": np.zeros(9, np.uint8)}, "pinned: got 9 entries"),
        (
            {"importance": np.zeros((2, 3, 9), np.float32), "keys": None, "values": None},
            "importance: its shape",
        ),
        ({"kind": np.full(10, 3, np.uint8)}, "kind: got 3"),
        ({"old": np.zeros(9, np.uint8)}, "old, tokens: got 9 and 0 entries"),
        ({"old": np.zeros(11, np.uint8)}, "old, tokens: got 11 and 0 entries"),
        ({"tokens": [1] * 9}, "old, tokens: got 0 and 9 entries"),
        ({"old": np.zeros(10, np.uint8), "tokens": [1] * 11}, "old, tokens: got 10 and 11 entries"),
    ],
)
def test_bad_arguments_are_refused(policy, changes, message):
    with pytest.raises(ValueError, match=message):
        core.make_plan(**make_problem(policy, **changes))


def test_no_cells_refused():
    with pytest.raises(ValueError, match="cells: got none"):
        core.make_plan(**make_problem("local", n_cells=0, n_keep=1))


@pytest.mark.parametrize("missing", ["keys", "values"])
def test_cover_needs_keys_and_values(missing):
    with pytest.raises(ValueError, match="rows: got none"):
        core.make_plan(**make_problem("elastic", **{missing: None}))


@pytest.mark.parametrize("name", ["keys", "values"])
def test_rows_of_another_shape_are_refused(name):
    wrong = {name: np.zeros((2, 2, 10, D), np.float32)}
    with pytest.raises(ValueError, match="keys and values: their shape"):
        core.make_plan(**make_problem("elastic", **wrong))


def test_cover_spends_no_place_on_a_copy():
    """Two groups of equal cells: the second kept cell is of the other group, however unimportant.

    The first cell of the image stays by itself.
    """
    problem = make_problem("elastic", n_cells=10, n_keep=5, n_sink=1)
    problem["kind"][:] = [0] + [1] * 8 + [0]
    problem["importance"][:] = [1, 9, 9, 9, 9, 1, 1, 1, 1, 1]
    problem["recent"][:] = 0
    problem["keys"][:, :, 1:5], problem["keys"][:, :, 5:9] = 1.0, -1.0
    problem["values"][:, :, 1:5], problem["values"][:, :, 5:9] = 1.0, -1.0
    plan = core.make_plan(**problem)
    np.testing.assert_array_equal(plan["kept"][0, 0], [0, 1, 2, 5, 9])
    np.testing.assert_array_equal(plan["bucket"][0, 0], [0, 1, 2, 2, 2, 3, 3, 3, 3, 4])


def test_unknown_policy_lists_the_names():
    with pytest.raises(ValueError, match="expected one of full, random, local"):
        core.make_plan(**make_problem("nothing"))


@pytest.mark.parametrize("recent", [None, np.zeros((2, 3, 9), np.float32)])
def test_recent_scores_are_needed(recent):
    with pytest.raises(ValueError, match="recent: its shape"):
        core.make_plan(**make_problem("snapkv", recent=recent))


def test_bad_recent_scores_are_refused():
    problem = make_problem("snapkv")
    problem["recent"][0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="expected finite values >= 0"):
        core.make_plan(**problem)
