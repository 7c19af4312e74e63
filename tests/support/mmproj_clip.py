"""LLaVA and its relatives: a CLIP tower with a class token, and one of four projectors."""

from __future__ import annotations

from tests.support.mmproj_weights import Weights, layers, patches, positions


def _clip(w: Weights) -> None:
    patches(w)
    w.draw("v.class_embd", w.n_embd)
    positions(w, w.n_patch + 1)
    w.norm("v.pre_ln", w.n_embd)
    layers(w)


def llava(w: Weights, n_text: int) -> None:
    _clip(w)
    w.linear("mm.0", n_text, w.n_embd)
    w.linear("mm.2", n_text, n_text)


def llava_norm(w: Weights, n_text: int) -> None:
    """Yi-VL: a LayerNorm behind each matrix."""
    _clip(w)
    w.linear("mm.0", n_text, w.n_embd)
    w.norm("mm.1", n_text)
    w.linear("mm.3", n_text, n_text)
    w.norm("mm.4", n_text)


def moondream(w: Weights, n_text: int) -> None:
    """SigLIP without a class token; the last layer is there to be skipped."""
    patches(w, bias=True)
    positions(w)
    layers(w)
    w.norm("v.post_ln", w.n_embd)
    w.linear("mm.0", 2 * n_text, w.n_embd)
    w.linear("mm.2", n_text, 2 * n_text)


def ldp(w: Weights, n_text: int) -> None:
    _clip(w)
    w.linear("mm.model.mlp.1", n_text, w.n_embd)
    w.linear("mm.model.mlp.3", n_text, n_text)
    for i in (1, 2):
        p = f"mm.model.mb_block.{i}.block."
        w.linear(p + "0.0", n_text, 1, 3, 3, bias=False)
        w.norm(p + "0.1", n_text)
        w.linear(p + "1.fc1", n_text // 4, n_text)
        w.linear(p + "1.fc2", n_text, n_text // 4)
        w.linear(p + "2.0", n_text, n_text, bias=False)
        w.norm(p + "2.1", n_text)


def ldpv2(w: Weights, n_text: int) -> None:
    _clip(w)
    w.linear("mm.model.mlp.0", n_text, w.n_embd)
    w.linear("mm.model.mlp.2", n_text, n_text)
    w.linear("mm.model.peg.0", n_text, 1, 3, 3)


def glm_edge(w: Weights, n_text: int) -> None:
    from tests.support.mmproj import glm_edge_adapter

    patches(w, bias=True)
    positions(w)
    layers(w)
    w.tensors.update(glm_edge_adapter(w.n_embd, n_text))


def cogvlm(w: Weights, n_text: int) -> None:
    patches(w, bias=True)
    w.draw("v.class_embd", w.n_embd)
    positions(w, w.n_patch + 1)
    layers(w, fused=True)
    w.linear("mm.model.fc", n_text, w.n_embd, bias=False)
    w.norm("mm.post_fc_norm", n_text)
    for name in ("up", "gate", "down"):
        w.linear("mm." + name, n_text, n_text, bias=False)
    for name in ("boi", "eoi"):
        w.draw("v." + name, n_text)
