"""Time to the first token of the second question about an image, and what an image takes on disk.

The first question encodes and reads the image; it is compressed and kept. The second one comes in
the same context, in another one of this process, or from the folder, as in a new process. The
prompt is compressed behind the first token. The compression is printed beside it, and so is the
share of both together.

With --shaped FILE (benchmarks/shaped_model.py OUT --layers 4) the model is that one, with a tower
of two narrow layers (benchmarks/shaped_tower.py).

Seconds are CPU seconds of one thread, which other programs on the machine change little.

Usage: python benchmarks/image_memory.py [--shaped FILE] [-n TIMES]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Callable

import numpy as np
from elastic_llama import Conversation, ElasticLlama, ImageMemory
from elastic_llama.bench.contexts import llama_cpp
from elastic_llama.kv_types import KV_TYPES
from elastic_llama.memory import MemoryFolder
from elastic_llama.scenes import make_scene
from shaped_tower import write as write_tower

QUESTIONS = ("What is in row 1, column 2?", "What is in row 2, column 1?")


def seconds(llm: ElasticLlama, question: str, number: int) -> tuple[float, float]:
    """To the first token of an answer about a scene, and of the compression behind it."""
    image = make_scene("test", number, grid=3).render()
    start = time.process_time()
    chat = Conversation(llm)
    answer = chat.ask(question, image, max_tokens=1)
    next(answer)
    first = time.process_time()
    if chat.stats.n_answer != 1:
        raise RuntimeError("the first token is no text; take another scene")
    next(answer, None)
    out = first - start, time.process_time() - first
    chat.close()
    return out


def decode(llm: ElasticLlama, image: np.ndarray, n_past: int) -> int:
    """Embeddings [n, width] from position `n_past` on."""
    width = image.shape[1]
    batch = llama_cpp.llama_batch_init(llm.n_batch, width, 1)
    try:
        for start in range(0, len(image), llm.n_batch):
            part = image[start : start + llm.n_batch]
            batch.n_tokens = n = len(part)
            np.ctypeslib.as_array(batch.embd, (n, width))[:] = part
            for i in range(n):
                batch.pos[i], batch.n_seq_id[i], batch.logits[i] = n_past + start + i, 1, 0
                batch.seq_id[i][0] = 0
            if llama_cpp.llama_decode(llm._ctx.ctx, batch):
                raise RuntimeError("llama_decode failed")
    finally:
        llama_cpp.llama_batch_free(batch)
    return n_past + len(image)


def measure(load: Callable[..., ElasticLlama], times: int) -> None:
    names = ("same context", "other context", "from disk")
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in ("first", *names)}
    with tempfile.TemporaryDirectory() as folder:
        memory = ImageMemory(folder)
        with load(memory) as llm, load(memory) as other, load(ImageMemory(folder)) as disk:
            for one in (llm, other, disk):
                seconds(one, QUESTIONS[0], 10**6)  # to warm up
            for i in range(times):
                rows["first"].append(seconds(llm, QUESTIONS[0], i))
                for name, one in zip(names, (llm, other, disk)):
                    rows[name].append(seconds(one, QUESTIONS[1], i))
    for name, row in rows.items():
        token, behind = (statistics.median(column) for column in zip(*row))
        shares = [100 * a[0] / b[0] for a, b in zip(row, rows["first"])]
        both = [100 * sum(a) / sum(b) for a, b in zip(row, rows["first"])]
        print(
            f"{name}: {token:.3f} s and {behind:.3f} s for the compression behind it; "
            f"{statistics.median(shares):.1f} % ({min(shares):.1f} to {max(shares):.1f} %), "
            f"both together {statistics.median(both):.1f} %"
        )


def sizes() -> None:
    """Bytes of a file in relation to the f16 K/V of all its positions."""
    for name, budget in (("f16", 0.5), ("q8_0", 0.5), ("q8_0", 0.2)):
        kind = KV_TYPES[name]
        with tempfile.TemporaryDirectory() as folder:
            options = {"type_k": kind, "type_v": kind, "n_threads": 1}
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
    args = parser.parse_args()
    threads = {"n_threads": 1, "n_threads_batch": 1}
    if args.shaped is None:
        measure(lambda memory: ElasticLlama(memory=memory, **threads), args.times)
        sizes()
        return
    with tempfile.TemporaryDirectory() as folder:
        tower = write_tower(Path(folder) / "mmproj.gguf")
        options = {"mmproj_path": tower, "n_ctx": 1024, **threads}
        measure(lambda memory: ElasticLlama(args.shaped, memory=memory, **options), args.times)


if __name__ == "__main__":
    main()
