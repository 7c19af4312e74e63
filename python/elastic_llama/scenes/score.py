"""Scoring answers: what a caption gets right, cell by cell, and how many tokens agree."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .layout import COLORS, EMPTY, SHAPES, Cell, Scene

_CELL = re.compile(rf"({EMPTY})|({'|'.join(COLORS)}) ({'|'.join(SHAPES)})")


@dataclass(frozen=True)
class CaptionScore:
    """Counts over the cells of a scene; all are sums, so scores of scenes can be added.

    Attributes
    ----------
    n_cells, n_objects : int
        Cells, and those that hold an object.
    cells, colors, shapes, positions : int
        Cells right; objects whose colour, shape is right in their place; cells rightly said to be
        empty or not (an object missing, invented or moved costs a position).
    whole : int
        1 when the whole caption is exact.
    """

    n_cells: int = 0
    n_objects: int = 0
    cells: int = 0
    colors: int = 0
    shapes: int = 0
    positions: int = 0
    whole: int = 0

    def __add__(self, other: CaptionScore) -> CaptionScore:
        return CaptionScore(
            *(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__)
        )


def parse_caption(text: str) -> list[list[Cell | None]]:
    """Rows of cells out of a caption; a cell that cannot be read is None."""
    rows = []
    for part in re.split(r"row \d+:", text)[1:]:
        row: list[Cell | None] = []
        for piece in part.strip().rstrip(".").split(","):
            match = _CELL.fullmatch(piece.strip())
            if match is None:
                row.append(None)
            else:
                row.append(Cell() if match.group(1) else Cell(match.group(2), match.group(3)))
        rows.append(row)
    return rows


def score_caption(scene: Scene, text: str) -> CaptionScore:
    """Compare a caption with the scene; cells it does not mention count as wrong."""
    rows = parse_caption(text)
    cells = colors = shapes = positions = 0
    for i, truth in enumerate(scene.cells):
        r, c = divmod(i, scene.grid)
        said = rows[r][c] if r < len(rows) and c < len(rows[r]) else None
        if said is None:
            continue
        cells += said == truth
        positions += said.is_empty == truth.is_empty
        if not truth.is_empty:
            colors += said.color == truth.color
            shapes += said.shape == truth.shape
    n_objects = sum(not cell.is_empty for cell in scene.cells)
    whole = int(text.strip() == scene.caption())
    return CaptionScore(len(scene.cells), n_objects, cells, colors, shapes, positions, whole)


def exact(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one, surrounding blanks aside."""
    return answer.strip() == expected.strip()


def token_accuracy(answer: Sequence[int], expected: Sequence[int]) -> float:
    """Share of places where two token lists agree, over the longer one; 1.0 for two empty ones."""
    longest = max(len(answer), len(expected))
    if longest == 0:
        return 1.0
    return sum(a == b for a, b in zip(answer, expected)) / longest
