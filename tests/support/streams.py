"""K or V of one layer as llama.cpp stores it, built and read with NumPy for tests of the merge."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PLAIN = ("f32", "f16", "bf16")
QUANTIZED = ("q8_0", "q5_0", "q5_1", "q4_0", "q4_1", "iq4_nl")

BLOCK = 32
BLOCK_BYTES = {"q8_0": 34, "q5_0": 22, "q5_1": 24, "q4_0": 18, "q4_1": 20, "iq4_nl": 18}


def head_bytes(kind: str, d: int) -> int:
    if kind in PLAIN:
        return d * (4 if kind == "f32" else 2)
    return d // BLOCK * BLOCK_BYTES[kind]


@dataclass
class Stream:
    """Bytes of ``n_rows`` rows of ``n_head`` heads of ``d`` elements."""

    kind: str
    n_head: int
    d: int
    data: np.ndarray

    def rows(self) -> np.ndarray:
        """Stored bytes per row and head [n_rows, n_head, head_bytes]."""
        return self.data.reshape(-1, self.n_head, head_bytes(self.kind, self.d))

    @classmethod
    def from_rows(cls, kind: str, d: int, rows: np.ndarray) -> Stream:
        """From stored bytes per row and head [n_rows, n_head, head_bytes]."""
        return cls(kind, rows.shape[1], d, rows.reshape(-1).copy())


def step(kind: str, x: np.ndarray) -> np.ndarray:
    """Distance between neighbouring values that ``kind`` can store, for every element of x [.., d].

    For iq4_nl, whose levels are uneven, the largest.
    """
    x = np.asarray(x, dtype=np.float64)
    if kind == "f32":
        return np.abs(x) * 2.0**-23 + 1e-45
    if kind in PLAIN:
        bits, least = (10, 2.0**-24) if kind == "f16" else (7, 1e-40)
        return np.abs(x) * 2.0**-bits + least
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    extent = blocks.max(axis=-1, keepdims=True) - blocks.min(axis=-1, keepdims=True)
    size = {
        "q8_0": largest / 127,
        "q5_0": largest / 16,
        "q5_1": extent / 31,
        "q4_0": largest / 8,
        "q4_1": extent / 15,
        "iq4_nl": largest * 24 / 113,
    }[kind]
    # scales are stored as f16
    size = size + 2.0**-10 * largest
    return np.broadcast_to(size, blocks.shape).reshape(x.shape)
