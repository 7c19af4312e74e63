"""A ggml backend that the package was built without: its devices made known to this process."""

from __future__ import annotations

import ctypes
from pathlib import Path

from elastic_llama import lib_dir

REGISTRY = {"libggml-vulkan": "ggml_backend_vk_reg"}  # of a library, what it registers


def add_backend(path: Path) -> None:
    """Load a backend's shared library; models that are loaded from now on use its devices.

    It finds libggml-base by name among the libraries that are loaded, so both must come from the
    same version of llama.cpp.
    """
    registry = getattr(ctypes.CDLL(str(path)), REGISTRY[path.stem])
    registry.restype = ctypes.c_void_p
    reg = registry()
    assert reg, f"{path} finds no device"
    ggml = ctypes.CDLL(str(next(lib_dir().glob("libggml.*"))))
    ggml.ggml_backend_register(ctypes.c_void_p(reg))
