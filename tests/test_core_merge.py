"""Merging compared with the slow oracle, for every rule and type."""

from __future__ import annotations

import numpy as np
import pytest
from elastic_llama import _core
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import oracle_merge as oracle
from tests.support.streams import PLAIN, QUANTIZED, Stream, head_bytes, step

core = _core.core

RULES = ("evict", "merge_mean", "merge_biased")
TYPES = PLAIN + QUANTIZED
D = 64


def load(kind, rows, d):
    """f32 of stored rows [n, n_head, head_bytes]."""
    flat = core.dequantize_rows(kind, np.ascontiguousarray(rows).reshape(-1), d)
    return flat.reshape(rows.shape[0], rows.shape[1], d)


def store(kind, x):
    """Stored rows of f32 [n, n_head, d]; plain types by NumPy alone."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    n, n_head, d = x.shape
    if kind == "f32":
        data = x
    elif kind == "f16":
        data = x.astype(np.float16)
    elif kind == "bf16":  # to the nearest, ties to even
        bits = x.view(np.uint32)
        data = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    else:
        data = core.quantize_rows(kind, x.reshape(n * n_head, d))
    return data.view(np.uint8).reshape(n, n_head, head_bytes(kind, d))


class Case:
    """A random layer: a stream shared with other sequences, and a random plan for some rows."""

    def __init__(self, seed, type_k, type_v, n_cells=None, n_keep=None, n_head=2, d=D):
        rng = self.rng = np.random.default_rng(seed)
        n_cells = self.n_cells = n_cells or int(rng.integers(1, 25))
        n_keep = self.n_keep = n_keep or int(rng.integers(1, n_cells + 1))
        self.n_rows, self.n_head, self.d = n_cells + 12, n_head, d

        rows = rng.permutation(self.n_rows)
        self.src = rows[:n_cells] if seed % 2 else np.sort(rows[:n_cells])
        self.dst = np.sort(self.src)[:n_keep]
        poisoned = rows[n_cells : n_cells + 6]
        self.k = self.stream(type_k, poisoned)
        self.v = self.stream(type_v, poisoned)

        self.kept = np.empty((1, n_head, n_keep), np.int32)
        self.bucket = rng.integers(-1, n_keep, (1, n_head, n_cells)).astype(np.int32)
        for h in range(n_head):
            chosen = rng.permutation(n_cells - 1)[: n_keep - 1]
            self.kept[0, h] = np.sort(np.append(chosen, n_cells - 1))
            self.bucket[0, h, self.kept[0, h]] = np.arange(n_keep)
        self.importance = rng.gamma(0.5, 1.0, self.bucket.shape).astype(np.float32)
        self.importance[rng.random(self.importance.shape) < 0.2] = 0
        self.weight = rng.gamma(0.5, 1.0, self.bucket.shape).astype(np.float32)
        self.weight[rng.random(self.importance.shape) < 0.2] = 0
        self.count = rng.integers(1, 4, self.bucket.shape).astype(np.float32)
        self.key_weight = rng.choice(np.array([0.0, 0.4, 1.0], np.float32), n_cells)
        self.bias = np.abs(rng.standard_normal(self.bucket.shape)).astype(np.float32)

    def stream(self, kind, poisoned):
        x = self.rng.standard_normal((self.n_rows, self.n_head, self.d)) * 3
        rows = store(kind, x)
        rows[poisoned] = 0xFF  # NaN in every type
        return Stream.from_rows(kind, self.d, rows)

    def merge(self, rule):
        k, v, importance, count, bias = core.merge_layer(
            rule,
            self.kept,
            self.bucket,
            self.k.data,
            self.k.kind,
            self.v.data,
            self.v.kind,
            self.d,
            self.n_rows,
            list(self.src),
            list(self.dst),
            self.importance,
            self.count,
            self.bias,
            self.weight,
            list(self.key_weight),
        )
        after_k = Stream(self.k.kind, self.n_head, self.d, k)
        after_v = Stream(self.v.kind, self.n_head, self.d, v)
        return after_k, after_v, importance, count, bias

    def cells(self, h):
        """What head h held before, as f32 in logical order."""
        return oracle.Cells(
            load(self.k.kind, self.k.rows()[self.src], self.d)[:, h],
            load(self.v.kind, self.v.rows()[self.src], self.d)[:, h],
            self.importance[0, h],
            self.count[0, h],
            self.bias[0, h],
            self.weight[0, h],
        )


def check_merged(kind, got, expected):
    """Stored rows of one head [n, head_bytes] against what they should hold [n, d]."""
    d = expected.shape[1]
    got_f32 = load(kind, got[:, None], d)[:, 0]
    if kind == "f32":
        np.testing.assert_allclose(got_f32, expected, rtol=1e-6, atol=2e-6)
        return
    nearest_bytes = store(kind, expected[:, None])
    nearest = load(kind, nearest_bytes, d)[:, 0]
    # what is rounded twice may fall to the other side: by one step, and rarely
    assert (np.abs(got_f32 - nearest) <= 1.01 * step(kind, expected) + 2e-6).all()
    assert (got == nearest_bytes[:, 0]).mean() > 0.95
    assert (np.abs(got_f32 - expected) <= 1.1 * step(kind, expected) + 2e-6).all()


def check(case, rule):
    after_k, after_v, importance, count, bias = case.merge(rule)
    for before, after in ((case.k, after_k), (case.v, after_v)):
        others = np.setdiff1d(np.arange(case.n_rows), case.dst)
        np.testing.assert_array_equal(after.rows()[others], before.rows()[others])
    for h in range(case.n_head):
        kept = case.kept[0, h]
        want, took = oracle.merge(rule, kept, case.bucket[0, h], case.cells(h), case.key_weight)
        took = np.array(took)
        for name, before, after in (("k", case.k, after_k), ("v", case.v, after_v)):
            moves = (name == "v") | (case.key_weight[kept] > 0)
            new = took & (rule == "merge_mean" or (rule == "merge_biased") & moves)
            old_rows, new_rows = before.rows()[case.src[kept], h], after.rows()[case.dst, h]
            np.testing.assert_array_equal(new_rows[~new], old_rows[~new])
            if new.any():
                check_merged(before.kind, new_rows[new], getattr(want, name)[new])
        np.testing.assert_allclose(importance[0, h], want.importance, rtol=1e-6)
        np.testing.assert_array_equal(count[0, h], want.count)
        np.testing.assert_allclose(bias[0, h], want.bias, rtol=1e-6, atol=1e-6)
        joined = case.bucket[0, h] >= 0
        if rule != "evict":
            np.testing.assert_allclose(
                importance[0, h].sum(), case.importance[0, h][joined].sum(), rtol=1e-5
            )
            assert count[0, h].sum() == case.count[0, h][joined].sum()


@pytest.mark.parametrize("type_v", TYPES)
@pytest.mark.parametrize("type_k", TYPES)
@pytest.mark.parametrize("rule", RULES)
def test_merge_equals_oracle(rule, type_k, type_v):
    for seed in range(4):
        check(Case(seed, type_k, type_v), rule)


@settings(deadline=None, max_examples=300)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(RULES),
    st.sampled_from(TYPES),
    st.sampled_from(TYPES),
    st.integers(1, 60),
    st.integers(1, 4),
    st.sampled_from([32, 96]),
    st.data(),
)
def test_merge_equals_oracle_for_any_plan(seed, rule, type_k, type_v, n_cells, n_head, d, data):
    n_keep = data.draw(st.sampled_from([1, n_cells, max(1, n_cells // 5), max(1, n_cells // 2)]))
    check(Case(seed, type_k, type_v, n_cells, n_keep, n_head, d), rule)


@pytest.mark.parametrize("d", [1, 3, 80])
@pytest.mark.parametrize("kind", PLAIN)
def test_head_sizes_that_are_no_whole_blocks(kind, d):
    for seed in range(4):
        check(Case(seed, kind, kind, d=d), "merge_mean")


def as_case(k, v, importance, kept, bucket, bias=None, count=None, key_weight=0.0):
    """An f32 case of one head out of given cells, in rows of their own."""
    case = Case(0, "f32", "f32", len(k), len(kept), 1, k.shape[1])
    case.n_rows = len(k)
    case.src, case.dst = np.arange(len(k)), np.arange(len(kept))
    case.k = Stream.from_rows("f32", k.shape[1], store("f32", k[:, None]))
    case.v = Stream.from_rows("f32", k.shape[1], store("f32", v[:, None]))
    case.kept, case.bucket = kept[None, None].astype(np.int32), bucket[None, None].astype(np.int32)
    case.importance = case.weight = importance[None, None].astype(np.float32)
    case.key_weight = np.full(len(k), key_weight, np.float32)
    case.bias = np.zeros_like(case.importance) if bias is None else bias[None, None]
    case.count = np.ones_like(case.importance) if count is None else count[None, None]
    return case


def merged_cells(case, rule):
    k, v, importance, count, bias = case.merge(rule)
    rows_k, rows_v = (load("f32", s.rows()[case.dst], case.d)[:, 0] for s in (k, v))
    return oracle.Cells(rows_k, rows_v, importance[0, 0], count[0, 0], bias[0, 0])


def random_plan(rng, n_cells, n_keep):
    """Kept cells, and a bucket for each of the others."""
    kept = np.sort(np.append(rng.permutation(n_cells - 1)[: n_keep - 1], n_cells - 1))
    bucket = rng.integers(0, n_keep, n_cells)
    bucket[kept] = np.arange(n_keep)
    return kept, bucket


@pytest.mark.parametrize("key_weight", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("equal_keys", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_biased_attention_is_conserved(seed, equal_keys, key_weight):
    rng = np.random.default_rng(seed)
    n, d = 40, 16
    k, v = rng.standard_normal((2, n, d)).astype(np.float32)
    q, other = rng.standard_normal((2, d))
    kept, bucket = random_plan(rng, n, 9)
    if equal_keys:
        k = k[kept][bucket]
    importance = oracle.attention_weights(q, k)
    cells = merged_cells(
        as_case(k, v, importance, kept, bucket, key_weight=key_weight), "merge_biased"
    )
    # any query when keys are equal within a bucket, otherwise the one the importance comes from
    for query in (q, other) if equal_keys else (q,):
        want = oracle.attention(query, k, v, np.zeros(n))
        got = oracle.attention(query, cells.k, cells.v, cells.bias)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    # merged again, without the tokens being known any more
    kept, bucket = random_plan(rng, 9, 3)
    state = cells.k, cells.v, cells.importance, kept, bucket, cells.bias, cells.count
    case = as_case(*state, key_weight)
    again = merged_cells(case, "merge_biased")
    got = oracle.attention(q, again.k, again.v, again.bias)
    want = oracle.attention(q, k, v, np.zeros(n))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert again.count.sum() == n
    np.testing.assert_allclose(again.importance.sum(), 1, rtol=1e-5)


def test_means_of_means_are_means_of_all():
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 20, 16)).astype(np.float32)
    kept, bucket = random_plan(rng, 20, 6)
    first = merged_cells(as_case(k, v, np.ones(20), kept, bucket), "merge_mean")
    one = np.array([5]), np.array([0] * 6)
    case = as_case(first.k, first.v, first.importance, *one, first.bias, first.count)
    last = merged_cells(case, "merge_mean")
    np.testing.assert_allclose(last.k[0], k.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(last.v[0], v.mean(axis=0), rtol=1e-5, atol=1e-6)
    assert last.count[0] == 20


@pytest.mark.parametrize("key_weight", [0.0, 0.4])
@pytest.mark.parametrize("smallest", [0.0, 1e-45, 1e-40, 1e-38])
def test_anchors_next_to_no_importance_get_a_finite_bias(smallest, key_weight):
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 3, 16)).astype(np.float32)
    importance = np.array([1, 2, smallest], np.float32)
    case = as_case(k, v, importance, np.array([2]), np.array([0, 0, 0]), key_weight=key_weight)
    check(case, "merge_biased")
    assert np.isfinite(merged_cells(case, "merge_biased").bias).all()


def test_types_without_rows_of_their_own_are_refused():
    case = Case(1, "f16", "f16")
    case.v.kind = "q2_K"
    with pytest.raises(ValueError, match="type q2_K"):
        case.merge("merge_biased")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("src", lambda rows: rows[:-1], "rows: got"),
        ("dst", lambda rows: rows[:-1], "rows: got"),
        ("src", lambda rows: rows + 1000, "rows_src: got"),
        ("dst", lambda rows: rows - 1000, "rows_dst: got"),
    ],
)
def test_bad_rows_are_refused(name, change, message):
    case = Case(1, "f16", "f16")
    setattr(case, name, change(getattr(case, name)))
    with pytest.raises(ValueError, match=message):
        case.merge("merge_biased")


def test_incomplete_blocks_are_refused():
    case = Case(1, "q8_0", "q8_0")
    case.d = 48
    with pytest.raises(ValueError, match="n_embd_head: got 48"):
        case.merge("merge_biased")


def test_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"\[rule\] got"):
        Case(1, "f16", "f16").merge("nothing")
