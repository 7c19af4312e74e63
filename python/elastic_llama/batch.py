"""Rows of a `llama_batch`."""

from __future__ import annotations

from collections.abc import Container
from typing import Any


def fill_batch(batch: Any, rows: list[tuple[int, int, int]], wanted: Container[int]) -> None:
    """Set the tokens of a batch: (token, position, sequence), and the rows that want logits."""
    batch.n_tokens = len(rows)
    for i, (token, pos, seq) in enumerate(rows):
        batch.token[i], batch.pos[i] = token, pos
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = seq
        batch.logits[i] = i in wanted
