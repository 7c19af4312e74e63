"""Policies side by side on held-out scenes: KL to the full cache, agreement, exact answers.

    python benchmarks/quality.py --scenes 20 --budgets 0.2 --out benchmarks/results/quality.json

Every policy gets the same prompt (image and question known) and the same forced reference answer.
KL = mean over answer tokens of KL(full cache || policy) of the next-token distribution, from the
second answer token on: the first one sees the full cache under every policy.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import elastic_llama
import numpy as np
from elastic_llama import ElasticConfig, ElasticLlama
from elastic_llama.conversation import Conversation
from elastic_llama.scenes import exact, make_scene, questions


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


class Runner:
    """One policy at one budget."""

    def __init__(self, config: ElasticConfig, args: argparse.Namespace) -> None:
        self.llm = ElasticLlama(
            args.model,
            mmproj_path=args.mmproj,
            elastic=config,
            n_ctx=1024,
            n_threads=args.threads,
            n_threads_batch=args.threads,
        )
        self.chat = Conversation(self.llm)

    def forced(self, image: Any, question: str, answer: str) -> np.ndarray:
        """Log-probabilities [n_answer, n_vocab] while the answer is forced."""
        from llama_cpp import llama_get_logits_ith

        self.chat.clear()
        self.chat.prefill(question, [image])
        tokens = self.llm.tokenize(answer.encode(), add_bos=False, special=False)
        rows = []
        for i in range(len(tokens)):
            if i:
                self.llm.eval([tokens[i - 1]])
            row = llama_get_logits_ith(self.llm._ctx.ctx, -1)
            rows.append(np.ctypeslib.as_array(row, (self.llm.n_vocab(),)).copy())
        return log_softmax(np.stack(rows))

    def answer(self, image: Any, question: str, max_tokens: int) -> str:
        self.chat.clear()
        return "".join(self.chat.ask(question, [image], max_tokens=max_tokens))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    full = Runner(ElasticConfig.off(), args)
    runners = {
        (policy, budget): Runner(ElasticConfig(budget=budget, policy=policy), args)
        for budget in args.budgets
        for policy in args.policies
    }
    rows = []
    for index in range(args.first, args.first + args.scenes):
        scene = make_scene(args.split, index, args.grid)
        image = scene.render()
        for q in questions(scene):
            if args.kinds and q.kind not in args.kinds:
                continue
            p = full.forced(image, q.text, q.answer)
            target = full.llm.tokenize(q.answer.encode(), add_bos=False, special=False)
            row: dict[str, Any] = {"scene": index, "grid": scene.grid, "kind": q.kind}
            row["full"] = {"nll": float(-p[np.arange(len(target)), target].mean())}
            if args.exact:
                text = full.answer(image, q.text, len(target) + 8)
                row["full"]["exact"] = bool(exact(text, q.answer))
            for (policy, budget), runner in runners.items():
                r = runner.forced(image, q.text, q.answer)
                kl = (np.exp(p[1:]) * (p[1:] - r[1:])).sum(-1)
                out = {
                    "kl": float(kl.mean()) if len(kl) else None,
                    "agree": float((p[1:].argmax(-1) == r[1:].argmax(-1)).mean())
                    if len(kl)
                    else None,
                    "nll": float(-r[np.arange(len(target)), target].mean()),
                }
                if args.exact:
                    text = runner.answer(image, q.text, len(target) + 8)
                    out["exact"] = bool(exact(text, q.answer))
                row[f"{policy}@{budget:g}"] = out
            rows.append(row)
        print(f"scene {index - args.first + 1}/{args.scenes}", end="\r", file=sys.stderr)
    print(file=sys.stderr)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    out = []
    names = [k for k in rows[0] if k not in ("scene", "grid", "kind")]
    for group, kinds in (("caption", {"caption"}), ("questions", None)):
        chosen = [r for r in rows if (r["kind"] in kinds if kinds else r["kind"] != "caption")]
        for name in names:
            line: dict[str, Any] = {"items": group, "run": name, "n": len(chosen)}
            for key in ("kl", "agree", "nll", "exact"):
                values = [r[name][key] for r in chosen if r[name].get(key) is not None]
                if values:
                    line[key] = float(np.mean(values))
                    line[key + "_se"] = float(np.std(values) / np.sqrt(len(values)))
            out.append(line)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model")
    parser.add_argument("--mmproj")
    parser.add_argument(
        "--policies", nargs="+", default=["elastic", "elastic-evict", "elastic-paper", "local"]
    )
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.2])
    parser.add_argument("--split", default="test")
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--grid", type=int)
    parser.add_argument("--kinds", nargs="+")
    parser.add_argument("--exact", action="store_true", help="greedy answers too (slower)")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)

    rows = measure(args)
    lines = summary(rows)
    for line in lines:
        print(
            "  ".join(
                f"{k} {v:.3f}" if isinstance(v, float) else f"{v}"
                for k, v in line.items()
                if not k.endswith("_se")
            )
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "command": sys.argv,
            "machine": platform.machine(),
            "build": elastic_llama.build_info(),
            "summary": lines,
            "rows": rows,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
