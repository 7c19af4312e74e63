"""Memories other than a plain KV cache: M-RoPE, sliding windows, hybrids, layers without attention.

Models are those of the zoo, whose windows are 32 cells.
"""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import elastic_llama as el
import llama_cpp
import numpy as np
import pytest
from elastic_llama import _core
from gguf import GGUFReader

from tests.support import zoo
from tests.support.capture import Capture
from tests.support.engine import Engine, nmse, random_tokens
from tests.support.images_2d import image_2d, image_rows

N_VOCAB = 128
N_WINDOW = 32
WINDOWS = ["gemma2", "gemma3", "gemma3n", "gemma4-shared", "gpt-oss", "cohere2"]
HYBRIDS = ["granitehybrid", "qwen3next", "falcon-h1"]
ALL = ["qwen2vl", "qwen3vl", *WINDOWS, *HYBRIDS, "qwen35", "deci"]
KEPT = {"budget": 0.3, "min_cells": 8}


def model(name: str) -> Path:
    try:
        found = {path.stem.rpartition("-")[0]: path for path in zoo.models()}
    except FileNotFoundError as e:
        pytest.skip(str(e))
    return found[name]


def answer(e: Engine, n_prompt: int = 110, n_forced: int = 8) -> np.ndarray:
    e.prompt(random_tokens(n_prompt, N_VOCAB, 1))
    first = e.logits(-1)
    return np.stack([first, *e.forced(random_tokens(n_forced, N_VOCAB, 2), n_prompt)])


@pytest.mark.parametrize("name", ALL)
def test_off_and_kept(name: str) -> None:
    """1.0 is bit by bit what stock computes; 0.3 has no NaN, and as many cells as it says."""
    path = str(model(name))
    with Engine(path, flash_attn=True) as e:
        off = answer(e)
        with Engine(path, {"budget": 1.0}, model=e.model) as other:
            assert np.array_equal(answer(other), off)
        with Engine(path, KEPT, model=e.model) as other:
            kept = answer(other)
            assert np.isfinite(kept).all()
            assert other.session.n_cells(0) < 50
            assert np.array_equal(kept[0], off[0]) or nmse(off[0], kept[0]) < 1e-5


LOCAL = {"policy": "local", "budget": 60.0, "min_cells": 8, "n_sink": 4, "offset": 50}


