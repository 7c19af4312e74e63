"""Time per generated token at a fixed number of cells, from token 200 to token 4000.

An elastic context and a stock one that holds as many cells (its oldest are removed) take turns,
block by block, so that a machine that gets slower or faster meanwhile does not count. Fits a line
to the ratio of their blocks and says how far its slope is from zero, in standard errors. A third
one is what stock programs do: when all cells are full, the older half goes and the rest moves to
its positions (context shift).

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
from elastic_llama.bench.contexts import Context, ContextOptions, Ideal, Prompts, llama_cpp
from elastic_llama.bench.scenarios import Scenario
from elastic_llama.native_log import silence

FIRST, BLOCK = 200, 200


class Shifting:
    """Stock llama.cpp with a context shift."""

    def __init__(self, context: Context, n_cells: int) -> None:
        self.context, self.n_cells, self.end = context, n_cells, n_cells

    def step(self, token: int) -> None:
        if self.end == self.n_cells:
            memory, half = self.context.memory, self.n_cells // 2
            llama_cpp.llama_memory_seq_rm(memory, 0, 0, half)
            llama_cpp.llama_memory_seq_add(memory, 0, half, -1, -half)
            self.end -= half
        self.context.step(token, self.end)
        self.end += 1


def generate(model: str | None, cells: int, n_tokens: int, n_threads: int) -> dict[str, list]:
    """Milliseconds of a token in each block, after a prompt of one image: the median, and the mean
    for "shift", which moves all its cells at once."""
    llm = ElasticLlama(model, elastic=None, n_ctx=256)
    scenario = Scenario("flat", "", 64, (576,), n_gen=n_tokens)
    config = ElasticConfig(budget=cells, overdraft=0)  # a cell is evicted for each token
    setting = ContextOptions(n_threads=n_threads)
    size = scenario.n_prompt + cells
    elastic = Context(llm, setting, 1, size, config)
    stock, shift = Context(llm, setting, 1, size), Context(llm, setting, 1, cells)
    prompts = Prompts(llm, scenario)
    tokens = prompts.tokens[scenario.n_text :]
    try:
        elastic.prefill(prompts.parts(), 0)
        for context in (stock, shift):
            context.prefill([tokens[:cells]], 0)
        ideal = Ideal(stock, config, scenario.n_prompt, cells)
        shifting = Shifting(shift, cells)

        def step(name: str, i: int) -> None:
            if name == "elastic":
                elastic.step(tokens[i], scenario.n_prompt + i)
            elif name == "stock":
                ideal.step(tokens[i])
            else:
                shifting.step(tokens[i])

        contexts = {"elastic": elastic, "stock": stock, "shift": shift}
        out: dict[str, list] = {name: [] for name in contexts}
        for first in range(0, n_tokens - BLOCK + 1, BLOCK):
            block = range(first, first + BLOCK)
            for name in sorted(contexts, reverse=(first // BLOCK) % 2 == 1):
                ms = []
                for i in block:
                    start = time.perf_counter()
                    step(name, i)
                    contexts[name].synchronize()
                    ms.append(1000 * (time.perf_counter() - start))
                if first >= FIRST:
                    middle = np.mean if name == "shift" else np.median
                    out[name].append(round(float(middle(ms)), 4))
            assert elastic.n_cells() == ideal.n_now == cells
        return out
    finally:
        elastic.close()
        stock.close()
        shift.close()
        llm.close()


def slope(y: np.ndarray) -> tuple[float, float]:
    """Change per 1000 tokens and its standard error."""
    x = np.arange(len(y)) * BLOCK / 1000
    (a, _), cov = np.polyfit(x, y, 1, cov=True)
    return float(a), float(cov[0, 0] ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model")
    parser.add_argument("--cells", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    silence()
    blocks = generate(args.model, args.cells, args.tokens, args.threads)
    ratio = np.array(blocks["elastic"]) / np.array(blocks["stock"])
    per_1000, error = slope(ratio)
    if args.out:
        row = {"cells": args.cells, "per_1000": per_1000, "error": error, "block_ms": blocks}
        args.out.write_text(json.dumps(row) + "\n", encoding="utf-8")
    for name, ms in blocks.items():
        print(f"{name}: {np.median(ms):.2f} ms per token ({min(ms):.2f}-{max(ms):.2f})  ")
    print(f"elastic / stock {np.median(ratio):.3f} ({ratio.min():.3f}-{ratio.max():.3f}),", end=" ")
    print(f"slope {100 * per_1000:+.2f} +- {100 * error:.2f} % per 1000 tokens")


if __name__ == "__main__":
    main()
