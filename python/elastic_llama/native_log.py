"""What the native libraries write to stderr.

Their log is handled in native code (cpp/bindings/bind_log.cpp). A Python callback would run inside
of their calls, where an exception, Ctrl-C too, is lost.
"""

from __future__ import annotations

import logging

from llama_cpp import _logger, llama_log_callback, mtmd_cpp

from . import _core

_DEBUG, _ERROR, _NOTHING = 1, 4, 5  # ggml's levels; llama-cpp-python's own table is off by one
_silent = False


def route(verbose: bool) -> None:
    """Send the logs of libllama and libmtmd to stderr: only errors unless verbose."""
    level = _DEBUG if verbose else _NOTHING if _silent else _ERROR
    callback = llama_log_callback(_core.route_log(level))
    mtmd_cpp.mtmd_helper_log_set(callback, None)
    _logger.logger.setLevel(logging.DEBUG if verbose else logging.ERROR)


def take() -> list[str]:
    """The latest warnings and errors, each in one line; forgotten after this."""
    return [" ".join(said.split()) for said in _core.take_log()]


def silence() -> None:
    """Not even errors, for a command line that reports them itself."""
    global _silent
    _silent = True
    _core.route_log(_NOTHING)
