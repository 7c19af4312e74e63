"""Tiny random vision towers with the projector of each family that libmtmd knows.

The names of tensors and parameters are those that llama.cpp's ``clip.cpp`` asks for. The weights
are random: only the arithmetic of a family, its chunks and its image positions are its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from tests.support import mmproj_clip as clip
from tests.support import mmproj_siglip as siglip
from tests.support import mmproj_vit as vit
from tests.support.mmproj_weights import Weights

_VISION = ("<|vision_start|>", "<|vision_end|>")
_SLICES = ("<image>", "</image>", "<slice>", "</slice>")
_ROWS = tuple(f"<row_{y}_col_{x}>" for y in (1, 2) for x in (1, 2))
_LFM2 = tuple(f"<|img_row_{y}_col_{x}|>" for y in (1, 2) for x in (1, 2))


@dataclass(frozen=True)
class Family:
    """A projector and a language model that it belongs to.

    Parameters
    ----------
    projector : str
        ``clip.projector_type``.
    text : str
        Architecture for `tests.support.vision_text`.
    build : callable
        Adds the tensors, given :class:`Weights` and the width of the language model.
    tokens : tuple of str
        Image markers of the family's vocabulary.
    vision : dict
        Parameters below ``clip.vision.`` besides those that every tower has.
    top : dict
        Parameters below ``clip.``.
    size, patch, n_embd : int
        Pixels of a side of the image the tower was made for, and of a patch; width of the tower.
    """

    projector: str
    text: str
    build: Callable[[Weights, int], None]
    tokens: tuple[str, ...] = ()
    vision: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    size: int = 56
    patch: int = 14
    n_embd: int = 32


_GELU, _SILU = {"use_gelu": True}, {"use_silu": True}
_MERGE = {"spatial_merge_size": 2}
_SCALE = {"projector.scale_factor": 2}
_PIXELS = {"image_min_pixels": 28 * 28, "image_max_pixels": 28 * 28 * 64}
_LDP = {"size": 96, "patch": 4}  # both graphs write 24 patches a side

FAMILIES: dict[str, Family] = {
    "llava": Family("mlp", "llama", clip.llava),
    "yi": Family("mlp", "llama", clip.llava_norm),
    "moondream2": Family("mlp", "phi2", clip.moondream, top=_GELU),
    "mobilevlm": Family("ldp", "llama", clip.ldp, **_LDP),
    "mobilevlm2": Family("ldpv2", "llama", clip.ldpv2, **_LDP),
    "glm-edge": Family("adapter", "llama", clip.glm_edge),
    "minicpmv": Family(
        "resampler", "qwen2", siglip.resampler, _SLICES,
        top={"minicpmv_version": 3, "minicpmv_query_num": 9, **_GELU},
    ),
    "qwen2vl": Family("qwen2vl_merger", "qwen2vl", vit.qwen2vl, _VISION, size=56, patch=7),
    "qwen2.5vl": Family(
        "qwen2.5vl_merger", "qwen2vl", vit.qwen25vl, _VISION, {"n_wa_pattern": 2}, _SILU,
        patch=7,
    ),
    "qwen3vl": Family("qwen3vl_merger", "qwen3vl", vit.qwen3vl, _VISION, _MERGE, _GELU, patch=7),
    "idefics3": Family(
        "idefics3", "llama", siglip.idefics3,
        ("\n\n", "<fake_token_around_image>", "<global-img>", *_ROWS),
        {**_SCALE, "preproc_image_size": 112}, _GELU,
    ),
    "internvl": Family(
        "internvl", "qwen2", vit.internvl, ("<img>", "</img>"),
        {**_SCALE, "preproc_max_tiles": 4}, _GELU,
    ),
    "gemma3": Family(
        "gemma3", "gemma3", siglip.gemma3, ("<start_of_image>", "<end_of_image>"), _SCALE, _GELU,
        patch=7,
    ),
    "gemma4": Family(
        "gemma4v", "gemma4", vit.gemma4, ("<|image>", "<image|>"), top=_GELU, patch=4
    ),
    "pixtral": Family("pixtral", "llama", vit.pixtral, ("[IMG_END]",), top=_SILU),
    "mistral-small": Family(
        "pixtral", "llama", vit.mistral_small, ("[IMG_END]",), _MERGE, _SILU, patch=7
    ),
    "llama4": Family(
        "llama4", "llama4", vit.llama4, ("<|image_start|>", "<|image_end|>"), _SCALE, _GELU
    ),
    "lfm2": Family(
        "lfm2", "lfm2", siglip.lfm2,
        ("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", *_LFM2), _SCALE, _GELU, patch=4,
    ),
    "granite4": Family(
        "granite4_vision", "granite", siglip.granite4, (),
        {
            "feature_layer": [0, 1], "projector.spatial_offsets": [-1, 0],
            "image_grid_pinpoints": [56, 112, 112, 56, 112, 112],
            "projector.query_side": 2, "projector.window_side": 4,
        },
        _GELU, patch=7, n_embd=64,
    ),
    "kimivl": Family(
        "kimivl", "llama", siglip.kimivl, ("<|media_start|>", "<|media_end|>"), _SCALE, _GELU,
        patch=7,
    ),
    "glm4v": Family(
        "glm4v", "glm4", vit.glm4v, ("<|begin_of_image|>", "<|end_of_image|>"), _MERGE, _SILU,
        patch=7,
    ),
    "hunyuan": Family(
        "hunyuanvl", "hunyuan_vl", siglip.hunyuan,
        ("<｜hy_place▁holder▁no▁100｜>", "<｜hy_place▁holder▁no▁101｜>"), {**_MERGE, **_PIXELS},
        _GELU, patch=7,
    ),
    "cogvlm": Family("cogvlm", "cogvlm", clip.cogvlm, top=_GELU),
    "youtuvl": Family(
        "youtuvl", "llama", vit.youtuvl, _VISION,
        {**_MERGE, "window_size": 56, "wa_layer_indexes": [1]}, _GELU, patch=7,
    ),
    "paddleocr": Family(
        "paddleocr", "paddleocr", siglip.paddleocr, ("<|IMAGE_START|>", "<|IMAGE_END|>"), _PIXELS,
        _GELU, patch=7,
    ),
    "dots-ocr": Family(
        "dots_ocr", "qwen2", vit.dots_ocr, ("<|img|>", "<|endofimg|>"), {**_SCALE, **_PIXELS},
        _SILU, patch=7,
    ),
    "lightonocr": Family("lightonocr", "qwen3", vit.lighton, (), _MERGE, _SILU, patch=7),
    "gemma4-unified": Family(
        "gemma4uv", "gemma4", vit.gemma4_unified, ("<|image>", "<image|>"), {"block_count": 0},
        patch=4,
    ),
    "qwen3.5": Family(
        "qwen3vl_merger", "qwen35", vit.qwen3vl_shallow, _VISION, _MERGE, _GELU, patch=7
    ),
    "minicpmv4.6": Family(
        "minicpmv4_6", "qwen35", siglip.minicpmv46, _SLICES,
        {"wa_layer_indexes": [0], "projector.scale_factor": 4}, _GELU, patch=7,
    ),
    "exaone4.5": Family(
        "exaone4_5", "exaone4", vit.exaone45, ("<vision>", "</vision>"),
        {**_MERGE, **_PIXELS, "n_wa_pattern": 2, "attention.head_count_kv": 1}, _SILU, patch=7,
    ),
    "nemotron": Family("nemotron_v2_vl", "qwen2", vit.nemotron, (), _SCALE, _GELU),
    "kimik2.5": Family(
        "kimik25", "llama", siglip.kimik25, ("<|media_begin|>", "<|media_end|>"),
        {**_SCALE, **_PIXELS}, _GELU, patch=7,
    ),
    "minimax-m3": Family(
        "minimax_m3", "llama", vit.minimax_m3,
        ("]<]start of image[>[", "]<]end of image[>["), _MERGE, _GELU, patch=7,
    ),
    "janus-pro": Family("janus_pro", "llama", siglip.janus, top=_GELU),
    "phi4": Family("phi4", "llama", siglip.phi4, (), _PIXELS, _GELU),
}  # fmt: skip

#: Other language models of a family: name -> family, architecture for `vision_text`.
TEXT_VARIANTS = {
    "gemma4-e2b": ("gemma4", "gemma4-e2b"),
    "gemma4-moe": ("gemma4", "gemma4-moe"),
}


def write_mmproj(path: Path, family: Family, n_embd_text: int) -> Path:
    """Write the vision tower of a family for a language model of a width; matrices f16."""
    n_head, n_layer = family.n_embd // 16, 2
    writer = GGUFWriter(str(path), "clip")
    writer.add_file_type(1)
    writer.add_name(f"tiny-random-{family.projector}")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", family.projector)
    numbers = {
        "image_size": family.size,
        "patch_size": family.patch,
        "embedding_length": family.n_embd,
        "feed_forward_length": 2 * family.n_embd,
        "projection_dim": n_embd_text,
        "attention.head_count": n_head,
        "block_count": n_layer,
        **family.vision,
    }
    for key, value in numbers.items():
        if isinstance(value, list):
            writer.add_array("clip.vision." + key, value)
        else:
            writer.add_uint32("clip.vision." + key, value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    for key, value in family.top.items():
        if key == "minicpmv_version":
            writer.add_int32("clip." + key, value)
        else:
            (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(
                "clip." + key, value
            )
    weights = Weights(family.n_embd, 2 * family.n_embd, n_head, n_layer, family.patch, family.size)
    family.build(weights, n_embd_text)
    for name, value in weights.tensors.items():
        f16 = value.ndim > 1 and name not in weights.f32
        writer.add_tensor(name, value.astype(np.float16 if f16 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
