"""Random tensors of vision towers: the transformer, and the projector of each family."""

from __future__ import annotations

import numpy as np


class Weights:
    """Tensors by GGUF name, drawn one after the other.

    Parameters
    ----------
    n_embd, n_ff, n_head, n_layer, patch, size : int
        Shape of the tower; ``size`` is in pixels.
    """

    def __init__(
        self, n_embd: int, n_ff: int, n_head: int, n_layer: int, patch: int, size: int
    ) -> None:
        self.n_embd, self.n_ff, self.n_head, self.n_layer = n_embd, n_ff, n_head, n_layer
        self.patch, self.size = patch, size
        self.tensors: dict[str, np.ndarray] = {}
        self.f32: set[str] = set()  # matrices that libmtmd reads as f32
        self._rng = np.random.default_rng(0)

    @property
    def n_patch(self) -> int:
        """Patches of an image of the size that the tower was made for."""
        return (self.size // self.patch) ** 2

    def draw(self, name: str, *shape: int, gain: float = 1.0, f32: bool = False) -> None:
        """A tensor of unit gain: each number is as large as makes an output of unit size."""
        n_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        self.tensors[name] = self._rng.standard_normal(shape, np.float32) * (gain / n_in**0.5)
        if f32:
            self.f32.add(name)

    def linear(self, name: str, n_out: int, *n_in: int, bias: bool = True) -> None:
        """A matrix, or the kernel of a convolution."""
        self.draw(name + ".weight", n_out, *n_in, gain=1.2)
        if bias:
            self.draw(name + ".bias", n_out, gain=0.1)

    def norm(self, name: str, n: int, bias: bool = True) -> None:
        self.draw(name + ".weight", n, gain=0.1)
        self.tensors[name + ".weight"] += 1
        if bias:
            self.draw(name + ".bias", n, gain=0.1)


def _patches(w: Weights, bias: bool = False, two: bool = False, flat: bool = False) -> None:
    shape = (3 * w.patch**2,) if flat else (3, w.patch, w.patch)
    w.linear("v.patch_embd", w.n_embd, *shape, bias=bias)
    if two:  # one for each of two frames
        w.draw("v.patch_embd.weight.1", w.n_embd, *shape)


def _positions(w: Weights, n: int | None = None, f32: bool = True) -> None:
    """Unit size, so that the order of patches matters."""
    n = w.n_patch if n is None else n
    w.draw("v.position_embd.weight", n, w.n_embd, gain=w.n_embd**0.5, f32=f32)


def _layers(
    w: Weights,
    *,
    gate: bool = False,
    bias: bool = True,
    norm_bias: bool = True,
    fused: bool = False,
    n_layer: int | None = None,
) -> None:
    n, n_ff = w.n_embd, w.n_ff
    for i in range(w.n_layer if n_layer is None else n_layer):
        p = f"v.blk.{i}."
        w.norm(p + "ln1", n, norm_bias)
        w.norm(p + "ln2", n, norm_bias)
        if fused:
            w.linear(p + "attn_qkv", 3 * n, n, bias=bias)
        for name in ("out",) if fused else ("q", "k", "v", "out"):
            w.linear(p + "attn_" + name, n, n, bias=bias)
        for name in ("gate", "up") if gate else ("up",):
            w.linear(p + "ffn_" + name, n_ff, n, bias=bias)
        w.linear(p + "ffn_down", n, n_ff, bias=bias)


def _mlp(w: Weights, first: int, second: int, n_in: int, n_text: int, bias: bool = True) -> None:
    """Two matrices ``mm.first`` and ``mm.second``, as wide as their input between."""
    w.linear(f"mm.{first}", n_in, n_in, bias=bias)
    w.linear(f"mm.{second}", n_text, n_in, bias=bias)


# -- LLaVA's relatives


def _clip(w: Weights) -> None:
    _patches(w)
    w.draw("v.class_embd", w.n_embd)
    _positions(w, w.n_patch + 1)
    w.norm("v.pre_ln", w.n_embd)
    _layers(w)


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
    _patches(w, bias=True)
    _positions(w)
    _layers(w)
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

    _patches(w, bias=True)
    _positions(w)
    _layers(w)
    w.tensors.update(glm_edge_adapter(w.n_embd, n_text))


def cogvlm(w: Weights, n_text: int) -> None:
    _patches(w, bias=True)
    w.draw("v.class_embd", w.n_embd)
    _positions(w, w.n_patch + 1)
    _layers(w, fused=True)
    w.linear("mm.model.fc", n_text, w.n_embd, bias=False)
    w.norm("mm.post_fc_norm", n_text)
    for name in ("up", "gate", "down"):
        w.linear("mm." + name, n_text, n_text, bias=False)
    for name in ("boi", "eoi"):
        w.draw("v." + name, n_text)


# -- SigLIP's relatives


def _siglip(w: Weights, n_position: int | None = None) -> None:
    _patches(w, bias=True)
    _positions(w, n_position)
    _layers(w)
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
    _mlp(w, 1, 2, 4 * w.n_embd, n_text)


def janus(w: Weights, n_text: int) -> None:
    _siglip(w)
    _mlp(w, 0, 1, w.n_embd, n_text)


def phi4(w: Weights, n_text: int) -> None:
    _siglip(w)
    _mlp(w, 0, 2, w.n_embd, n_text)


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
    _patches(w, bias=True)
    _positions(w)
    _layers(w)
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
    _mlp(w, 1, 2, 4 * w.n_embd, n_text)


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


# -- other towers


def internvl(w: Weights, n_text: int) -> None:
    _patches(w, bias=True)
    w.draw("v.class_embd", w.n_embd)
    _positions(w, w.n_patch + 1)
    _layers(w)
    for i in range(w.n_layer):
        for name in ("ls1", "ls2"):
            w.norm(f"v.blk.{i}.{name}", w.n_embd, bias=False)
    w.norm("mm.model.mlp.0", 4 * w.n_embd)
    w.linear("mm.model.mlp.1", n_text, 4 * w.n_embd)
    w.linear("mm.model.mlp.3", n_text, n_text)


def llama4(w: Weights, n_text: int) -> None:
    _patches(w, flat=True)
    w.draw("v.class_embd", w.n_embd)
    _positions(w, w.n_patch + 1)
    w.norm("v.pre_ln", w.n_embd)
    _layers(w)
    w.norm("v.post_ln", w.n_embd)
    w.linear("mm.model.mlp.1", 2 * w.n_embd, 4 * w.n_embd, bias=False)
    w.linear("mm.model.mlp.2", 2 * w.n_embd, 2 * w.n_embd, bias=False)
    w.linear("mm.model.fc", n_text, 2 * w.n_embd, bias=False)


def gemma4(w: Weights, n_text: int) -> None:
    """Tables of positions for x and y; four norms a layer, and one a head."""
    _patches(w)
    w.draw("v.position_embd.weight", 2, 64, w.n_embd, gain=(64 * w.n_embd) ** 0.5, f32=True)
    _layers(w, gate=True, bias=False, norm_bias=False)
    for i in range(w.n_layer):
        p = f"v.blk.{i}."
        w.norm(p + "attn_q_norm", w.n_embd // w.n_head, bias=False)
        w.norm(p + "attn_k_norm", w.n_embd // w.n_head, bias=False)
        w.norm(p + "attn_post_norm", w.n_embd, bias=False)
        w.norm(p + "ffn_post_norm", w.n_embd, bias=False)
    w.linear("mm.input_projection", n_text, w.n_embd, bias=False)


def _pixtral(w: Weights) -> None:
    _patches(w)
    w.norm("v.pre_ln", w.n_embd, bias=False)
    _layers(w, gate=True, bias=False, norm_bias=False)


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
    _patches(w, two=True)
    _layers(w)
    w.norm("v.post_ln", w.n_embd)
    _mlp(w, 0, 2, 4 * w.n_embd, n_text)


def qwen25vl(w: Weights, n_text: int) -> None:
    """RMS norms, a gate, and windows in the first layer."""
    _patches(w, two=True)
    _layers(w, gate=True, norm_bias=False)
    w.norm("v.post_ln", w.n_embd, bias=False)
    _mlp(w, 0, 2, 4 * w.n_embd, n_text)


def qwen3vl(w: Weights, n_text: int) -> None:
    """What the first layer makes goes to the first layer of the language model (deepstack)."""
    _patches(w, bias=True, two=True)
    _positions(w)
    _layers(w, fused=True)
    w.norm("v.post_ln", w.n_embd)
    _mlp(w, 0, 2, 4 * w.n_embd, n_text)
    w.norm("v.deepstack.0.norm", 4 * w.n_embd)
    w.linear("v.deepstack.0.fc1", 4 * w.n_embd, 4 * w.n_embd)
    w.linear("v.deepstack.0.fc2", n_text, 4 * w.n_embd)


def glm4v(w: Weights, n_text: int) -> None:
    _patches(w, bias=True, two=True)
    _positions(w)
    w.norm("v.norm_embd", w.n_embd, bias=False)
    _layers(w, gate=True, bias=False, norm_bias=False, fused=True)
    w.norm("v.post_ln", w.n_embd, bias=False)
    w.linear("mm.patch_merger", n_text, w.n_embd, 2, 2)
    w.linear("mm.model.fc", n_text, n_text, bias=False)
    w.norm("mm.post_norm", n_text)
    for name in ("up", "gate", "down"):
        w.linear("mm." + name, n_text, n_text, bias=False)


def youtuvl(w: Weights, n_text: int) -> None:
    _patches(w, bias=True, flat=True)
    _layers(w)
    w.norm("v.post_ln", w.n_embd)
    w.norm("mm.input_norm", w.n_embd, bias=False)
    _mlp(w, 0, 2, 4 * w.n_embd, n_text)


def dots_ocr(w: Weights, n_text: int) -> None:
    _patches(w, bias=True)
    w.norm("v.pre_ln", w.n_embd, bias=False)
    _layers(w, gate=True, bias=False, norm_bias=False)
    w.norm("mm.post_norm", w.n_embd, bias=False)
    w.norm("mm.input_norm", w.n_embd)
    _mlp(w, 0, 2, 4 * w.n_embd, n_text)
