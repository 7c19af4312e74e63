"""Bytes that a conversation holds in a context, of the part that is compressed and of the others.

Sliding windows and recurrent states are left alone by the elastic cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import llama_cpp

from . import _core
from .kv_types import stock_bytes
from .pointers import address_of

if TYPE_CHECKING:
    from .llama import ElasticLlama

__all__ = ["bytes_in_use", "other_parts"]


def bytes_in_use(ctx: Any) -> tuple[int, int]:
    """What sequence 0 holds in a context without an elastic cache.

    Parameters
    ----------
    ctx : llama_context (a ctypes pointer)

    Returns
    -------
    total, other : int
        Bytes of all parts of the memory, and of those among them that an elastic cache would not
        compress.
    """
    try:
        attention, other = _core.bytes_in_use(address_of(ctx))
    except NotImplementedError:
        attention = other = 0
    return (attention + other, other) if other else (stock_bytes(ctx), 0)


def other_parts(llm: ElasticLlama) -> str:
    """What of the model's memory is not compressed, as text; "" where all is, or nothing can be.

    Such as "windows of 512 tokens; compressed are 3 of 18 layers".
    """
    parts = []
    n_swa = llama_cpp.llama_model_n_swa(llm.model)
    if n_swa > 0:
        parts.append(f"windows of {n_swa} tokens")
    if llama_cpp.llama_model_is_hybrid(llm.model):
        parts.append("recurrent states")
    try:
        about = _core.memory(address_of(llm._ctx.ctx))
    except NotImplementedError:  # without flash attention the cache is off
        return " and ".join(parts)
    layers = f"{about['n_layer']} of {about['n_layer_model']} layers"
    return f"{' and '.join(parts)}; compressed are {layers}" if parts else ""
