"""What each image token should say: labels per patch, and words the language model can read.

Every patch row of a cell spells "row 2 column 3 red circle," over and over, one word per patch, and
every second patch row starts it at the colour. So wherever the language model looks, a place is
followed by what is there, an object by where it is, and the last object of a row by a full stop:
without that word, captions ran on at the end of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from elastic_llama.scenes import COLORS, EMPTY, GRIDS, SHAPES, Scene
from elastic_llama.scenes.render import outline, placements
from torch import Tensor

# Attribute -> number of classes. Class 0 of color and shape is "empty"; rows and columns from 0;
# a place is 4 * row + column; an end is 0 within a row, 1 at its last cell, 2 at the scene's.
ATTRIBUTES = {
    "color": 1 + len(COLORS),
    "shape": 1 + len(SHAPES),
    "row": 4,
    "column": 4,
    "grid": 3,
    "place": 16,
    "end": 3,
}
UNIT = 7  # words of one repetition
OUTLINE = 10  # pixels per side of an object's outline


@dataclass
class PatchLabels:
    """Labels of the patches of a batch.

    Attributes
    ----------
    classes : dict of str to Tensor [b, n_patch], int64
        Class of each attribute in ATTRIBUTES.
    slot : Tensor [b, n_patch], int64
        Which word of the unit the patch says, 0 to UNIT - 1.
    words : Tensor [b, n_patch], int64
        Index into `vocabulary()`.
    outlines : Tensor [n_object, OUTLINE * OUTLINE], f32
        Every object of the batch alone, centred and of one size.
    objects : Tensor [b, n_patch], int64
        Index into `outlines` of the object in the patch's cell, -1 where it is empty.
    """

    classes: dict[str, Tensor]
    slot: Tensor
    words: Tensor
    outlines: Tensor
    objects: Tensor


def vocabulary() -> list[str]:
    """Words an image token can say, each one token of the language model."""
    return (
        [" row", " column"]
        + [str(i + 1) for i in range(4)]
        + [f" {EMPTY}"]
        + [f" {c}" for c in COLORS]
        + [f" {s}" for s in SHAPES]
        + [",", "."]
    )


def patch_labels(scenes: list[Scene], side: int) -> PatchLabels:
    """Labels for `side` patches a side; the grid must divide it."""
    index = torch.arange(side)
    classes: dict[str, list[Tensor]] = {name: [] for name in ATTRIBUTES}
    slots, words, outlines, objects = [], [], [], []
    first_color = 7
    first_shape = first_color + len(COLORS)
    first_stop = first_shape + len(SHAPES)
    for scene in scenes:
        per_cell = side // scene.grid
        row = (index // per_cell)[:, None].expand(side, side)
        column = (index // per_cell)[None].expand(side, side)
        cell = row * scene.grid + column
        color = torch.tensor([0 if c.is_empty else 1 + COLORS.index(c.color) for c in scene.cells])[
            cell
        ]
        shape = torch.tensor([0 if c.is_empty else 1 + SHAPES.index(c.shape) for c in scene.cells])[
            cell
        ]
        last = scene.grid - 1
        end = (column == last).long() + ((column == last) & (row == last)).long()
        slot = (index[None] % per_cell + 4 * (index[:, None] % 2)) % UNIT
        said = torch.stack(
            [
                torch.zeros_like(cell),
                2 + row,
                torch.ones_like(cell),
                2 + column,
                torch.where(color == 0, 6, first_color + color - 1),
                torch.where(shape == 0, 6, first_shape + shape - 1),
                first_stop + (end > 0).long(),
            ],
            dim=-1,
        )
        known = torch.full((scene.grid**2,), -1)
        for p in placements(scene):
            known[p.cell] = len(outlines)
            drawn = outline(scene.cells[p.cell].shape, p.turn, OUTLINE)
            outlines.append(torch.from_numpy(drawn).flatten())
        objects.append(known[cell].reshape(-1))
        grid = torch.full_like(cell, GRIDS.index(scene.grid))
        for name, value in zip(
            ATTRIBUTES, (color, shape, row, column, grid, 4 * row + column, end)
        ):
            classes[name].append(value.reshape(-1))
        slots.append(slot.reshape(-1))
        words.append(said.gather(-1, slot[..., None]).reshape(-1))
    return PatchLabels(
        {name: torch.stack(v) for name, v in classes.items()},
        torch.stack(slots),
        torch.stack(words),
        torch.stack(outlines),
        torch.stack(objects),
    )
