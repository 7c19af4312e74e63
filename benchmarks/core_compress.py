"""Milliseconds that a compression costs in the core, at LLaVA-1.5-7B's shape, on one thread.

    python benchmarks/core_compress.py [--repeat 5] [--layers 32]

32 layers, 32 KV heads of 128, f16, all rows random: one image of 576 patches in 640 cells kept to 128, and
2880 patches in 2944 cells kept to 589. One layer is timed and its time multiplied by the layers, since layers
are independent; what is timed goes through the bindings, whose copies are timed alone and taken off.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, Callable

import numpy as np

from elastic_llama import _core

N_HEAD, D = 32, 128
CASES = [("one image", 640, 32, 128), ("high resolution", 2944, 32, 589)]  # cells, text each side, kept


def timed(repeat: int, f: Callable[[], Any]) -> list[float]:
    """Milliseconds of each run, after one that does not count."""
    f()
    out = []
    for _ in range(repeat):
        start = time.perf_counter()
        f()
        out.append(1e3 * (time.perf_counter() - start))
    return out


def show(name: str, ms: list[float], layers: int) -> float:
    ms = [layers * x for x in ms]
    median = statistics.median(ms)
    print(f"  {name:<34}{median:9.1f} ms  ({min(ms):.1f} - {max(ms):.1f})")
    return median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--layers", type=int, default=32, help="layers that one layer stands for")
    args = parser.parse_args()

    core = _core.core
    rng = np.random.default_rng(0)
    for title, n, n_text, n_keep in CASES:
        kind = np.zeros(n, np.uint8)
        kind[n_text:-n_text] = 1
        pinned = np.zeros_like(kind)
        mass = rng.gamma(0.5, size=(1, N_HEAD, n)).astype(np.float32)
        keys = rng.normal(size=(1, N_HEAD, n, D)).astype(np.float32)
        rows = core.quantize_rows("f16", keys[0].transpose(1, 0, 2).reshape(n * N_HEAD, D))
        ones, zeros = np.ones_like(mass), np.zeros_like(mass)
        order = list(range(n))

        print(f"{title}: {n} -> {n_keep} cells, {args.layers} layers, {N_HEAD} heads of {D}, f16")
        for name in ("elastic-evict", "elastic-paper", "elastic"):
            def plan(k: int = n_keep, name: str = name) -> dict[str, np.ndarray]:
                return core.make_plan(name, k, 4, kind, pinned, mass, keys)

            p = plan()
            rule = {r["name"]: r["combine"] for r in core.policies()}[name]
            t_plan = show(f"{name}: plan", timed(args.repeat, plan), args.layers)

            for transposed in (False, True):
                def merge(p: dict[str, np.ndarray] = p, rule: str = rule, t: bool = transposed) -> Any:
                    n_now = p["kept"].shape[2]
                    return core.merge_layer(rule, p["kept"], p["bucket"], rows, "f16", rows, "f16", t,
                                            D, n, order, order[:n_now], mass, ones, zeros)

                # the bindings copy K and V in and out
                copies = statistics.median(timed(args.repeat, lambda: [rows.copy() for _ in range(4)]))
                ms = [max(0.0, x - copies) for x in timed(args.repeat, merge)]
                label = "V transposed" if transposed else "V in rows"
                t_merge = show(f"{name}: merge, {label}", ms, args.layers)
                print(f"  {'':<34}{t_plan + t_merge:9.1f} ms  plan + merge")


if __name__ == "__main__":
    main()
