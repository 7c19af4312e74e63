"""Elastic KV cache for vision-language models in llama.cpp.

>>> from elastic_llama import ElasticLlama
>>> llm = ElasticLlama("model.gguf", mmproj_path="mmproj.gguf", kv_budget=0.2)  # doctest: +SKIP

Import it before `llama_cpp`: it points llama-cpp-python at the libraries of this package.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ._libraries import get_include, get_library_dir, lib_dir, use_our_libraries
from .errors import (
    ConfigError,
    ContextOverflowError,
    DownloadError,
    ElasticError,
    ImageError,
    LibraryConflictError,
    ModelFileError,
    ModelNotFoundError,
    StateError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from .config import ElasticConfig, scorer
    from .conversation import Conversation
    from .llama import ElasticLlama
    from .memory import ImageMemory
    from .stats import ElasticStats, TurnStats

use_our_libraries()

try:
    __version__ = version("elastic-llama")
except PackageNotFoundError:  # a source tree
    __version__ = "0+unknown"

# What loads native code, or llama_cpp, is loaded at first use.
_LAZY = {
    "Conversation": "conversation",
    "ElasticConfig": "config",
    "ElasticLlama": "llama",
    "ElasticStats": "stats",
    "ImageMemory": "memory",
    "TurnStats": "stats",
    "scorer": "config",
}

__all__ = [
    "ConfigError",
    "ContextOverflowError",
    "Conversation",
    "DownloadError",
    "ElasticConfig",
    "ElasticError",
    "ElasticLlama",
    "ElasticStats",
    "ImageError",
    "ImageMemory",
    "LibraryConflictError",
    "ModelFileError",
    "ModelNotFoundError",
    "StateError",
    "TurnStats",
    "UnsupportedModelError",
    "__version__",
    "build_info",
    "get_include",
    "get_library_dir",
    "lib_dir",
    "scorer",
]


def build_info() -> dict[str, Any]:
    """What the native part was built from: llama.cpp commit, archive, patches, compiler, flags."""
    from . import _core

    return dict(_core.build_info())


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
