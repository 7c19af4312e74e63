"""Writing scenes to a folder: PNG files and one JSON list of questions."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .layout import SPLITS, make_scene
from .questions import KINDS, questions


def write_dataset(
    folder: str | Path,
    split: str = "test",
    count: int = 40,
    grid: int | None = None,
    first: int = 0,
    kinds: tuple[str, ...] = KINDS,
) -> Path:
    """Write `count` scenes of a split.

    Returns
    -------
    pathlib.Path
        The JSON file: a list of {"image", "kind", "question", "answer"}, image paths relative to
        the file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for index in range(first, first + count):
        scene = make_scene(split, index, grid)
        name = f"{split}-{scene.grid}x{scene.grid}-{index:05d}.png"
        scene.render().save(folder / name, optimize=True)
        for q in questions(scene, kinds):
            items.append({"image": name, "kind": q.kind, "question": q.text, "answer": q.answer})
    path = folder / "dataset.json"
    path.write_text(json.dumps(items, indent=1) + "\n", encoding="utf-8")
    return path


def main(argv: list[str] | None = None) -> None:
    """Command line of `python -m elastic_llama.scenes.dataset`."""
    parser = argparse.ArgumentParser(description="Write synthetic scenes and questions to a folder")
    parser.add_argument("folder")
    parser.add_argument("--split", choices=list(SPLITS), default="test")
    parser.add_argument("--count", type=int, default=40, help="scenes (default 40)")
    parser.add_argument("--first", type=int, default=0, help="index of the first scene")
    parser.add_argument("--grid", type=int, help="cells per side: 2, 3, 4 (default: mixed)")
    args = parser.parse_args(argv)
    print(write_dataset(args.folder, args.split, args.count, args.grid, args.first))


if __name__ == "__main__":
    main()
