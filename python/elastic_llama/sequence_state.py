"""Sequence 0 of a context, saved and loaded with its elastic cache."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np

from .errors import StateError, message

if TYPE_CHECKING:
    from .llama import ElasticLlama


def save_sequence(llm: ElasticLlama) -> memoryview:
    """What `load_sequence` takes.

    Raises
    ------
    StateError
    """
    ctx = llm._ctx.ctx
    size = llama_cpp.llama_state_seq_get_size(ctx, 0)
    state = memoryview(np.empty(size, np.uint8))
    n = llama_cpp.llama_state_seq_get_data(ctx, _bytes_of(state), size, 0)
    if n != size:
        raise StateError(message("state", "llama.cpp could not save the sequence", n, size))
    return state


def put_sequence(ctx: Any, state: memoryview, seq_id: int = 0) -> int:
    """A sequence of a context becomes a saved one; the bytes that were read, 0 if it was refused.

    A policy that looks at less than was recorded reads less than all.

    Parameters
    ----------
    ctx : llama_context_p
    state : memoryview
        From `save_sequence`.
    seq_id : int
    """
    return int(llama_cpp.llama_state_seq_set_data(ctx, _bytes_of(state), len(state), seq_id))


def load_sequence(llm: ElasticLlama, state: memoryview, ids: np.ndarray) -> bool:
    """Whether the cache holds a saved sequence, and nothing else of it; else it holds nothing.

    Parameters
    ----------
    ids : ndarray, int32
        Of its positions.
    """
    llm._rewind.cut(0)
    if put_sequence(llm._ctx.ctx, state) != len(state):
        llm._rewind.cut(0)  # the context has too few cells
        return False
    llm._grow_scores(len(ids))
    llm.input_ids[: len(ids)] = ids
    llm.n_tokens = len(ids)
    llm._requires_eval = True
    return True


def _bytes_of(state: memoryview) -> Any:
    """The pointer to bytes that llama.cpp takes."""
    return np.frombuffer(state, np.uint8).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
