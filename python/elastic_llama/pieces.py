"""A prompt as pieces of text and images, and the ids by which the KV cache recognises them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

__all__ = [
    "ImagePiece",
    "Piece",
    "TextPiece",
    "common_prefix",
    "image_start",
    "n_cells_from",
    "piece_ids",
    "pixel_key",
]


@dataclass(frozen=True)
class TextPiece:
    """Tokens of text, each of them >= 0."""

    tokens: tuple[int, ...]

    def __len__(self) -> int:
        """Positions that it takes."""
        return len(self.tokens)

    @property
    def n_cells(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class ImagePiece:
    """One run of image embeddings.

    Attributes
    ----------
    key : str
        Tells its content apart from every other one's, such as a hash of the pixels.
    n_positions : int
        Positions that it takes: fewer than its embeddings with M-RoPE.
    decode : callable
        ``decode(n_past) -> int`` puts it into the cache at position `n_past` and returns the next
        position. Called only if the cache does not hold it already.
    n_embeddings : int, optional
        Cells that it takes; as many as positions by default.
    part : int
        Which of the chunks of its image it is: tiles and an overview are one each.
    grid : (int, int), optional
        Rows and columns of its embeddings where all of them are at its first position (M-RoPE).
    """

    key: str
    n_positions: int
    decode: Callable[[int], int]
    n_embeddings: int | None = None
    part: int = 0
    grid: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self.n_positions

    @property
    def n_cells(self) -> int:
        return self.n_positions if self.n_embeddings is None else self.n_embeddings


Piece = Any  # TextPiece or ImagePiece


def pixel_key(image: Image.Image) -> str:
    """The key of an RGB image: a hash of its size and pixels."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def image_ids(key: str, n: int) -> np.ndarray:
    """Ids [n], int32, < 0: the places of an image in a list of tokens.

    They are a hash of the image and the place, so that an image equals itself and no other one.
    """
    stream = hashlib.shake_256(key.encode()).digest(4 * n)
    return -1 - (np.frombuffer(stream, np.uint32) & 0x3FFFFFFF).astype(np.intc)


def piece_ids(pieces: Sequence[Piece]) -> np.ndarray:
    """Ids of all positions of a prompt, int32."""
    parts = [
        image_ids(p.key, len(p)) if isinstance(p, ImagePiece) else np.asarray(p.tokens, np.intc)
        for p in pieces
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.intc)


def n_cells_from(pieces: Sequence[Piece], n: int) -> int:
    """Cells that a prompt takes from position `n` on, which is within no image."""
    first = n_cells = 0
    for piece in pieces:
        last = first + len(piece)
        if last > n:
            n_cells += piece.n_cells if first >= n else last - n
        first = last
    return n_cells


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def image_start(ids: np.ndarray, n: int) -> int:
    """`n`, or where the run of image ids begins that a cut at `n` would go through."""
    if not 0 < n < len(ids) or ids[n] >= 0:
        return n
    while n > 0 and ids[n - 1] < 0:
        n -= 1
    return n
