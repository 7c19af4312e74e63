"""Addresses that llama-cpp-python's pointers hold, as `_core` takes them."""

from __future__ import annotations

import ctypes
from typing import Any

__all__ = ["address_of"]


def address_of(pointer: Any) -> int:
    """Of a context or a model, given as a ctypes pointer; 0 where there is none."""
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0
