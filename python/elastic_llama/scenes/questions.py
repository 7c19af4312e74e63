"""Questions about a scene, each with one exact answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .layout import Scene, stream

CAPTION_PROMPT = "Describe the image row by row."
KINDS = ("caption", "row", "cell", "color", "shape", "where")


@dataclass(frozen=True)
class Question:
    """A question, its kind (one of KINDS) and the exact answer."""

    kind: str
    text: str
    answer: str


def caption(scene: Scene) -> str:
    """The whole scene: "row 1: red circle, empty. row 2: blue star, pink heart."."""
    return " ".join(_row_text(scene, row) for row in range(1, scene.grid + 1))


def _row_text(scene: Scene, row: int) -> str:
    return f"row {row}: " + ", ".join(str(cell) for cell in scene.row(row)) + "."


def question(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """Draw a question of one kind; None where the scene has none (no unique object)."""
    places = [(r, c) for r in range(1, scene.grid + 1) for c in range(1, scene.grid + 1)]
    if kind == "caption":
        return Question(kind, CAPTION_PROMPT, caption(scene))
    if kind == "row":
        row = int(rng.integers(1, scene.grid + 1))
        return Question(kind, f"What is in row {row}?", _row_text(scene, row))
    if kind == "where":
        found = [str(cell) for cell in scene.cells]
        places = [
            p for p in places if not scene.at(*p).is_empty and found.count(str(scene.at(*p))) == 1
        ]
    elif kind in ("color", "shape"):
        places = [p for p in places if not scene.at(*p).is_empty]
    elif kind != "cell":
        raise ValueError(f"[question] unknown kind, got {kind!r}, expected one of {KINDS}")
    if not places:
        return None
    row, column = places[int(rng.integers(len(places)))]
    cell, place = scene.at(row, column), f"row {row}, column {column}"
    if kind == "where":
        return Question(kind, f"Where is the {cell}?", place)
    if kind == "cell":
        return Question(kind, f"What is in {place}?", str(cell))
    if kind == "color":
        return Question(kind, f"What color is the object in {place}?", cell.color)
    return Question(kind, f"What shape is in {place}?", cell.shape)


def questions(scene: Scene, kinds: tuple[str, ...] = KINDS) -> list[Question]:
    """One question of each kind, drawn from the scene's own seed."""
    rng = stream(scene.seed, "questions")
    drawn = (question(scene, kind, rng) for kind in kinds)
    return [q for q in drawn if q is not None]
