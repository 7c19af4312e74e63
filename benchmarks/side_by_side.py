"""What answering side by side is worth: many questions about one image, and a folder of images.

ask:     8 questions as one batch, against 8 calls of `ask` over the same cells, and against 8 calls
         that read the image each, as llama-cpp-python's handlers do. CPU seconds of one thread,
         which a busy machine changes little.
caption: image files answered as by `elastic-llama caption`, against one after the other with the
         threads that llama-cpp-python chooses: in a `Conversation`, by chat completions, and by
         chat completions without an elastic cache. Seconds, in turns; the machine must be idle,
         and what other programs took of it meanwhile is printed. --weights Q8_0 or Q4_0: the
         embedded model in a type for which ggml has kernels that read prompts fast.
folder:  the command over scenes and broken files, killed once in the middle.

Usage: python benchmarks/side_by_side.py ask|caption|folder [--shaped FILE] [--weights TYPE] [-n N]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import elastic_llama  # noqa: F401  (before llama_cpp: its libraries are ours)
import llama_cpp
import numpy as np
from elastic_llama import Conversation, ElasticLlama, caption_workers
from elastic_llama.ask import SharedImage
from elastic_llama.caption_workers import captions_by
from elastic_llama.embedded import embedded_mmproj, embedded_model
from elastic_llama.images import to_data_uri
from elastic_llama.memory.reader import PrefixReader
from elastic_llama.pieces import ImagePiece, TextPiece
from elastic_llama.scenes import CAPTION_PROMPT, make_scene

N_QUESTIONS = 8
MOST = 120  # tokens of a caption
THREADS = {"n_threads": 1, "n_threads_batch": 1}


def cpu_seconds(do: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    out = do()
    return time.process_time() - start, out


def report(name: str, together: float, alone: float) -> None:
    print(f"{name}: {together:.2f} s against {alone:.2f} s, {together / alone:.2f}")


def ask_embedded() -> None:
    image = make_scene("test", 3, grid=3).render()
    short = [f"What is in row {r}, column {c}?" for r in (1, 2, 3) for c in (1, 2, 3)]
    long = [CAPTION_PROMPT + " " * i for i in range(N_QUESTIONS)]
    with ElasticLlama(n_seq_max=N_QUESTIONS + 1, **THREADS) as llm:
        read, _ = cpu_seconds(lambda: llm.ask(image, ["hi"], max_tokens=1))
        for name, questions in (("short answers", short[:N_QUESTIONS]), ("captions", long)):
            together, a = cpu_seconds(lambda q=questions: llm.ask(image, q, max_tokens=MOST))
            alone, b = cpu_seconds(
                lambda q=questions: [llm.ask(image, [x], max_tokens=MOST)[0] for x in q]
            )
            report(f"{name}, over the same cells", together, alone)
            report(f"{name}, image read each time", read + together, N_QUESTIONS * read + alone)
            print(f"  answers equal: {sum(x == y for x, y in zip(a, b))} of {N_QUESTIONS}")


def ask_shaped(path: Path, n_tokens: int) -> None:
    """Random embeddings, questions of 17 tokens, answers of `n_tokens`."""
    from image_memory import decode

    rng = np.random.default_rng(0)
    with ElasticLlama(path, n_seq_max=N_QUESTIONS + 1, **THREADS) as llm:
        image = rng.normal(0, 1, (576, llm.n_embd())).astype(np.float32)
        prompts = [
            [
                TextPiece(tuple(llm.tokenize(b"A chat. USER: "))),
                ImagePiece("random", 576, lambda n: decode(llm, image, n)),
                TextPiece(tuple(rng.integers(10, 30000, 17).tolist())),
            ]
            for _ in range(N_QUESTIONS)
        ]
        reader = PrefixReader(llm, None, 0.5)
        read, _ = cpu_seconds(lambda: SharedImage(llm, prompts[:1]).answers(reader, 1))
        together, a = cpu_seconds(lambda: SharedImage(llm, prompts).answers(reader, n_tokens))
        alone, b = cpu_seconds(
            lambda: [SharedImage(llm, [p]).answers(reader, n_tokens)[0] for p in prompts]
        )
        report(f"{n_tokens} tokens, over the same cells", together, alone)
        report(f"{n_tokens} tokens, image read each time", read + together, 8 * read + alone)
        print(f"  answers equal: {sum(x == y for x, y in zip(a, b))} of {N_QUESTIONS}")


def completions(llm: ElasticLlama) -> Callable[[list[Path]], list[str]]:
    """One chat completion for each image."""

    def one(path: Path) -> str:
        url = {"url": to_data_uri(path)}
        parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": CAPTION_PROMPT}]
        messages = [{"role": "user", "content": parts}]
        out = llm.create_chat_completion(messages, temperature=0, max_tokens=MOST)
        return str(out["choices"][0]["message"]["content"])

    return lambda paths: [one(path) for path in paths]


def in_turn(chat: Conversation) -> Callable[[list[Path]], list[str]]:
    """A new conversation for each image."""

    def one(path: Path) -> str:
        chat.clear()
        return "".join(chat.ask(CAPTION_PROMPT, path, max_tokens=MOST))

    return lambda paths: [one(path) for path in paths]


def at_once(chats: list[Conversation]) -> Callable[[list[Path]], list[str]]:
    """As the command does it."""

    def all_of(paths: list[Path]) -> list[str]:
        said = {c.name: c.text for c in captions_by(chats, paths, CAPTION_PROMPT, MOST)}
        return [said[path] for path in paths]

    return all_of


def busy_seconds() -> float:
    """Of all cores since the start of the machine (Linux)."""
    user, nice, system, _, _, irq, soft = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def caption(n: int, rounds: int, grid: int, model: dict[str, Any]) -> None:
    n_cores = caption_workers.n_cores()
    n_workers = caption_workers.default_workers([])
    threads = max(1, n_cores // n_workers)
    options = {"n_threads": threads, "n_threads_batch": threads, "n_seq_max": 9, "n_ctx": 9 * 1024}
    workers = [Conversation(ElasticLlama(**model, **options)) for _ in range(n_workers)]
    ways = {
        "caption": at_once(workers),
        "conversation": in_turn(Conversation(ElasticLlama(**model))),
        "conversation, all threads": in_turn(
            Conversation(ElasticLlama(**model, n_threads=n_cores))
        ),
        "chat completion": completions(ElasticLlama(**model)),
        "chat completion, off": completions(ElasticLlama(**model, elastic=None)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as temp:
        paths = [Path(temp) / f"{i}.png" for i in range(n)]
        for i in range(-1, rounds):
            for k, path in enumerate(paths):
                make_scene("test", (i + 1) * n + k, grid=grid).render().save(path)
            expected: list[str] = []
            for name, way in ways.items():
                if i < 0:  # to warm up
                    way(paths[:n_workers])
                    continue
                own, busy, start = time.process_time(), busy_seconds(), time.perf_counter()
                said = way(paths)
                took = time.perf_counter() - start
                other = busy_seconds() - busy - (time.process_time() - own)
                expected = expected or said
                seconds[name].append(took / n)
                print(
                    f"{name}: {took / n:.3f} s for an image; others took "
                    f"{100 * other / took / n_cores:.0f} % of the machine; "
                    f"{sum(a == b for a, b in zip(said, expected))} of {n} captions equal",
                    flush=True,
                )
    for name, row in list(seconds.items())[1:]:
        ratio = statistics.median(a / b for a, b in zip(row, seconds["caption"]))
        print(f"throughput of caption: {ratio:.2f} times that of {name}")


def in_type(name: str, out: Path) -> Path:
    """The embedded model with its weights in another type."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.allow_requantize = True
    source = os.fsencode(embedded_model())
    if llama_cpp.llama_model_quantize(source, os.fsencode(out), ctypes.byref(params)) != 0:
        raise SystemExit(f"llama.cpp could not write weights as {name}")
    return out


