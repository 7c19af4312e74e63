"""What one compression kept of a prompt, cell by cell; `picture` draws it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
from PIL import Image, ImageOps

from .config import policy_row
from .errors import ConfigError, StateError, message
from .gguf_check import Header, read_header
from .grids import Grid, grid_of, tile_boxes
from .images import ImageSource, as_images, load_image
from .in_use import other_parts
from .pieces import ImagePiece
from .stats import mib

if TYPE_CHECKING:
    from .conversation import Conversation
    from .llama import ElasticLlama

__all__ = ["Kept", "Panel", "kept_share", "look"]

_SIGNS = {" ": "·", "\n": "↵", "\t": "→"}
# Towers that libmtmd gives a square: the whole image in its middle, this colour around it.
_PADDED = ("mlp", "mlp_norm", "ldp", "ldpv2")
_PAD_COLOR = (122, 116, 104)


@dataclass(frozen=True)
class Panel:
    """One image, or a tile of one, and its cells.

    Attributes
    ----------
    name : str
        "image 1", "image 2, tile 1 of 4", "image 2, overview", ...
    cells : int array [n]
        Logical indices before the compression, in the order of the patches.
    shape : (int, int)
        Rows and columns of patches; (1, n) where they are not known.
    image : PIL image or None
        What the vision tower saw; None where that part of the image is not known.
    note : str
        What the picture cannot show exactly, or "".
    """

    name: str
    cells: np.ndarray
    shape: tuple[int, int]
    image: Image.Image | None
    note: str = ""


@dataclass(frozen=True)
class Kept:
    """What a compression kept.

    Attributes
    ----------
    share : f64 array [n_cells]
        For each cell before the compression, the share of rows (layers x KV heads) that keep it,
        0 to 1.
    pieces : list of str
        Text of each cell's token with visible white space, "" for cells of images.
    panels : list of Panel
        The images, in the order of the prompt.
    n_after : int
        Cells after the compression.
    title, subtitle : str
        What was done, and what a share is a share of.
    bytes_note : str
        Bytes of all parts of the memory, where windows or recurrent states are not compressed.
    """

    share: np.ndarray
    pieces: list[str]
    panels: list[Panel]
    n_after: int
    title: str
    subtitle: str
    bytes_note: str = ""


def kept_share(
    plan: Mapping[str, Any] | None, n_cells: int, layer: int | None = None
) -> np.ndarray:
    """Share of the rows of a plan (layers x KV heads) that keep each cell.

    Where a policy merges, a row keeps a cell if the cell is an anchor in it.

    Parameters
    ----------
    plan : mapping or None
        `Session.last_plan()`: kept, int [n_layer, n_head_kv, n_keep], logical indices in any order,
        -1 where a layer holds fewer. None, or a plan of no rows: nothing was compressed.
    n_cells : int
        Cells before the compression.
    layer : int, optional
        Only the rows of this layer.

    Returns
    -------
    f64 array [n_cells], 0 to 1

    Raises
    ------
    ConfigError
        The plan has no such layer.
    StateError
        The plan is of more cells.
    """
    kept = np.zeros((0, 0, 0), np.int32) if plan is None else np.asarray(plan["kept"])
    if kept.size == 0:
        return np.ones(n_cells)
    if layer is not None:
        check_layer(layer, len(kept))
        kept = kept[layer : layer + 1]
    if kept.max() >= n_cells:
        raise StateError(message("show", "plan", f"cell {kept.max()}", f"cells below {n_cells}"))
    n_rows = kept.shape[0] * kept.shape[1]
    return np.bincount(kept[kept >= 0], minlength=n_cells) / n_rows


def check_layer(layer: int, n_layer: int) -> None:
    if not 0 <= layer < n_layer:
        raise ConfigError(message("show", "layer", layer, f"0 to {n_layer - 1}"))


def look(
    chat: Conversation,
    question: str,
    images: Sequence[ImageSource] = (),
    layer: int | None = None,
) -> Kept:
    """Decode a question about images, compress it, and say what was kept.

    Parameters
    ----------
    chat : Conversation
        Of a model with an elastic cache; its earlier turns are forgotten.
    layer : int, optional
        Look at this layer alone.

    Raises
    ------
    ConfigError
        No such layer, or no elastic cache.
    ImageError, ContextOverflowError
        As from `Conversation.prefill`.
    """
    llm = chat.llm
    if llm.elastic is None:
        raise ConfigError(message("show", "the model has no elastic cache", do="pass elastic"))
    loaded = [load_image(image) for image in as_images(images)]
    n_layer, n_head = _shape(llm)
    if layer is not None:
        check_layer(layer, n_layer)

    chat.clear()
    chat.prefill(question, loaded)
    ids, chunks = _cells(chat)
    plan, n_after = _compress(llm)
    n_cells = len(ids)
    others = other_parts(llm)
    rows = f"the {n_layer} {'compressed ' if others else ''}layers × {n_head} KV heads"
    if layer is not None:
        rows = f"the {n_head} KV heads of layer {layer}"
    return Kept(
        share=kept_share(plan, n_cells, layer),
        pieces=_pieces(llm, ids),
        panels=_panels(llm.mmproj_path, chunks, loaded),
        n_after=n_after,
        title=_title(llm, n_cells, n_after),
        bytes_note=_bytes_note(llm, others),
        subtitle=f"share of {rows} that keep a cell; {_fate(llm, plan)}",
    )


def _shape(llm: ElasticLlama) -> tuple[int, int]:
    """Layers and KV heads."""
    if llm.session is not None:
        n_layer, n_head = llm.session.importance().shape[:2]
    else:
        n_layer = llama_cpp.llama_model_n_layer(llm.model)
        n_head = llama_cpp.llama_model_n_head_kv(llm.model)
    return int(n_layer), int(n_head)


@dataclass(frozen=True)
class _Chunk:
    """An image, or a tile of one, and the cells that are there of it."""

    piece: ImagePiece
    cells: np.ndarray


def _cells(chat: Conversation) -> tuple[np.ndarray, list[_Chunk]]:
    """Token of each cell of the prompt, < 0 in images, and the cells of each image chunk."""
    pos, tokens, owners = [], [], []
    start = 0
    for i, piece in enumerate(chat._pieces):
        is_image = isinstance(piece, ImagePiece)
        n = piece.n_cells
        is_at_one = isinstance(piece, ImagePiece) and piece.grid is not None  # M-RoPE
        spread = np.zeros(n, np.int64) if is_at_one else np.arange(n)
        pos.append(start + spread)
        tokens.append(np.full(n, -1) if is_image else np.asarray(piece.tokens))
        owners.append(np.full(n, i))
        start += len(piece)
    all_pos, all_tokens, owner = (np.concatenate(part) for part in (pos, tokens, owners))
    session = chat.llm.session
    here = all_pos if session is None else session.cells()["pos"]
    if len(here) < len(all_pos):  # some were merged while the prompt was read
        first = np.searchsorted(all_pos, here)
        all_tokens, owner = all_tokens[first], owner[first]
    chunks = [
        _Chunk(piece, np.flatnonzero(owner == i))
        for i, piece in enumerate(chat._pieces)
        if isinstance(piece, ImagePiece)
    ]
    return all_tokens, [chunk for chunk in chunks if len(chunk.cells)]


def _compress(llm: ElasticLlama) -> tuple[Any, int]:
    """The plan, None where nothing was compressed, and cells after."""
    session = llm.session
    if session is None:  # every cell stays
        return None, llm._room.n_used()
    n_done = session.stats()["compressions"]
    session.compress()
    # where nothing was compressed, the last plan is that of an earlier prompt
    plan = session.last_plan() if session.stats()["compressions"] > n_done else None
    return plan, int(session.n_per_layer())


def _title(llm: ElasticLlama, n_before: int, n_after: int) -> str:
    assert llm.elastic is not None
    unit = "" if llm.elastic.budget <= 1 else " cells"
    budget = f"{llm.elastic.budget:g}{unit}"
    return f"policy {llm.elastic.policy}, budget {budget}: {n_before} → {n_after} cells"


def _bytes_note(llm: ElasticLlama, others: str) -> str:
    stats = llm.stats
    if not others or not stats.bytes_before:
        return ""
    return (
        f"{mib(stats.bytes_before)} → {mib(stats.bytes_after)} of the whole memory, of which "
        f"{mib(stats.other_bytes)} are not compressed: {others}"
    )


def _fate(llm: ElasticLlama, plan: Mapping[str, Any] | None) -> str:
    """What became of the cells that were not kept."""
    if plan is None:
        return "nothing was compressed"
    assert llm.elastic is not None
    merges = policy_row(llm.elastic.policy)["merges"]
    return "the others are merged into kept ones" if merges else "the others are lost"


# -- the text


def _pieces(llm: ElasticLlama, ids: np.ndarray) -> list[str]:
    """Text of each cell's token; "" for cells of images, whose places hold ids < 0."""
    return [_piece(llm, int(token)) if token >= 0 else "" for token in ids]


