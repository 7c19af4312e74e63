"""The cache against stock llama.cpp operations and NumPy: oracles that should be exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from elastic_llama import _core

from tests.support.capture import Capture
from tests.support.engine import N_GPU_LAYERS, Engine, nmse, random_tokens
from tests.support.oracle_generate import GENERATED, NEWEST, eviction_candidates

N_VOCAB = 384
N_LAYER = {"tiny_gqa": 3, "tiny_mha": 2}
# about three times the largest error against NumPy in f64
RTOL = 5e-6  # of sums of attention
ATOL = 5e-6  # of the output of attention, whose values are about 1
ATOL_FUSED = 1e-2  # of that of llama.cpp's fused op, which adds up values in f16
LAYOUTS = [  # K, V
    ("f16", "f16"),
    ("f32", "f32"),
    ("q8_0", "f16"),
    ("q8_0", "q8_0"),
    ("q4_0", "q5_1"),
    ("bf16", "bf16"),
    ("iq4_nl", "q4_1"),
]
LAYOUT_IDS = [f"{k}-{v}" for k, v in LAYOUTS]
# a V of f16 is summed in f16, row by row: the order of rows counts, the more with a quantized K
EXACT = [layout for layout in LAYOUTS if layout != ("q8_0", "f16")]


def image_rows(n: int, n_embd: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=0.5, size=(n, n_embd)).astype(np.float32)


def feed(e: Engine, n_image: int = 200, seq: int = 0) -> int:
    """Text, image, text; returns the next position."""
    e.prompt(random_tokens(40, N_VOCAB, 1), 0, seq, logits=False)
    e.image(image_rows(n_image, e.n_embd), 40, seq)
    e.prompt(random_tokens(20, N_VOCAB, 2), 40 + n_image, seq)
    return 60 + n_image


@pytest.mark.parametrize(("k", "v"), EXACT)
def test_eviction_equals_seq_rm(tiny_gqa: Path, k: str, v: str) -> None:
    """Evicting the same cells everywhere is what llama_memory_seq_rm does."""
    forced = random_tokens(24, N_VOCAB, 3)
    kw = {"flash_attn": True, "type_k": k, "type_v": v}
    with Engine(
        tiny_gqa,
        elastic={"policy": "local", "budget": 90.0, "min_cells": 8, "n_sink": 4, "offset": 10},
        **kw,
    ) as e:
        n = feed(e)
        assert e.session.compress(0) == 90
        kept = e.session.cells(0)["pos"]
        assert kept.tolist() == [0, 1, 2, 3, *range(n - 86, n)]
        ours = []
        expected_rm = []
        for i, t in enumerate(forced):
            before = set(e.session.cells(0)["pos"].tolist())
            ours.append(e.token(t, n + i))
            expected_rm.append(before - set(e.session.cells(0)["pos"].tolist()))
    with Engine(tiny_gqa, **kw) as e:
        feed(e)
        assert e.seq_rm(0, 4, n - 86)
        stock = []
        for i, t in enumerate(forced):
            for pos in expected_rm[i]:
                e.seq_rm(0, pos, pos + 1)
            stock.append(e.token(t, n + i))
    assert all(len(gone) == 1 for gone in expected_rm)
    assert nmse(np.stack(stock), np.stack(ours)) <= 1e-6


@pytest.mark.parametrize("n_ubatch", [32, 128, 512])
@pytest.mark.parametrize("model", ["tiny_gqa", "tiny_mha"])
def test_importance_is_the_column_sum(
    model: str, n_ubatch: int, attention_op: str, request: pytest.FixtureRequest
) -> None:
    """Accumulated over ubatches, it is the column sum of softmax(q k / sqrt(d)).

    So are the recent scores, with weights on the queries: 1 for the last 32, or, for queries of
    text alone, 0.9 to the power of those that came after.
    """
    capture = Capture("Qcur")
    with Engine(
        request.getfixturevalue(model),
        n_ubatch=n_ubatch,
        type_k="f32",
        type_v="f32",
        cb_eval=capture.callback,
        elastic={"policy": "full", "budget": 1.0, "record": True},
    ) as e:
        n = feed(e, 150)
        importance = e.session.importance(0)
        decayed, window = e.session.recent(0)
        assert len(importance) == len(decayed) == len(window) == N_LAYER[model]
        keys = [e.session.read_kv(0, il)[0] for il in range(N_LAYER[model])]
    assert ("attn_beside" in capture.names) == (attention_op != "own")
    halves = attention_op != "own"
    for il, k in enumerate(keys):
        a = attention(capture, il, k, halves)
        ago = np.arange(n)[::-1]
        is_text = np.r_[np.ones(40), np.zeros(150), np.ones(20)]
        by_age = is_text * 0.9 ** (is_text[::-1].cumsum()[::-1] - is_text)
        for found, weights in ((importance, ago >= 0), (window, ago < 32), (decayed, by_age)):
            expected = np.einsum("gmn,m->gn", a, weights.astype(np.float64))
            close(found[il], expected, rtol=RTOL)


def test_every_fourth_generated_token_counts_for_four(tiny_gqa: Path, attention_op: str) -> None:
    """Its attention is added to the importance and to the recent score, which fades by four."""
    capture = Capture("Qcur")
    with Engine(
        tiny_gqa,
        type_k="f32",
        type_v="f32",
        cb_eval=capture.callback,
        elastic={"policy": "elastic", "budget": 400.0},
    ) as e:
        n_prompt = feed(e, 150)
        e.forced(random_tokens(10, N_VOCAB, 3), n_prompt)
        importance = e.session.importance(0)
        decayed, _ = e.session.recent(0)
        assert len(importance) == len(decayed) == N_LAYER["tiny_gqa"]
        keys = [e.session.read_kv(0, il)[0] for il in range(len(importance))]
    is_text = np.r_[np.ones(40), np.zeros(150), np.ones(20)]
    count = np.r_[np.ones(n_prompt), np.tile([0, 0, 0, 4], 2), 0, 0]
    ago = 8 + is_text[::-1].cumsum()[::-1] - is_text  # the last two do not count yet
    recent = np.r_[is_text * 0.9**ago, 0, 0, 0, 4 * 0.9**4, 0, 0, 0, 4, 0, 0]
    for il, k in enumerate(keys):
        a = attention(capture, il, k, attention_op != "own")
        for found, weights in ((importance, count), (decayed, recent)):
            close(found[il], np.einsum("gmn,m->gn", a, weights), rtol=RTOL)


@pytest.mark.parametrize("policy", ["h2o", "elastic", "elastic-evict"])
def test_each_head_loses_its_least_attended_cell(
    tiny_gqa: Path, policy: str, attention_op: str
) -> None:
    """Step by step, the rows of a head are those of before but for the lost one, and the new."""
    elastic = {"policy": policy, "budget": 60.0, "min_cells": 8, "n_sink": 4, "overdraft": 0}
    rule = "heavy" if policy == "h2o" else "per_head"
    with Engine(tiny_gqa, elastic=elastic, type_k="f32", type_v="f32") as e:
        n = feed(e, 150)
        e.session.compress(0)
        while e.session.n_cells(0) < 60:  # what was left free for the answer
            e.token(20, n)
            n += 1
        moved = 0
        for i, t in enumerate(random_tokens(40, N_VOCAB, 3)):
            kind, importance, bias = (
                e.session.cells(0)["kind"],
                e.session.importance(0),
                e.session.bias(0),
            )
            if policy != "h2o":  # shares of all attention and of the recent one, 0.9 per token
                importance = importance / (n + i) + e.session.recent(0)[0] * (1 - 0.9)
            before = [e.session.read_kv(0, il) for il in range(len(importance))]
            e.token(t, n + i)
            after = [e.session.read_kv(0, il) for il in range(len(importance))]
            bias_after = e.session.bias(0)
            # 60 cells cannot hold 60 of text and an image: no text was kept whole. Of 56 a quarter
            # is newest text, which `elastic` protects and a short answer spares
            total = np.ones(60)
            if policy == "elastic":
                total[np.flatnonzero(kind == 0)[-14:]] = np.inf
            free = eviction_candidates(rule, kind, np.zeros(60), 4, total)
            for il, ih in np.ndindex(*importance.shape[:2]):
                lost = min(free, key=lambda j: importance[il, ih, j])
                stay = [j for j in range(60) if j != lost]
                for x, y in zip(before[il], after[il]):  # K, V
                    np.testing.assert_array_equal(
                        np.sort(x[stay, ih], axis=0), np.sort(y[:-1, ih], axis=0)
                    )
                np.testing.assert_array_equal(
                    np.sort(bias[il, ih, stay]), np.sort(bias_after[il, ih, :-1])
                )
                moved += lost != free[-1]
        assert moved > 0  # heads did not all lose the same cell


@pytest.mark.parametrize("overdraft", [-1, 7])
def test_an_overdraft_loses_nothing_until_it_is_merged(
    tiny_gqa: Path, overdraft: int, attention_op: str
) -> None:
    """Step by step, rows stay as they are and one is added; the merge is that of the plan.

    It is made of all cells, as after a prompt, but to the whole budget: there is no answer left to
    leave cells for.
    """
    n_most = 60 + (32 if overdraft < 0 else overdraft)
    elastic = {
        "policy": "elastic",
        "budget": 60.0,
        "min_cells": 8,
        "n_sink": 4,
        "overdraft": overdraft,
    }
    with Engine(tiny_gqa, elastic=elastic, type_k="f32", type_v="f32") as e:
        n = feed(e, 150)
        e.session.compress(0)
        assert e.session.n_cells(0) == 56
        merges = []
        for i, t in enumerate(random_tokens(80, N_VOCAB, 3)):
            cells, importance, bias = e.session.cells(0), e.session.importance(0), e.session.bias(0)
            recent = e.session.recent(0)[0]
            before = [e.session.read_kv(0, il) for il in range(len(importance))]
            held = len(cells["pos"])
            e.token(t, n + i)
            after = [e.session.read_kv(0, il) for il in range(len(importance))]
            assert e.session.cells(0)["pos"][-1] == n + i
            assert e.session.cells(0)["kind"][-1] == GENERATED
            assert (e.session.bias(0)[..., -1] == 0).all()
            if held < n_most:
                for x, y in zip(before, after):
                    np.testing.assert_array_equal(x[0], y[0][:-1])
                    np.testing.assert_array_equal(x[1], y[1][:-1])
                np.testing.assert_array_equal(bias, e.session.bias(0)[..., :-1])
                continue
            merges.append(i)
            assert held == n_most
            assert e.session.n_cells(0) == 61
            said = (cells["kind"] == GENERATED) & (np.arange(held) + NEWEST < held)
            expected = _core.core.make_plan(
                policy="elastic",
                n_keep=60,
                n_sink=4,
                kind=cells["kind"],
                pinned=np.zeros(held, np.uint8),
                importance=importance,
                recent=recent,
                keys=np.stack([k.swapaxes(0, 1) for k, _ in before]),
                values=np.stack([v.swapaxes(0, 1) for _, v in before]),
                old=said.astype(np.uint8),
                tokens=np.maximum(1, np.diff(cells["pos"], prepend=-1)).tolist(),
            )
            plan = e.session.last_plan()
            np.testing.assert_array_equal(plan["kept"], expected["kept"])
            np.testing.assert_array_equal(plan["bucket"], expected["bucket"])
            np.testing.assert_array_equal(
                e.session.cells(0)["pos"][:-1], cells["pos"][expected["positions"]]
            )
            # what no other joins stays as it is
            for il, ih in np.ndindex(*importance.shape[:2]):
                bucket = plan["bucket"][il, ih]
                alone = np.flatnonzero(np.bincount(bucket[bucket >= 0], minlength=60) == 1)
                assert len(alone) > 20
                source = plan["kept"][il, ih, alone]
                for x, y in zip(before[il], after[il]):
                    np.testing.assert_array_equal(x[source, ih], y[alone, ih])
                np.testing.assert_array_equal(
                    bias[il, ih, source], e.session.bias(0)[il, ih, alone]
                )
        period = n_most - 60
        assert merges == list(range(n_most - 56, 80, period))
        assert e.session.stats()["compressions"] == 1 + len(merges)
        assert e.session.stats()["evictions"] == 0


def in_halves(x: np.ndarray) -> np.ndarray:
    """As llama.cpp's fused op reads f32: queries, K, V and the mask are rounded to f16."""
    return x.astype(np.float16).astype(np.float64)


