"""Held-out accuracy of the vision model, by grid size and kind of question, in one command."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from elastic_llama.scenes import (
    GRIDS,
    SPLITS,
    CaptionScore,
    exact,
    make_scene,
    questions,
    score_caption,
    token_accuracy,
)
from prompts import FORMATS
from readers import LlamaReader, TorchReader

MMPROJ = Path(__file__).resolve().parents[1] / "python/elastic_llama/data/mmproj-scenes-f16.gguf"


def evaluate(
    reader: TorchReader | LlamaReader, split: str, count: int, grid: int, style: str, first: int = 0
) -> dict[str, float]:
    """Accuracy over `count` scenes of one grid size; every figure is a share, 0 to 1."""
    captions, tokens = CaptionScore(), []
    right: dict[str, list[bool]] = defaultdict(list)
    for index in range(first, first + count):
        scene = make_scene(split, index, grid)
        asked = questions(scene)
        # A little room is enough: an answer that goes on is wrong whatever it says.
        limits = [len(reader.encode(q.answer)) + 8 for q in asked]
        answers = reader.answers(scene.render(), [q.text for q in asked], style, limits)
        for q, answer in zip(asked, answers):
            right[q.kind].append(exact(answer, q.answer))
            if q.kind == "caption":
                captions += score_caption(scene, answer)
                tokens.append(token_accuracy(reader.encode(answer), reader.encode(q.answer)))
    c = captions
    out = {
        "cells": c.cells / c.n_cells,
        "colors": c.colors / c.n_objects,
        "shapes": c.shapes / c.n_objects,
        "positions": c.positions / c.n_cells,
        "tokens": float(np.mean(tokens)),
    }
    return {**out, **{f"q:{kind}": float(np.mean(hits)) for kind, hits in right.items()}}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lm", required=True, help="SmolLM2-135M-Instruct GGUF")
    parser.add_argument("--vision", default=str(MMPROJ), help="mmproj, or a checkpoint (torch)")
    parser.add_argument("--backend", choices=["torch", "llama"], default="llama")
    parser.add_argument("--split", choices=list(SPLITS), default="test")
    parser.add_argument("--count", type=int, default=100, help="scenes of each grid size")
    parser.add_argument("--first", type=int, default=0, help="index of the first scene")
    parser.add_argument("--grid", type=int, choices=GRIDS, action="append")
    parser.add_argument("--style", choices=list(FORMATS), default="plain")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(argv)
    if args.backend == "torch":
        import torch

        torch.set_num_threads(args.threads)
        reader = TorchReader(args.lm, args.vision)
    else:
        reader = LlamaReader(args.lm, args.vision, args.threads)
    print(f"{args.split} split, {args.count} scenes per grid, {args.backend}, {args.style} prompt")
    table = {}
    for grid in args.grid or GRIDS:
        row = evaluate(reader, args.split, args.count, grid, args.style, args.first)
        table[f"{grid}x{grid}"] = row
        print(
            f"{grid}x{grid}  " + "  ".join(f"{k} {100 * v:.1f}" for k, v in row.items()), flush=True
        )
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
