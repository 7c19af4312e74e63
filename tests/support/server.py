"""A llama-server of this package as a process, and a plain client for it."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

START = 120  # seconds for a start on a busy machine


def binary() -> Path:
    """llama-server, or the reason to skip."""
    from elastic_llama.cli.serve import find_server
    from elastic_llama.errors import ElasticError

    try:
        return find_server()
    except ElasticError as e:
        pytest.skip(f"{e}")


def data_uri(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "png")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def user(question: str, *urls: str) -> dict[str, Any]:
    """A message with images before its question."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def said(answer: str) -> dict[str, Any]:
    return {"role": "assistant", "content": answer}


class Server:
    """A running server; `options` are those of `elastic-llama serve`."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.log = folder / "server.log"
        command = [sys.executable, "-m", "elastic_llama", "serve", "--port", str(self.port)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "-t", "1", "-tb", "1", "--no-warmup", *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def wait(self) -> Server:
        end = time.monotonic() + START
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                if self.get("/health")[0] == 200:
                    return self
            time.sleep(0.1)
        self.process.kill()
        raise AssertionError("the server did not start:\n" + self.log.read_text()[-3000:])

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(30)

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and answer, as JSON where it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        with contextlib.suppress(ValueError):
            return response.status, json.loads(text)
        return response.status, text

    def get(self, path: str) -> tuple[int, Any]:
        return self.request("GET", path)

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        return self.request("POST", path, body)

    def chat(self, *messages: dict[str, Any], n: int = 16, **options: Any) -> dict[str, Any]:
        """The whole answer to a chat completion, greedy."""
        body = {"messages": list(messages), "max_tokens": n, "temperature": 0, **options}
        status, out = self.post("/v1/chat/completions", body)
        assert status == 200, out
        return out

    def stream(self, *messages: dict[str, Any], n: int = 16, **options: Any) -> Iterator[Any]:
        """The events of a chat completion; closing the iterator hangs up."""
        body = {"messages": list(messages), "max_tokens": n, "temperature": 0, "stream": True}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        data = json.dumps({**body, **options}).encode()
        connection.request(
            "POST", "/v1/chat/completions", data, {"Content-Type": "application/json"}
        )
        try:
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])
        finally:
            connection.close()

    def erase(self) -> None:
        """Every slot is as if the server had just been started."""
        for slot in self.get("/slots")[1]:
            status, out = self.post(f"/slots/{slot['id']}?action=erase", {})
            assert status == 200, out

    def metric(self, name: str) -> float:
        status, text = self.get("/metrics")
        assert status == 200
        found = [
            line.split()[1] for line in text.splitlines() if line.startswith(f"llamacpp:{name} ")
        ]
        return float(found[0])


def text_of(out: dict[str, Any]) -> str:
    return str(out["choices"][0]["message"]["content"])


def n_read(out: dict[str, Any]) -> int:
    """Tokens of the prompt that were decoded for this answer."""
    return int(out["timings"]["prompt_n"])
