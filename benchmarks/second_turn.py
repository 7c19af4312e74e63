"""The second turn of a conversation about a high-resolution image: its prompt, stock and elastic.

After a prompt of 2944 cells and one token of the answer a turn of 64 tokens is read, taken back
and read again, in turns; elastic attends to the cells that it kept.

Usage: python benchmarks/second_turn.py MODEL.gguf [-r REPETITIONS]
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace

import numpy as np
from elastic_llama import ElasticConfig, ElasticLlama
from elastic_llama.bench.contexts import Context, ContextOptions, Prompts, llama_cpp
from elastic_llama.bench.scenarios import find_scenarios
from elastic_llama.native_log import silence

N_TURN = 64


def read(context: Context, tokens: list[int], pos: int) -> float:
    """Milliseconds that a turn takes; it is taken back."""
    rows = [(token, pos + i, 0) for i, token in enumerate(tokens)]
    start = time.perf_counter()
    context._decode_tokens(rows, {len(rows) - 1})
    context.synchronize()
    ms = 1000 * (time.perf_counter() - start)
    assert llama_cpp.llama_memory_seq_rm(context.memory, 0, pos, -1)
    return ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-r", "--repetitions", type=int, default=10)
    args = parser.parse_args()
    silence()
    (scenario,) = find_scenarios("hires")
    llm = ElasticLlama(args.model, elastic=None, n_ctx=256)
    prompts = Prompts(llm, scenario)
    turn = prompts.tokens[scenario.n_text : scenario.n_text + N_TURN]
    n_cells = scenario.n_prompt + N_TURN + 1
    setting = ContextOptions(n_threads=os.cpu_count() or 1)
    contexts = {
        "stock, fa off": Context(llm, replace(setting, flash_attn=False), 1, n_cells),
        "stock, fa on": Context(llm, setting, 1, n_cells),
        "elastic": Context(llm, setting, 1, n_cells, ElasticConfig()),
    }
    ms: dict[str, list[float]] = {name: [] for name in contexts}
    for context in contexts.values():
        context.prefill(prompts.parts(), 0)
        context.step(turn[0], scenario.n_prompt)
    names = list(contexts)
    for i in range(args.repetitions):
        for name in names if i % 2 == 0 else names[::-1]:
            ms[name].append(read(contexts[name], turn, scenario.n_prompt + 1))
    for name, own in ms.items():
        print(f"{name}: {np.median(own):.0f} ms ({min(own):.0f}-{max(own):.0f})")
    for name in names[:2]:
        ratio = np.array(ms["elastic"]) / np.array(ms[name])
        print(f"elastic / {name}: {np.median(ratio):.3f}")
    for context in contexts.values():
        context.close()


if __name__ == "__main__":
    main()