def close(found: np.ndarray, expected: np.ndarray, **tol: float) -> None:
    """Within the tolerance of the CPU; a device multiplies in less than f32."""
    if N_GPU_LAYERS:
        tol = {"rtol": 2e-2, "atol": 2e-3}
    np.testing.assert_allclose(found, expected, **tol)


def attention(capture: Capture, il: int, k: np.ndarray, halves: bool) -> np.ndarray:
    """Softmax of all queries over keys k [n, n_head_kv, d], mean over the heads of a KV head.

    Returns [n_head_kv, n, n].
    """
    q = rotated(capture.seen[f"Qcur-{il}"])
    if halves:
        q, k = in_halves(q), in_halves(k)
    n, n_head, d = q.shape
    gqa = n_head // k.shape[1]
    logits = np.einsum(
        "mhd,nhd->hmn", q.astype(np.float64), np.repeat(k, gqa, axis=1).astype(np.float64)
    ) / np.sqrt(d)
    logits[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
    a = np.exp(logits - logits.max(-1, keepdims=True))
    a /= a.sum(-1, keepdims=True)
    return a.reshape(k.shape[1], gqa, n, n).mean(1)


def rotated(seen: list[np.ndarray]) -> np.ndarray:
    """Queries [n, n_head, d] after RoPE, out of all tensors that llama.cpp calls Qcur.

    Per ubatch these are the projection, its reshape and the rotated one, in this order.
    """
    assert len(seen) % 3 == 0
    return np.concatenate([a[0] for a in seen[2::3]], axis=0)


@pytest.mark.parametrize("n_new", [1, 20, 200])
@pytest.mark.parametrize(
    ("policy", "share"),
    [("elastic", ()), ("elastic", (0.5, 2, 0.5)), ("elastic-paper", ()), ("elastic-evict", ())],
)
def test_biased_attention_equals_numpy(
    tiny_gqa: Path, policy: str, share: tuple[float, ...], n_new: int, attention_op: str
) -> None:
    """The attention output over merged cells is NumPy's, bias included.

    For the token that follows, and for another prompt of few or of many tokens. What is scored goes
    through an op of our own, or, in the graph, the bias into KQ or into the mask of the fused op.
    """
    capture_q, forced = Capture("Qcur"), random_tokens(n_new, N_VOCAB, 3)
    capture_o = Capture("kqv_out")

    def both(tensor: int, ask: bool, data: object) -> bool:
        a = capture_q._on_tensor(tensor, ask, data)
        b = capture_o._on_tensor(tensor, ask, data)
        return (a or b) if ask else True

    import llama_cpp

    callback = llama_cpp.ggml_backend_sched_eval_callback(both)
    with Engine(
        tiny_gqa,
        type_k="f32",
        type_v="f32",
        cb_eval=callback,
        elastic={"policy": policy, "budget": 0.3, "min_cells": 8, "layer_share": share},
    ) as e:
        n = feed(e)
        n_after = e.session.compress(0)
        assert (e.session.n_per_layer(0) < n_after) == bool(share)
        biased = bool((e.session.bias(0) != 0).any())
        capture_q.seen.clear()
        capture_o.seen.clear()
        capture_q.names.clear()
        e.prompt(forced, n)
        assert e.session.n_cells(0) == n_after + n_new
        bias = e.session.bias(0)
        assert len(bias) == N_LAYER["tiny_gqa"]
        # `elastic-paper` scores prompts alone: what follows them goes through llama.cpp's ops
        in_graph = attention_op != "own" or (policy == "elastic-paper" and n_new == 1)
        is_fused = in_graph and not (attention_op == "plain" and biased)
        assert ("kq_mask_bias" in capture_q.names) == (is_fused and biased)
        assert ("kq_plus_bias" in capture_q.names) == (in_graph and not is_fused)
        ahead = np.arange(n_after + n_new) > n_after + np.arange(n_new)[:, None]
        for il in range(bias.shape[0]):
            k, v = e.session.read_kv(0, il)
            q = capture_q.seen[f"Qcur-{il}"][-1].reshape(n_new, 4, 64).astype(np.float64)
            out = capture_o.seen[f"kqv_out-{il}"][-1].reshape(n_new, 4, 64)
            b = bias[il].astype(np.float64)
            if is_fused:
                q, k, v, b = in_halves(q), in_halves(k), in_halves(v), in_halves(b)
            gqa = 4 // k.shape[1]
            for h in range(4):
                z = q[:, h] @ k[:, h // gqa].T.astype(np.float64) / 8.0 + b[h // gqa]
                p = np.exp(np.where(ahead, -np.inf, z - z.max(axis=1, keepdims=True)))
                expected = (p / p.sum(axis=1, keepdims=True)) @ v[:, h // gqa]
                close(out[:, h], expected, rtol=0, atol=ATOL_FUSED if is_fused else ATOL)
    assert (np.abs(bias).max() > 0.1) == (policy == "elastic")


@pytest.mark.parametrize(("k", "v"), LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("policy", ["elastic", "elastic-paper"])
@pytest.mark.parametrize("whole", [True, False], ids=["context", "sequence"])
def test_save_load_continue(tiny_gqa: Path, policy: str, whole: bool, k: str, v: str) -> None:
    """Save, load into a fresh context and go on: as if nothing had been saved."""
    forced = random_tokens(30, N_VOCAB, 3)
    kw = {
        "type_k": k,
        "type_v": v,
        "elastic": {"policy": policy, "budget": 0.3, "min_cells": 8},
    }
    which = None if whole else 0
    with Engine(tiny_gqa, **kw) as e:
        n = feed(e)
        e.forced(forced[:10], n)
        data = e.save(which)
        straight = e.forced(forced[10:], n + 10)
        cells = e.session.cells(0)["pos"].tolist()
    with Engine(tiny_gqa, **kw) as e:
        assert e.load(data, which) == len(data)
        again = e.forced(forced[10:], n + 10)
        assert e.session.cells(0)["pos"].tolist() == cells
    assert nmse(straight, again) <= 1e-10


def test_save_before_compression(tiny_gqa: Path) -> None:
    """A prompt that still waits for its compression is compressed the same after loading."""
    forced = random_tokens(10, N_VOCAB, 3)
    kw = {"elastic": {"policy": "elastic", "budget": 0.3, "min_cells": 8}}
    with Engine(tiny_gqa, **kw) as e:
        n = feed(e)
        data = e.save()
        straight = e.forced(forced, n)
    with Engine(tiny_gqa, **kw) as e:
        assert e.load(data) == len(data)
        assert nmse(straight, e.forced(forced, n)) <= 1e-10


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_prompts_of_one_batch(tiny_gqa: Path, unified: bool, attention_op: str) -> None:
    """Two prompts in one ubatch: logits and scores of each as if it were alone."""
    prompts = [random_tokens(150, N_VOCAB, seed) for seed in (1, 2)]
    kw = {"elastic": {"policy": "elastic", "budget": 0.3, "min_cells": 8}}
    alone = []
    for prompt in prompts:
        with Engine(tiny_gqa, **kw) as e:
            e.prompt(prompt)
            alone.append((e.logits(-1), e.session.importance(0), e.session.recent(0)[0]))
    with Engine(tiny_gqa, n_seq_max=2, unified=unified, **kw) as e:
        rows = [(t, i, seq, i == 149) for seq in (0, 1) for i, t in enumerate(prompts[seq])]
        assert e.decode(rows) == 0
        for seq, (logits, importance, recent) in enumerate(alone):
            assert nmse(logits, e.logits(149 + 150 * seq)) <= 1e-6
            # the fused op rounds what later layers see, by where the prompt lies
            rtol = 5e-4 if attention_op != "own" else RTOL
            close(e.session.importance(seq), importance, rtol=rtol)
            close(e.session.recent(seq)[0], recent, rtol=rtol)


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_sequences_do_not_disturb_each_other(
    tiny_gqa: Path, unified: bool, attention_op: str
) -> None:
    """Two sequences in one cache, one long enough to be compressed: each as if alone."""
    forced = random_tokens(12, N_VOCAB, 3)
    short = random_tokens(50, N_VOCAB, 5)
    kw = {
        "n_seq_max": 2,
        "unified": unified,
        "n_ctx": 2048,
        "elastic": {"policy": "elastic", "budget": 0.3, "min_cells": 60},
    }

    def run(seqs: tuple[int, ...]) -> dict[int, list[np.ndarray]]:
        out: dict[int, list[np.ndarray]] = {s: [] for s in seqs}
        with Engine(tiny_gqa, **kw) as e:
            pos = {}
            if 0 in seqs:
                pos[0] = feed(e)
            if 1 in seqs:
                e.prompt(short, 0, 1)
                pos[1] = len(short)
            for i, t in enumerate(forced):
                rows = [(t, pos[s] + i, s, True) for s in seqs if i < 8 or s == 1]
                if not rows:
                    break
                assert e.decode(rows) == 0
                for j, row in enumerate(rows):
                    out[row[2]].append(e.logits(j))
            if 0 in seqs:
                assert e.session.n_cells(0) < 100
            if 1 in seqs:
                assert e.session.cells(1)["pos"][0] == 0
        return out

    both, first, second = run((0, 1)), run((0,)), run((1,))
    assert nmse(np.stack(first[0]), np.stack(both[0])) <= 1e-6
    assert nmse(np.stack(second[1]), np.stack(both[1])) <= 1e-6
