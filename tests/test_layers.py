"""Layers that keep different numbers of cells under one budget."""

from __future__ import annotations

import ctypes
import math
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from elastic_llama import ElasticConfig, ElasticLlama, _core
from elastic_llama.errors import ConfigError

from tests.support import oracle_plan as oracle
from tests.support.engine import N_GPU_LAYERS, Engine, held_after, nmse, random_tokens
from tests.test_core_plan import make_problem
from tests.test_oracles import N_VOCAB, feed

core = _core.core
SHARE = [0.5, 2.0, 0.5]  # of the tiny model's layers
ELASTIC: dict[str, Any] = {"policy": "elastic", "budget": 0.2, "min_cells": 8}
UNEVEN = {**ELASTIC, "layer_share": SHARE}
OVERDRAFT = 32  # what the policy is made for
overdrafts = pytest.mark.parametrize("overdraft", [0, OVERDRAFT])
linux = pytest.mark.skipif(
    not sys.platform.startswith("linux") or N_GPU_LAYERS > 0, reason="gives pages back"
)


def cells_of_layers(n: int, share: list[float], room: list[int]) -> list[int]:
    """One for each layer with room, then all others one at a time to the layer furthest behind."""
    out = [min(1, r) if n > 0 else 0 for r in room]
    for _ in range(n * len(share) - sum(out)):
        open_layers = [i for i, r in enumerate(room) if out[i] < r]
        if not open_layers:
            break
        out[min(open_layers, key=lambda i: (out[i] / share[i], i))] += 1
    return out


def problem_of(seed: int) -> dict[str, Any]:
    """Text, or an image between two pieces of text; some cells masked in a layer already."""
    rng = np.random.default_rng(seed)
    n_layer, n_cells = int(rng.integers(1, 5)), int(rng.integers(30, 91))
    shape = (n_layer, 2, n_cells)
    kind = np.zeros(n_cells, np.uint8)
    if seed % 2:
        kind[8 : n_cells - 8] = 1
    masked = np.zeros((n_layer, n_cells), np.uint8)
    if seed % 3 == 0:
        masked[:, 4:-4] = rng.random((n_layer, n_cells - 8)) < 0.3
    keys = rng.standard_normal((*shape, 6)).astype(np.float32)
    return {
        "policy": "elastic",
        "n_keep": int(rng.integers(12, n_cells - 4)),
        "n_sink": 1,
        "kind": kind,
        "pinned": np.zeros(n_cells, np.uint8),
        "importance": rng.random(shape, dtype=np.float32),
        "recent": rng.random(shape, dtype=np.float32),
        "keys": keys,
        "values": rng.standard_normal(keys.shape).astype(np.float32),
        "layer_share": rng.uniform(0.2, 4, n_layer).tolist(),
        "masked": masked,
    }


@pytest.mark.parametrize(
    "seed", [*range(8), *(pytest.param(i, marks=pytest.mark.slow) for i in range(8, 24))]
)
def test_each_layer_is_covered_as_if_it_were_alone(seed: int) -> None:
    """NumPy's selection by coverage of the cells that the layer holds, as many as it keeps."""
    problem = problem_of(seed)
    plan = core.make_plan(**problem)
    kind, masked, n_keep = problem["kind"], problem["masked"], problem["n_keep"]
    score = oracle.scores(
        "expected_attention_damped", kind, problem["importance"], problem["recent"]
    )
    stay = oracle.protected("coverage", kind, problem["pinned"], n_keep, 1)
    not_mergeable = oracle.verbatim(kind, n_keep)
    n_of_run = oracle.quotas("coverage", kind, stay, n_keep)
    n_layer = len(masked)
    for run, n_run in n_of_run:
        here = [[i for i in run if not masked[il, i]] for il in range(n_layer)]
        is_open = n_run < len(run)
        free = n_run - len(stay.intersection(run))
        room = [len(cells) - len(stay.intersection(cells)) for cells in here]
        for il in range(n_layer):
            for ih in range(2):
                kept = [i for i in plan["kept"][il, ih] if i in run]
                if not is_open:
                    assert sorted(kept) == here[il]
                    continue
                n_free = len(kept) - len(stay.intersection(here[il]))
                assert 0 <= n_free <= room[il]
                x = oracle.run_features(
                    here[il], problem["keys"][il, ih], problem["values"][il, ih]
                )
                chosen, joins = oracle.cover_run(
                    here[il], stay, not_mergeable, score[il, ih], x, len(kept)
                )
                assert kept == chosen
                row = list(plan["kept"][il, ih])
                for i, anchor in joins.items():
                    assert plan["bucket"][il, ih, i] == row.index(anchor)
        if is_open:
            got = [len([i for i in plan["kept"][il, 0] if i in run]) for il in range(n_layer)]
            n_stay = [len(stay.intersection(cells)) for cells in here]
            expected = cells_of_layers(free, problem["layer_share"], room)
            if masked.any():  # another run may have left some
                assert sum(got) - sum(n_stay) >= sum(expected)
            else:
                assert sum(got) - sum(n_stay) == sum(expected)
                assert np.abs(np.array(got) - n_stay - expected).max() <= 2 * n_layer  # rounding


