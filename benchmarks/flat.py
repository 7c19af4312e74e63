"""Time per generated token at a fixed number of cells, from token 200 to token 4000.

Fits a line and says how far its slope is from zero, in standard errors over blocks of tokens.

Usage: python benchmarks/flat.py [-m MODEL.gguf] [--cells 128] [--tokens 4000] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
from elastic_llama import ElasticConfig, ElasticLlama
from elastic_llama.bench.contexts import Context, Prompts, Setting
from elastic_llama.bench.scenarios import Scenario
from elastic_llama.native_log import silence

FIRST, BLOCK = 200, 200


def generate(model: str | None, cells: int, n_tokens: int, n_threads: int) -> list[float]:
    """Milliseconds of each token after a prompt of one image."""
    llm = ElasticLlama(model, elastic=None, n_ctx=256)
    scenario = Scenario("flat", "", 64, (576,), n_gen=n_tokens)
    config = ElasticConfig(budget=cells)
    setting = Setting(n_threads=n_threads)
    context = Context(llm, setting, 1, scenario.n_prompt + cells, config)
    prompts = Prompts(llm, scenario)
    try:
        context.prefill(prompts.parts(), 0)
        out = []
        for i, token in enumerate(prompts.tokens[scenario.n_text :]):
            start = time.perf_counter()
            context.step(token, scenario.n_prompt + i)
            context.synchronize()
            out.append(1000 * (time.perf_counter() - start))
            assert context.n_cells() == cells
        return out
    finally:
        context.close()
        llm.close()


def slope(ms: list[float]) -> tuple[float, float, list[float]]:
    """Microseconds per 1000 tokens, its standard error, and the medians of blocks of tokens."""
    y = np.array([np.median(ms[i : i + BLOCK]) for i in range(FIRST, len(ms) - BLOCK + 1, BLOCK)])
    x = np.arange(len(y)) * BLOCK / 1000
    (a, _), cov = np.polyfit(x, 1000 * y, 1, cov=True)
    return float(a), float(cov[0, 0] ** 0.5), [round(float(v), 3) for v in y]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model")
    parser.add_argument("--cells", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    silence()
    ms = generate(args.model, args.cells, args.tokens, args.threads)
    per_1000, error, blocks = slope(ms)
    if args.out:
        row = {"cells": args.cells, "us_per_1000": per_1000, "error": error, "block_ms": blocks}
        args.out.write_text(json.dumps(row) + "\n", encoding="utf-8")
    print(f"tokens {FIRST} to {args.tokens} in {args.cells} cells: {np.median(ms[FIRST:]):.2f} ms")
    print(f"slope {per_1000:+.1f} +- {error:.1f} us per 1000 tokens")


if __name__ == "__main__":
    main()
