"""How often answers are right in turns 1 to 5 of a conversation about images, by policy and budget.

python benchmarks/turns.py --split dev --items 8 --out benchmarks/results/turns/dev-0.jsonl

A line per conversation and setting; settings are inside, so that a part of a run is balanced. What
the file holds already is not run again. `--shard 0/2` and `--shard 1/2` share the work, each with a
file of its own. `benchmarks/turns_report.py FILE...` makes the tables.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elastic_llama import Conversation, ElasticConfig, ElasticLlama
from elastic_llama.errors import StateError, message
from elastic_llama.evaluation.prompts import Prefiller
from elastic_llama.evaluation.runner import make_config
from elastic_llama.evaluation.streams import Streams
from elastic_llama.scenes import SPLITS, Scene, Turn, exact, parse_caption
from elastic_llama.scenes.scenarios import SCENARIOS, make_scenario
from forced_answers import ForcedAnswers, divergence
from turns_shared import FirstPrompt

POLICIES = "full,random,local,h2o,snapkv,elastic-paper,elastic-evict,elastic"
BUDGETS = "0.5,0.3,0.2,0.1"
MAX_TOKENS = 120


class Table:
    """One model and one context, which each setting takes in turn."""

    def __init__(self, args: argparse.Namespace) -> None:
        llm = ElasticLlama(
            args.model,
            mmproj_path=args.mmproj,
            elastic=None,
            n_ctx=256,  # replaced by the streams'
            n_threads=args.threads,
            n_threads_batch=args.threads,
        )
        self.streams = Streams(llm, 1, args.n_ctx)
        self.chat = Conversation(llm)
        self.prefiller = Prefiller(self.streams) if args.share else None
        self.max_tokens = args.max_tokens
        self.forced = ForcedAnswers(llm) if args.forced else None
        self.full: list[list[Any]] = []  # log p of forced answers with all cells, by turn

    def close(self) -> None:
        self.chat.close()
        if self.prefiller is not None:
            self.prefiller.close()
        self.streams.close()

    def first_prompt(self, turns: tuple[Turn, ...], images: dict[int, Any]) -> FirstPrompt | None:
        """The first turn's prompt, or None where each setting reads its own."""
        if self.prefiller is None:
            return None
        image = images[turns[0].images[0].seed]
        return FirstPrompt(self.streams, self.prefiller, turns[0].question.text, image)

    def run(
        self,
        config: ElasticConfig,
        turns: tuple[Turn, ...],
        images: dict[int, Any],
        prompt: FirstPrompt | None,
    ) -> list[dict[str, Any]]:
        """The turns of one conversation under one setting."""
        llm, chat = self.streams.llm, self.chat
        self.streams.attach(config)
        llm.elastic = config
        llm.reset()
        chat.clear()
        if prompt is not None:
            prompt.load()
        arrived: list[Scene] = []
        full: list[list[Any]] = []
        out = []
        for i, turn in enumerate(turns):
            arrived += turn.images
            given = [images[scene.seed] for scene in turn.images]
            said = self.ask(turn.question.text, given, turn.question.answer)
            n_read = chat.stats.n_text + chat.stats.n_image
            if i == 0 and prompt is not None and n_read:
                raise StateError(message("turns", "a loaded prompt was read again", n_read, "0"))
            scene = arrived[turn.about] if turn.about >= 0 else None
            found = {**score(turn, scene, said), "cells": llm.stats.cells}
            if self.forced is not None:
                found |= {"right": self.forced.right, "nll": round(self.forced.nll, 4)}
                full.append(self.forced.rows)
                if self.full and not config.is_off:
                    found["kl"] = round(divergence(self.full[i], full[i]), 4)
            out.append(found)
        if config.is_off:
            self.full = full
        return out

    def ask(self, question: str, images: list[Any], answer: str) -> str:
        """What is said; the answer given where answers are forced."""
        if self.forced is None:
            return "".join(self.chat.ask(question, images, max_tokens=self.max_tokens))
        with self.forced:
            n = self.forced.expect(answer)
            return "".join(self.chat.ask(question, images, max_tokens=n))


def score(turn: Turn, scene: Scene | None, said: str) -> dict[str, Any]:
    """Whether an answer is right; of a caption also the objects that are right, and all objects."""
    q = turn.question
    out: dict[str, Any] = {"kind": q.kind, "right": exact(said, q.answer), "answer": said}
    if not out["right"]:
        out["expected"] = q.answer
    if q.kind == "caption":
        assert scene is not None
        out["objects"] = objects_right(scene, said)
    return out


def objects_right(scene: Scene, said: str) -> list[int]:
    """Objects with the right colour and shape in their place, and objects there are."""
    rows = dict(enumerate(parse_caption(said)))
    places = [(i, c) for i, c in enumerate(scene.cells) if not c.is_empty]
    right = 0
    for i, cell in places:
        row, column = divmod(i, scene.grid)
        right += rows.get(row, [])[column : column + 1] == [cell]
    return [right, len(places)]


