"""Graphs of many layers and heads: llama.cpp ends the process if one has too many nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_llama import write_tiny_llama

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import sys
from tests.support.engine import Engine, random_tokens

given = {"n_ctx": 65536, "n_seq_max": int(sys.argv[2]), "unified": False}
with Engine(sys.argv[1], {"policy": "elastic", "budget": 0.2, "min_cells": 8}, **given) as e:
    assert len(set(e.session.attention())) == 1
    e.prompt(random_tokens(70, 384, 1), 0, 0)
    e.token(20, 70, 0)
    assert e.session.stats()["compressions"] == 1
"""


@pytest.mark.parametrize("way", ["", "graph", "streams", "plain"])
@pytest.mark.parametrize("n_seq", [1, 16])
def test_many_layers_and_heads(tmp_path: Path, way: str, n_seq: int) -> None:
    """The largest graph, of an ubatch and a full cache, is reserved when the cache is attached."""
    path = tmp_path / "deep.gguf"
    write_tiny_llama(path, n_layer=24, n_embd=64, n_head=16, n_head_kv=16, n_ff=32)
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(n_seq)],
        cwd=ROOT,
        env={**os.environ, "ELASTIC_ATTENTION": way},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr[-2000:]
