"""What is in a scene: the grid, its cells, and the seed ranges of the splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
EMPTY = "empty"
GRIDS = (2, 3, 4)  # cells per side

# First seed of each split; a split is SPLIT_SIZE consecutive seeds, so no two overlap.
SPLIT_SIZE = 1_000_000_000
SPLITS = {"train": 0, "dev": SPLIT_SIZE, "test": 2 * SPLIT_SIZE}

EMPTY_RATE = 0.12  # chance of a cell to hold nothing


@dataclass(frozen=True)
class Cell:
    """One cell of the grid; `color` and `shape` are both "" when it is empty."""

    color: str = ""
    shape: str = ""

    @property
    def is_empty(self) -> bool:
        return not self.color

    def __str__(self) -> str:
        return EMPTY if self.is_empty else f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A grid of cells and the seed that draws it.

    Attributes
    ----------
    grid : int
        Cells per side, 2 to 4.
    cells : tuple of Cell
        `grid * grid` cells, row by row.
    seed : int
        Seed of the layout and of every random choice in the drawing.
    """

    grid: int
    cells: tuple[Cell, ...]
    seed: int

    def at(self, row: int, column: int) -> Cell:
        """Cell at a 1-based row and column."""
        if not (1 <= row <= self.grid and 1 <= column <= self.grid):
            raise ValueError(
                f"[scene] cell outside the grid, got row {row}, column {column}, "
                f"expected 1 to {self.grid}"
            )
        return self.cells[(row - 1) * self.grid + column - 1]

    def row(self, row: int) -> tuple[Cell, ...]:
        """Cells of a 1-based row, left to right."""
        return tuple(self.at(row, column) for column in range(1, self.grid + 1))

    def caption(self) -> str:
        """The scene in words, row by row: the answer to `CAPTION_PROMPT`."""
        from .questions import caption

        return caption(self)

    def render(self) -> Image:
        """The picture, RGB, 336 x 336."""
        from .render import render

        return render(self)


def make_scene(split: str, index: int, grid: int | None = None) -> Scene:
    """Scene number `index` of a split; the same on every machine.

    Parameters
    ----------
    split : {"train", "dev", "test"}
        "train" is for gradients, "dev" for choices, "test" for reported figures only.
    index : int
        0 to SPLIT_SIZE - 1.
    grid : int, optional
        Cells per side. Drawn from the seed (2, 3, 4 equally likely) when not given.
    """
    if split not in SPLITS:
        raise ValueError(f"[scene] unknown split, got {split!r}, expected one of {list(SPLITS)}")
    if not 0 <= index < SPLIT_SIZE:
        raise ValueError(f"[scene] index out of range, got {index}, expected 0 to {SPLIT_SIZE - 1}")
    if grid is not None and grid not in GRIDS:
        raise ValueError(f"[scene] unknown grid, got {grid}, expected one of {GRIDS}")
    seed = SPLITS[split] + index
    rng = stream(seed, "layout")
    drawn = GRIDS[int(rng.integers(len(GRIDS)))]  # drawn always, so that cells do not depend on it
    size = drawn if grid is None else grid
    return Scene(size, tuple(_draw_cell(rng) for _ in range(size * size)), seed)


def stream(seed: int, purpose: str) -> np.random.Generator:
    """Independent random stream of a scene: one purpose never shifts another's numbers."""
    key = ("layout", "render", "questions", "background").index(purpose)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, key])))


def _draw_cell(rng: np.random.Generator) -> Cell:
    color, shape = int(rng.integers(len(COLORS))), int(rng.integers(len(SHAPES)))
    if rng.random() < EMPTY_RATE:
        return Cell()
    return Cell(COLORS[color], SHAPES[shape])