def settings(policies: str, budgets: str, given: dict[str, Any]) -> list[ElasticConfig]:
    """The full cache once, the others with every budget."""
    out = []
    for policy in policies.split(","):
        if policy == "full":
            out.append(ElasticConfig.off())
        else:
            out += [make_config(policy, float(b), given) for b in budgets.split(",")]
    return out


def fields(text: str) -> dict[str, Any]:
    """ "layers=even probe=4" as fields of `ElasticConfig`."""
    out = {}
    for part in text.split():
        name, value = part.split("=", 1)
        try:
            out[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            out[name] = value
    return out


def jobs(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Scenario and number of each conversation, all scenarios taking turns; those of the shard."""
    names = args.scenarios.split(",")
    both = [(name, i) for i in range(args.first, args.first + args.items) for name in names]
    shard, n_shards = (int(x) for x in args.shard.split("/"))
    return both[shard::n_shards]


class Results:
    """A file with a line per conversation and setting."""

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path, self.run = path, run
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_text(encoding="utf-8") if path.exists() else ""
        kept = whole[: whole.rfind("\n") + 1]
        if kept != whole:  # half a line, of a run that was stopped
            path.write_text(kept, encoding="utf-8")
        rows = [json.loads(line) for line in kept.splitlines()]
        for row in rows:
            if row["tag"] == run["tag"] and row["run"] != run:
                raise SystemExit(f"{path} holds another run: {row['run']}; choose another --tag")
        self.done = {(row["tag"], row["id"], row["policy"], row["budget"]) for row in rows}

    def has(self, name: str, config: ElasticConfig) -> bool:
        return (self.run["tag"], name, config.policy, config.budget) in self.done

    def add(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"tag": self.run["tag"], **row, "run": self.run}) + "\n")


def measure(args: argparse.Namespace, results: Results, table: Table) -> Iterator[str]:
    """Run what is missing; yields a line to print for each conversation."""
    configs = settings(args.policies, args.budgets, fields(args.config))
    for scenario, index in jobs(args):
        grid = args.grid or None
        name = f"{args.split}-{f'{grid}x{grid}' if grid else 'mixed'}-{scenario}-{index}"
        waiting = [config for config in configs if not results.has(name, config)]
        if not waiting:
            continue
        start = time.perf_counter()
        turns = make_scenario(args.split, scenario, index, grid)
        images = {scene.seed: scene.render() for turn in turns for scene in turn.images}
        prompt = table.first_prompt(turns, images)
        table.full = []
        n_right = 0
        for config in waiting:
            begun = time.perf_counter()
            found = table.run(config, turns, images, prompt)
            n_right += sum(turn["right"] for turn in found)
            row = {"id": name, "scenario": scenario, "policy": config.policy}
            row |= {"budget": config.budget, "turns": found}
            results.add({**row, "s": round(time.perf_counter() - begun, 2)})
        seconds = time.perf_counter() - start
        n = len(waiting) * len(turns)
        yield f"{name}: {n_right} of {n} right, {seconds / len(waiting):.2f} s per setting"


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the figures besides a line's own fields."""
    from elastic_llama.embedded import embedded_mmproj

    mmproj = Path(args.mmproj or embedded_mmproj())
    return {
        **({"forced": True} if args.forced else {}),
        "tag": args.tag,
        "config": args.config,
        "model": Path(args.model).name if args.model else "embedded",
        "mmproj": hashlib.sha256(mmproj.read_bytes()).hexdigest()[:12],
        "flash_attn": "on",
        "max_tokens": args.max_tokens,
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=sorted(SPLITS), default="dev")
    parser.add_argument("--items", type=int, default=8, help="conversations of each scenario")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--policies", default=POLICIES)
    parser.add_argument("--budgets", default=BUDGETS)
    parser.add_argument("--grid", type=int, default=3, help="cells per side, 0: 2 to 4 mixed")
    parser.add_argument("--config", default="", help='fields of ElasticConfig, "layers=even n=1"')
    parser.add_argument("--tag", default="", help="a name for what --config or --mmproj changes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shard", default="0/1", help="I/N: each N-th conversation")
    parser.add_argument("--model", help="GGUF (default: the embedded one)")
    parser.add_argument("--mmproj", help="GGUF of a vision tower (default: the embedded one)")
    parser.add_argument("--share", action=argparse.BooleanOptionalAction, default=True,
                        help="read a first prompt once for all settings")  # fmt: skip
    parser.add_argument("--forced", action="store_true",
                        help="decode the right answers, note how likely each was, and the KL to "
                             "the full cache where that runs, too")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="of an answer")
    parser.add_argument("--n-ctx", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    results = Results(args.out, describe(args))
    table = Table(args)
    try:
        for line in measure(args, results, table):
            print(line, flush=True)
    finally:
        table.close()


if __name__ == "__main__":
    main()
