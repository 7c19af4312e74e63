"""A pytest plugin under which llama-cpp-python's own tests run with `ElasticLlama`.

ELASTIC_UPSTREAM_MODEL stands in for the transformers that they download; ELASTIC_UPSTREAM_BUDGET is
the budget, of prompts of any length.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import elastic_llama
import huggingface_hub
import llama_cpp
import pytest

CONFIG = elastic_llama.ElasticConfig(
    budget=float(os.environ["ELASTIC_UPSTREAM_BUDGET"]), min_cells=8
)

# imported there and not used
sys.modules["scipy"] = types.ModuleType("scipy")
sys.modules["scipy.special"] = types.ModuleType("scipy.special")
sys.modules["scipy.special"].log_softmax = None  # type: ignore[attr-defined]

TRANSFORMERS = ("lmstudio-community/Qwen3.5-0.8B-GGUF", "ggml-org/models")
OTHERS = {
    "CompendiumLabs/bge-small-en-v1.5-gguf": "an embedding model, which is not supported",
    "QuantFactory/mamba-130m-hf-GGUF": "a recurrent model, which is not supported",
    "tiiuae/Falcon-H1-Tiny-90M-Instruct-GGUF": "a hybrid model, which is not supported",
}

compressions: list[int] = []


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"{sum(compressions)} compressions")


def stand_in(repo_id: str, filename: str) -> str:
    if repo_id in TRANSFORMERS:
        return os.environ["ELASTIC_UPSTREAM_MODEL"]
    pytest.skip(OTHERS[repo_id])


class Llama(elastic_llama.ElasticLlama):
    def __init__(self, model_path: str, **kwargs: Any) -> None:
        elastic = None if kwargs.get("vocab_only") else CONFIG
        super().__init__(model_path, elastic=elastic, **kwargs)

    def close(self) -> None:
        session = getattr(self, "session", None)
        if session is not None and session.is_attached:
            compressions.append(session.stats()["compressions"])
        super().close()


huggingface_hub.hf_hub_download = stand_in
llama_cpp.Llama = Llama