@pytest.mark.parametrize("seed", range(60))
def test_ranks_agree_between_layers(seed: int) -> None:
    """Positions ascend to the last, the newest cells have the last ranks, kinds are the same."""
    problem = problem_of(seed)
    plan = core.make_plan(**problem)
    kept, kind = plan["kept"], problem["kind"]
    held = kept >= 0
    assert (held == held[:, :1]).all()
    assert held.any(axis=(0, 1)).all()
    assert (np.diff(plan["positions"]) > 0).all()
    assert plan["positions"][-1] == len(kind) - 1
    assert (kept[..., -1] == len(kind) - 1).all()
    for j in range(kept.shape[2]):
        assert len(set(kind[kept[..., j][held[..., j]]] == 1)) == 1
    newest = oracle.protected("coverage", kind, problem["pinned"], problem["n_keep"], 0)
    tail = [i for i in range(len(kind)) if set(range(i, len(kind))) <= newest]
    for n, i in enumerate(reversed(tail)):
        if not problem["masked"][:, i:].all(axis=0).any():  # somebody holds each of them
            there = problem["masked"][:, i] == 0
            assert (kept[there][..., -1 - n] == i).all()
    total = held[:, 0].sum()
    assert total <= problem["n_keep"] * held.shape[0]


def test_equal_shares_change_nothing() -> None:
    problem = make_problem(n_cells=60, n_keep=20)
    expected = core.make_plan(**problem)
    plan = core.make_plan(**problem, layer_share=[3.0, 3.0])
    for name, value in expected.items():
        np.testing.assert_array_equal(plan[name], value)


def test_what_a_layer_cannot_take_goes_to_the_others() -> None:
    problem = make_problem(n_cells=60, n_keep=40, kind=np.zeros(60, np.uint8))
    held = core.make_plan(**problem, layer_share=[1.0, 100.0])["kept"] >= 0
    assert held[1].all()
    assert held[:, 0].sum() == 2 * 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_share": [1.0]}, r"layer_share: got 1 layers, expected 2"),
        ({"layer_share": [1.0, 0.0]}, r"layer_share: got 0\.0+, expected finite values > 0"),
        ({"layer_share": [1.0, float("nan")]}, r"layer_share: got -?nan"),
        ({"masked": np.zeros(3, np.uint8)}, r"masked: got 3 entries"),
    ],
)
def test_bad_shares_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        core.make_plan(**make_problem(), **changes)


@pytest.mark.parametrize("auto", [False, True])
def test_bad_shares_are_not_attached(tiny_gqa: Path, auto: bool) -> None:
    shares = {"layer_share": [1.0, 0.0, 1.0], "auto_layers": auto}
    with pytest.raises(ValueError, match=r"layer_share: got 0\.0+, expected finite values > 0"):
        Engine(tiny_gqa, elastic=shares)


