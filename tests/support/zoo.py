"""Tiny random models of every architecture of llama.cpp, written once into the cache folder.

`write_zoo` (make upstream) makes them by the recipe of llama.cpp's own test-llama-archs.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

from scripts.build_stock import source

ROOT = Path(__file__).resolve().parent.parent.parent
WRITER = ROOT / "build-upstream" / "write_zoo"

#: What the recipe leaves out and `write_zoo` completes; some as a variant: gemma4-shared
#: shares K and V of layers, lfm2-full has no sliding window, as those that are published.
ADDED = (
    *("apertus", "arwkv7", "bert", "bitnet", "chameleon", "deepseek2-ocr", "eurobert"),
    *("gemma-embedding", "gemma3n", "gemma4", "gemma4-shared", "graniteswitch", "jina-bert-v2"),
    *("jina-bert-v3", "lfm2-full", "llama-embed", "modern-bert", "neo-bert", "nomic-bert"),
    *("nomic-bert-moe", "rwkv6", "rwkv6qwen2", "rwkv7", "step35", "t5", "t5encoder"),
    *("wavtokenizer-dec",),
)
VARIANTS = {"gemma4-shared", "lfm2-full"}
#: What no context of its own can be made of, and why.
LEFT_OUT = {
    "clip": "a vision tower, not a language model",
    "dflash": "drafts for another model, whose context it needs",
    "eagle3": "drafts for another model, whose context it needs",
    "gemma4-assistant": "drafts for another model, whose context it needs",
    "gptj": "llama.cpp has no graph for it",
    "plm": "llama.cpp aborts on it: V has another shape than its cache takes",
}


def architectures() -> set[str]:
    """Every architecture that the pinned llama.cpp names."""
    pin = source.read_pin(ROOT / "patches" / "llama-cpp.pin")
    tree = source.prepare(pin, [], None, source.cache_dir())
    text = (tree / "src" / "llama-arch.cpp").read_text()
    return set(re.findall(r'\{ LLM_ARCH_\w+,\s+"([\w.-]+)"', text))


def folder() -> Path:
    """Where the models of the pinned tree lie, or will."""
    digest = hashlib.sha256()
    for path in ("patches/llama-cpp.pin", "tests/cpp/write_zoo.cpp"):
        digest.update((ROOT / path).read_bytes() + b"\0")
    digest.update(" ".join(ADDED).encode())
    return source.cache_dir() / "zoo" / digest.hexdigest()[:12]


def models() -> list[Path]:
    """All of them, by name. The first time 1 GB is written, in about 20 seconds."""
    target = folder()
    if not target.is_dir():
        if not WRITER.is_file():
            raise FileNotFoundError(f"{WRITER} is missing: run make upstream")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temp:
            made = Path(temp) / "models"
            made.mkdir()
            _write(str(made))
            for name in ADDED:
                _write(str(made), name)
            if not target.is_dir():  # else another process was faster
                os.replace(made, target)
    return sorted(target.glob("*.gguf"))


def _write(*args: str) -> None:
    done = subprocess.run([str(WRITER), *args], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"write_zoo {' '.join(args)}: {(done.stdout + done.stderr)[-2000:]}")


def label(path: Path) -> str:
    """The architecture of a model, marked where there is one with experts beside one without."""
    name, _, variant = path.stem.rpartition("-")
    other = path.with_name(f"{name}-dense.gguf")
    return f"{name} (MoE)" if variant == "moe" and other.is_file() else name
