"""Random tensors of vision towers, and what the towers of all families have in common."""

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


def patches(w: Weights, bias: bool = False, two: bool = False, flat: bool = False) -> None:
    shape = (3 * w.patch**2,) if flat else (3, w.patch, w.patch)
    w.linear("v.patch_embd", w.n_embd, *shape, bias=bias)
    if two:  # one for each of two frames
        w.draw("v.patch_embd.weight.1", w.n_embd, *shape)


def positions(w: Weights, n: int | None = None, f32: bool = True) -> None:
    """Unit size, so that the order of patches matters."""
    n = w.n_patch if n is None else n
    w.draw("v.position_embd.weight", n, w.n_embd, gain=w.n_embd**0.5, f32=f32)


def layers(
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


def mlp(w: Weights, first: int, second: int, n_in: int, n_text: int, bias: bool = True) -> None:
    """Two matrices ``mm.first`` and ``mm.second``, as wide as their input between."""
    w.linear(f"mm.{first}", n_in, n_in, bias=bias)
    w.linear(f"mm.{second}", n_text, n_in, bias=bias)
