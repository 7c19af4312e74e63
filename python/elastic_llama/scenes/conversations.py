"""Conversations of several turns about one or two scenes, drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .layout import SPLIT_SIZE, SPLITS, Scene, make_scene
from .questions import Question, question

KIND_SHARES = {"caption": 2, "row": 2, "cell": 3, "color": 1, "shape": 1, "where": 3}
ORDINALS = ("first", "second")
MAX_TURNS = 5
TWO_IMAGES = 0.4  # share of the conversations of two turns or more
TEXT_TURN = 0.12  # share of the later turns that ask nothing about an image


@dataclass(frozen=True)
class Turn:
    """One question of a conversation.

    Attributes
    ----------
    images : tuple of Scene
        Scenes that arrive with this turn, before its question.
    question : Question
        Kind, text and the exact answer; kind "text" asks nothing about an image.
    about : int
        Index of the scene asked about, in order of arrival; -1 where there is none.
    """

    images: tuple[Scene, ...]
    question: Question
    about: int


def draw_conversation(split: str, index: int, n_turns: int | None = None) -> tuple[Turn, ...]:
    """Conversation number `index` of a split; the same on every machine.

    Its scenes are numbers `2 * index` and `2 * index + 1` of the split. Once two images have
    arrived, a question names its image, except that one without a name is about the latest.

    Parameters
    ----------
    split : {"train", "dev", "test"}
    index : int
        0 to SPLIT_SIZE // 2 - 1.
    n_turns : int, optional
        Drawn from 1 to MAX_TURNS when not given.
    """
    if split not in SPLITS:
        raise ValueError(f"[scene] unknown split, got {split!r}, expected one of {list(SPLITS)}")
    if not 0 <= index < SPLIT_SIZE // 2:
        raise ValueError(f"[scene] index, got {index}, expected 0 to {SPLIT_SIZE // 2 - 1}")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([SPLITS[split] + index, 99])))
    drawn = int(rng.integers(1, MAX_TURNS + 1))
    n_turns = drawn if n_turns is None else n_turns
    second = n_turns  # turn at which the second image arrives: never
    if n_turns > 1 and rng.random() < TWO_IMAGES:
        second = int(rng.integers(0, n_turns))
    scenes = [make_scene(split, 2 * index), make_scene(split, 2 * index + 1)]

    turns: list[Turn] = []
    n_seen = 0
    for i in range(n_turns):
        arriving = ([scenes[0]] if i == 0 else []) + ([scenes[1]] if i == second else [])
        n_seen += len(arriving)
        if not arriving and rng.random() < TEXT_TURN:
            turns.append(Turn((), _sum(rng), -1))
            continue
        about = int(rng.integers(n_seen))
        named = n_seen == 2 and (about == 0 or rng.random() < 0.7)
        turns.append(Turn(tuple(arriving), _ask(scenes[about], about, named, rng), about))
    return tuple(turns)


def _ask(scene: Scene, about: int, named: bool, rng: np.random.Generator) -> Question:
    kinds = list(KIND_SHARES)
    shares = np.array(list(KIND_SHARES.values()), float)
    q = None
    while q is None:  # a scene may hold no object, or none that is unique
        q = question(scene, kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))], rng)
    if named:
        q = Question(q.kind, f"In the {ORDINALS[about]} image: {q.text}", q.answer)
    return q


def _sum(rng: np.random.Generator) -> Question:
    a, b = (int(x) for x in rng.integers(1, 6, 2))
    return Question("text", f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.")
