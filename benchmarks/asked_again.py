"""What the same prompt costs the second time: time to the first token, text and image.

python benchmarks/asked_again.py [--budget 0.2] [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

from elastic_llama import Conversation, ElasticLlama
from elastic_llama.images import load_image
from elastic_llama.scenes import CAPTION_PROMPT, make_scene

N_ANSWER = 200  # tokens


def first_token(pieces: Iterator[str]) -> float:
    """Milliseconds to the first piece of an answer, which is then read to its end."""
    start = time.perf_counter()
    next(pieces)
    elapsed = 1000 * (time.perf_counter() - start)
    for _ in pieces:
        pass
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    threads = {"n_threads": args.threads, "n_threads_batch": args.threads}
    text = "The sea is wide, and the old ships lie in the harbour. " * 40 + "Describe the ships."
    image = load_image(make_scene("dev", 0, grid=3).render())
    with ElasticLlama(kv_budget=args.budget, n_ctx=2048, **threads) as llm:
        chat = Conversation(llm)
        for name, question, images in (("text", text, []), ("image", CAPTION_PROMPT, [image])):
            times = []
            for _ in range(4):
                chat.clear()
                times.append(first_token(chat.ask(question, images, max_tokens=N_ANSWER)))
            again = ", ".join(f"{t:.1f}" for t in times[1:])
            share = 100 * max(times[1:]) / times[0]
            kept = llm.stats.checkpoint_bytes / 2**20
            print(f"{name}: first {times[0]:.0f} ms, again {again} ms (at most {share:.1f} %), "
                  f"checkpoints {kept:.1f} MiB")  # fmt: skip
        chat.close()


if __name__ == "__main__":
    main()
