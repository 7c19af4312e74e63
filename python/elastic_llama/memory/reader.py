"""The images that a prompt begins with, read from the image memory or into it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import budget_value
from ..errors import ConfigError, StateError, message
from ..pieces import ImagePiece, Piece, n_cells_from, piece_ids
from ..sequence_state import load_sequence, save_sequence
from .container import Entry
from .keys import owner_of, prefix_key, stamps
from .store import ImageMemory

if TYPE_CHECKING:
    from ..llama import ElasticLlama

BUDGET = 0.5
_BETWEEN = 8  # tokens of text between two images, or tiles of one, that ask nothing


def leading_images(pieces: Sequence[Piece]) -> int:
    """Pieces up to the last image of those that a prompt begins with; 0: it has none.

    Text before the first one belongs to it, and so does what stands between two of them, as long as
    no question fits in.
    """
    n = 0
    for i, piece in enumerate(pieces):
        if isinstance(piece, ImagePiece):
            n = i + 1
        elif n > 0 and len(piece) > _BETWEEN:
            break
    return n


class PrefixReader:
    """Gives an `ElasticLlama` the images of its prompts out of an `ImageMemory`.

    Parameters
    ----------
    llm : ElasticLlama
    memory : ImageMemory, optional
        None: images are compressed as if there were one, and not kept.
    budget : float or int
        Of the cells that are kept of an image and what stands before it, as
        `ElasticConfig.budget`.

    Raises
    ------
    ConfigError
        The scores are computed in Python, which no hash can say anything of.
    """

    def __init__(self, llm: ElasticLlama, memory: ImageMemory | None, budget: float | int) -> None:
        self.llm, self.memory = llm, memory
        self.budget = budget_value("memory_budget", budget)
        self._owner: dict[str, Any] | None = None
        self._stamps = stamps(llm) if memory is not None else []
        if llm.elastic is not None and llm.elastic.scorer is not None:
            raise ConfigError(
                message(
                    "config",
                    "an image memory with a scorer written in Python",
                    do="choose a policy by its name, or leave memory out",
                )
            )

    def read(self, pieces: Sequence[Piece], ids: np.ndarray, n_kept: int) -> tuple[int, int]:
        """Have the cache hold the images that a prompt begins with.

        Parameters
        ----------
        ids : ndarray, int32
            Of all positions of the prompt.
        n_kept : int
            Positions of it that the cache holds.

        Returns
        -------
        int, int
            Positions that it holds then, and the cells that had to be decoded.

        Raises
        ------
        ContextOverflowError
            They do not fit; nothing is decoded.
        """
        k = leading_images(pieces)
        n = sum(len(piece) for piece in pieces[:k])
        if n <= n_kept or n == len(ids) or not self._is_ours(pieces[:k]):
            return n_kept, 0
        return n, self._read(pieces[:k], ids[:n])

    def hold(self, prompt: Sequence[Piece]) -> None:
        """Have the cache hold the images that a prompt begins with, and nothing else.

        Raises
        ------
        ContextOverflowError
            They do not fit; nothing is decoded.
        """
        k = leading_images(prompt)
        n = sum(len(piece) for piece in prompt[:k])
        ids, rewind, session = piece_ids(prompt), self.llm._rewind, self.llm.session
        if rewind.common_prefix(ids) >= n and rewind.cut(n) == n:
            if session is not None:  # does nothing if it has been done
                session.compress_prefix(self.budget)
        else:
            self._read(prompt[:k], ids[:n])
        self.llm._requires_eval = True

    def _read(self, pieces: Sequence[Piece], ids: np.ndarray) -> int:
        """From the memory or into it; returns the cells that had to be decoded."""
        key = "" if self.memory is None else self.key(pieces)
        entry = None if self.memory is None else self.memory.get(key)
        if entry is not None and self._load(entry, pieces, ids):
            return 0
        self._compute(pieces, ids)
        if self.memory is not None:
            self.memory.put(*self._saved(key, ids))
        return n_cells_from(pieces, 0)

    def remember(self, pieces: Sequence[Piece]) -> bool:
        """Have the memory hold the images that a prompt begins with; False: it did already."""
        k = leading_images(pieces)
        if k == 0:
            raise ConfigError(message("remember", "images", 0, "a prompt that begins with one"))
        assert self.memory is not None
        key = self.key(pieces[:k])
        if self.memory.has(key):
            return False
        ids = piece_ids(pieces[:k])
        self._compute(pieces[:k], ids)
        self.memory.put(*self._saved(key, ids))
        return True

    def key(self, pieces: Sequence[Piece]) -> str:
        """What a prompt that ends with an image is known by."""
        if self._owner is None:
            if stamps(self.llm) != self._stamps:
                raise StateError(
                    message(
                        "memory",
                        "a file of the model was replaced after it was loaded",
                        do="load the model again",
                    )
                )
            self._owner = owner_of(self.llm, self.budget)
        return prefix_key(self._owner, int(self.llm.context_params.n_ctx), pieces)

    def _is_ours(self, pieces: Sequence[Piece]) -> bool:
        """Not of another tower, whose handler names it in the key of an image."""
        return all(os.sep not in p.key for p in pieces if isinstance(p, ImagePiece))

    def _compute(self, pieces: Sequence[Piece], ids: np.ndarray) -> None:
        """From an empty cache on, so that what is kept does not depend on what was held before."""
        llm = self.llm
        llm._rewind.cut(0)
        llm.check_room(n_cells_from(pieces, 0) + 1, len(ids) + 1)
        llm._decode_pieces(pieces, ids, 0)
        if llm.session is not None:
            llm.session.compress_prefix(self.budget)
            llm._requires_eval = True  # the logits are of all cells

    def _saved(self, key: str, ids: np.ndarray) -> tuple[Entry, memoryview]:
        llm, state = self.llm, save_sequence(self.llm)
        session = llm.session
        info = {
            "model": os.path.basename(llm.model_path),
            "policy": "full" if session is None or llm.elastic is None else llm.elastic.policy,
            "budget": 1 if session is None else self.budget,
            "positions": len(ids),
            "cells": len(ids) if session is None else session.n_per_layer(0),
        }
        return Entry.of_state(key, ids, state, info), state

    def _load(self, entry: Entry, pieces: Sequence[Piece], ids: np.ndarray) -> bool:
        """Whether the cache holds the entry, and nothing else, of sequence 0."""
        assert self.memory is not None
        if not load_sequence(self.llm, self.memory.state_of(entry), ids):
            self.memory.forget(entry.key)
            return False
        n = 0
        for piece in pieces:
            if isinstance(piece, ImagePiece):
                self.llm._spans.put(n, len(piece), piece.n_cells)
            n += len(piece)
        return True
