"""llama-server under load, and the memory that conversations about photos take in it.

load:          400 requests of 8 `openai` clients to 4 slots, with and without images, streaming or
               not, one in ten malformed, one in twenty hanging up; with --save-slots, slots are
               saved and restored in between. Every well-formed one must be answered as alone
               (greedy), every malformed one refused with a message, and the server must not grow
               after a warm-up of half as many requests, which fills the prompt cache in RAM.
again:         time to the first token of a question about a photo, of the next turn, of the same
               question again, and of another question in a new conversation; median of 5.
conversations: 16 conversations about one photo each; resident bytes of K and V, with and without
               the elastic cache.

Without SERVER OPTIONS the server is what `elastic-llama serve` starts.

Usage: server_load.py WHAT [--requests N] [--save-slots] [--seed N] [--out FILE] [-- SERVER OPTIONS]
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import io
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from elastic_llama.scenes.layout import make_scene
from elastic_llama.scenes.render import render
from openai import APIStatusError, OpenAI

FACTS = (
    "The red house stands by the sea. The blue boat has left the harbour at noon. "
    "A green bird sits on the white gate. Four children play under the old tree. "
)
QUESTIONS = ("What is in row 3?", "What is in row 1, column 1?")
TEXT_QUESTIONS = (
    "What stands by the sea?",
    "Where does the bird sit?",
    "Who plays under the tree?",
)


class Server:
    def __init__(self, options: list[str], folder: Path) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.log = folder / f"server-{self.port}.log"
        command = [sys.executable, "-m", "elastic_llama", "serve", "--port", str(self.port)]
        command += ["-t", "1", "-tb", "1", "--slots", "--metrics", "--slot-save-path", str(folder)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*command, *options], stdout=log, stderr=log)
        while True:
            if self.process.poll() is not None:
                raise SystemExit("the server did not start:\n" + self.log.read_text()[-2000:])
            with contextlib.suppress(OSError):
                self.get("/health")
                return
            time.sleep(0.2)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=600) as answer:
            return str(answer.read().decode())

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read())

    def client(self) -> OpenAI:
        url = f"http://127.0.0.1:{self.port}/v1"
        return OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)

    def resident(self) -> int:
        """Bytes of the process that are its own."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", status)[0])

    def metric(self, name: str) -> float:
        found = re.findall(rf"^llamacpp:{name} (\S+)$", self.get("/metrics"), re.MULTILINE)
        return float(found[0]) if found else 0.0

    def cached(self) -> int:
        """Bytes of the prompt cache in RAM, as the log says (-lv 4)."""
        found = re.findall(r"cache state: \d+ prompts, ([\d.]+) MiB", self.log.read_text())
        return int(float(found[-1]) * (1 << 20)) if found else 0

    def stop(self) -> None:
        if self.process.poll() is not None:
            print(f"the server ended with {self.process.returncode}:", file=sys.stderr)
            print(self.log.read_text()[-4000:], file=sys.stderr)
        self.process.terminate()
        self.process.wait(60)


def photo(index: int) -> str:
    out = io.BytesIO()
    render(make_scene("dev", index, 3)).save(out, "png")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def ask_about(url: str, question: str) -> list[dict[str, Any]]:
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


def prompts(n_photos: int, n_questions: int) -> list[list[dict[str, Any]]]:
    """With and without images; every other one of a text has the same beginning as another."""
    out = [ask_about(photo(i), q) for i in range(n_photos) for q in QUESTIONS[:n_questions]]
    for n in (6, 9):
        for question in TEXT_QUESTIONS:
            out.append([{"role": "user", "content": FACTS * n + question}])
    return out


MALFORMED: list[dict[str, Any]] = [
    {"messages": "hello"},
    {"messages": [{"role": "user", "content": [{"type": "picture"}]}]},
    {"messages": ask_about("data:image/png;base64,AAAA", "?")},
    {"messages": ask_about("http://127.0.0.1/x.png", "?")},
    {"messages": [{"role": "user", "content": "?"}], "temperature": "warm"},
    {"messages": [{"role": "user", "content": "word " * 4000}]},
]


