"""Families with a SigLIP tower: no class token, a norm with bias behind the last layer."""

from __future__ import annotations

from tests.support.mmproj_weights import Weights, layers, mlp, patches, positions


def _siglip(w: Weights, n_position: int | None = None) -> None:
    patches(w, bias=True)
    positions(w, n_position)
    layers(w)
    w.norm("v.post_ln", w.n_embd)


def idefics3(w: Weights, n_text: int) -> None:
    _siglip(w)
    w.linear("mm.model.fc", n_text, 4 * w.n_embd, bias=False)


def gemma3(w: Weights, n_text: int) -> None:
    _siglip(w)
    w.norm("mm.soft_emb_norm", w.n_embd, bias=False)
    w.linear("mm.input_projection", w.n_embd, n_text, bias=False)


def lfm2(w: Weights, n_text: int) -> None:
    _siglip(w)
    w.norm("mm.input_norm", 4 * w.n_embd)
    mlp(w, 1, 2, 4 * w.n_embd, n_text)


def janus(w: Weights, n_text: int) -> None:
    _siglip(w)
    mlp(w, 0, 1, w.n_embd, n_text)


def phi4(w: Weights, n_text: int) -> None:
    _siglip(w)
    mlp(w, 0, 2, w.n_embd, n_text)


def resampler(w: Weights, n_text: int) -> None:
    """MiniCPM-V: 9 queries read the patches; positions are buckets of 70 a side."""
    _siglip(w, 70 * 70)
    p = "resampler."
    w.draw(p + "pos_embed_k", w.n_patch, n_text)
    w.draw(p + "query", 9, n_text, gain=n_text**0.5, f32=True)
    w.linear(p + "proj", n_text, n_text, bias=False)
    w.linear(p + "kv", n_text, w.n_embd, bias=False)
    for name in ("q", "k", "v", "out"):
        w.linear(p + "attn." + name, n_text, n_text)
    for name in ("q", "kv", "post"):
        w.norm(p + "ln_" + name, n_text)


def granite4(w: Weights, n_text: int) -> None:
    """A query transformer for each of two layers; their outputs stand side by side (deepstack)."""
    patches(w, bias=True)
    positions(w)
    layers(w)
    w.draw("v.image_newline", n_text)
    n, n_window, n_query = w.n_embd, 4 * 4, 2 * 2
    for i in range(2):
        p = f"v.proj_blk.{i}."
        w.draw(p + "img_pos", n_window, n, f32=True)
        w.draw(p + "query", n_query, n, f32=True)
        w.linear(p + "linear", n_text, n)
        for name in ("norm", "post_norm", "self_attn_norm", "cross_attn_norm", "ffn_norm"):
            w.norm(p + name, n)
        for kind in ("self", "cross"):
            for name in ("q", "k", "v", "out"):
                w.linear(f"{p}{kind}_attn_{name}", n, n)
        w.linear(p + "ffn_up", w.n_ff, n)
        w.linear(p + "ffn_down", n, w.n_ff)


def kimivl(w: Weights, n_text: int) -> None:
    _siglip(w)
    w.norm("mm.input_norm", w.n_embd)
    mlp(w, 1, 2, 4 * w.n_embd, n_text)


paddleocr = kimivl


def hunyuan(w: Weights, n_text: int) -> None:
    _siglip(w)
    n = w.n_embd
    w.norm("mm.pre_norm", n, bias=False)
    w.linear("mm.0", 2 * n, n, 2, 2)
    w.linear("mm.2", 4 * n, 2 * n, 1, 1)
    w.linear("mm.model.fc", n_text, 4 * n)
    w.norm("mm.post_norm", n_text, bias=False)
    w.draw("mm.image_begin", n_text)
    w.draw("mm.image_end", n_text)
    w.draw("v.image_newline", 4 * n)


def kimik25(w: Weights, n_text: int) -> None:
    """Kimi-VL's tower; its positions are a grid."""
    kimivl(w, n_text)
    side = w.size // w.patch
    name = "v.position_embd.weight"
    w.tensors[name] = w.tensors[name].reshape(side, side, w.n_embd)


def minicpmv46(w: Weights, n_text: int) -> None:
    """Patches are merged behind the first layer, in windows of 2 x 2, and once more at the end."""
    _siglip(w, 70 * 70)
    n, p = w.n_embd, "v.vit_merger."
    w.norm(p + "ln1", n)
    for name in ("q", "k", "v", "out"):
        w.linear(p + "attn_" + name, n, n)
    w.norm(p + "ds_ln", 4 * n)
    w.linear(p + "ds_ffn_up", w.n_ff, 4 * n)
    w.linear(p + "ds_ffn_down", n, w.n_ff)
    w.norm("mm.input_norm", 4 * n)
    w.linear("mm.up", w.n_ff, 4 * n)
    w.linear("mm.down", n_text, w.n_ff)