def test_a_masked_row_is_left_as_it_is() -> None:
    """No importance, and a bias under which nothing attends to it; the others merge as ever."""
    rng = np.random.default_rng(0)
    n, d = 6, 8
    k, v = (rng.standard_normal((n, 1, d)).astype(np.float32) for _ in range(2))
    kept = np.array([[[0, -1, 5]]], np.int32)
    bucket = np.array([[[0, 0, 0, 2, 2, 2]]], np.int32)
    ones = np.ones((1, 1, n), np.float32)
    rows = [7, 6, 5, 4, 3, 2]
    store_k, store_v = (np.zeros((8, d), np.float32) for _ in range(2))
    store_k[rows], store_v[rows] = k[:, 0], v[:, 0]
    out_k, out_v, importance, _, bias = core.merge_layer(
        "merge_biased", kept, bucket, store_k.view(np.uint8).ravel(), "f32",
        store_v.view(np.uint8).ravel(), "f32", d, 8, rows, [2, 3, 4],
        ones, ones, 0 * ones,
    )  # fmt: skip
    out_k, out_v = (x.view(np.float32).reshape(8, d) for x in (out_k, out_v))
    np.testing.assert_array_equal(out_v[3], store_v[3])
    np.testing.assert_array_equal(out_k[3], store_k[3])
    assert importance[0, 0].tolist() == [3, 0, 3]
    assert bias[0, 0, 1] == -np.inf
    np.testing.assert_allclose(bias[0, 0, [0, 2]], np.log(3), rtol=1e-6)
    np.testing.assert_allclose(out_v[[2, 4]], [v[:3, 0].mean(0), v[3:, 0].mean(0)], rtol=1e-5)


def with_overdraft(config: dict[str, Any], overdraft: int) -> dict[str, Any]:
    """The policy's own number by default, not by its value."""
    return {**config, "overdraft": -1 if overdraft == OVERDRAFT else overdraft}