class Load:
    def __init__(self, server: Server, args: argparse.Namespace) -> None:
        self.server = server
        self.weights = [40, 41, 10, 5, 4] if args.save_slots else [42, 43, 10, 5, 0]
        self.rng = random.Random(args.seed)
        self.prompts = prompts(args.photos, args.questions)
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.lock = threading.Lock()

    def erase(self) -> None:
        for slot in json.loads(self.server.get("/slots")):
            self.server.post(f"/slots/{slot['id']}?action=erase", {})

    def answers_alone(self) -> None:
        self.alone = []
        for messages in self.prompts:
            self.erase()
            self.alone.append(self.whole(self.server.client(), messages))
        self.erase()

    def whole(self, client: OpenAI, messages: list[Any], stream: bool = False) -> str:
        out = client.chat.completions.create(
            model="embedded", messages=messages, max_tokens=24, temperature=0, stream=stream
        )
        if stream:
            return "".join(e.choices[0].delta.content or "" for e in out if e.choices)
        return str(out.choices[0].message.content)

    def hang_up(self, client: OpenAI, messages: list[Any], n_pieces: int) -> None:
        out = client.chat.completions.create(
            model="embedded", messages=messages, max_tokens=400, temperature=0, stream=True
        )
        for _ in zip(out, range(n_pieces)):
            pass
        out.close()

    def one(self, client: OpenAI, kind: str, i: int, extra: int) -> None:
        if kind == "malformed":
            try:
                client.post(
                    "/chat/completions", body=MALFORMED[extra % len(MALFORMED)], cast_to=object
                )
                self.note(kind, f"malformed {extra % len(MALFORMED)} was answered")
            except APIStatusError as e:
                good = 400 <= e.status_code < 500 and bool(e.message)
                self.note(kind, None if good else f"malformed: {e.status_code} {e.message}")
        elif kind == "hang-up":
            self.hang_up(client, self.prompts[i], extra % 6)
            self.note(kind, None)
        elif kind == "slots":
            slot = extra % 4
            for action in ("save", "restore"):
                self.server.post(f"/slots/{slot}?action={action}", {"filename": f"{slot}.bin"})
            self.note(kind, None)
        else:
            got = self.whole(client, self.prompts[i], kind == "stream")
            same = got == self.alone[i]
            self.note(kind, None if same else f"prompt {i}: {got!r} for {self.alone[i]!r}")

    def note(self, kind: str, wrong: str | None) -> None:
        with self.lock:
            self.counts[kind] += 1
            if wrong:
                self.wrong.append(wrong)

    def run(self, n: int, n_clients: int = 8) -> None:
        kinds = self.rng.choices(
            ["whole", "stream", "malformed", "hang-up", "slots"], self.weights, k=n
        )
        queue = [(k, self.rng.randrange(len(self.prompts)), self.rng.randrange(999)) for k in kinds]

        def work() -> None:
            client = self.server.client()
            while True:
                with self.lock:
                    if not queue:
                        return
                    job = queue.pop()
                try:
                    self.one(client, *job)
                except Exception as e:
                    self.note(job[0], f"{job}: {type(e).__name__}: {e}")

        threads = [threading.Thread(target=work) for _ in range(n_clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def load(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    server = Server(["-lv", "4", *args.options], folder)  # the log has the size of the prompt cache
    try:
        run = Load(server, args)
        run.answers_alone()
        print(f"alone: {server.resident()} bytes", file=sys.stderr, flush=True)
        run.run(args.requests // 2)
        warm, cached = server.resident(), server.cached()
        print(f"warm: {warm} bytes, {cached} of them cached", file=sys.stderr, flush=True)
        run.counts.clear()
        start = time.perf_counter()
        run.run(args.requests)
        seconds = time.perf_counter() - start
        return {
            "requests": dict(run.counts),
            "wrong": run.wrong,
            "seconds": round(seconds, 1),
            "resident_warm": warm,
            "resident_end": server.resident(),
            "cached_warm": cached,
            "cached_end": server.cached(),
            "checkpoints_end": server.metric("kv_checkpoint_bytes"),
            "reused_tokens": server.metric("prompt_tokens_cached_total"),
            "read_tokens": server.metric("prompt_tokens_total"),
            "compressions": server.metric("kv_compressions_total"),
            "alive": server.process.poll() is None,
        }
    finally:
        server.stop()


def first_token(
    client: OpenAI, messages: list[Any], n: int, answer: str = ""
) -> tuple[float, int, str]:
    """Seconds to the first token, tokens that were read for it, and the answer."""
    start = time.perf_counter()
    seconds, n_read, text = 0.0, 0, ""
    more = {"grammar": f'root ::= "{answer}"'} if answer else {}
    for event in client.chat.completions.create(
        model="embedded",
        messages=messages,
        max_tokens=n,
        temperature=0,
        stream=True,
        extra_body=more,
    ):
        piece = event.choices[0].delta.content if event.choices else None
        if piece:
            seconds = seconds or time.perf_counter() - start
            text += piece
        n_read = (event.model_extra or {}).get("timings", {}).get("prompt_n", n_read)
    return seconds, n_read, text


def again(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    server = Server(["-np", "1", "-c", "2048", *args.options], folder)
    try:
        return times_again(server.client(), args.predict, args.answer)
    finally:
        server.stop()


def times_again(client: OpenAI, n: int, text: str = "") -> dict[str, Any]:
    rows = collections.defaultdict(list)
    for i in range(5):
        asked = ask_about(photo(i), QUESTIONS[0])
        *first, answer = first_token(client, asked, n, text)
        said = {"role": "assistant", "content": answer}
        turn = [*asked, said, {"role": "user", "content": QUESTIONS[1]}]
        other = ask_about(photo(i), QUESTIONS[1])
        rows["first"].append(first)
        rows["next turn"].append(first_token(client, turn, n, text)[:2])
        rows["same question"].append(first_token(client, asked, n, text)[:2])
        rows["new conversation"].append(first_token(client, other, n, text)[:2])
    median = {name: [*map(statistics.median, zip(*row))] for name, row in rows.items()}
    out = {name: round(seconds, 3) for name, (seconds, _) in median.items()}
    read = {f"{name}, tokens read": n for name, (_, n) in median.items()}
    share = {f"{name}, share": round(out[name] / out["first"], 3) for name in list(out)[1:]}
    return {**out, **read, **share}


def kv_resident(server: Server) -> tuple[int, int]:
    """Bytes of the K/V buffer, and of these in memory."""
    sizes = re.findall(r"KV buffer size = +([\d.]+) MiB", server.log.read_text())
    size = int(max(map(float, sizes)) * (1 << 20))  # that of the slots; others are measured with
    smaps = Path(f"/proc/{server.process.pid}/smaps").read_text()
    found = re.findall(r"^Size:\s+(\d+) kB.*?^Rss:\s+(\d+) kB", smaps, re.MULTILINE | re.DOTALL)
    # the mapping that holds the buffer, which the system may have joined with its neighbours
    _, resident = min((int(n), int(rss)) for n, rss in found if int(n) * 1024 >= size)
    return size, resident * 1024


def warm_up(server: Server) -> None:
    """Buffers of a prompt, which may lie beside K and V, are in memory; a slot is empty again."""
    for words in ("word " * 600, "word"):  # the second batch gives back what the first one took
        body = {"prompt": words, "n_predict": 1, "temperature": 0, "id_slot": 0}
        server.post("/completion", body)
        server.post("/slots/0?action=erase", {})


def hold(server: Server, n: int) -> dict[str, Any]:
    """What n conversations about one photo each take."""
    warm_up(server)
    before = server.resident()
    size, at_start = kv_resident(server)
    for i in range(n):
        body = {"messages": ask_about(photo(i), QUESTIONS[0]), "max_tokens": 24, "id_slot": i}
        server.post("/v1/chat/completions", {**body, "temperature": 0})
    # llama.cpp writes all of it at the start; else what is there at the start is a neighbour's
    own = size if at_start >= size else kv_resident(server)[1] - at_start
    return {
        "kv_buffer": size,
        "kv_resident": own,
        "checkpoints": server.metric("kv_checkpoint_bytes"),
        "tokens": server.metric("kv_tokens"),
        "cells": server.metric("kv_cells"),
        "process_before": before,
        "process_after": server.resident(),
    }


def conversations(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    out: dict[str, Any] = {}
    n, n_ctx = 16, 768
    names = args.only.split(",") if args.only else None
    for name, options in (
        ("llama.cpp", ["--kv-budget", "1"]),
        ("serve", []),
        ("no image checkpoints", ["--no-kv-image-checkpoint"]),
    ):
        if names and name not in names:
            continue
        options = [
            "-np",
            str(n),
            "-c",
            str(n * n_ctx),
            "-v",
            "--cache-ram",
            "0",
            "-fa",
            "on",
            *options,
        ]
        server = Server([*options, *args.options], folder)
        try:
            out[name] = hold(server, n)
        finally:
            server.stop()
        print(name, out[name], file=sys.stderr, flush=True)
    own = next(iter(out.values()))["kv_buffer"]  # which llama.cpp has in memory as a whole
    for row in out.values():
        row["ratio"] = round((row["kv_resident"] + row["checkpoints"]) / own, 3)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("load", "again", "conversations"))
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--save-slots", action="store_true")
    parser.add_argument("--photos", type=int, default=4)
    parser.add_argument("--questions", type=int, default=2, help="about each photo, 1 or 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--predict",
        type=int,
        default=16,
        help="again: tokens of an answer at most",
    )
    parser.add_argument(
        "--answer",
        default="",
        help="again: the answer, by a grammar; one word for random weights, whose text becomes "
        "other tokens when it comes back",
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--only", metavar="NAME,...", help="of the conversations: llama.cpp, serve, …"
    )
    own, _, options = " ".join(sys.argv[1:]).partition(" -- ")
    args = parser.parse_args(own.split(), argparse.Namespace(options=options.split()))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        run = {"load": load, "again": again, "conversations": conversations}[args.what]
        out = run(args, Path(folder))
    text = json.dumps(out, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    if args.what == "again":
        return 0 if all(out[name] <= 0.05 for name in out if name.endswith("share")) else 1
    if args.what == "conversations":
        return 0 if out["serve"]["ratio"] <= 0.25 else 1
    grown = out["resident_end"] / out["resident_warm"]
    return 0 if not out["wrong"] and out["alive"] and grown <= 1.05 else 1


if __name__ == "__main__":
    sys.exit(main())
