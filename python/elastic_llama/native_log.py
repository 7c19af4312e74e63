"""What the native libraries write to stderr."""

from __future__ import annotations

import ctypes
import logging

from llama_cpp import _logger, mtmd_cpp

_SILENT = 100  # above every level of `logging`


def route(verbose: bool) -> None:
    """Send libmtmd's log the way llama-cpp-python sends libllama's: only errors unless verbose."""
    mtmd_cpp.mtmd_helper_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
    if _logger.logger.level != _SILENT or verbose:
        _logger.logger.setLevel(logging.DEBUG if verbose else logging.ERROR)


def silence() -> None:
    """Not even errors, for a command line that reports them itself."""
    _logger.logger.setLevel(_SILENT)
