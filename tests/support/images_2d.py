"""Images as mtmd gives them to models with M-RoPE: one position, and a row and a column each."""

from __future__ import annotations

import ctypes

import llama_cpp
import numpy as np

from tests.support.engine import Engine


def image_rows(n: int, n_embd: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=0.5, size=(n, n_embd)).astype(np.float32)


def image_2d(e: Engine, rows: np.ndarray, pos: int, width: int, first: int = 0) -> int:
    """Decode rows [n, n_embd] from index `first` of an image on; returns llama_decode's code.

    The position of what follows the image is `pos` + the larger of its width and height.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    n = len(rows)
    index = first + np.arange(n)
    y, x = pos + index // width, pos + index % width
    places = np.concatenate([np.full(n, pos), y, x, np.zeros(n)]).astype(np.int32)
    batch = llama_cpp.llama_batch_init(n, rows.shape[1], 1)
    own = ctypes.cast(batch.pos, ctypes.c_void_p).value  # the field itself is a view
    batch.pos = places.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    batch.n_tokens = n
    ctypes.memmove(batch.embd, rows.ctypes.data, rows.nbytes)
    for i in range(n):
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
        batch.logits[i] = False
    code = llama_cpp.llama_decode(e.ctx, batch)
    batch.pos = ctypes.cast(own, ctypes.POINTER(ctypes.c_int32))
    llama_cpp.llama_batch_free(batch)
    return int(code)
