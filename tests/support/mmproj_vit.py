"""Families with a vision transformer of their own."""

from __future__ import annotations

from tests.support.mmproj_weights import Weights, layers, mlp, patches, positions


def internvl(w: Weights, n_text: int) -> None:
    patches(w, bias=True)
    w.draw("v.class_embd", w.n_embd)
    positions(w, w.n_patch + 1)
    layers(w)
    for i in range(w.n_layer):
        for name in ("ls1", "ls2"):
            w.norm(f"v.blk.{i}.{name}", w.n_embd, bias=False)
    w.norm("mm.model.mlp.0", 4 * w.n_embd)
    w.linear("mm.model.mlp.1", n_text, 4 * w.n_embd)
    w.linear("mm.model.mlp.3", n_text, n_text)


def llama4(w: Weights, n_text: int) -> None:
    patches(w, flat=True)
    w.draw("v.class_embd", w.n_embd)
    positions(w, w.n_patch + 1)
    w.norm("v.pre_ln", w.n_embd)
    layers(w)
    w.norm("v.post_ln", w.n_embd)
    w.linear("mm.model.mlp.1", 2 * w.n_embd, 4 * w.n_embd, bias=False)
    w.linear("mm.model.mlp.2", 2 * w.n_embd, 2 * w.n_embd, bias=False)
    w.linear("mm.model.fc", n_text, 2 * w.n_embd, bias=False)


