"""What is asked: an image or a text, a question, and the reference answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, message

SCENE_KINDS = ("caption", "row", "cell", "color", "shape", "where")


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes
    ----------
    id : str
        Unique in its set.
    group : str
        Items of one group share a line of the summary.
    question, answer : str
    image : PIL image, path or None
        What the question is about.
    text : str
        Stands before the question in the user's turn.
    raw : bool
        `text` is continued as it is, without a chat template.
    exact : bool
        The answer is short enough to be right or wrong.
    """

    id: str
    group: str
    question: str
    answer: str
    image: Any = None
    text: str = ""
    raw: bool = False
    exact: bool = False

    @property
    def prompt(self) -> str:
        """The user's turn, images aside."""
        return "\n\n".join(part for part in (self.text, self.question) if part)


def scene_items(split: str, count: int, grid: int = 3, first: int = 0) -> list[Item]:
    """A caption and a question about each of `count` synthetic scenes.

    The kind of question goes round with the scene, so that all kinds are asked equally often.
    """
    from ..scenes import make_scene, questions

    items = []
    for index in range(first, first + count):
        scene = make_scene(split, index, grid)
        asked = {q.kind: q for q in questions(scene)}
        kinds = [k for k in SCENE_KINDS[1:] if k in asked]
        chosen = kinds[index % len(kinds)]
        image = scene.render()
        for kind in ("caption", chosen):
            q = asked[kind]
            group = "captions" if kind == "caption" else "questions"
            name = f"{split}-{grid}x{grid}-{index}-{kind}"
            items.append(Item(name, group, q.text, q.answer, image, exact=kind != "caption"))
    return items


def read_items(path: str | Path, split: str | None = None) -> list[Item]:
    """Items of a JSON list of objects.

    `question` and `answer` are needed; `image` (relative to the file), `text`, `id`, `kind`, `raw`,
    `exact` and `split` are taken where given. That is the format of the Elastic Cache repository
    (MM-Vet, LLaVA-Description), so its files run as they are.

    Raises
    ------
    ConfigError
        The file cannot be read, is not such a list, or holds nothing of the split.
    """
    path = Path(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(message("eval", "--data", str(e), "a JSON file")) from e
    if not isinstance(rows, list):
        raise ConfigError(message("eval", "--data", type(rows).__name__, "a JSON list of items"))
    items = []
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not {"question", "answer"} <= set(row):
            raise ConfigError(
                message(
                    "eval", f"item {i} of {path}", row, 'an object with "question" and "answer"'
                )
            )
        if split and row.get("split", split) != split:
            continue
        kind = str(row.get("kind", "all"))
        image = row.get("image")
        items.append(
            Item(
                id=str(row.get("id", i)),
                group=str(row.get("group", kind)),
                question=str(row["question"]),
                answer=str(row["answer"]),
                image=str(path.parent / image) if image else None,
                text=str(row.get("text", "")),
                raw=bool(row.get("raw", kind == "raw")),
                exact=bool(row.get("exact", False)),
            )
        )
    if not items:
        raise ConfigError(message("eval", "--data", f"no item of split {split!r} in {path}"))
    if len({item.id for item in items}) < len(items):
        raise ConfigError(message("eval", "--data", f"two items of {path} share an id"))
    return items
