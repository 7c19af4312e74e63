"""Train the vision model in three phases; README.md gives the order and the commands.

    a   the tower alone: what is in each patch, and which embedding it should say
    c   the codebook: which embeddings the frozen language model reads best (no pictures)
    b   the tower through the language model

Schedules count steps, never seconds. A checkpoint is written every `--save-every` steps and found
again by the next run with the same `--out`, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from functools import partial
from pathlib import Path

import torch
from codebook import Codebook
from elastic_llama.scenes import make_scene
from lm import LanguageModel
from losses import Heads, PhaseA, PhaseB, PhaseC, Reading
from tower import Tower

# First scenes are far apart, so that no phase sees another's pictures.
DEFAULTS = {
    "a": {"steps": 1200, "batch": 8, "lr": 1e-3, "first": 0},
    "c": {"steps": 300, "batch": 2, "lr": 1.5e-3, "first": 10_000_000},
    "b": {"steps": 900, "batch": 4, "lr": 2e-4, "first": 20_000_000},
}


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    x = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, x))))


def make_optimizers(
    phase: str, trained: dict[str, torch.nn.Module], lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the tower's blocks, AdamW for everything else.

    Shapes stalled with AdamW alone and came after the change to Muon (with smaller objects and the
    outline head, at the same time).
    In phase b the tower moves at half the rate of the projector, which has more to learn there.
    """
    named = [
        (f"{part}.{name}", p)
        for part, module in trained.items()
        for name, p in module.named_parameters()
    ]
    tower_scale = 0.5 if phase == "b" else 1.0
    matrices, projector, rest = [], [], []
    for name, p in named:
        if name.startswith("tower.blocks") and p.dim() == 2:
            matrices.append(p)
        else:
            (projector if name.startswith("tower.mm") else rest).append(p)
    groups = [{"params": projector, "scale": 1.0}, {"params": rest, "scale": tower_scale}]
    adam = torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=lr,
        betas=(0.9, 0.98),
        weight_decay=0.0 if phase == "c" else 0.01,
    )
    if not matrices:
        return [adam]
    muon = torch.optim.Muon(
        [{"params": matrices, "scale": tower_scale}],
        lr=lr,
        weight_decay=0.02,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, adam]


class Log:
    """One JSON line for every ten steps: means of the figures, and seconds per step."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8")
        self.rows: list[dict] = []
        self.clock = time.time()

    def add(self, step: int, figures: dict) -> None:
        self.rows.append(figures)
        if step % 10:
            return
        means = {"step": step, "s_per_step": round((time.time() - self.clock) / len(self.rows), 2)}
        for key in sorted({k for row in self.rows for k in row}):
            values = [row[key] for row in self.rows if key in row]
            means[key] = round(sum(values) / len(values), 4)
        self.file.write(json.dumps(means) + "\n")
        self.file.flush()
        self.rows, self.clock = [], time.time()


def save(path: Path, **state: object) -> None:
    """Write a checkpoint so that a crash never leaves half a file."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("phase", choices=list(DEFAULTS))
    parser.add_argument("--lm", required=True, help="SmolLM2-135M-Instruct GGUF")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--init", type=Path, help="start from this checkpoint")
    parser.add_argument(
        "--codebook", type=Path, help="checkpoint of phase c; without it phase a says plain words"
    )
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, help="images per step")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--first", type=int, help="index of the first training scene")
    parser.add_argument("--warmup", type=int, default=20, help="steps")
    parser.add_argument("--save-every", type=int, default=50, help="steps")
    parser.add_argument("--compile", action="store_true", help="fuse parts of the language model")
    parser.add_argument(
        "--helpers", type=int, default=0, help="extra processes in phases b and c, one core each"
    )
    args = parser.parse_args(argv)
    for name, value in DEFAULTS[args.phase].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)  # a second core is worth more as a helper
    torch.manual_seed(1)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"phase-{args.phase}.pt"

    lm = LanguageModel(args.lm, compiled=args.compile)
    tower, codebook = Tower(), Codebook(lm)
    heads = Heads(tower.config.width)
    trained = {"codebook": codebook} if args.phase == "c" else {"tower": tower, "heads": heads}
    optimizers = make_optimizers(args.phase, trained, args.lr)
    start = 0
    if path.exists():
        state = torch.load(path)
        for optimizer, values in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(values)
        start = state["step"]
    else:
        state = torch.load(args.init) if args.init else {}
    for name, module in trained.items():
        if name in state:
            module.load_state_dict(state[name], strict=name != "heads")
    if args.codebook:
        codebook.load_state_dict(torch.load(args.codebook)["codebook"])

    if args.phase == "a":
        run = partial(PhaseA(codebook).backward, tower, heads)
    else:
        reading = Reading(lm, tower.config, args.batch, args.helpers)
        run = (
            partial(PhaseB(reading).backward, tower, heads)
            if args.phase == "b"
            else partial(PhaseC(reading, tower.config).backward, codebook)
        )
    parameters = [p for module in trained.values() for p in module.parameters()]
    log = Log(args.out / f"phase-{args.phase}.log")
    for step in range(start, args.steps):
        rate = learning_rate(step, args.steps, args.lr, args.warmup)
        for group in [g for optimizer in optimizers for g in optimizer.param_groups]:
            group["lr"] = rate * group["scale"]
        first = args.first + step * args.batch
        for p in parameters:
            p.grad = None
        log.add(step + 1, run([make_scene("train", i) for i in range(first, first + args.batch)]))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(
                path,
                **{name: module.state_dict() for name, module in trained.items()},
                optimizers=[o.state_dict() for o in optimizers],
                step=step + 1,
            )


if __name__ == "__main__":
    main()