def _piece(llm: ElasticLlama, token: int) -> str:
    return visible(llm.detokenize([token], special=True)) or f"#{token}"


def visible(piece: bytes) -> str:
    """A token as text: white space as signs, bytes that are no text on their own as ``\\xNN``."""
    out = ""
    for c in piece.decode("utf-8", "backslashreplace"):
        out += _SIGNS.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode())
    return out


# -- the images


def _panels(
    mmproj_path: str | None, chunks: list[_Chunk], images: list[Image.Image]
) -> list[Panel]:
    if not chunks or mmproj_path is None:
        return []
    tower = read_header(mmproj_path, "mmproj")
    first = [i for i, chunk in enumerate(chunks) if chunk.piece.part == 0]
    panels: list[Panel] = []
    for k, (begin, end) in enumerate(zip(first, [*first[1:], len(chunks)])):
        panels += _image_panels(f"image {k + 1}", chunks[begin:end], images[k], tower)
    return panels


def _image_panels(
    name: str, chunks: list[_Chunk], image: Image.Image, tower: Header
) -> Iterator[Panel]:
    """One for each chunk of an image: it, or its tiles and an overview."""
    boxes = tile_boxes(len(chunks), _kind(tower), image.size)
    n_tile = 0
    for chunk, box in zip(chunks, boxes):
        part = None if box is None else image.crop(box)
        is_tile = box != (0, 0, *image.size)
        n_tile += is_tile
        if len(chunks) == 1:
            yield _panel(name, chunk, image, tower)
        else:
            what = f"tile {n_tile} of {len(chunks) - 1}" if is_tile else "overview"
            yield _panel(f"{name}, {what}", chunk, part, tower)


