"""Where the embeddings of an image lie: rows and columns of each of its chunks, and its tiles.

libmtmd says rows and columns only for models with M-RoPE. For others they follow from the number of
embeddings, the kind of projector and the shape of the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

__all__ = ["Grid", "grid_of", "grid_shape", "tile_boxes"]

# Projectors whose towers take an image in its own shape; those of others are square.
_OWN_SHAPE = (
    "pixtral lightonocr qwen2vl_merger qwen2.5vl_merger qwen3vl_merger lfm2 kimivl kimik25 gemma4v "
    "gemma4uv phi4 youtuvl dots_ocr paddleocr hunyuanvl glm4v exaone4_5 mimovl"
).split()
_ROW_END = ("pixtral", "hunyuanvl")  # an embedding more at the end of each row
_BOTH_ENDS = ("hunyuanvl", "adapter", "cogvlm")  # and one before and after the image
_NO_PLACE = ("resampler",)  # each embedding looks at all of the image
_OVERVIEW_FIRST = ("resampler", "minicpmv4_6")
_MOST_OFF = 1.6  # how far the shape of a grid may be from that of its image


@dataclass(frozen=True)
class Grid:
    """Rows and columns of patches; `stride` embeddings a row, `lead` of them before the first."""

    rows: int
    columns: int
    lead: int = 0
    stride: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def patches(self) -> np.ndarray:
        """Index of each patch among the embeddings, int [rows * columns]."""
        y, x = np.indices(self.shape)
        return (self.lead + y * (self.stride or self.columns) + x).ravel()


def grid_of(n: int, kind: str, size: tuple[int, int], side: int = 0) -> Grid | None:
    """The grid of an image's, or a tile's, `n` embeddings; None if it is not known.

    Parameters
    ----------
    kind : str
        ``clip.projector_type``.
    size : (int, int)
        Width and height of what the tower saw.
    side : int
        Patches per side of a tower for square images; 0 if unknown.
    """
    if kind in _NO_PLACE:
        return None
    lead = int(kind in _BOTH_ENDS)
    n -= 2 * lead
    if kind not in _OWN_SHAPE:
        rows, columns = grid_shape(n, side)
        return Grid(rows, columns, lead) if rows > 1 else None
    found = list(_grids(n, 0, lead))
    if kind in _ROW_END:
        found += _grids(n + (kind == "pixtral"), 1, lead)  # the last row has none in Pixtral
    best = min(found, key=lambda grid: _off(grid.columns / grid.rows, size), default=None)
    is_near = best is not None and _off(best.columns / best.rows, size) <= _MOST_OFF
    return best if is_near else None


def grid_shape(n: int, side: int = 0) -> tuple[int, int]:
    """Rows and columns of an image's n cells: the tower's square or a pooled one, else (1, n).

    A square that is no whole fraction of `side` (patches per side of the tower, 0 if unknown) is a
    coincidence: several tiles in a row.
    """
    k = math.isqrt(n)
    return (k, k) if n and k * k == n and side % k == 0 else (1, n)


def tile_boxes(n: int, kind: str, size: tuple[int, int]) -> list[tuple[int, int, int, int] | None]:
    """What part of an image each of its `n` chunks shows, in pixels: left, top, right, bottom.

    One of them is an overview of the whole image. None where a chunk is a tile, but of what grid of
    tiles is not known.
    """
    width, height = size
    whole = (0, 0, width, height)
    if n == 1:
        return [whole]
    best = min(_grids(n - 1, 0, 0), key=lambda grid: _off(grid.columns / grid.rows, size))
    tiles: list[tuple[int, int, int, int] | None] = [None] * (n - 1)
    if _off(best.columns / best.rows, size) <= _MOST_OFF:
        x = [round(i * width / best.columns) for i in range(best.columns + 1)]
        y = [round(i * height / best.rows) for i in range(best.rows + 1)]
        tiles = [(x[i % best.columns], y[i // best.columns], x[i % best.columns + 1],
                  y[i // best.columns + 1]) for i in range(n - 1)]  # fmt: skip
    return [whole, *tiles] if kind in _OVERVIEW_FIRST else [*tiles, whole]


def _grids(n: int, n_ends: int, lead: int) -> Iterator[Grid]:
    """Grids of `n` embeddings with `n_ends` more than columns in each row."""
    for rows in range(1, n + 1):
        if n % rows == 0 and n // rows > n_ends:
            columns = n // rows - n_ends
            yield Grid(rows, columns, lead, columns + n_ends)


def _off(aspect: float, size: tuple[int, int]) -> float:
    """Factor between the shape of a grid and that of an image, at least 1."""
    factor = aspect * size[1] / size[0]
    return max(factor, 1 / factor)
