"""CLIP's vision tower and the LLaVA projector in NumPy, written from the papers' formulas.

Weights come under the names of ``transformers`` (see ``tests/reference/llava_reference.py``); a
tower without ``embeddings.class_embedding`` has no class token. Everything runs in f64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

Weights = Mapping[str, np.ndarray]


def hidden_states(
    w: Weights, pixels: np.ndarray, n_head: int, eps: float = 1e-5
) -> list[np.ndarray]:
    """States before the first and after every layer.

    Parameters
    ----------
    w : mapping of str to ndarray
        Weights of the tower, matrices ``[n_out, n_in]``.
    pixels : ndarray, shape (3, size, size)
        Normalised image.
    n_head : int
        Attention heads.

    Returns
    -------
    list of ndarray, each (n_token, n_embd)
        ``n_layer + 1`` arrays; row 0 is the class token where the tower has one.
    """
    kernel = w["embeddings.patch_embedding.weight"].astype(np.float64)
    x = _patches(pixels.astype(np.float64), kernel.shape[-1]) @ kernel.reshape(len(kernel), -1).T
    if "embeddings.class_embedding" in w:
        x = np.concatenate([w["embeddings.class_embedding"][None], x])
    x = x + w["embeddings.position_embedding.weight"]
    x = _norm(w, "pre_layrnorm", x, eps)
    states = [x]
    while f"encoder.layers.{len(states) - 1}.layer_norm1.weight" in w:
        p = f"encoder.layers.{len(states) - 1}."
        x = x + _attention(w, p + "self_attn.", _norm(w, p + "layer_norm1", x, eps), n_head)
        inner = _linear(w, p + "mlp.fc1", _norm(w, p + "layer_norm2", x, eps))
        x = x + _linear(w, p + "mlp.fc2", inner / (1 + np.exp(-1.702 * inner)))  # quick GELU
        states.append(x)
    return states


def image_features(
    w: Weights,
    pixels: np.ndarray,
    n_head: int,
    layers: Sequence[int] = (-2,),
    post_norm: bool = False,
) -> np.ndarray:
    """What the language model gets: patches of the chosen layers, projected.

    Parameters
    ----------
    w, pixels, n_head
        As for :func:`hidden_states`.
    layers : sequence of int, default=(-2,)
        Indices into the hidden states; several are joined along the features.
    post_norm : bool, default=False
        Apply the tower's last LayerNorm first (LLaVA does not).

    Returns
    -------
    ndarray, shape (n_patch, n_embd_text)
    """
    states = hidden_states(w, pixels, n_head)
    first = 1 if "embeddings.class_embedding" in w else 0
    x = np.concatenate([states[i][first:] for i in layers], axis=-1)
    if post_norm:
        x = _norm(w, "post_layernorm", x, 1e-5)
    x = _linear(w, "projector.linear_1", x)
    gelu = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return _linear(w, "projector.linear_2", gelu)


def normalize(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Bytes ``(size, size, 3)`` to normalised pixels ``(3, size, size)``."""
    return ((image / 255.0 - np.asarray(mean)) / np.asarray(std)).transpose(2, 0, 1)


def _patches(pixels: np.ndarray, size: int) -> np.ndarray:
    """Rows of ``(n_patch, 3 * size * size)``, in reading order."""
    side = pixels.shape[-1] // size
    grid = pixels.reshape(3, side, size, side, size).transpose(1, 3, 0, 2, 4)
    return grid.reshape(side * side, -1)


def _linear(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[name + ".weight"].astype(np.float64).T + w[name + ".bias"]


def _norm(w: Weights, name: str, x: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return scaled * w[name + ".weight"] + w[name + ".bias"]


def _attention(w: Weights, p: str, x: np.ndarray, n_head: int) -> np.ndarray:
    """Full attention of ``x`` (n_token, n_embd) to itself."""
    q, k, v = (
        _linear(w, p + name, x).reshape(len(x), n_head, -1).transpose(1, 0, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    logits = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    return _linear(w, p + "out_proj", (weight @ v).transpose(1, 0, 2).reshape(len(x), -1))
