"""What can go wrong, as one family: every error raised on purpose is an `ElasticError`.

Each class is also the built-in error that callers of llama-cpp-python expect for the same mistake.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "ContextOverflowError",
    "DownloadError",
    "ElasticError",
    "ImageError",
    "LibraryConflictError",
    "ModelFileError",
    "ModelNotFoundError",
    "StateError",
    "UnsupportedModelError",
    "message",
]


class ElasticError(Exception):
    """Base of every error of this package."""


class ConfigError(ElasticError, ValueError):
    """A parameter out of range, or parameters that do not go together."""


class ModelFileError(ElasticError, ValueError):
    """A file that is not the GGUF asked for: damaged, of the wrong kind, or of another model."""


class ModelNotFoundError(ElasticError, FileNotFoundError):
    """A model file that does not exist."""


class ImageError(ElasticError, ValueError):
    """An image that cannot be read."""


class ContextOverflowError(ElasticError, ValueError):
    """A prompt that needs more cells than the context has."""


class UnsupportedModelError(ElasticError, NotImplementedError):
    """A model whose memory the elastic cache cannot compress."""


class LibraryConflictError(ElasticError, ImportError):
    """`llama_cpp` was imported with other native libraries."""


class StateError(ElasticError, RuntimeError):
    """A saved state that does not fit, or a native call that failed."""


class DownloadError(ElasticError, RuntimeError):
    """A model that could not be fetched."""


def message(op: str, what: str, got: object = None, expected: str = "", do: str = "") -> str:
    """Message of an error: ``[op] what, got X, expected Y; do Z``."""
    out = f"[{op}] {what}"
    if got is not None:
        out += f", got {got}"
    if expected:
        out += f", expected {expected}"
    if do:
        out += f"; {do}"
    return out


text = message  # its old name, for one release
