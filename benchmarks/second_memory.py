"""Memory of gemma-3-270m at a long context: stock llama-cpp-python, and an elastic cache.

python benchmarks/second_memory.py [--n-ctx 32768] [--tokens 3000] [--budget 0.2] [--out FILE.json]

Each row is a process of its own: the model is loaded with defaults, a prompt of documentation is
read, and 16 tokens are generated. Shown is the anonymous resident memory (Linux); the weights are
mapped from the file and not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

N_GENERATED = 16
LIBRARIES = ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")  # llama-cpp-python reads them at import
ROWS = {
    "llama-cpp-python": "stock libraries, its defaults",
    "off": "no elastic cache",
    "elastic": "an elastic cache",
}


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(x for x in status.splitlines() if x.startswith("RssAnon:")).split()[1])


def work(row: str, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """In the child: figures of one row."""
    text = args.text.read_text(encoding="utf-8")
    before = anonymous()
    common: dict[str, Any] = {"n_ctx": args.n_ctx, "n_threads": 1, "n_threads_batch": 1}
    if row == "llama-cpp-python":
        from llama_cpp import Llama  # with stock's libraries

        llm: Any = Llama(model, verbose=False, **common)
    else:
        from elastic_llama import ElasticConfig, ElasticLlama

        elastic = ElasticConfig(budget=args.budget) if row == "elastic" else None
        llm = ElasticLlama(model, elastic=elastic, **common)
    tokens = llm.tokenize(text.encode())[: args.tokens]
    loaded = anonymous()
    said = next_tokens(llm.generate(tokens, temp=0.0))
    return {"row": row, "import": before, "loaded": loaded, "after": anonymous(), "said": said}


def next_tokens(stream: Iterator[int]) -> list[int]:
    return [int(next(stream)) for _ in range(N_GENERATED)]


def child(row: str, model: Path, args: argparse.Namespace, text: Path) -> dict[str, Any]:
    shared = ("--n-ctx", args.n_ctx, "--tokens", args.tokens, "--budget", args.budget)
    command = [sys.executable, __file__, "--child", row, "--model", model, "--text", text, *shared]
    env = {k: v for k, v in os.environ.items() if k not in LIBRARIES}
    if row == "llama-cpp-python":
        from tests.support.stock import stock_lib_dir

        env.update(dict.fromkeys(LIBRARIES, str(stock_lib_dir())))
    done = subprocess.run(
        [str(x) for x in command], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-ctx", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=list(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--text", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(work(args.child, str(args.model), args)))
        return
    from long_texts import text_file
    from second_model import second_model

    model, text = second_model(), text_file("dev")
    rows = [child(row, model, args, text) for row in ROWS]
    stock = rows[0]["after"]
    print(
        "| run | MiB loaded | MiB after the prompt | of llama-cpp-python's |\n" + "| --- " * 4 + "|"
    )
    for row in rows:
        loaded, after = row["loaded"] / 2**20, row["after"] / 2**20
        name = f"{row['row']}: {ROWS[row['row']]}"
        print(f"| {name} | {loaded:.0f} | {after:.0f} | {row['after'] / stock:.2f} |")
    if args.out:
        args.out.write_text(json.dumps(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
