"""Phase t: the tower learns through the language model to be asked about in several turns.

A step is a batch of whole conversations (`elastic_llama.scenes.draw_conversation`), the loss is on
the answers' tokens. Made for a GPU, where a batch of 24 conversations takes a fraction of a second;
runs on a CPU too.

    python training/turns.py --lm LM.gguf --init mmproj.gguf --out runs --steps 3000
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from elastic_llama.scenes import draw_conversation
from export_mmproj import export, load_tower
from lm import END, LanguageModel
from losses import Heads
from targets import PatchLabels, patch_labels
from torch import Tensor, nn
from tower import Tower
from train import learning_rate, make_optimizers

FIRST = 30_000_000  # index of the first conversation; its scenes are at twice that
WEIGHTS = {"caption": 3.0, "color": 0.5, "shape": 0.5}  # of one answer; 1 for other kinds
HELD = 96  # conversations of the dev split that are looked at now and then

# name -> (before everything, before the images of a turn, after its question, after its answer)
STYLES = {
    "plain": ("", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "\n", 0.6),
    "system": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
        "Hugging Face<|im_end|>\n",
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "\n",
        0.25,
    ),
    "newline": ("", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "\n", 0.05),
    "llava": (
        "A chat between a curious human and an artificial intelligence assistant. The "
        "assistant gives helpful, detailed, and polite answers to the human's questions. ",
        "\nUSER: ",
        "\nASSISTANT: ",
        "",
        0.1,
    ),
}


def layout(lm: LanguageModel, index: int, split: str = "train", style: str | None = None) -> dict:
    """Token ids of a conversation (-1 for each patch of an image), targets, weights, kinds.

    targets [n]: the token that follows where it belongs to an answer, else -1.
    """
    turns = draw_conversation(split, index)
    if style is None:
        rng = np.random.default_rng([index, 78])
        names = list(STYLES)
        style = names[int(rng.choice(len(names), p=[STYLES[n][4] for n in names]))]
    start, before, after, closing, _ = STYLES[style]
    ids, targets, weights, answers = [], [], [], []

    def add(new: list[int], targets_of: list[int] | None = None, weight: float = 0.0) -> None:
        ids.extend(new)
        targets.extend(targets_of or [-1] * len(new))
        weights.extend([weight] * len(new))

    text = start
    for turn in turns:
        text += before
        if turn.images:
            add(lm.encode(text))
            add([-1] * (576 * len(turn.images)))
            text = "\n" if style == "newline" else ""
        head = lm.encode(text + turn.question.text + after)
        answer = lm.encode(turn.question.answer) + [END]
        add(head)
        first = len(ids)
        weight = WEIGHTS.get(turn.question.kind, 1.0) / len(answer)
        targets[-1], weights[-1] = answer[0], weight
        add(answer, answer[1:] + [-1], weight)
        weights[-1] = 0.0
        answers.append((first - 1, first - 1 + len(answer), turn.question.kind))
        text = closing
    return {"ids": ids, "targets": targets, "weights": weights, "answers": answers, "turns": turns}


class Data(torch.utils.data.Dataset):
    """A batch is an item, so that workers draw and render it."""

    def __init__(self, lm: LanguageModel, tower: Tower, batch: int, first: int, n: int, split: str):
        self.lm, self.config, self.batch = lm, tower.config, batch
        self.first, self.n, self.split = first, n, split

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, step: int) -> dict:
        torch.set_num_threads(1)
        rows = []
        for i in range(self.batch):
            style = None if self.split == "train" else "plain"
            rows.append(layout(self.lm, self.first + step * self.batch + i, self.split, style))
        scenes = [s for row in rows for turn in row["turns"] for s in turn.images]
        pixels = torch.from_numpy(np.stack([np.asarray(s.render()) for s in scenes]))
        labels = patch_labels(scenes, self.config.side)
        n = max(len(row["ids"]) for row in rows)

        def pad(key: str, fill: float) -> list[list]:
            return [row[key] + [fill] * (n - len(row[key])) for row in rows]

        return {
            "pixels": pixels,
            "labels": labels,
            "ids": torch.tensor(pad("ids", 0)),
            "targets": torch.tensor(pad("targets", -1)),
            "weights": torch.tensor(pad("weights", 0.0)),
            "answers": [row["answers"] for row in rows],
        }


class Reader(nn.Module):
    """The frozen language model over a batch of sequences, padded on the right."""

    def __init__(self, lm: LanguageModel, device: str) -> None:
        super().__init__()
        self.lm, self.device = lm, device
        self.layers = [{k: v.to(device) for k, v in layer.items()} for layer in lm.layers]
        self.embedding, self.head = lm.embedding.to(device), lm.head.to(device)
        self.out_norm = lm.out_norm.to(device)

    def forward(self, ids: Tensor, said: Tensor) -> Tensor:
        """Hidden states after the final norm, [b, n, width]; `said` fills the places of -1."""
        lm = self.lm
        x = self.embedding[ids.clamp(min=0)]
        x = x.masked_scatter((ids < 0)[..., None], said)
        b, n, _ = x.shape
        cos, sin = (t.to(self.device) for t in lm.rope(torch.arange(n)))
        for layer in self.layers:
            x = _layer(x, layer, cos, sin, lm.n_head, lm.n_head_kv, lm.eps)
        return F.rms_norm(x, (lm.width,), self.out_norm, lm.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.to(self.lm.dtype), self.head).float()


def _layer(
    x: Tensor, w: dict, cos: Tensor, sin: Tensor, n_head: int, n_head_kv: int, eps: float
) -> Tensor:
    b, n, width = x.shape
    d = cos.shape[1]
    y = F.rms_norm(x, (width,), w["attn_norm"], eps).to(w["qkv"].dtype)
    qkv = F.linear(y, w["qkv"]).view(b, n, n_head + 2 * n_head_kv, d)
    n_qk = n_head + n_head_kv
    qk = qkv[:, :, :n_qk].float()
    turned = torch.cat([-qk[..., d // 2 :], qk[..., : d // 2]], dim=-1)
    qk = (qk * cos[:, None] + turned * sin[:, None]).to(y.dtype)
    q, k, v = (t.transpose(1, 2) for t in (qk[:, :, :n_head], qk[:, :, n_head:], qkv[:, :, n_qk:]))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + F.linear(out.transpose(1, 2).reshape(b, n, -1), w["out"])
    y = F.rms_norm(x, (width,), w["ffn_norm"], eps).to(y.dtype)
    y = F.silu(F.linear(y, w["gate"])) * F.linear(y, w["up"])
    return x + F.linear(y, w["down"])


def to_device(labels: PatchLabels, device: str) -> PatchLabels:
    return PatchLabels(
        {k: v.to(device) for k, v in labels.classes.items()},
        *(t.to(device) for t in (labels.slot, labels.words, labels.outlines, labels.objects)),
    )


def answers_right(batch: dict, hits: Tensor) -> dict[str, list[float]]:
    """Whether each answer is right to the last token (teacher-forced), by turn and kind."""
    out: dict[str, list[float]] = {}
    for row, answers in enumerate(batch["answers"]):
        for turn, (first, last, kind) in enumerate(answers):
            right = float(hits[row, first:last].all())
            out.setdefault(kind, []).append(right)
            out.setdefault(f"turn{turn + 1}", []).append(right)
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lm", required=True)
    parser.add_argument("--init", type=Path, required=True, help="mmproj GGUF or checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seconds", type=float, default=1e9, help="ends the schedule early")
    parser.add_argument("--batch", type=int, default=24, help="conversations per step")
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--aux", type=float, default=0.15)
    parser.add_argument("--first", type=int, default=FIRST)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--eval-every", type=int, default=500)
    args = parser.parse_args(argv)

    global _layer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    args.out.mkdir(parents=True, exist_ok=True)
    lm = LanguageModel(args.lm)
    tower = load_tower(args.init).to(device).train()
    heads = Heads(tower.config.width).to(device)
    reader = Reader(lm, device)
    if args.compile:
        _layer = torch.compile(_layer, dynamic=True)
    optimizers = make_optimizers("b", {"tower": tower, "heads": heads}, args.lr)

    def run(batch: dict, train: bool, step: int) -> tuple[dict, Tensor]:
        pixels = batch["pixels"].to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
        pixels = (pixels - tower.config.mean) / tower.config.std
        ids, targets = batch["ids"].to(device), batch["targets"].to(device)
        weights = batch["weights"].to(device)
        with torch.autocast(device, torch.bfloat16):
            features = tower.features(pixels)
            seen = features if step >= args.warmup * 2 else features.detach()
            aux, right = heads.loss(seen, to_device(batch["labels"], device))
            said = tower.project(features).float()
        hidden = reader(ids, said)
        rows = targets >= 0
        logits = reader.logits(hidden[rows])
        loss = F.cross_entropy(logits, targets[rows], reduction="none")
        total = (loss * weights[rows]).sum() / weights[rows].sum()
        if train:
            (total + args.aux * aux).backward()
        hits = torch.zeros_like(rows)
        hits[rows] = logits.argmax(-1) == targets[rows]
        return {"loss": total.detach(), "aux_shape": right["shape"]}, hits

    def evaluate() -> dict:
        found: dict[str, list[float]] = {}
        held = Data(lm, tower, 24, 0, HELD // 24, "dev")
        with torch.no_grad():
            for i in range(len(held)):
                batch = held[i]
                _, hits = run(batch, False, 10**9)
                for key, values in answers_right(batch, hits.cpu()).items():
                    found.setdefault(key, []).extend(values)
        return {key: round(float(np.mean(v)), 3) for key, v in sorted(found.items())}

    data = Data(lm, tower, args.batch, args.first, args.steps, "train")
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, shuffle=False, num_workers=args.workers,
        prefetch_factor=4 if args.workers else None,
    )  # fmt: skip
    log = (args.out / "phase-t.log").open("a")
    start = time.time()
    steps = args.steps
    rows: list[dict] = []
    for step, batch in enumerate(loader):
        if step == 200:  # what the rest of the time is enough for
            steps = min(steps, int(args.seconds / (time.time() - start) * 200))
        if step >= steps or time.time() - start > args.seconds * 1.05:
            break
        rate = learning_rate(step, steps, args.lr, args.warmup)
        for group in [g for optimizer in optimizers for g in optimizer.param_groups]:
            group["lr"] = rate * group["scale"]
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        figures, hits = run(batch, True, step)
        parameters = [p for m in (tower, heads) for p in m.parameters()]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        rows.append(figures)
        if (step + 1) % 50 == 0:
            line = {"step": step + 1, "s": round(time.time() - start, 1)}
            line["loss"] = round(float(torch.stack([r["loss"] for r in rows]).mean()), 4)
            line["aux_shape"] = round(float(np.mean([r["aux_shape"] for r in rows])), 4)
            rows = []
            log.write(json.dumps(line) + "\n")
            log.flush()
            print(line, flush=True)
        if (step + 1) % args.eval_every == 0 or step + 1 == steps:
            found = {"step": step + 1, "dev": evaluate()}
            log.write(json.dumps(found) + "\n")
            log.flush()
            print(found, flush=True)
            export(tower.cpu(), args.out / "mmproj.gguf")
            tower.to(device)
    print("done", step, round(time.time() - start, 1), evaluate(), flush=True)
    export(tower.cpu(), args.out / "mmproj.gguf")


if __name__ == "__main__":
    main()