def gemma4(w: Weights, n_text: int) -> None:
    """Tables of positions for x and y; four norms a layer, and one a head."""
    patches(w)
    w.draw("v.position_embd.weight", 2, 64, w.n_embd, gain=(64 * w.n_embd) ** 0.5, f32=True)
    layers(w, gate=True, bias=False, norm_bias=False)
    for i in range(w.n_layer):
        p = f"v.blk.{i}."
        w.norm(p + "attn_q_norm", w.n_embd // w.n_head, bias=False)
        w.norm(p + "attn_k_norm", w.n_embd // w.n_head, bias=False)
        w.norm(p + "attn_post_norm", w.n_embd, bias=False)
        w.norm(p + "ffn_post_norm", w.n_embd, bias=False)
    w.linear("mm.input_projection", n_text, w.n_embd, bias=False)


def _pixtral(w: Weights) -> None:
    patches(w)
    w.norm("v.pre_ln", w.n_embd, bias=False)
    layers(w, gate=True, bias=False, norm_bias=False)


def pixtral(w: Weights, n_text: int) -> None:
    _pixtral(w)
    w.linear("mm.1", n_text, w.n_embd)
    w.linear("mm.2", n_text, n_text)
    w.draw("v.token_embd.img_break", n_text)


def lighton(w: Weights, n_text: int) -> None:
    """Pixtral's tower; 2x2 patches are merged, and rows have no break."""
    _pixtral(w)
    w.norm("mm.input_norm", w.n_embd, bias=False)
    w.linear("mm.patch_merger", w.n_embd, 4 * w.n_embd, bias=False)
    w.linear("mm.1", n_text, w.n_embd, bias=False)
    w.linear("mm.2", n_text, n_text, bias=False)


def mistral_small(w: Weights, n_text: int) -> None:
    lighton(w, n_text)
    w.draw("v.token_embd.img_break", n_text)


def qwen2vl(w: Weights, n_text: int) -> None:
    patches(w, two=True)
    layers(w)
    w.norm("v.post_ln", w.n_embd)
    mlp(w, 0, 2, 4 * w.n_embd, n_text)


def qwen25vl(w: Weights, n_text: int) -> None:
    """RMS norms, a gate, and windows in the first layer."""
    patches(w, two=True)
    layers(w, gate=True, norm_bias=False)
    w.norm("v.post_ln", w.n_embd, bias=False)
    mlp(w, 0, 2, 4 * w.n_embd, n_text)


def qwen3vl_shallow(w: Weights, n_text: int) -> None:
    """Qwen3.5's: Qwen3-VL's tower without deepstack."""
    patches(w, bias=True, two=True)
    positions(w)
    layers(w, fused=True)
    w.norm("v.post_ln", w.n_embd)
    mlp(w, 0, 2, 4 * w.n_embd, n_text)


def qwen3vl(w: Weights, n_text: int) -> None:
    """What the first layer makes goes to the first layer of the language model (deepstack)."""
    qwen3vl_shallow(w, n_text)
    w.norm("v.deepstack.0.norm", 4 * w.n_embd)
    w.linear("v.deepstack.0.fc1", 4 * w.n_embd, 4 * w.n_embd)
    w.linear("v.deepstack.0.fc2", n_text, 4 * w.n_embd)


def glm4v(w: Weights, n_text: int) -> None:
    patches(w, bias=True, two=True)
    positions(w)
    w.norm("v.norm_embd", w.n_embd, bias=False)
    layers(w, gate=True, bias=False, norm_bias=False, fused=True)
    w.norm("v.post_ln", w.n_embd, bias=False)
    w.linear("mm.patch_merger", n_text, w.n_embd, 2, 2)
    w.linear("mm.model.fc", n_text, n_text, bias=False)
    w.norm("mm.post_norm", n_text)
    for name in ("up", "gate", "down"):
        w.linear("mm." + name, n_text, n_text, bias=False)


def youtuvl(w: Weights, n_text: int) -> None:
    patches(w, bias=True, flat=True)
    layers(w)
    w.norm("v.post_ln", w.n_embd)
    w.norm("mm.input_norm", w.n_embd, bias=False)
    mlp(w, 0, 2, 4 * w.n_embd, n_text)


def dots_ocr(w: Weights, n_text: int) -> None:
    patches(w, bias=True)
    w.norm("v.pre_ln", w.n_embd, bias=False)
    layers(w, gate=True, bias=False, norm_bias=False)
    w.norm("mm.post_norm", w.n_embd, bias=False)
    w.norm("mm.input_norm", w.n_embd)
    mlp(w, 0, 2, 4 * w.n_embd, n_text)


def gemma4_unified(w: Weights, n_text: int) -> None:
    """No transformer: large patches (3 x 3 of the size in the file), norms, positions."""
    n = w.n_embd
    n_pixel = 3 * (3 * w.patch) ** 2
    w.linear("v.patch_embd", n, n_pixel)
    for i, width in enumerate((n_pixel, n, n), start=1):
        w.norm(f"v.patch_norm.{i}", width)
    w.draw("v.position_embd.weight", 2, 64, n, gain=(64 * n) ** 0.5, f32=True)
    w.linear("mm.input_projection", n_text, n, bias=False)


def exaone45(w: Weights, n_text: int) -> None:
    """Qwen2.5-VL's tower with half as many KV heads."""
    patches(w, two=True)
    layers(w, gate=True, norm_bias=False, fused=True)
    for i in range(w.n_layer):
        w.linear(f"v.blk.{i}.attn_qkv", 2 * w.n_embd, w.n_embd)
    w.norm("v.post_ln", w.n_embd, bias=False)
    mlp(w, 0, 2, 4 * w.n_embd, n_text)


def nemotron(w: Weights, n_text: int) -> None:
    """Registers before the patches; squared ReLU."""
    patches(w)
    positions(w)
    w.draw("v.class_embd", 3, w.n_embd, f32=True)
    layers(w)
    w.norm("mm.model.mlp.0", 4 * w.n_embd, bias=False)
    w.linear("mm.model.mlp.1", n_text, 4 * w.n_embd, bias=False)
    w.linear("mm.model.mlp.3", n_text, n_text, bias=False)


def minimax_m3(w: Weights, n_text: int) -> None:
    patches(w, two=True)
    w.norm("v.pre_ln", w.n_embd)
    layers(w)
    w.linear("mm.1", n_text, w.n_embd)
    w.linear("mm.2", w.n_embd, n_text)
    w.linear("mm.merger.fc1", n_text, 4 * w.n_embd)
    w.linear("mm.merger.fc2", n_text, n_text)
