"""Train the vision tower: `train.py a` (no language model), then `train.py b` (through it).

Schedules count steps, never seconds. A checkpoint is written every `--save-every` steps and found
again by the next run with the same `--out`, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from elastic_llama.scenes import make_scene
from codebook import Codebook
from lm import LanguageModel
from losses import Heads, PhaseA, PhaseB
from tower import Tower

DEFAULTS = {"a": {"steps": 800, "batch": 16, "lr": 1e-3, "first": 0},
            "b": {"steps": 900, "batch": 4, "lr": 6e-4, "first": 1_000_000}}


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    x = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, x))))


def make_optimizers(phase: str, tower: Tower, heads: Heads, lr: float
                    ) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else.

    Muon learns shapes in a third of the images AdamW takes. Phase b moves the tower by half the
    rate of the projector, which has more to learn there.
    """
    named = dict(tower.named_parameters())
    matrices = [p for name, p in named.items() if name.startswith("blocks") and p.dim() == 2]
    projector = [p for name, p in named.items() if name.startswith("mm")]
    known = {id(p) for p in [*matrices, *projector]}
    rest = [p for p in [*named.values(), *heads.parameters()] if id(p) not in known]
    tower_scale = 0.5 if phase == "b" else 1.0
    return [torch.optim.Muon([{"params": matrices, "scale": tower_scale}], lr=lr,
                             weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([{"params": projector, "scale": 1.0},
                               {"params": rest, "scale": tower_scale}],
                              lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]


def save(path: Path, **state: object) -> None:
    """Write a checkpoint so that a crash never leaves half a file."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=["a", "b"])
    parser.add_argument("--lm", required=True, help="SmolLM2-135M-Instruct GGUF")
    parser.add_argument("--out", type=Path, default=Path("train-run"))
    parser.add_argument("--init", type=Path, help="start from this checkpoint (phase b: phase-a.pt)")
    parser.add_argument("--codebook", type=Path, help="tuned codebook (phase a; default: words)")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, help="images per step")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--first", type=int, help="index of the first training scene")
    parser.add_argument("--warmup", type=int, default=40, help="steps")
    parser.add_argument("--save-every", type=int, default=50, help="steps")
    parser.add_argument("--compile", action="store_true", help="fuse parts of the language model")
    parser.add_argument("--helpers", type=int, default=0, help="extra processes in phase b")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    for name, value in DEFAULTS[args.phase].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    args.out.mkdir(parents=True, exist_ok=True)

    lm = LanguageModel(args.lm, compiled=args.compile)
    tower = Tower()
    heads = Heads(tower.config.width)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizers = make_optimizers(args.phase, tower, heads, args.lr)
    path = args.out / f"phase-{args.phase}.pt"
    start = 0
    if path.exists():
        state = torch.load(path)
        for optimizer, values in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(values)
        start = state["step"]
    elif args.init:
        state = torch.load(args.init)
    else:
        state = None
    if state:
        tower.load_state_dict(state["tower"])
        heads.load_state_dict(state["heads"], strict=False)

    codebook = Codebook(lm)
    if args.codebook:
        codebook.load_state_dict(torch.load(args.codebook))
    phase = (PhaseA(codebook) if args.phase == "a"
             else PhaseB(lm, tower.config, args.batch, args.helpers))
    log = (args.out / f"phase-{args.phase}.log").open("a", encoding="utf-8")
    clock, figures = time.time(), []
    for step in range(start, args.steps):
        for group in [g for optimizer in optimizers for g in optimizer.param_groups]:
            rate = learning_rate(step, args.steps, args.lr, args.warmup)
            group["lr"] = rate * group["scale"]
        first = args.first + step * args.batch
        scenes = [make_scene("train", i) for i in range(first, first + args.batch)]
        for p in parameters:
            p.grad = None
        if args.phase == "a":
            with torch.autocast("cpu", torch.bfloat16):
                loss, row = phase.loss(tower, heads, scenes)
            loss.backward()
        else:
            row = phase.backward(tower, heads, scenes)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        figures.append(row)
        if (step + 1) % 10 == 0:
            keys = sorted({k for row in figures for k in row})
            means = {}
            for key in keys:
                values = [row[key] for row in figures if key in row]
                means[key] = round(sum(values) / len(values), 4)
            seconds = (time.time() - clock) / len(figures)
            log.write(json.dumps({"step": step + 1, "s_per_step": round(seconds, 2), **means}) + "\n")
            log.flush()
            clock, figures = time.time(), []
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(path, tower=tower.state_dict(), heads=heads.state_dict(),
                 optimizers=[o.state_dict() for o in optimizers], step=step + 1)


if __name__ == "__main__":
    main()