@pytest.mark.parametrize("swa_full", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_eviction_equals_seq_rm(name: str, swa_full: bool) -> None:
    """Evicting the same cells everywhere, behind every window, is what llama_memory_seq_rm does."""
    n, forced = 150, random_tokens(6, N_VOCAB, 3)
    kw = {"flash_attn": True, "swa_full": swa_full, "n_ctx": 512}
    ours, gone = [], []
    with Engine(str(model(name)), LOCAL, **kw) as e:
        e.prompt(random_tokens(n, N_VOCAB, 1))
        assert e.session.compress(0) == 60
        kept = e.session.cells(0)["pos"].tolist()
        assert kept == [0, 1, 2, 3, *range(n - 56, n)]
        for i, t in enumerate(forced):
            before = set(e.session.cells(0)["pos"].tolist())
            ours.append(e.token(t, n + i))
            gone.append(before - set(e.session.cells(0)["pos"].tolist()))
        with Engine(str(model(name)), model=e.model, **kw) as stock:
            stock.prompt(random_tokens(n, N_VOCAB, 1))
            assert stock.seq_rm(0, 4, n - 56)
            theirs = []
            for i, t in enumerate(forced):
                for pos in gone[i]:
                    assert pos + N_WINDOW < n
                    stock.seq_rm(0, pos, pos + 1)
                theirs.append(stock.token(t, n + i))
    assert sum(map(len, gone)) == len(forced)
    assert nmse(np.stack(theirs), np.stack(ours)) <= 1e-6


#: Of each query head: what q k is times, the cap, and the tensor of sinks.
ATTENTION = {
    "gemma2": (1 / np.sqrt(128), 50.0, None),
    "gpt-oss": (1 / np.sqrt(128), None, "attn_sinks.weight"),
    "qwen2vl": (1 / np.sqrt(128), None, None),
}


def strong(name: str, path: Path) -> Path:
    """A copy whose logits are so large that a cap matters, and whose sinks are not alike."""
    shutil.copyfile(model(name), path)
    reader = GGUFReader(path, "r+")
    rng = np.random.default_rng(0)
    for t in reader.tensors:
        if t.name.endswith(("attn_q.weight", "attn_k.weight")):
            t.data[:] = rng.standard_normal(t.data.shape) * 2 / np.sqrt(t.data.shape[-1])
        if t.name.endswith(("attn_norm.weight", "attn_q.scale", "attn_k.scale")):
            t.data[:] = 1
        if t.name.endswith("attn_sinks.weight"):
            t.data[:] = rng.standard_normal(t.data.shape) + 1
    reader.data.flush()
    return path


@pytest.mark.parametrize("name", ATTENTION)
def test_importance_equals_numpy(name: str, attention_op: str, tmp_path: Path) -> None:
    """Soft cap before the mask, and sinks a part of the denominator, whatever computes it."""
    path = strong(name, tmp_path / "strong.gguf")
    scale, cap, sinks = ATTENTION[name]
    tensors = {t.name: np.array(t.data) for t in GGUFReader(path).tensors}
    capture = Capture("Qcur")
    n = 60
    with Engine(
        str(path),
        {"policy": "full", "budget": 1.0, "record": True},
        n_ubatch=32,
        type_k="f32",
        type_v="f32",
        cb_eval=capture.callback,
    ) as e:
        e.prompt(random_tokens(n, N_VOCAB, 1))
        found = e.session.importance(0)
        keys = [e.session.read_kv(0, il)[0] for il in range(len(found))]
        memory = e.session.memory()
    compressed = range(2) if memory["kind"] == "plain" else [1]
    assert len(found) == len(list(compressed))
    for i, il in enumerate(compressed):
        seen = capture.seen[f"Qcur-{il}"]
        n_each = len(seen) // 2  # two ubatches, the last one of each is rotated
        q = np.concatenate([seen[n_each - 1][0], seen[2 * n_each - 1][0]]).astype(np.float64)
        k = keys[i].astype(np.float64)
        if name == "gemma2":  # which scales its queries itself
            q, scale = q * scale, 1.0
        if attention_op != "own":
            q, k = q.astype(np.float16).astype(float), k.astype(np.float16).astype(float)
        gqa = q.shape[1] // k.shape[1]
        x = np.einsum("mhd,nhd->hmn", q, np.repeat(k, gqa, axis=1)) * scale
        x = cap * np.tanh(x / cap) if cap else x
        assert cap is None or np.abs(x).max() > cap / 4
        x[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        a = np.exp(x)
        total = a.sum(-1, keepdims=True)
        if sinks:
            total = total + np.exp(tensors[f"blk.{il}.{sinks}"].astype(float))[:, None, None]
        a = (a / total).sum(1).reshape(k.shape[1], gqa, n).mean(1)
        np.testing.assert_allclose(found[i], a, rtol=2e-5 if attention_op == "own" else 2e-3)


# -- M-RoPE

WIDTH, HEIGHT = 12, 5


def two_turns(e: Engine, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Text, image, question, answer; image, question, answer. Logits of both answers."""
    out, pos, n = [], 0, width * height
    for turn in range(2):
        e.prompt(random_tokens(10, N_VOCAB, turn), pos, logits=False)
        rows = image_rows(n, e.n_embd, turn)
        for first in range(0, n, 25):  # an image that is cut into batches
            assert image_2d(e, rows[first : first + 25], pos + 10, width, first) == 0
        pos += 10 + max(width, height)
        if e.session is not None:
            assert e.session.next_pos(0) == pos
        e.prompt(random_tokens(7, N_VOCAB, 10 + turn), pos)
        out += [e.logits(-1), *e.forced(random_tokens(6, N_VOCAB, 20 + turn), pos + 7)]
        pos += 13
    return np.stack(out)


def test_two_images_over_two_turns() -> None:
    """With all cells kept the bits are stock's, and with few of them the turns go on."""
    path = str(model("qwen2vl"))
    with Engine(path, flash_attn=True) as e:
        off = two_turns(e)
        with Engine(path, {"budget": 1.0}, model=e.model) as other:
            assert np.array_equal(two_turns(other), off)
        with Engine(path, {**KEPT, "policy": "elastic-evict"}, model=e.model) as other:
            kept = two_turns(other)
            assert np.isfinite(kept).all()
            assert other.session.n_tokens(0) == 2 * (10 + 60 + 7 + 6)
            assert other.session.n_cells(0) <= 55
            pos = other.session.cells(0)["pos"]
            assert (np.diff(pos) >= 0).all()
            assert (other.session.cells(0)["kind"] == 1).sum() > 5


@pytest.mark.parametrize("policy", ["elastic", "h2o", "elastic-paper"])
def test_a_cap_inside_an_image(policy: str) -> None:
    """Cells of an image are merged while it is read, and later ubatches of it see what is left."""
    path = str(model("qwen2vl"))
    elastic = {"policy": policy, "budget": 40.0, "min_cells": 8, "max_cells": 40}
    with Engine(path, elastic, n_ubatch=32, n_batch=32, n_ctx=128) as e:
        e.prompt(random_tokens(10, N_VOCAB, 1), logits=False)
        rows = image_rows(20 * 15, e.n_embd)
        for first in range(0, 300, 32):
            assert image_2d(e, rows[first : first + 32], 10, 20, first) == 0
            assert e.session.n_cells(0) <= 40 + 32
        assert e.session.n_tokens(0) == 310
        assert e.session.next_pos(0) == 30
        assert np.isfinite(e.forced(random_tokens(5, N_VOCAB, 2), 30)).all()


def test_image_cells_are_in_order_of_arrival() -> None:
    """Where its second batch finds free rows in front of those of the first one."""
    path = str(model("qwen2vl"))
    record = {"budget": 1.0, "record": True}
    rows = image_rows(120, 256)

    def read_image(e: Engine, between: bool) -> None:
        e.prompt(random_tokens(100, N_VOCAB, 1), logits=False)
        assert image_2d(e, rows[:60], 100, 20) == 0
        if between:
            assert e.seq_rm(1, -1, -1)
        assert image_2d(e, rows[60:], 100, 20, 60) == 0

    with Engine(path, record, n_ctx=512, n_seq_max=2) as e:
        e.prompt(random_tokens(100, N_VOCAB, 1), seq=1, logits=False)
        read_image(e, True)
        cells = e.session.cells(0)
        index = cells["index"][cells["kind"] == 1]
        assert index[0] > index[60], "the rows are in order"
        assert cells["pos"].tolist().count(100) == 120
        with Engine(path, record, model=e.model) as other:
            read_image(other, False)
            for il in range(2):
                ours, theirs = e.session.read_kv(0, il), other.session.read_kv(0, il)
                np.testing.assert_allclose(ours[0], theirs[0], atol=2e-3)
                assert nmse(theirs[1], ours[1]) < 1e-5
            np.testing.assert_allclose(
                e.session.importance(0), other.session.importance(0), rtol=1e-2
            )


def test_cuts_behind_an_image() -> None:
    """Every position between the image's and the next one stands for the same cut."""
    path = str(model("qwen2vl"))
    with Engine(path, {**KEPT, "budget": 40.0}) as e:
        e.prompt(random_tokens(10, N_VOCAB, 1), logits=False)
        assert image_2d(e, image_rows(60, e.n_embd), 10, 12) == 0
        e.session.compress(0)
        first = e.forced(random_tokens(20, N_VOCAB, 2), 22)
        assert e.session.can_cut(22) == 22
        assert e.session.can_cut(15) == 15
        assert e.session.can_cut(10) == 0
        assert not e.seq_rm(0, 10, -1)
        assert e.seq_rm(0, 22, -1)
        assert e.session.next_pos(0) == 22
        again = e.forced(random_tokens(20, N_VOCAB, 2), 22)
        assert nmse(first, again) <= 1e-10
        assert e.seq_rm(0, 0, -1)
        assert e.session.n_cells(0) == 0


# -- states


@pytest.mark.parametrize("name", ALL)
def test_states_go_on_alike(name: str) -> None:
    """To the bit, but that llama.cpp puts the cells of a window into other rows."""
    path = str(model(name))
    with Engine(path, KEPT, swa_full=False) as e:
        answer(e)
        whole, of_seq = e.save(), e.save(0)
        rest = e.forced(random_tokens(12, N_VOCAB, 5), 118)
        for data, seq in ((whole, None), (of_seq, 0)):
            with Engine(path, KEPT, model=e.model, swa_full=False) as other:
                assert other.load(data, seq) == len(data)
                again = other.forced(random_tokens(12, N_VOCAB, 5), 118)
                assert np.array_equal(again, rest) or nmse(rest, again) <= 2e-6 * (name in WINDOWS)


@pytest.mark.parametrize("name", ["qwen2vl", "gemma3", "qwen3next"])
@pytest.mark.parametrize("unified", [True, False])
def test_sequences_answer_as_if_alone(name: str, unified: bool) -> None:
    path = str(model(name))
    kw = {"n_ctx": 1024, "n_seq_max": 2, "unified": unified}
    with Engine(path, KEPT, **kw) as e:
        alone = []
        for seq in (0, 1):
            e.prompt(random_tokens(90 + seq, N_VOCAB, seq), seq=seq)
            alone.append(e.forced(random_tokens(5, N_VOCAB, 7), 90 + seq, seq))
            e.seq_rm(seq, -1, -1)
        for seq in (0, 1):
            e.prompt(random_tokens(90 + seq, N_VOCAB, seq), seq=seq)
        both = [[], []]
        for i, t in enumerate(random_tokens(5, N_VOCAB, 7)):
            assert e.decode([(t, 90 + seq + i, seq, True) for seq in (0, 1)]) == 0
            for seq in (0, 1):
                both[seq].append(e.logits(seq))
        for seq in (0, 1):
            assert nmse(alone[seq], np.stack(both[seq])) <= 1e-6


# -- refusals leave all parts as they were


def held_by_parts(e: Engine) -> tuple[int, int]:
    memory = e.memory
    low = llama_cpp.llama_memory_seq_pos_min(memory, 0)
    return low, llama_cpp.llama_memory_seq_pos_max(memory, 0)


@pytest.mark.parametrize("name", ["gemma3", "qwen3next", "falcon-h1"])
def test_a_refused_removal_changes_no_part(name: str) -> None:
    path = str(model(name))
    with Engine(path, KEPT, swa_full=False) as e:
        answer(e)
        before, held = e.save(), held_by_parts(e)
        for p0 in (30, 109, 112):
            assert e.session.can_cut(p0) < p0
            assert not e.seq_rm(0, p0, -1)
            assert not e.seq_rm(-1, p0, -1)
        assert not e.seq_rm(0, 20, 30)
        assert held_by_parts(e) == held
        assert e.save() == before
        rest = e.forced(random_tokens(4, N_VOCAB, 5), 118)
        with Engine(path, KEPT, model=e.model, swa_full=False) as other:
            answer(other)
            assert np.array_equal(other.forced(random_tokens(4, N_VOCAB, 5), 118), rest)
        assert e.seq_rm(0, -1, -1)
        assert held_by_parts(e) == (-1, -1)


def test_a_window_limits_cuts() -> None:
    """Where it has lost what a token would look at, the history has to be read again."""
    path = str(model("gemma3"))
    local = {"policy": "local", "budget": 1000.0}  # adds nothing to scores
    with Engine(path, local, swa_full=False, n_ctx=1024, n_ubatch=64) as e:
        e.prompt(random_tokens(20, N_VOCAB, 1))
        assert e.session.can_cut(10) == 10
        e.forced(random_tokens(500, N_VOCAB, 2), 20)
        low = llama_cpp.llama_memory_seq_pos_min(e.memory, 0)
        assert low > 200
        exact = low + N_WINDOW - 1
        assert [e.session.can_cut(exact - i) for i in (0, 1)] == [exact, 0]
        assert not e.seq_rm(0, exact - 1, -1)
        assert llama_cpp.llama_memory_seq_pos_max(e.memory, 0) == 519
        assert e.seq_rm(0, exact, -1)
    with Engine(path, local, swa_full=True, n_ctx=1024, n_ubatch=64) as e:
        e.prompt(random_tokens(20, N_VOCAB, 1))
        e.forced(random_tokens(500, N_VOCAB, 2), 20)
        assert e.session.can_cut(25) == 25


# -- probes


@pytest.mark.parametrize("swa_full", [True, False])
@pytest.mark.parametrize("name", ["gemma3", "gpt-oss"])
def test_a_probe_leaves_the_window_as_it_was(name: str, swa_full: bool) -> None:
    """Twenty tokens take the places of what the window does not hold any more; it comes back."""
    path = str(model(name))
    kw = {"n_ctx": 1024, "n_ubatch": 64, "n_batch": 64, "swa_full": swa_full}
    with Engine(path, {"budget": 1000.0}, **kw) as e:
        for first in range(0, 640, 64):
            e.prompt(random_tokens(64, N_VOCAB, first), first)
        assert e.session.can_probe()
        with Engine(path, {"budget": 1000.0}, model=e.model, **kw) as other:
            for first in range(0, 640, 64):
                other.prompt(random_tokens(64, N_VOCAB, first), first)
            e.session.begin_probe()
            e.forced(random_tokens(20, N_VOCAB, 5), 640)
            e.session.end_probe()
            low = llama_cpp.llama_memory_seq_pos_min
            assert low(e.memory, 0) <= 640 - N_WINDOW + 1
            assert llama_cpp.llama_memory_seq_pos_max(e.memory, 0) == 639
            theirs = other.forced(random_tokens(40, N_VOCAB, 6), 640)
            assert nmse(theirs, e.forced(random_tokens(40, N_VOCAB, 6), 640)) <= 1e-9


@pytest.mark.parametrize("name", HYBRIDS)
def test_no_probe_with_recurrent_layers(name: str) -> None:
    with Engine(str(model(name)), KEPT) as e:
        e.prompt(random_tokens(20, N_VOCAB, 1))
        assert not e.session.can_probe()
        with pytest.raises(ValueError, match="take back.*hybrid"):
            e.session.begin_probe()


# -- caps and full contexts


@pytest.mark.parametrize("name", ["gemma3", "gpt-oss", "falcon-h1"])
def test_a_cap_beside_a_window(name: str) -> None:
    """A text longer than the context is read, the window part has its own size."""
    path = str(model(name))
    elastic = {"budget": 60.0, "min_cells": 8, "max_cells": 60}
    with Engine(path, elastic, n_ctx=256, n_ubatch=32, n_batch=32, swa_full=False) as e:
        for first in range(0, 640, 32):
            e.prompt(random_tokens(32, N_VOCAB, first), first)
            assert e.session.n_cells(0) <= 60 + 32
        assert np.isfinite(e.forced(random_tokens(20, N_VOCAB, 2), 640)).all()


def test_a_cap_needs_room_for_the_window() -> None:
    path = str(model("gemma3"))
    with pytest.raises(
        ValueError, match=r"sliding window.*at least 288 cells, or ubatches of at most 224"
    ):
        Engine(path, {"max_cells": 60}, n_ctx=256, n_ubatch=512)


def test_free_cells_are_those_of_the_smaller_part() -> None:
    with Engine(
        str(model("gemma3")), {"budget": 1000.0}, n_ctx=1024, n_ubatch=64, swa_full=False
    ) as e:
        assert e.session.memory()["other_cells"] == 256
        assert e.session.n_free(0) == 256
        e.prompt(random_tokens(100, N_VOCAB, 1))
        assert e.session.n_free(0) == 256 - N_WINDOW + 1
    with Engine(str(model("qwen2vl")), {"budget": 1000.0}, n_ctx=256) as e:
        e.prompt(random_tokens(10, N_VOCAB, 1), logits=False)
        assert image_2d(e, image_rows(200, e.n_embd), 10, 20) == 0
        assert e.session.n_free(0) == 46


# -- what is there, and what is refused


@pytest.mark.parametrize(
    ("name", "kind", "n_layer"),
    [
        ("llama", "plain", 2),
        ("qwen2vl", "plain", 2),
        ("gemma3", "sliding window", 1),
        ("gemma3n", "sliding window", None),
        ("granitehybrid", "hybrid", None),
        ("qwen3next", "hybrid", 1),
        ("falcon-h1", "hybrid", 2),
        ("deci", "plain", None),
    ],
)
def test_memory(name: str, kind: str, n_layer: int | None) -> None:
    with Engine(str(model(name)), flash_attn=True) as e:
        address = ctypes.cast(e.ctx, ctypes.c_void_p).value
        memory = _core.memory(address)
        assert memory["kind"] == kind
        assert memory["n_layer_model"] == llama_cpp.llama_model_n_layer(e.model)
        assert n_layer is None or memory["n_layer"] == n_layer
        assert memory["recurrent"] == ("hybrid" in kind)
        assert (memory["other_bytes"] > 0) == (kind != "plain")
        assert memory["cell_bytes"] > 0


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("bloom", "ALiBi"),
        ("grok", "without flash attention only"),
        ("deepseek2", r"latent \(MLA\)"),
        ("kimi-linear", r"latent \(MLA\)"),
        ("t5", "encoder"),
        ("mamba", "recurrent"),
        ("rwkv7", "recurrent"),
        ("llama-embed", "not causal"),
        ("deepseek32", "sparse"),
        ("minimax-m3", "sparse"),
        ("qwen4exp", "sparse"),
    ],
)
def test_refusals_name_the_reason(name: str, why: str) -> None:
    with Engine(str(model(name)), flash_attn=True) as e:
        address = ctypes.cast(e.ctx, ctypes.c_void_p).value
        with pytest.raises(NotImplementedError, match=why):
            _core.memory(address)
        with pytest.raises(NotImplementedError, match=why):
            _core.Session(address, **KEPT)


def test_an_encoder_is_not_left_out() -> None:
    """llama.cpp would end the process."""
    with el.ElasticLlama(model("t5"), n_threads=1, n_threads_batch=1) as llm:
        for ask in (llm, llm.eval):
            with pytest.raises(el.UnsupportedModelError, match="does not run.*llama_encode"):
                ask([1, 2, 3])
    with el.ElasticLlama(model("t5encoder"), embedding=True, n_threads=1) as llm:
        assert np.isfinite(llm.embed("the sea")).all()
