"""What the elastic cache does for a model file: on which layers it works, and what it saves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import llama_cpp

from . import _core
from ._checks import ENCODER
from .config import ElasticConfig, whole
from .errors import ConfigError, StateError, UnsupportedModelError, message
from .fallback import why_not
from .images import MAX_PIXELS
from .pointers import address_of
from .session import attach, lazy_buffers

__all__ = ["ImageCost", "ModelInfo", "Sizes", "model_info"]

N_TOKENS = (2048, 8192, 32768)
IMAGE_SIZE = (1024, 768)
_PAD = 256  # llama.cpp makes caches of whole multiples of these
_INSTEAD = "run it with the cache off (elastic=None, --kv-budget 1)"


@dataclass(frozen=True)
class Sizes:
    """Bytes of the memory of a context that holds `n_tokens`, each with both of its parts.

    Parameters
    ----------
    stock : int
        As llama-cpp-python makes it: every layer with attention holds all tokens (`swa_full`).
    windowed : int
        With `swa_full=False`: layers with a sliding window hold the window.
    elastic : int
        So, and with the elastic cache after a prompt of as many tokens.
    other : int
        The share of the last two that is not compressed: windows and recurrent states.
    """

    n_tokens: int
    stock: int
    windowed: int
    elastic: int
    other: int

    @property
    def saved(self) -> float:
        """Share of `windowed` that the elastic cache saves, 0 to 1."""
        return 1 - self.elastic / self.windowed


@dataclass(frozen=True)
class ImageCost:
    """Cells that an image takes before and after it is compressed, and their bytes in all layers.

    `positions` are fewer than cells with M-RoPE.
    """

    width: int
    height: int
    cells: int
    positions: int
    n_bytes: int
    cells_kept: int
    bytes_kept: int


@dataclass(frozen=True)
class ModelInfo:
    """What there is to say of a model file.

    Parameters
    ----------
    why : str
        Why the elastic cache does not take the model; "" if it does. All sizes are 0 then.
    instead : str
        What to do about that.
    kind : str
        plain, sliding window, hybrid, or hybrid with a sliding window.
    n_layer_model, n_layer : int
        Layers of the model, and those whose cache is compressed.
    cell_bytes : int
        Of K and V of a cell in the layers that are compressed.
    bias_bytes : int
        What the elastic cache adds to each of its cells.
    window_tokens, window_cells, window_cell_bytes : int
        Of a sliding window: what it sees, what is kept for that and a batch, and bytes of one.
    state_bytes : int
        Of the recurrent states of a sequence.
    """

    path: str
    architecture: str
    n_params: int
    budget: float | int
    why: str = ""
    instead: str = ""
    kind: str = ""
    n_layer_model: int = 0
    n_layer: int = 0
    cell_bytes: int = 0
    bias_bytes: int = 0
    window_tokens: int = 0
    window_cells: int = 0
    window_cell_bytes: int = 0
    state_bytes: int = 0
    sizes: list[Sizes] = field(default_factory=list)
    image: ImageCost | None = None

    @property
    def works(self) -> bool:
        return not self.why

    def kept(self, n_tokens: int) -> int:
        """Cells of a prompt of so many tokens once it is compressed."""
        n = int(_core.core.budget_cells(float(self.budget), n_tokens))
        return min(n_tokens, max(n, ElasticConfig.min_cells))

    def other_bytes(self, n_tokens: int) -> int:
        """Of what is not compressed, with windows of no more cells than they need."""
        return min(n_tokens, self.window_cells) * self.window_cell_bytes + self.state_bytes

    def size(self, n_tokens: int) -> Sizes:
        other = self.other_bytes(n_tokens)
        return Sizes(
            n_tokens=n_tokens,
            stock=n_tokens * (self.cell_bytes + self.window_cell_bytes) + self.state_bytes,
            windowed=n_tokens * self.cell_bytes + other,
            elastic=self.kept(n_tokens) * (self.cell_bytes + self.bias_bytes) + other,
            other=other,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        out = {**asdict(self), "works": self.works}
        for row, sizes in zip(out["sizes"], self.sizes):
            row["saved"] = sizes.saved
        return out


def model_info(
    model_path: str | os.PathLike[str],
    mmproj_path: str | os.PathLike[str] | None = None,
    *,
    budget: float | int = 0.2,
    image_size: tuple[int, int] = IMAGE_SIZE,
    n_tokens: Iterable[int] = N_TOKENS,
    n_ubatch: int = 512,
    type_k: int | None = None,
    type_v: int | None = None,
) -> ModelInfo:
    """Look at a model file; it is loaded, and nothing is computed with it.

    Parameters
    ----------
    mmproj_path : path, optional
        For what an image costs.
    budget : float or int
        As in `ElasticConfig`.
    image_size : (int, int)
        Width and height of the image, in pixels.
    n_ubatch : int
        Tokens that are computed at once: a sliding window has cells for so many more.
    type_k, type_v : int, optional
        ggml's numbers of the types of K and V; f16 by default.

    Raises
    ------
    ModelNotFoundError, ModelFileError, ConfigError
    """
    from .llama import ElasticLlama

    elastic = ElasticConfig(budget=budget)
    whole("n_ubatch", n_ubatch, 1)
    if min(image_size) < 1 or image_size[0] * image_size[1] > MAX_PIXELS:
        raise ConfigError(
            message(
                "info",
                "image size",
                image_size,
                f"a width and a height of at least 1, and at most {MAX_PIXELS} pixels",
            )
        )
    types: dict[str, Any] = {"type_k": type_k, "type_v": type_v}
    llm = ElasticLlama(
        model_path,
        mmproj_path=mmproj_path,
        elastic=None,
        n_ctx=_PAD,
        embedding=True,  # so that models without a KV cache load too
        flash_attn=True,
        **types,
    )
    try:
        about: dict[str, Any] = {
            "path": os.fspath(model_path),
            "architecture": llm.metadata.get("general.architecture", "?"),
            "n_params": int(llama_cpp.llama_model_n_params(llm.model)),
            "budget": elastic.budget,
        }
        try:
            about.update(_memory(llm, elastic, n_ubatch, types))
        except UnsupportedModelError as e:
            return ModelInfo(**about, why=why_not(e), instead=_instead(llm))
        info = ModelInfo(**about)
        about["sizes"] = [info.size(n) for n in n_tokens]
        if mmproj_path is not None:
            about["image"] = _image(llm, info, image_size)
        return ModelInfo(**about)
    finally:
        llm.close()


def _instead(llm: Any) -> str:
    if llm._ctx.memory is None:
        return "make embeddings with it: embedding=True"
    if llama_cpp.llama_model_has_encoder(llm.model):
        return ENCODER
    return f"{_INSTEAD}; -ctk q8_0 -ctv q8_0 -fa on halves its cache"


def _memory(llm: Any, elastic: ElasticConfig, n_ubatch: int, types: dict[str, Any]) -> dict:
    """What the memory consists of; two contexts tell bytes per cell from those of any context."""
    with _context(llm, _PAD, types) as ctx:
        small = _native_memory(ctx)
        session = attach(llm, ctx, elastic) if not elastic.is_off else None
        bias = 0 if session is None else session.kv_bytes_per_cell() - small["cell_bytes"]
        if session is not None:
            session.detach()
    with _context(llm, 2 * _PAD, types) as ctx:
        large = _native_memory(ctx)
    per_cell = (large["other_bytes"] - small["other_bytes"]) // _PAD
    n_swa = int(llama_cpp.llama_model_n_swa(llm.model)) if per_cell else 0
    return {
        **{name: small[name] for name in ("kind", "n_layer_model", "n_layer", "cell_bytes")},
        "bias_bytes": bias,
        "window_tokens": n_swa,
        "window_cells": -(-(n_swa + n_ubatch) // _PAD) * _PAD if per_cell else 0,
        "window_cell_bytes": per_cell,
        "state_bytes": small["other_bytes"] - _PAD * per_cell,
    }


def _native_memory(ctx: Any) -> dict[str, Any]:
    try:
        return dict(_core.memory(address_of(ctx)))
    except NotImplementedError as e:
        raise UnsupportedModelError(str(e)) from e


@contextmanager
def _context(llm: Any, n_ctx: int, types: dict[str, Any]) -> Iterator[Any]:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = n_ctx
    params.n_batch = params.n_ubatch = 32
    params.flash_attn_type = 1
    params.swa_full = True
    for name, value in types.items():
        if value is not None:
            setattr(params, name, value)
    with lazy_buffers(ElasticConfig()):
        ctx = llama_cpp.llama_init_from_model(llm.model, params)
    if not ctx:
        raise StateError(message("info", "llama.cpp refused a context", f"{n_ctx} cells"))
    try:
        yield ctx
    finally:
        llama_cpp.llama_free(ctx)


def _image(llm: Any, info: ModelInfo, size: tuple[int, int]) -> ImageCost:
    from PIL import Image

    from .vision import MARKER, Vision

    vision = Vision(llm.mmproj_path, llm)
    try:
        with vision.chunks(MARKER, [Image.new("RGB", size)], False) as chunks:
            images = [chunk for chunk in chunks if chunk.is_image]
            cells = sum(len(chunk) for chunk in images)
            positions = sum(
                int(llama_cpp.mtmd_cpp.mtmd_input_chunk_get_n_pos(chunk.native)) for chunk in images
            )
    finally:
        vision.close()
    kept = info.kept(cells)
    window = min(cells, info.window_cells) * info.window_cell_bytes
    return ImageCost(
        width=size[0],
        height=size[1],
        cells=cells,
        positions=positions,
        n_bytes=cells * info.cell_bytes + window,
        cells_kept=kept,
        bytes_kept=kept * (info.cell_bytes + info.bias_bytes) + window,
    )
