"""Conversations of a fixed plan: what is asked in which turn, about scenes drawn from a seed."""

from __future__ import annotations

import numpy as np

from .conversations import ORDINALS, Turn, _sum
from .layout import SPLITS, Scene, make_scene
from .questions import KINDS, Question, question

SCENARIOS = ("questions", "caption-last", "again", "text-between", "two-images")

FIRST_SCENE = 500_000  # of a split; the scenes before are for single questions and for training


def make_scenario(split: str, name: str, index: int, grid: int | None = None) -> tuple[Turn, ...]:
    """Conversation number `index` of a scenario; the same on every machine.

    No two conversations of a split share a scene, whatever their scenarios.

    Parameters
    ----------
    split : {"dev", "test", "train"}
    name : str
        "questions": five kinds of question about one image. "caption-last": three or four of them,
        then the caption. "again": the caption, and the caption again. "text-between": three
        questions with a sum after the first and the second. "two-images": the second image comes
        with turn 3, turn 4 asks about the first one and turn 5 about the second one, by name.
    index : int
        >= 0.
    grid : int, optional
        Cells per side. Drawn from the seed (2, 3, 4 equally likely) when not given.
    """
    if name not in SCENARIOS:
        raise ValueError(f"[scene] unknown scenario, got {name!r}, expected one of {SCENARIOS}")
    number = index * len(SCENARIOS) + SCENARIOS.index(name)
    first, second = (make_scene(split, FIRST_SCENE + 2 * number + i, grid) for i in range(2))
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([SPLITS[split], number, 7])))
    kinds = [str(kind) for kind in rng.permutation(KINDS[1:])]  # the caption is the first kind
    asked = [_ask(first, kind, rng) for kind in kinds]
    caption = _ask(first, "caption", rng)
    if name == "questions":
        return _about_one(first, asked)
    if name == "caption-last":
        return _about_one(first, [*asked[: 3 + index % 2], caption])
    if name == "again":
        return _about_one(first, [caption, caption])
    if name == "text-between":
        return _about_one(first, [asked[0], _sum(rng), asked[1], _sum(rng), asked[2]])
    later = [_ask(second, kinds[i], rng) for i in (2, 4)]
    return (
        *_about_one(first, asked[:2]),
        Turn((second,), later[0], 1),
        Turn((), _named(asked[3], 0), 0),
        Turn((), _named(later[1], 1), 1),
    )


def _about_one(scene: Scene, asked: list[Question]) -> tuple[Turn, ...]:
    return tuple(
        Turn((scene,) if i == 0 else (), q, -1 if q.kind == "text" else 0)
        for i, q in enumerate(asked)
    )


def _ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question:
    q = question(scene, kind, rng) or question(scene, "row", rng)  # of a scene without an object
    assert q is not None
    return q


def _named(q: Question, about: int) -> Question:
    return Question(q.kind, f"In the {ORDINALS[about]} image: {q.text}", q.answer)