@overdrafts
def test_the_budget_holds_on_average(tiny_gqa: Path, overdraft: int) -> None:
    """After the prompt, while generating, and after another prompt; in proportion to the shares."""
    config = with_overdraft(UNEVEN, overdraft)
    with Engine(tiny_gqa, elastic=config) as e:
        n = feed(e, 300)
        e.session.compress(0)
        held = e.session.cells_per_layer(0)
        total = int(0.2 * n) - oracle.left_free(int(0.2 * n))
        assert 3 * total - 3 <= held.sum() <= 3 * total
        assert held[0] == held[2] < total < held[1] == e.session.n_cells(0)
        assert e.session.n_per_layer(0) == -(-held.sum() // 3)
        size = e.session.kv_bytes_per_cell()
        bias = 4 * 3 * 2
        assert e.session.kv_bytes(0) == held.sum() * (size - bias) // 3 + bias * held[1]
        found, expected, promised = [e.session.n_per_layer(0)], [e.session.n_per_layer(0)], []
        for i in range(60):
            e.token(20, n + i)
            promised.append(-(-2 * (n + i + 1) // 10))
            found.append(e.session.n_per_layer(0))
            expected.append(held_after(expected[-1], promised[-1], overdraft))
            assert found[-1] <= promised[-1] + overdraft
        assert found == expected
        if overdraft:
            assert min(np.diff(found)) == 83 - 114  # 82 for 407 tokens; of 114 one more is added
            assert found[-1] == 83 + 13
        else:
            assert found[-1] == -(-2 * (n + 60) // 10)
        before = e.session.n_cells(0) - e.session.cells_per_layer(0)
        e.prompt(random_tokens(100, N_VOCAB, 5), n + 60)
        np.testing.assert_array_equal(e.session.n_cells(0) - e.session.cells_per_layer(0), before)
        e.session.compress(0)
        n += 160
        total = int(0.2 * n) - oracle.left_free(int(0.2 * n))
        assert 3 * total - 3 <= e.session.cells_per_layer(0).sum() <= 3 * total


def masked_rows(e: Engine) -> list[set[int]]:
    """Masked rows of the cache in each layer."""
    index = e.session.cells(0)["index"]
    return [set(index[row]) for row in np.isneginf(e.session.bias(0)[:, 0])]


def test_what_is_evicted_is_evicted_from_every_layer(tiny_gqa: Path) -> None:
    """Each token that comes takes a row in all layers; none goes where a layer has given it up."""
    config = {**UNEVEN, "overdraft": 0}
    with Engine(tiny_gqa, elastic=config) as e:
        n = feed(e, 300)
        e.session.compress(0)
        first = masked_rows(e)
        for i in range(40):
            e.token(20, n + i)
        assert masked_rows(e) == first
        assert e.session.stats()["evictions"] > 0


def test_an_overdraft_is_taken_in_every_layer(tiny_gqa: Path) -> None:
    """Until it is used up rows are as above; the merge shares them out anew among the layers."""
    with Engine(tiny_gqa, elastic=UNEVEN) as e:
        n = feed(e, 300)
        e.session.compress(0)
        merges = []
        before, gone = e.session.cells_per_layer(0), masked_rows(e)
        for i in range(120):
            e.token(20, n + i)
            rows = e.session.cells_per_layer(0)
            index = e.session.cells(0)["index"]
            masked = masked_rows(e)
            assert not any(index[-1] in layer for layer in masked)  # the token itself
            if rows[1] > before[1]:
                assert masked == gone
                assert (rows - before == 1).all()
            else:
                merges.append(i)
                promised = -(-2 * (n + i + 1) // 10)
                assert 3 * promised - 3 <= rows.sum() - 3 <= 3 * promised
                assert max(rows[0], rows[2]) < promised < rows[1]
                assert index.max() == len(index) - 1  # the first rows again
                assert not set.intersection(*masked)
            before, gone = rows, masked
        assert merges == [46, 86]  # 68 cells at first, then 83: of 82 + 32, and of 90 + 32
        assert e.session.stats()["compressions"] == 3
        assert e.session.stats()["evictions"] == 0


def test_a_layer_alone_hears_nothing_of_what_it_does_without(tiny_gqa: Path) -> None:
    """What lies in the rows that a layer gave up changes no bit of what is said."""
    said = []
    for release in (False, True):  # left as they are, or zero
        config = {**UNEVEN, "release_memory": release}
        with Engine(tiny_gqa, elastic=config) as e:
            n = feed(e, 300)
            said.append(e.forced(random_tokens(30, N_VOCAB, 3), n))
            e.prompt(random_tokens(100, N_VOCAB, 4), n + 30)
            said.append(e.logits(-1))
    np.testing.assert_array_equal(said[0], said[2])
    np.testing.assert_array_equal(said[1], said[3])


@pytest.mark.parametrize("whole", [True, False], ids=["context", "sequence"])
def test_save_load_continue(tiny_gqa: Path, whole: bool) -> None:
    forced = random_tokens(30, N_VOCAB, 3)
    which = None if whole else 0
    with Engine(tiny_gqa, elastic=UNEVEN) as e:
        n = feed(e, 300)
        e.forced(forced[:10], n)
        data = e.save(which)
        straight = e.forced(forced[10:], n + 10)
        held = e.session.cells_per_layer(0).tolist()
    for config in (UNEVEN, ELASTIC):  # who loads it need not have shares of its own
        with Engine(tiny_gqa, elastic=config) as e:
            assert e.load(data, which) == len(data)
            assert nmse(straight, e.forced(forced[10:], n + 10)) <= 1e-10
            assert e.session.cells_per_layer(0).tolist() == held


def test_two_streams_do_not_disturb_each_other(tiny_gqa: Path) -> None:
    forced = random_tokens(20, N_VOCAB, 3)
    with Engine(tiny_gqa, elastic=UNEVEN) as e:
        n = feed(e, 300)
        alone = e.forced(forced, n)
    for unified in (False, True):
        with Engine(tiny_gqa, elastic=UNEVEN, n_seq_max=2, n_ctx=2048, unified=unified) as e:
            feed(e, 200, seq=1)
            n = feed(e, 300)
            both = e.forced(forced, n)
        assert nmse(alone, both) <= 1e-5


@linux
def test_memory_follows_the_layers(tiny_gqa: Path) -> None:
    """The rows masked in single layers go back, not only those behind the last cell."""
    with Engine(tiny_gqa, elastic=UNEVEN, n_ctx=8192, n_ubatch=1024) as e:
        n = feed(e, 6000)
        e.session.compress(0)
        freed = 3 * n - int(e.session.cells_per_layer(0).sum())
        assert e.session.stats()["bytes_released"] > 0.9 * freed * (2 * 2 * 64 * 2)
        assert e.session.frees_rows()
    with Engine(tiny_gqa, elastic={**UNEVEN, "release_memory": False}) as e:
        assert not e.session.frees_rows()


def test_a_pyramid_holds_fewer_cells_in_later_layers(tiny_gqa: Path) -> None:
    """The budget holds on average; under a cap all layers hold as many."""
    options = {"policy": "pyramidkv", "budget": 0.3, "min_cells": 8}
    for cap in (0, 80):
        with Engine(tiny_gqa, elastic={**options, "max_cells": cap}, flash_attn=True) as e:
            e.prompt(random_tokens(150, N_VOCAB, 1))
            e.session.compress(0)
            held = e.session.cells_per_layer(0)
            assert e.session.n_per_layer(0) == math.ceil(0.3 * 150)
            assert (held[0] > held[1] > held[2]) if cap == 0 else len(set(held)) == 1
            assert np.isfinite(e.forced(random_tokens(20, N_VOCAB, 5), 150)).all()
            assert e.session.n_per_layer(0) <= math.ceil(0.3 * (150 + 20)) + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_share": [1.0, 2.0]}, r"layer_share: got 2 layers, expected 3"),
        ({"layer_share": [1.0, -1.0, 1.0]}, r"layer_share: got -1"),
        ({"policy": "h2o"}, r"layer_share: got it with the policy h2o"),
        ({"max_cells": 100}, r"layer_share: got it with max_cells = 100"),
    ],
)
def test_bad_parameters(tiny_gqa: Path, changes: dict[str, Any], message: str) -> None:
    with Engine(tiny_gqa, flash_attn=True) as e, pytest.raises(ValueError, match=message):
        address = ctypes.cast(e.ctx, ctypes.c_void_p).value
        _core.Session(address, auto_layers=False, **{**UNEVEN, **changes})


@pytest.mark.parametrize("bad", ["both", "123", [], [1.0, 0.0], [1.0, "x"], 3, None])
def test_bad_layers_are_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"layers"):
        ElasticConfig(layers=bad)
    assert ElasticConfig(layers=[1, 2]).layers == (1.0, 2.0)


@linux
def test_layers_are_measured_where_memory_follows(
    tiny_gqa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default; with what says otherwise all layers are alike."""
    scores = [0.0, 0.0, 0.2]
    monkeypatch.setattr("elastic_llama.session.measured_scores", lambda llm: scores)
    prompt = random_tokens(400, N_VOCAB, 1)

    def held(**kwargs: Any) -> np.ndarray:
        config = ElasticConfig(**kwargs.pop("config", {}))
        n_ctx = None if config.kv_cells else 512
        threads = {"n_threads": 1, "n_threads_batch": 1}
        with ElasticLlama(tiny_gqa, elastic=config, n_ctx=n_ctx, **threads, **kwargs) as llm:
            llm.eval(prompt)
            llm.session.compress(0)
            assert llm.stats.cells == llm.session.n_per_layer(0)
            return np.array(llm.session.cells_per_layer(0))

    uneven = held()
    assert uneven[0] < 80 < uneven[-1]
    for even in (
        {"config": {"layers": "even"}},
        {"config": {"release_memory": False}},
        {"config": {"policy": "h2o"}},
        {"config": {"kv_cells": 100}},
    ):
        assert len(set(held(**even))) == 1, even
    given = held(config={"layers": [1.0, 1.0, 4.0]})
    assert given[-1] > given[0]


def test_what_a_run_lacks_goes_to_another() -> None:
    """Of a text that layers hold a fifth of, and an image that came later."""
    n_text, n_image = 100, 100
    kind = np.array([0] * n_text + [1] * n_image + [0] * 4, np.uint8)
    masked = np.zeros((2, len(kind)), np.uint8)
    masked[:, 4:84] = 1
    problem = make_problem(n_cells=len(kind), n_keep=100, kind=kind, masked=masked)
    held = core.make_plan(**problem)["kept"] >= 0
    assert held[:, 0].sum() == 2 * 100


@pytest.mark.parametrize(("overdraft", "n_answer"), [(0, 10), (0, 40), (32, 10), (32, 40)])
def test_ranks_are_limited_by_the_slots_of_the_context(
    tiny_gqa: Path, overdraft: int, n_answer: int
) -> None:
    """Turn after turn under a number of cells that nearly fills the context."""
    config = with_overdraft({**UNEVEN, "budget": 300}, overdraft)
    with Engine(tiny_gqa, elastic=config, n_ctx=512) as e:
        n = held = 0
        for _ in range(12):
            e.prompt(random_tokens(100, N_VOCAB, n), n)
            n, held = n + 100, held + 100
            assert e.session.n_per_layer(0) == held
            if held > 300:
                held = 300 - oracle.left_free(300)
            for token in random_tokens(n_answer, N_VOCAB, n):
                e.token(token, n)
                n, held = n + 1, held_after(held, 300, overdraft)
                assert e.session.n_per_layer(0) == held
            assert e.session.n_per_layer(0) <= 300 + min(overdraft, n_answer - 4)
            assert e.session.n_cells(0) <= 384 + min(n_answer, max(10, overdraft))
        assert e.session.n_per_layer(0) < e.session.n_cells(0)


def test_an_answer_that_fills_the_context_is_merged(tiny_gqa: Path) -> None:
    """Before its overdraft is used up, and where layers have to be made alike for it."""
    config = {**UNEVEN, "budget": 300, "overdraft": 300}
    with Engine(tiny_gqa, elastic=config, n_ctx=512) as e:
        e.prompt(random_tokens(450, N_VOCAB, 1))
        held, merges = 0, []
        for i in range(400):
            assert np.isfinite(e.token(20 + i % 300, 450 + i)).all()
            assert e.session.n_per_layer(0) <= e.session.n_cells(0) <= 512
            if e.session.n_per_layer(0) < held:
                merges.append((held, e.session.n_per_layer(0)))
            held = e.session.n_per_layer(0)
        assert len(merges) > 1
        assert all(after == 301 for _, after in merges)
        assert e.session.stats()["evictions"] == 0


def test_equalized_layers(tiny_gqa: Path) -> None:
    """As many cells in all layers, no more in all; a prompt that waits still waits."""
    with Engine(tiny_gqa, elastic=UNEVEN) as e:
        n = feed(e, 300)
        e.session.compress(0)
        held = int(e.session.cells_per_layer(0).sum())
        e.session.set_prefill(True)
        e.prompt(random_tokens(50, N_VOCAB, 1), n)
        e.session.equalize_layers(0)
        rows = e.session.cells_per_layer(0)
        assert e.session.n_cells(0) <= -(-(held + 150) // 3)
        assert rows.min() >= 90  # these held no more than 96
        e.session.set_prefill(False)
        e.token(20, n + 50)
        assert e.session.n_per_layer(0) <= -(-2 * (n + 51) // 10)
        np.testing.assert_array_equal(np.isfinite(e.logits(-1)), True)


def test_levelled_before_a_context_overflows(tiny_gqa: Path) -> None:
    config = ElasticConfig(budget=300, layers=[1.0, 1.0, 9.0])
    with ElasticLlama(tiny_gqa, elastic=config, n_ctx=512, n_threads=1, n_threads_batch=1) as llm:
        llm.eval(random_tokens(450, N_VOCAB, 1))
        llm.session.compress(0)
        assert llm.session.n_cells(0) > 320
        llm.eval(random_tokens(190, N_VOCAB, 2))
        assert llm.session.n_cells(0) <= 300 + 190


@overdrafts
@pytest.mark.usefixtures("attention_op")
@pytest.mark.parametrize("budget", [32, 40])
def test_heads_of_a_layer_agree(tiny_gqa: Path, budget: int, overdraft: int) -> None:
    """Even where no evictable row is held by all layers, and the budget holds."""
    config = {**ELASTIC, "budget": budget, "layer_share": [0.1, 1.0, 1.9]}
    with Engine(tiny_gqa, elastic=with_overdraft(config, overdraft)) as e:
        n = feed(e, 300)
        held = budget - oracle.left_free(budget)
        for i in range(60):
            e.token(20, n + i)
            gone = np.isneginf(e.session.bias(0))
            assert (gone == gone[:, :1]).all()
            held = held_after(held, budget, overdraft)
            assert e.session.n_per_layer(0) == held <= budget + overdraft
        assert e.session.stats()["compressions"] == (2 if overdraft else 1)


def test_behind_a_shared_prefix(tiny_gqa: Path) -> None:
    """The prefix counts with what layers hold of it."""
    with Engine(tiny_gqa, elastic=UNEVEN, n_seq_max=2, n_ctx=2048) as e:
        e.prompt(random_tokens(300, N_VOCAB, 1))
        e.session.compress(0)
        llama_cpp.llama_memory_seq_cp(e.memory, 0, 1, -1, -1)
        e.prompt(random_tokens(200, N_VOCAB, 2), 300, seq=1)
        e.session.compress(1)
        assert 100 - 4 - 2 <= e.session.n_per_layer(1) <= 100


@pytest.mark.parametrize("overdraft", [0, 5, OVERDRAFT])
@pytest.mark.parametrize("cap", [70, 100, 120])
def test_a_cap_levels_what_was_saved_without_one(tiny_gqa: Path, cap: int, overdraft: int) -> None:
    """A cap is one of slots, so the rows that any layer holds count; the budget is an average.

    Without an overdraft rows are made as few as the budget at once.
    """
    with Engine(tiny_gqa, elastic=UNEVEN) as e:
        n = feed(e, 300)
        e.session.compress(0)
        data = e.save(0)
        held = e.session.n_per_layer(0)
        rows = e.session.n_cells(0)
    assert held < 70 < 100 < rows
    config = with_overdraft({**ELASTIC, "max_cells": cap}, overdraft)
    with Engine(tiny_gqa, elastic=config) as e:
        assert e.load(data, 0) == len(data)
        found, expected = [], []
        for i in range(60):
            promised = min(-(-2 * (n + i + 1) // 10), cap)
            fits = rows < cap and e.session.n_per_layer(0) < promised + overdraft
            assert np.isfinite(e.token(20, n + i)).all()
            found.append(e.session.n_cells(0))
            if overdraft == 0:
                rows = held_after(rows, promised, 0, cap)
            else:
                rows = rows + 1 if fits else held_after(cap, promised, overdraft, cap)
            expected.append(rows)
            assert held / 2 < e.session.n_per_layer(0) <= found[-1]
        assert found == expected
        assert max(found) <= cap


@linux
@pytest.mark.parametrize("how", ["state", "stream"])
def test_memory_follows_after_a_copy(tiny_gqa: Path, how: str) -> None:
    config = {**UNEVEN, "budget": 0.5, "layer_share": [0.1, 0.1, 2.8]}
    two = {"n_seq_max": 2, "n_ctx": 16384, "unified": False, "n_ubatch": 1024}
    with Engine(tiny_gqa, elastic=config, **two) as e:
        n = feed(e, 3000)
        e.session.compress(0)
        data = e.save(0)
        released = e.session.stats()["bytes_released"]
        if how == "state":
            assert e.load(data, 1) == len(data)
        else:
            llama_cpp.llama_memory_seq_cp(e.memory, 0, 1, -1, -1)
        e.token(20, n, seq=1)
        lacks = 3 * e.session.n_cells(1) - int(e.session.cells_per_layer(1).sum())
        assert e.session.stats()["bytes_released"] - released > 0.9 * lacks * (2 * 2 * 64 * 2)


def test_attaching_with_wrong_shares_changes_nothing(tiny_gqa: Path) -> None:
    with Engine(tiny_gqa, elastic=ELASTIC) as e:
        with pytest.raises(ValueError, match="layer_share"):
            _core.Session(
                ctypes.cast(e.ctx, ctypes.c_void_p).value, **{**UNEVEN, "layer_share": [1.0]}
            )
        assert e.session.is_attached


@pytest.mark.parametrize("changes", [{"policy": "h2o"}, {"kv_cells": 100}])
def test_numbers_for_layers_need_the_policy(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="layers"):
        ElasticConfig(layers=[1.0, 2.0], **changes)
