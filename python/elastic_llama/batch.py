"""Rows of a `llama_batch`, and how many numbers a position of an embedding has."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import llama_cpp

_MROPE = (llama_cpp.LLAMA_ROPE_TYPE_MROPE, llama_cpp.LLAMA_ROPE_TYPE_IMROPE)


def n_position_planes(model: Any) -> int:
    """Numbers that say where an embedding is: time, row, column and one more with M-RoPE, else 1.

    A batch of n embeddings has as many times n positions, plane by plane. Tokens have one each.
    """
    return 4 if int(llama_cpp.llama_model_rope_type(model)) in _MROPE else 1


def fill_batch(batch: Any, rows: list[tuple[int, int, int]], wanted: Container[int]) -> None:
    """Set the tokens of a batch: (token, position, sequence), and the rows that want logits."""
    batch.n_tokens = len(rows)
    for i, (token, pos, seq) in enumerate(rows):
        batch.token[i], batch.pos[i] = token, pos
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = seq
        batch.logits[i] = i in wanted
