"""`elastic-llama info -m`: the bytes that it names are those that contexts have."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import elastic_llama as el
import pytest
from elastic_llama.kv_types import KV_TYPES
from elastic_llama.model_info import model_info
from elastic_llama.vision import MARKER, Vision
from PIL import Image

from tests.support.engine import Engine, random_tokens
from tests.support.tiny_archs import write_tiny
from tests.support.tiny_llama import write_tiny_llama

HEADER = 64 * 1024  # of a saved state: positions and names beside the rows


def run(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "elastic_llama", "info", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows in three of four layers."""
    path = tmp_path_factory.mktemp("info") / "cohere2.gguf"
    return write_tiny_llama(path, arch="cohere2", n_layer=4, n_embd=128)


def saved_bytes(path: Path, n: int, **args: Any) -> int:
    """Of the K and V of n tokens, as llama.cpp writes them."""
    with Engine(str(path), n_ctx=n, flash_attn=True, **args) as e:
        empty = len(e.save(0))
        e.prompt(random_tokens(n, 300, 1))
        return len(e.save(0)) - empty


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_plain(tiny_gqa: Path, kv_type: str) -> None:
    types = {"type_k": KV_TYPES[kv_type], "type_v": KV_TYPES[kv_type]}
    info = model_info(tiny_gqa, n_tokens=(512, 1000), **types)
    assert (info.works, info.kind, info.n_layer, info.n_layer_model) == (True, "plain", 3, 3)
    row = 2 * 64 * 2 if kv_type == "f16" else 2 * 64 // 32 * 34  # bytes of K of a layer and cell
    assert info.cell_bytes == 3 * 2 * row
    assert info.bias_bytes == 3 * 2 * 4
    assert info.window_cells == info.state_bytes == 0
    small, large = info.sizes
    assert small.stock == small.windowed == 512 * info.cell_bytes
    assert large.elastic == 200 * (info.cell_bytes + info.bias_bytes)
    stored = saved_bytes(tiny_gqa, 512, type_k=kv_type, type_v=kv_type)
    assert 0 <= stored - small.stock < HEADER


def test_the_elastic_figure_is_what_a_session_holds(tiny_gqa: Path) -> None:
    info = model_info(tiny_gqa, n_tokens=(500,))
    with el.ElasticLlama(tiny_gqa, elastic=el.ElasticConfig(layers="even"), n_ctx=512) as llm:
        llm.eval(random_tokens(500, 300, 1))
        llm.session.compress(0)
        held = llm.session.n_cells(0)
        assert held == info.kept(500) - 4  # free for the answer
        assert llm.session.kv_bytes(0) * info.kept(500) == info.sizes[0].elastic * held


def test_windows(windowed: Path) -> None:
    """Against the memory of contexts as they are made."""
    info = model_info(windowed, n_tokens=(2048,), n_ubatch=64)
    assert info.kind == "sliding window"
    assert (info.n_layer, info.n_layer_model) == (1, 4)
    assert info.window_cell_bytes == 3 * info.cell_bytes
    (size,) = info.sizes
    for swa_full, expected in ((True, size.stock), (False, size.windowed)):
        with Engine(
            str(windowed), n_ctx=2048, n_ubatch=64, flash_attn=True, swa_full=swa_full
        ) as e:
            memory = el._core.memory(ctypes.cast(e.ctx, ctypes.c_void_p).value)
        assert 2048 * memory["cell_bytes"] + memory["other_bytes"] == expected
        assert swa_full or memory["other_cells"] == info.window_cells
    assert size.windowed < size.stock
    kept = info.kept(2048) * (info.cell_bytes + info.bias_bytes)
    assert size.elastic == kept + info.window_cells * info.window_cell_bytes
    assert size.saved == 1 - size.elastic / size.windowed


@pytest.mark.parametrize(
    ("arch", "why", "instead"),
    [
        ("refact", "ALiBi", "--kv-budget 1"),
        ("mamba", "recurrent", "--kv-budget 1"),
        ("eurobert", "KV cache", "embedding=True"),
    ],
)
def test_refused(tmp_path: Path, arch: str, why: str, instead: str) -> None:
    path = write_tiny(tmp_path / f"{arch}.gguf", arch)
    done = run("-m", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{arch}, " in done.stdout
    (line,) = (x for x in done.stdout.splitlines() if x.startswith("elastic cache: no; "))
    assert why in line
    assert instead in done.stdout
    info = json.loads(run("-m", path, "--json").stdout)
    assert (info["works"], info["sizes"]) == (False, [])
    assert why in info["why"]


def test_an_image(tiny_vlm: tuple[Path, Path]) -> None:
    model, mmproj = tiny_vlm
    done = run("-m", model, "--mmproj", mmproj, "--image-size", "80x60", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    info = json.loads(done.stdout)
    image = info["image"]
    with el.ElasticLlama(model, mmproj_path=mmproj, n_ctx=256) as llm:
        vision = Vision(mmproj, llm)
        with vision.chunks(MARKER, [Image.new("RGB", (80, 60))], False) as chunks:
            n = sum(len(chunk) for chunk in chunks if chunk.is_image)
        vision.close()
    assert (image["width"], image["height"], image["cells"], image["positions"]) == (80, 60, n, n)
    assert image["n_bytes"] == n * info["cell_bytes"]
    assert "an image of 80x60" in run(*done.args[4:-1]).stdout


def test_as_people_read_it(tiny_gqa: Path) -> None:
    done = run("-m", tiny_gqa)
    assert (done.returncode, done.stderr) == (0, "")
    assert "works, on 3 of 3 layers (plain)" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.strip().endswith("%")]
    assert [row[0] for row in rows] == ["2048", "8192", "32768"]
    (size,) = model_info(tiny_gqa, n_tokens=(8192,)).sizes
    assert rows[1][-2:] == [f"{100 * size.saved:.0f}", "%"]
    assert rows[1][1:3] == [f"{size.stock / 2**20:.4g}", "MiB"]
    assert "swa_full" not in done.stdout


def test_the_build() -> None:
    said = json.loads(run("--json").stdout)
    assert said["policies"].keys() >= {"elastic", "h2o"}
    assert "libraries: " in run().stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["-m", "no.gguf"], "no such file"),
        (["-m", "broken.gguf"], "GGUF"),
        (["--mmproj", "x.gguf"], "--mmproj without -m"),
        (["-m", "broken.gguf", "--kv-budget", "0"], "budget"),
        (["-m", "broken.gguf", "--image-size", "12"], "1024x768"),
        (["-m", "broken.gguf", "--image-size", "²x3"], "1024x768"),
        (["-m", "broken.gguf", "--image-size", "99999999x99999999"], "pixels"),
        (["-m", "broken.gguf", "-ub", "0"], "from 1 to"),
        (["-m", "broken.gguf", "-ub", "99999999999"], "from 1 to"),
    ],
)
def test_bad_arguments(tmp_path: Path, args: list[str], says: str) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    done = run(*(tmp_path / a if a.endswith(".gguf") else a for a in args))
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr


def test_a_model_that_llama_cpp_refuses(tmp_path: Path) -> None:
    """A whole GGUF of an architecture that does not exist."""
    path = write_tiny_llama(tmp_path / "x.gguf", arch="nothing", n_layer=1, n_embd=64)
    with pytest.raises(el.ModelFileError, match="a model that llama.cpp can load"):
        model_info(path)
