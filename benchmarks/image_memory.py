"""Time to the first token of the second question about an image, and what an image takes on disk.

The first question encodes and reads the image; it is compressed and kept. The second one comes in
the same context, in another one of this process, or from the folder, as in a new process. Its time
has the compression of its prompt, which comes before the first token is decoded.

With --shaped FILE (benchmarks/shaped_model.py OUT --layers 4) the image is 576 random embeddings of
that model's width, and there is no tower to run: the first question is faster by that.

Usage: python benchmarks/image_memory.py [--shaped FILE] [-n TIMES] [-t THREADS]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
from elastic_llama import Conversation, ElasticLlama, ImageMemory
from elastic_llama.bench.contexts import llama_cpp
from elastic_llama.kv_types import KV_TYPES
from elastic_llama.memory import MemoryFolder
from elastic_llama.pieces import ImagePiece, TextPiece
from elastic_llama.scenes import make_scene

QUESTIONS = ("What is in row 1, column 2?", "What is in row 2, column 1?")


class Embedded:
    """The embedded model, and a scene."""

    def __init__(self, number: int) -> None:
        self.image = make_scene("test", number, grid=3).render()

    def seconds(self, llm: ElasticLlama, question: str) -> float:
        chat = Conversation(llm)
        start = time.perf_counter()
        next(iter(chat.ask(question, self.image, max_tokens=1)))
        return time.perf_counter() - start


class Shaped:
    """Random embeddings, and a question of as many tokens as those of the embedded model."""

    def __init__(self, number: int) -> None:
        self.number = number

    def seconds(self, llm: ElasticLlama, question: str) -> float:
        rng = np.random.default_rng(self.number)
        image = rng.normal(0, 1, (576, llm.n_embd())).astype(np.float32)
        text = llm.tokenize(f"\nUSER: {question}\nASSISTANT: ".encode(), False)
        before = llm.tokenize(b"A chat between a human and an assistant. USER: ", True)
        pieces = [
            TextPiece(tuple(before)),
            ImagePiece(f"random-{self.number}", 576, lambda n: decode(llm, image, n)),
            TextPiece(tuple(text)),
        ]
        start = time.perf_counter()
        llm.prefill(pieces)
        next(iter(llm.generate([], reset=False, temp=0.0)))
        llm.session.compress(0)
        return time.perf_counter() - start


def decode(llm: ElasticLlama, image: np.ndarray, n_past: int) -> int:
    n, width = image.shape
    batch = llama_cpp.llama_batch_init(n, width, 1)
    try:
        batch.n_tokens = n
        np.ctypeslib.as_array(batch.embd, (n, width))[:] = image
        for i in range(n):
            batch.pos[i], batch.n_seq_id[i], batch.logits[i] = n_past + i, 1, 0
            batch.seq_id[i][0] = 0
        if llama_cpp.llama_decode(llm._ctx.ctx, batch):
            raise RuntimeError("llama_decode failed")
    finally:
        llama_cpp.llama_batch_free(batch)
    return n_past + n


def measure(load: Callable[..., ElasticLlama], make: Callable[[int], Any], times: int) -> None:
    rows: dict[str, list[float]] = {"same context": [], "other context": [], "from disk": []}
    firsts = []
    with tempfile.TemporaryDirectory() as folder:
        memory = ImageMemory(folder)
        with load(memory) as llm, load(memory) as other, load(ImageMemory(folder)) as disk:
            warm = make(10**6)
            for one in (llm, other, disk):
                warm.seconds(one, QUESTIONS[0])
            for i in range(times):
                image = make(i)
                firsts.append(image.seconds(llm, QUESTIONS[0]))
                rows["same context"].append(image.seconds(llm, QUESTIONS[1]))
                rows["other context"].append(image.seconds(other, QUESTIONS[1]))
                rows["from disk"].append(image.seconds(disk, QUESTIONS[1]))
    first = statistics.median(firsts)
    print(f"first question: {first:.2f} s ({min(firsts):.2f} to {max(firsts):.2f})")
    for name, seconds in rows.items():
        ratio = [s / f for s, f in zip(seconds, firsts)]
        print(
            f"second, {name}: {statistics.median(seconds):.3f} s, "
            f"{100 * statistics.median(ratio):.1f} % ({100 * min(ratio):.1f} to "
            f"{100 * max(ratio):.1f} %)"
        )


def sizes(threads: int) -> None:
    """Bytes of a file in relation to the f16 K/V of all its positions."""
    for name, budget in (("f16", 0.5), ("q8_0", 0.5), ("q8_0", 0.2)):
        kind = KV_TYPES[name]
        with tempfile.TemporaryDirectory() as folder:
            options = {"type_k": kind, "type_v": kind, "n_threads": threads}
            with ElasticLlama(memory=folder, memory_budget=budget, **options) as llm:
                Conversation(llm).remember(make_scene("test", 0, grid=3).render())
                n = llm.n_tokens
                full = n * 30 * 3 * 64 * 2 * 2  # layers, KV heads, their width, K and V, f16
                (file,) = MemoryFolder(folder).files()
                size = file.stat().st_size
        print(f"{budget:g} x {name}: {size} bytes, {100 * size / full:.1f} % of {full}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shaped", type=Path, metavar="FILE")
    parser.add_argument("-n", "--times", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int, default=1)
    args = parser.parse_args()
    threads = {"n_threads": args.threads, "n_threads_batch": args.threads}
    if args.shaped is None:
        measure(lambda memory: ElasticLlama(memory=memory, **threads), Embedded, args.times)
        sizes(args.threads)
    else:
        measure(
            lambda memory: ElasticLlama(args.shaped, memory=memory, n_ctx=1024, **threads),
            Shaped,
            args.times,
        )


if __name__ == "__main__":
    main()
