"""Write vision towers as mmproj GGUF, in the layouts that converters of LLaVA-like models use.

The legacy LLaVA-1.5 layout (llama.cpp's ``convert_image_encoder_to_gguf.py``): the encoder's last
layer left out and not counted, no post-LayerNorm, fc1 called ``ffn_down`` and fc2 ``ffn_up``, no
``clip.vision.feature_layer``. :class:`Layout` says in what a file departs from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGUFWriter


@dataclass(frozen=True)
class Layout:
    """How a file is laid out.

    Parameters
    ----------
    n_block : int, optional
        Encoder layers to store; all but the last by default, as the legacy converter does.
    class_token : bool, default=True
        Store the class embedding (CLIP) or leave it and its position out (SigLIP-like).
    feature_layer : tuple of int, default=()
        Value of ``clip.vision.feature_layer``; empty leaves the key out.
    post_norm : bool, default=False
        Store the post-LayerNorm.
    repeat_last : bool, default=False
        Append a copy of the last block, as Moondream2's converter does.
    projector : {"mlp", "adapter"}, default="mlp"
        LLaVA's projector, or GLM-Edge's (then ``tensors`` come from :func:`glm_edge_adapter`).
    """

    n_block: int | None = None
    class_token: bool = True
    feature_layer: tuple[int, ...] = ()
    post_norm: bool = False
    repeat_last: bool = False
    projector: str = "mlp"


LEGACY = Layout()


@dataclass(frozen=True)
class Tower:
    """A random tower with its projector, as ``tests/reference/llava_reference.py`` stores it.

    Parameters
    ----------
    weights : dict of str to ndarray
        By the names of ``transformers``.
    shape : dict of str to int
        ``image_size, patch_size, n_embd, n_head, n_ff, n_layer, n_embd_text``.
    mean, std : ndarray, shape (3,)
        Image normalisation.
    image : ndarray of uint8, shape (image_size, image_size, 3)
    features : ndarray, shape (n_patch, n_embd_text)
        Reference output for ``image``, of the tower as stored.
    """

    weights: dict[str, np.ndarray]
    shape: dict[str, int]
    mean: np.ndarray
    std: np.ndarray
    image: np.ndarray
    features: np.ndarray

    @classmethod
    def load(cls, path: str | Path) -> Tower:
        """Read the stored reference."""
        with np.load(path) as data:
            groups: dict[str, dict[str, np.ndarray]] = {"weight": {}, "shape": {}}
            for key in data:
                group, _, name = key.partition("/")
                if name:
                    groups[group][name] = data[key]
            weights = groups["weight"]
            shape = {name: int(value) for name, value in groups["shape"].items()}
            return cls(weights, shape, data["mean"], data["std"], data["image"], data["features"])

    def without_class_token(self) -> Tower:
        """The same tower, its class token and the token's position removed."""
        weights = dict(self.weights)
        del weights["embeddings.class_embedding"]
        name = "embeddings.position_embedding.weight"
        weights[name] = weights[name][1:]
        return replace(self, weights=weights)


def write_mmproj(path: str | Path, tower: Tower, layout: Layout = LEGACY) -> Path:
    """Write ``tower`` in ``layout``: matrices f16, vectors f32."""
    path, s = Path(path), tower.shape
    n_block = s["n_layer"] - 1 if layout.n_block is None else layout.n_block
    writer = GGUFWriter(str(path), "clip")
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_llava_projector", layout.projector == "mlp")
    writer.add_file_type(1)
    writer.add_name("tiny-random-clip")
    writer.add_description("image encoder for LLaVA")
    writer.add_string("clip.projector_type", layout.projector)
    vision = "clip.vision."
    writer.add_uint32(vision + "image_size", s["image_size"])
    writer.add_uint32(vision + "patch_size", s["patch_size"])
    writer.add_uint32(vision + "embedding_length", s["n_embd"])
    writer.add_uint32(vision + "feed_forward_length", s["n_ff"])
    writer.add_uint32(vision + "projection_dim", s["n_embd_text"])
    writer.add_uint32(vision + "attention.head_count", s["n_head"])
    writer.add_float32(vision + "attention.layer_norm_epsilon", 1e-5)
    writer.add_uint32(vision + "block_count", n_block + layout.repeat_last)
    writer.add_array(vision + "image_mean", tower.mean.tolist())
    writer.add_array(vision + "image_std", tower.std.tolist())
    if layout.feature_layer:
        writer.add_array(vision + "feature_layer", list(layout.feature_layer))
    writer.add_bool("clip.use_gelu", False)
    for name, value in _tensors(tower.weights, layout, n_block).items():
        writer.add_tensor(name, value.astype(np.float16 if value.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def glm_edge_adapter(n_embd: int, n_embd_text: int) -> dict[str, np.ndarray]:
    """Random weights of GLM-Edge's projector, by GGUF name."""
    rng = np.random.default_rng(2)

    def matrix(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) / np.float32(np.prod(shape[1:]) ** 0.5)

    return {
        "adapter.conv.weight": matrix(n_embd_text, n_embd, 2, 2),
        "adapter.conv.bias": matrix(n_embd_text, 1)[:, 0],
        "adapter.linear.linear.weight": matrix(n_embd_text, n_embd_text),
        "adapter.linear.norm1.weight": np.ones(n_embd_text, np.float32),
        "adapter.linear.norm1.bias": np.zeros(n_embd_text, np.float32),
        "adapter.linear.dense_h_to_4h.weight": matrix(2 * n_embd_text, n_embd_text),
        "adapter.linear.gate.weight": matrix(2 * n_embd_text, n_embd_text),
        "adapter.linear.dense_4h_to_h.weight": matrix(n_embd_text, 2 * n_embd_text),
        "adapter.boi": matrix(n_embd_text, 1)[:, 0],
        "adapter.eoi": matrix(n_embd_text, 1)[:, 0],
    }


def _tensors(
    weights: Mapping[str, np.ndarray], layout: Layout, n_block: int
) -> dict[str, np.ndarray]:
    """GGUF names and values."""
    out = {
        "v.patch_embd.weight": weights["embeddings.patch_embedding.weight"],
        "v.position_embd.weight": weights["embeddings.position_embedding.weight"],
    }
    if layout.class_token:
        out["v.class_embd"] = weights["embeddings.class_embedding"]

    def copy(target: str, source: str) -> None:
        for part in (".weight", ".bias"):
            out[target + part] = weights[source + part]

    copy("v.pre_ln", "pre_layrnorm")
    if layout.post_norm:
        copy("v.post_ln", "post_layernorm")
    for i in range(n_block + layout.repeat_last):
        target = f"v.blk.{i}."
        source = f"encoder.layers.{min(i, n_block - 1)}."
        for name in ("q", "k", "v", "out"):
            copy(target + f"attn_{name}", source + f"self_attn.{name}_proj")
        copy(target + "ln1", source + "layer_norm1")
        copy(target + "ln2", source + "layer_norm2")
        # Legacy files have these two names the wrong way round; the reader swaps them back.
        copy(target + "ffn_down", source + "mlp.fc1")
        copy(target + "ffn_up", source + "mlp.fc2")
    if layout.projector == "mlp":
        copy("mm.0", "projector.linear_1")
        copy("mm.2", "projector.linear_2")
    else:
        n_embd_text, n_embd = weights["projector.linear_1.weight"].shape
        out.update(glm_edge_adapter(n_embd, n_embd_text))
    return out
