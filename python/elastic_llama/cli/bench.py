"""`elastic-llama bench`: speed and memory of stock, elastic and ideal in one run."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

from ..errors import ConfigError, message
from ..kv_types import KV_TYPES, PLAIN_TYPES
from . import options


def add_parser(commands: Any) -> None:
    from ..bench.scenarios import SCENARIOS

    parser = commands.add_parser(
        "bench",
        help="speed and memory: stock, elastic and ideal in turns",
        epilog="scenarios:\n" + "\n".join(f"  {s.name:15} {s.about}" for s in SCENARIOS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-m", "--model", metavar="FILE", help="GGUF (the embedded model if none)")
    parser.add_argument("--mmproj", metavar="FILE", help="time encoding an image with it, too")
    parser.add_argument("--scenarios", default="image", metavar="A,B", help="see below (image)")
    parser.add_argument("--budgets", default="0.2", metavar="B,B", help="what is kept (0.2)")
    parser.add_argument("--policy", default="elastic", help="row of the policy table (elastic)")
    parser.add_argument("--kv-types", default="f16", metavar="T,T", help="e.g. f16,q8_0,q4_0 (f16)")
    parser.add_argument(
        "-fa",
        "--flash-attn",
        default="off,on",
        metavar="off,on",
        help="of stock (off,on); elastic and ideal have it on, and elastic is compared with each",
    )
    parser.add_argument("-r", "--repeat", type=int, default=3, metavar="N", help="prompts (3)")
    parser.add_argument("-n", "--predict", type=int, metavar="N", help="tokens to generate")
    parser.add_argument("-ub", "--ubatch-size", type=int, default=512, metavar="N")
    parser.add_argument(
        "-t", "--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="(all)"
    )
    options.add_layers_option(parser)
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md", help="(md)")
    parser.add_argument("--out", metavar="FILE", help="append a JSON line per row to FILE")
    parser.add_argument("-v", "--verbose", action="store_true", help="llama.cpp's own log")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..native_log import silence

    if not args.verbose:
        silence()
    rows: list[dict[str, Any]] = []
    file = None if args.out is None else _open(args.out)
    try:
        _measure_all(args, rows, file)
    finally:  # Ctrl-C too: what was measured is shown
        if file is not None:
            file.close()
        _show(rows, args.output)


def _open(path: str) -> Any:
    try:
        return Path(path).open("a", encoding="utf-8")
    except OSError as e:
        raise ConfigError(message("bench", "--out", str(e), "a file that can be written")) from e


def _measure_all(args: argparse.Namespace, rows: list[dict[str, Any]], file: Any) -> None:
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from ..bench.contexts import ContextOptions
    from ..bench.encode import time_encoding
    from ..bench.measure import as_row, measure, n_steps
    from ..bench.scenarios import find_scenarios
    from ..config import ElasticConfig
    from ..llama import ElasticLlama

    scenarios = find_scenarios(args.scenarios)
    if args.predict is not None:
        scenarios = [
            replace(s, n_gen=_at_least("--predict", args.predict, 4 * s.n_parts)) for s in scenarios
        ]
    configs = [
        ElasticConfig(budget=budget, policy=args.policy, layers=args.layers)
        for budget in _numbers(args.budgets)
    ]
    if any(config.is_off for config in configs):
        raise ConfigError(
            message("bench", "a cache that keeps every cell", f"{args.policy}, {args.budgets}")
        )
    flash = _flash(args.flash_attn)
    settings = [
        (
            ContextOptions(
                kv_type,
                n_threads=_at_least("--threads", args.threads, 1),
                n_ubatch=_at_least("--ubatch-size", args.ubatch_size, 1),
            ),
            [on for on in flash if on or kv_type in PLAIN_TYPES],
        )
        for kv_type in _known("--kv-types", args.kv_types, tuple(KV_TYPES))
        if True in flash or kv_type in PLAIN_TYPES
    ]
    if not settings:
        raise ConfigError(
            message("bench", "quantized V without flash attention", args.kv_types, do="add -fa on")
        )
    n_prefills = _at_least("--repeat", args.repeat, 1)
    llm = ElasticLlama(args.model, mmproj_path=args.mmproj, elastic=None, n_ctx=256)
    about = _about(llm)

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        if file is not None:
            file.write(json.dumps(row) + "\n")
            file.flush()

    total = sum(
        n_steps(scenario, len(stock_flash), len(configs), n_prefills)
        for scenario in scenarios
        for _, stock_flash in settings
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=total)
            if llm.mmproj_path is not None:
                add({**about, **time_encoding(llm, args.threads, n_prefills)})

            def tick(what: str) -> None:
                bar.update(task, advance=1, description=what)

            for scenario in scenarios:
                for setting, stock_flash in settings:
                    for one in measure(
                        llm, scenario, setting, configs, n_prefills, tick, stock_flash
                    ):
                        add(as_row(one, scenario, about))
    finally:
        llm.close()


def _about(llm: Any) -> dict[str, Any]:
    import llama_cpp

    from .. import __version__

    return {
        "model": os.path.basename(llm.model_path),
        "n_params": int(llama_cpp.llama_model_n_params(llm.model)),
        "version": __version__,
        "system": llama_cpp.llama_print_system_info().decode().strip(),
        "cpu": _cpu(),
        "n_cpus": os.cpu_count(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _show(rows: list[dict[str, Any]], output: str) -> None:
    from ..bench.report import markdown

    if rows:
        print(json.dumps(rows, indent=1) if output == "json" else markdown(rows))


def _at_least(name: str, value: int, least: int) -> int:
    if value < least:
        raise ConfigError(message("bench", name, value, f"at least {least}"))
    return value


def _numbers(values: str) -> list[float]:
    try:
        return [float(x) for x in values.split(",")]
    except ValueError:
        raise ConfigError(
            message("bench", "--budgets", repr(values), "numbers separated by commas")
        ) from None


def _known(name: str, values: str, known: tuple[str, ...]) -> list[str]:
    chosen = [x.strip() for x in values.split(",")]
    for x in chosen:
        if x not in known:
            raise ConfigError(message("bench", name, repr(x), "some of " + ", ".join(known)))
    return chosen


def _flash(values: str) -> list[bool]:
    return [x == "on" for x in _known("--flash-attn", values, ("on", "off"))]
