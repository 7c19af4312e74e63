"""What one compression kept of a prompt, cell by cell; `picture` draws it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
from PIL import Image, ImageOps

from .config import policy_row
from .errors import ConfigError, StateError, message
from .gguf_check import Header, read_header
from .images import ImageSource, as_images, load_image

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
    """One image and its cells.

    Attributes
    ----------
    name : str
        "image 1", "image 2", ...; "images" for several that cannot be told apart.
    cells : int array [n]
        Logical indices before the compression, in the order of the patches.
    shape : (int, int)
        Rows and columns of patches; (1, n) where the cells are no square.
    image : PIL image or None
        As the vision tower saw it; None for several images.
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
    """

    share: np.ndarray
    pieces: list[str]
    panels: list[Panel]
    n_after: int
    title: str
    subtitle: str


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
    ids, plan, n_after = _compress(llm)
    n_cells = len(ids)
    rows = f"the {n_layer} layers × {n_head} KV heads"
    if layer is not None:
        rows = f"the {n_head} KV heads of layer {layer}"
    return Kept(
        share=kept_share(plan, n_cells, layer),
        pieces=_pieces(llm, ids),
        panels=_panels(llm.mmproj_path, ids < 0, loaded),
        n_after=n_after,
        title=_title(llm, n_cells, n_after),
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


def _compress(llm: ElasticLlama) -> tuple[np.ndarray, Any, int]:
    """Ids of the prompt's cells, the plan, None where nothing was compressed, and cells after."""
    session = llm.session
    if session is None:  # every cell stays
        return llm.input_ids[: llm.n_tokens], None, llm.n_tokens
    ids = llm.input_ids[session.cells()["pos"]]
    n_done = session.stats()["compressions"]
    session.compress()
    # where nothing was compressed, the last plan is that of an earlier prompt
    plan = session.last_plan() if session.stats()["compressions"] > n_done else None
    return ids, plan, int(session.n_per_layer())


def _title(llm: ElasticLlama, n_before: int, n_after: int) -> str:
    assert llm.elastic is not None
    unit = "" if llm.elastic.budget <= 1 else " cells"
    budget = f"{llm.elastic.budget:g}{unit}"
    return f"policy {llm.elastic.policy}, budget {budget}: {n_before} → {n_after} cells"


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
    mmproj_path: str | None, is_image: np.ndarray, images: Sequence[Image.Image]
) -> list[Panel]:
    if not images or mmproj_path is None:
        return []
    tower = read_header(mmproj_path, "mmproj")
    side = _patches_per_side(tower)
    groups = image_groups(is_image, len(images), side)
    if len(groups) < len(images):
        note = f"{len(images)} images that cannot be told apart: cells in order, as one strip"
        return [Panel("images", groups[0], (1, len(groups[0])), None, note)]
    return [
        _panel(f"image {i + 1}", cells, image, tower, side)
        for i, (cells, image) in enumerate(zip(groups, images))
    ]


def _panel(name: str, cells: np.ndarray, image: Image.Image, tower: Header, side: int) -> Panel:
    shape = grid_shape(len(cells), side)
    if shape[0] == 1:
        note = "not a square of patches: cells in order, as one strip"
        return Panel(name, cells, shape, image, note)
    meta = tower.meta
    kind = meta.get("clip.vision.projector_type", meta.get("clip.projector_type", "mlp"))
    size = int(meta.get("clip.vision.image_size", 0)) or max(image.size)
    if kind in _PADDED:
        seen = ImageOps.pad(image, (size, size), Image.Resampling.BILINEAR, color=_PAD_COLOR)
        return Panel(name, cells, shape, seen)
    seen = image.resize((size, size))
    return Panel(name, cells, shape, seen, "image stretched over its patches")


def _patches_per_side(tower: Header) -> int:
    """Of a tower for square images; 0 if unknown."""
    size, patch = (int(tower.meta.get(f"clip.vision.{k}_size", 0)) for k in ("image", "patch"))
    return size // patch if patch else 0


def grid_shape(n: int, side: int = 0) -> tuple[int, int]:
    """Rows and columns of an image's n cells: the tower's square or a pooled one, else (1, n).

    A square that is no whole fraction of `side` (patches per side of the tower, 0 if unknown) is a
    coincidence: several tiles in a row.
    """
    k = math.isqrt(n)
    return (k, k) if n and k * k == n and side % k == 0 else (1, n)


def image_groups(is_image: np.ndarray, n_images: int, side: int = 0) -> list[np.ndarray]:
    """Cells of each image: `n_images` index arrays, or one of all if they cannot be told apart.

    `is_image` is bool [n_cells]. Images side by side in a prompt make one run of cells; only a
    tower that gives every image one square of patches says where the next one begins.
    """
    cells = np.flatnonzero(is_image)
    runs = np.split(cells, np.flatnonzero(np.diff(cells) > 1) + 1)
    if len(runs) == n_images:
        return runs
    n = len(cells) // n_images
    if (
        n * n_images == len(cells)
        and grid_shape(n, side)[0] > 1
        and not any(len(r) % n for r in runs)
    ):
        return np.split(cells, n_images)
    return [cells]