def _panel(name: str, chunk: _Chunk, image: Image.Image | None, tower: Header) -> Panel:
    kind, n = _kind(tower), len(chunk.cells)
    size = (1, 1) if image is None else image.size
    grid = grid_of(n, kind, size, _patches_per_side(tower))
    if chunk.piece.grid is not None:
        grid = Grid(*chunk.piece.grid)
    if grid is None or n != chunk.piece.n_cells:
        return Panel(name, chunk.cells, (1, n), image, "cells in order, as one strip")
    cells = chunk.cells[grid.patches()]
    if image is not None and kind in _PADDED:
        side = int(tower.meta.get("clip.vision.image_size", 0)) or max(image.size)
        seen = ImageOps.pad(image, (side, side), Image.Resampling.BILINEAR, color=_PAD_COLOR)
        return Panel(name, cells, grid.shape, seen)
    note = "" if image is None or _is_near(grid, size) else "image stretched over its patches"
    return Panel(name, cells, grid.shape, image, note)


def _is_near(grid: Grid, size: tuple[int, int]) -> bool:
    """Whether patches are about as high as wide."""
    return 0.8 < grid.columns * size[1] / (grid.rows * size[0]) < 1.25


def _kind(tower: Header) -> str:
    meta = tower.meta
    return str(meta.get("clip.vision.projector_type", meta.get("clip.projector_type", "mlp")))


def _patches_per_side(tower: Header) -> int:
    """Of a tower for square images; 0 if unknown."""
    size, patch = (int(tower.meta.get(f"clip.vision.{k}_size", 0)) for k in ("image", "patch"))
    return size // patch if patch else 0
