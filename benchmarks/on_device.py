"""An elastic cache on a device: does it say what the CPU says, and what does a token cost?

For builds with -DGGML_CUDA=ON, Metal, …, and for RPC servers: model, keys and values lie on the
device, the plan is made on the CPU. Compares logits under every policy after a prompt of 640
tokens, then times a prompt of 2944 on the device: stock, elastic at 0.2, and ideal, which is stock
with a prompt of as many cells as elastic keeps. The three take turns.

Usage: python benchmarks/on_device.py MODEL.gguf [-t THREADS] [--rpc HOST:PORT] [--speed-only]
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass

import numpy as np
from elastic_llama import ElasticConfig, ElasticLlama
from elastic_llama.bench.contexts import Context, ContextOptions, llama_cpp
from elastic_llama.evaluation.metrics import kl, log_softmax
from elastic_llama.native_log import silence
from elastic_llama.rpc import add_rpc_server

POLICIES = ("elastic", "elastic-evict", "elastic-paper", "h2o", "snapkv", "local")
# flash attention, and a policy or stock; an elastic cache has flash attention
N_PROMPT, N_ANSWER = 2944, 192
RUNS = ((False, None), (True, None), *((True, policy) for policy in POLICIES))


@dataclass
class Answer:
    """What one context said and took; seconds, and milliseconds per token."""

    logits: list[np.ndarray]
    prompt: float
    first: float
    mean: float  # without the first; the compressions of an answer are a part of it
    n_cells: int


def answer(
    llm: ElasticLlama, policy: str | None, setting: ContextOptions, n_prompt: int, n: int
) -> Answer:
    """`n` forced tokens after a prompt of random ones."""
    tokens = np.random.default_rng(0).integers(10, llm.n_vocab(), n_prompt + n + 1).tolist()
    config = ElasticConfig(policy=policy) if policy else None
    context = Context(llm, setting, 1, n_prompt + n + 1, config)
    try:
        prompt = context.prefill([tokens[:n_prompt]], 0)
        logits, times = [], []
        for i, token in enumerate(tokens[n_prompt:]):
            start = time.perf_counter()
            context.step(token, n_prompt + i)
            row = llama_cpp.llama_get_logits_ith(context.ctx, 0)
            logits.append(np.ctypeslib.as_array(row, (context.n_vocab,)).copy())
            times.append(1000 * (time.perf_counter() - start))
        held = context.n_cells() if config else n_prompt + n + 1
        return Answer(logits, prompt, times[0], float(np.mean(times[1:])), held)
    finally:
        context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rpc", metavar="HOST:PORT", help="an RPC server is the device")
    parser.add_argument("--speed-only", action="store_true", help="only the first policy's speed")
    parser.add_argument("-r", "--repeat", type=int, default=5)
    args = parser.parse_args()
    silence()
    if args.rpc:
        print(add_rpc_server(args.rpc))
    kw = {"elastic": None, "n_ctx": 256, "n_threads_batch": args.threads}
    print(f"device: {llama_cpp.llama_supports_gpu_offload()}, {args.threads} threads")
    with (
        ElasticLlama(args.model, n_gpu_layers=0, **kw) as host,
        ElasticLlama(args.model, n_gpu_layers=99, **kw) as device,
    ):
        for fa, policy in () if args.speed_only else RUNS:
            setting = ContextOptions(flash_attn=fa, n_threads=args.threads)
            ours, theirs = (
                log_softmax(answer(x, policy, setting, 640, 32).logits) for x in (host, device)
            )
            print(f"fa {fa} {policy or 'stock'}: KL of host to device {kl(ours, theirs):.1e}")
        for _, policy in RUNS[2:3] if args.speed_only else RUNS[2:]:
            time_policy(device, policy, args)


def time_policy(device: ElasticLlama, policy: str | None, args: argparse.Namespace) -> None:
    """Stock, elastic and ideal by turns; medians with the lowest and highest."""
    setting = ContextOptions(flash_attn=True, n_threads=args.threads)
    held = answer(device, policy, setting, N_PROMPT, 4).n_cells  # the first one loads kernels
    runs: dict[str, list[Answer]] = {"stock": [], "elastic": [], "ideal": []}
    for _ in range(args.repeat):
        runs["stock"].append(answer(device, None, setting, N_PROMPT, N_ANSWER))
        runs["elastic"].append(answer(device, policy, setting, N_PROMPT, N_ANSWER))
        runs["ideal"].append(answer(device, None, setting, held, N_ANSWER))
    print(f"{policy}, {held} cells of {N_PROMPT}:")
    for name, answers in runs.items():
        mean = [x.mean for x in answers]
        prompt = np.median([x.prompt for x in answers])
        print(
            f"  {name}: prompt {prompt:.3f} s, first token {answers[-1].first:.1f} ms, then "
            f"{np.median(mean):.2f} ms per token ({min(mean):.2f} to {max(mean):.2f})"
        )
    ratio = np.median([i.mean / e.mean for i, e in zip(runs["ideal"], runs["elastic"])])
    print(f"  decode: {ratio:.2f} of ideal's speed")


if __name__ == "__main__":
    main()
