"""Off is off: speed and resident memory of our libraries without an elastic cache against stock's.

Two processes, one with each build of the same source, take turns: a prompt, then tokens. The ratio
of each turn to the other process's next turn is what counts; whoever comes first changes.

Usage: python benchmarks/off_vs_stock.py MODEL.gguf [--turns 9] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

N_PROMPT, N_GEN = 512, 40


def work(model: str, flash_attn: bool) -> None:
    """In the child: one turn for each line of input, its figures as a line of JSON."""
    from tests.support.engine import Engine, random_tokens

    n_threads = os.cpu_count() or 1
    with Engine(model, n_ctx=1024, flash_attn=flash_attn, n_threads=n_threads) as e:
        tokens = random_tokens(N_PROMPT + N_GEN, 300, 1)
        for _ in sys.stdin:
            e.clear()
            start = time.perf_counter()
            e.prompt(tokens[:N_PROMPT])
            e.logits(-1)  # waits for it
            middle = time.perf_counter()
            for i, token in enumerate(tokens[N_PROMPT:]):
                e.token(token, N_PROMPT + i)
            end = time.perf_counter()
            figures = {"prompt_s": middle - start, "generate_s": end - middle, "rss": rss()}
            print(json.dumps(figures), flush=True)


def rss() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(x for x in status.splitlines() if x.startswith("VmRSS:")).split()[1])


class Child:
    def __init__(self, lib_dir: Path, model: str, flash_attn: bool) -> None:
        env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(lib_dir), "MTMD_CPP_LIB": str(lib_dir)}
        command = [sys.executable, __file__, model, "--child", "on" if flash_attn else "off"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True)

    def turn(self) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.communicate()


def compare(model: str, flash_attn: bool, turns: int) -> dict[str, Any]:
    import elastic_llama

    from tests.support.stock import stock_lib_dir

    children = {
        "stock": Child(stock_lib_dir(), model, flash_attn),
        "ours": Child(elastic_llama.lib_dir(), model, flash_attn),
    }
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in children}
    for turn in range(turns + 1):
        for name in sorted(children, reverse=turn % 2 == 0):
            figures = children[name].turn()
            if turn > 0:  # the first one loads the model's pages
                seen[name].append(figures)
    for child in children.values():
        child.close()
    return {"flash_attn": flash_attn, "n_prompt": N_PROMPT, "n_gen": N_GEN, **seen}


def ratio(run: dict[str, Any], what: str) -> str:
    """Ours to stock: the median of turns, and their range."""
    pairs = [a[what] / b[what] for a, b in zip(run["ours"], run["stock"])]
    return f"{statistics.median(pairs):.3f} ({min(pairs):.3f}-{max(pairs):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=("on", "off"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        work(args.model, args.child == "on")
        return
    runs = [compare(args.model, flash_attn, args.turns) for flash_attn in (False, True)]
    if args.out:
        args.out.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    print("| fa | prompt, ours / stock | generation, ours / stock | RSS, ours / stock |")
    print("| --- | --- | --- | --- |")
    for run in runs:
        cells = [ratio(run, what) for what in ("prompt_s", "generate_s", "rss")]
        print(f"| {'on' if run['flash_attn'] else 'off'} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