def folder(n: int, n_broken: int, model: list[str]) -> None:
    """The command over scenes and broken files, killed once in the middle."""
    with tempfile.TemporaryDirectory() as temp:
        images, out = Path(temp) / "images", Path(temp) / "captions.jsonl"
        images.mkdir()
        for i in range(n):
            path = images / f"{i:04d}.png"
            make_scene("test", i, grid=3).render().save(path)
            if i % max(1, n // max(1, n_broken)) == 0 and i // max(1, n // n_broken) < n_broken:
                path.write_bytes(path.read_bytes()[:1000])
        command = [sys.executable, "-m", "elastic_llama", "caption", str(images)]
        command += ["-p", CAPTION_PROMPT, "-o", str(out), "-n", "64", *model]
        process = subprocess.Popen(command)
        while process.poll() is None and not (
            out.exists() and out.read_bytes().count(b"\n") >= n // 2
        ):
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        code = subprocess.run(command, check=False).returncode
        lines = [json.loads(line) for line in out.read_text().splitlines()]
    names = {line["file"] for line in lines}
    n_errors = sum("error" in line for line in lines)
    print(f"exit code {code}; {len(lines)} lines of {len(names)} files, {n_errors} errors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("ask", "caption", "folder"))
    parser.add_argument("--shaped", type=Path, metavar="FILE")
    parser.add_argument("-n", "--images", type=int, default=16)
    parser.add_argument("--broken", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--grid", type=int, default=3, help="caption: cells per side of a scene, 2 to 4"
    )
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--weights", choices=("Q8_0", "Q4_0"), help="caption: the embedded model in another type"
    )
    other.add_argument("-m", "--model", help="caption, folder: another language model")
    parser.add_argument("--mmproj")
    args = parser.parse_args()
    if args.what == "caption":
        with tempfile.TemporaryDirectory() as temp:
            path = in_type(args.weights, Path(temp) / "m.gguf") if args.weights else args.model
            model = {"model_path": path, "mmproj_path": args.mmproj or embedded_mmproj()}
            caption(args.images, args.rounds, args.grid, model if path else {})
    elif args.what == "folder":
        given = {"-m": args.model, "--mmproj": args.mmproj}
        folder(args.images, args.broken, [x for name, v in given.items() if v for x in (name, v)])
    elif args.shaped is None:
        ask_embedded()
    else:
        for n_tokens in (4, 32):
            ask_shaped(args.shaped, n_tokens)


if __name__ == "__main__":
    main()
