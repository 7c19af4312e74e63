"""`elastic-llama eval`: policies and budgets side by side on a set of questions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import ConfigError, message
from . import options


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "eval", help="compare policies and budgets on a set of questions (resumable)"
    )
    parser.add_argument("-m", "--model", metavar="FILE", help="GGUF (the embedded model if none)")
    parser.add_argument("--mmproj", metavar="FILE", help="GGUF of the vision tower and projector")
    parser.add_argument(
        "--data",
        default="scenes",
        metavar="FILE",
        help='JSON list of {"image", "question", "answer"}, or "scenes" (synthetic; the default)',
    )
    parser.add_argument("--split", default="test", help="dev or test (test)")
    parser.add_argument("--grid", type=int, default=3, help="scenes: cells per side (3)")
    parser.add_argument("--limit", type=int, metavar="N", help="items (scenes: pictures) at most")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="skip the first N")
    parser.add_argument("--policies", default="full,local,h2o,elastic-paper,elastic")
    parser.add_argument("--budgets", default="0.5,0.3,0.2,0.1")
    parser.add_argument("--kv-type", default="f16", help="KV cache types, e.g. f16,q8_0,q4_0")
    parser.add_argument(
        "--before", action="store_true", help="compress images before the question is known"
    )
    options.add_answer_options(parser)
    options.add_layers_option(parser)
    parser.add_argument(
        "--metrics",
        default="forced,exact,rouge",
        help="forced (perplexity, KL, agreement), exact, rouge (slowest)",
    )
    parser.add_argument(
        "--shard", default="0/1", metavar="I/N", help="every N-th item from the I-th on (0/1)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="results; a second run goes on")
    parser.add_argument(
        "--parallel", type=int, default=1, metavar="N", help="sequences side by side (1)"
    )
    parser.add_argument("-t", "--threads", type=int, default=1, metavar="N")
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=int,
        default=1024,
        metavar="N",
        help="cells of each sequence (1024)",
    )
    parser.add_argument("-ub", "--ubatch-size", type=int, default=512, metavar="N")
    parser.add_argument(
        "-fa",
        "--flash-attn",
        choices=("on", "off"),
        default="on",
        help="on: the caches that are compared are elastic, which have no other",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="llama.cpp's own log")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    _need_extra()
    from ..evaluation.figure import draw
    from ..evaluation.runner import Results, Runner
    from ..evaluation.summary import summarise, write_csv
    from ..native_log import silence

    plan = _plan(args)
    items = _items(args)
    shard, n_shards = _shard(args.shard)
    results = Results(Path(args.out), {**plan.describe(), **_what(args)}, shard)
    todo = [item for item in items[shard::n_shards] if item.id not in results.done()]
    if not args.verbose:
        silence()
    runner = Runner(plan)
    try:
        _progress(runner, todo, results)
    finally:
        runner.close()
        if results.rows:
            lines = summarise(results.rows)
            write_csv(lines, results.folder / "summary.csv")
            draw(lines, results.folder)
            _print(lines)


def _progress(runner: Any, todo: list[Any], results: Any) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{len(todo)} items", total=runner.n_runs(len(todo)))
        for rows in runner.run(todo, lambda n: bar.advance(task, n)):
            results.add(rows)


def _need_extra() -> None:
    try:
        import matplotlib  # noqa: F401
        import rouge_score  # noqa: F401
        import yaml  # noqa: F401
    except ImportError as e:
        raise ConfigError(
            message(
                "eval", f"the package {e.name} is missing", do='pip install "elastic-llama[eval]"'
            )
        ) from e


def _plan(args: argparse.Namespace) -> Any:
    from ..embedded import embedded_mmproj, embedded_model
    from ..evaluation.runner import Case, Plan, make_config
    from ..kv_types import KV_TYPES

    options.check_flash(args)
    kv_types = _list(args.kv_type)
    for name in kv_types:
        if name not in KV_TYPES:
            raise ConfigError(message("eval", "--kv-type", name, "some of " + ", ".join(KV_TYPES)))
    try:
        budgets = [float(b) for b in _list(args.budgets)]
    except ValueError as e:
        raise ConfigError(message("eval", "--budgets", args.budgets, "numbers and commas")) from e
    asked = {
        "probe": args.probe,
        "layers": args.layers if isinstance(args.layers, str) else list(args.layers),
    }
    when = {name: value for name, value in asked.items() if value is not None}
    cases = []
    for kv_type in kv_types:
        cases.append(Case("full", 1.0, kv_type))
        for policy in _list(args.policies):
            for budget in budgets:
                make_config(policy, budget, when)  # says what is wrong
                if policy != "full" and budget != 1:
                    cases.append(Case(policy, budget, kv_type))
    for name, value in (
        ("--parallel", args.parallel),
        ("--threads", args.threads),
        ("--ubatch-size", args.ubatch_size),
    ):
        if value < 1:
            raise ConfigError(message("eval", name, value, "at least 1"))
    if args.mmproj and not args.model:
        raise ConfigError(message("eval", "--mmproj without -m", do="name the language model too"))
    metrics = tuple(_list(args.metrics))
    known = ("forced", "exact", "rouge")
    if not metrics or not set(metrics) <= set(known):
        raise ConfigError(message("eval", "--metrics", args.metrics, "some of " + ", ".join(known)))
    return Plan(
        cases,
        args.model or str(embedded_model()),
        args.mmproj if args.model else str(embedded_mmproj()),
        args.before,
        metrics,
        args.parallel,
        args.threads,
        args.ctx_size,
        args.ubatch_size,
        when,
    )


def _items(args: argparse.Namespace) -> list[Any]:
    from ..evaluation.items import read_items, scene_items

    if args.data == "scenes":
        return scene_items(args.split, args.limit or 100, args.grid, args.first)
    items = read_items(args.data, args.split)[args.first :]
    return items[: args.limit] if args.limit else items


def _what(args: argparse.Namespace) -> dict[str, Any]:
    from ..evaluation.runner import _identity

    if args.data == "scenes":
        return {"data": "scenes", "split": args.split, "grid": args.grid}
    return {"data": _identity(args.data), "split": args.split}


def _shard(value: str) -> tuple[int, int]:
    parts = value.split("/")
    if len(parts) == 2 and all(p.isdecimal() for p in parts) and int(parts[0]) < int(parts[1]):
        return int(parts[0]), int(parts[1])
    raise ConfigError(message("eval", "--shard", value, "I/N with 0 <= I < N, such as 0/2"))


def _list(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


def _print(lines: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = [k for k in ("kl", "ppl", "ppl_ratio", "agree", "exact", "rouge") if k in lines[0]]
    shown += [k for k in ("exact",) if k not in shown and any(k in line for line in lines)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("group", "KV", "policy"):
        table.add_column(name)
    for name in ("budget", "n", "cells", *shown):
        table.add_column(name, justify="right")
    for line in lines:
        cells = [line["group"], line["kv_type"], line["policy"], f"{line['budget']:g}"]
        cells += [str(line["n"]), f"{line['cells']:.0f}"]
        for key in shown:
            se = line.get(key + "_se")
            value = "" if key not in line else f"{line[key]:.3f}"
            cells.append(value if se is None or not value else f"{value} ±{se:.3f}")
        table.add_row(*cells)
    Console(width=130, soft_wrap=False).print(table)
