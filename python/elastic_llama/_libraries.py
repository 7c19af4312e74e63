"""Where our native libraries and headers are, and the check that `llama_cpp` uses the libraries."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from .errors import ElasticError, LibraryConflictError, message

_VARIABLES = ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")  # llama-cpp-python reads them at first import


def find_lib_dir() -> Path | None:
    """Folder of the libraries, or None where the extension is not built.

    It lies beside the compiled `_core`, which an editable install keeps elsewhere than this file.
    """
    spec = importlib.util.find_spec(f"{__package__}._core")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).resolve().parent / "lib"


def lib_dir() -> Path:
    """Folder of libllama, libggml* and libmtmd.

    Raises
    ------
    ElasticError
        The native part is not built.
    """
    path = find_lib_dir()
    if path is None or not path.is_dir():
        raise ElasticError(
            message(
                "import",
                "native libraries",
                path or "no _core extension",
                "a built package",
                "install it with pip install .",
            )
        )
    return path


def get_library_dir() -> str:
    """Folder to link against (`-L`, and `-Wl,-rpath,`): libllama, libggml* and libmtmd.

    Raises
    ------
    ElasticError
        The native part is not built.
    """
    return str(lib_dir())


def get_include() -> str:
    """Folder of the C interface (`-I`): `elastic.h`, and llama.cpp's headers that it includes.

    Raises
    ------
    ElasticError
        The native part is not built.
    """
    return str(lib_dir().parent / "include")


def use_our_libraries() -> None:
    """Make a later ``import llama_cpp`` load our libraries.

    Raises
    ------
    LibraryConflictError
        `llama_cpp` is loaded already, with others. Two copies of them in one process would crash.
    """
    ours = find_lib_dir()
    if ours is None:
        return  # a source tree: what needs no native code still works
    loaded = sys.modules.get("llama_cpp.llama_cpp")
    theirs = getattr(getattr(loaded, "_lib", None), "_name", None)
    if theirs is not None and Path(theirs).resolve().parent != ours:
        raise LibraryConflictError(
            message(
                "import",
                "llama_cpp was imported before elastic_llama, with other libraries",
                theirs,
                f"libraries of {ours}",
                "import elastic_llama first",
            )
        )
    for name in _VARIABLES:
        os.environ[name] = str(ours)
