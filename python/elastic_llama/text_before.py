"""The text that many prompts begin with, read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .pieces import Piece, TextPiece, n_cells_from
from .sequence_state import load_sequence, save_sequence

if TYPE_CHECKING:
    from .llama import ElasticLlama


class TextBefore:
    """What the cache holds of the text before the first image: a system prompt, mostly.

    An answer is the same as if the text had been read again: it is read in a batch of its own
    then, too.
    """

    def __init__(self, llm: ElasticLlama) -> None:
        self._llm = llm
        self._tokens: tuple[int, ...] = ()
        self._state = memoryview(b"")

    def hold(self, pieces: Sequence[Piece]) -> None:
        """Have the cache hold the text that a prompt begins with, if it is longer than that, and
        nothing else.

        Raises
        ------
        ContextOverflowError
            The prompt does not fit; nothing is decoded.
        StateError
            llama.cpp could not decode the text.
        """
        llm = self._llm
        if len(pieces) < 2 or not isinstance(pieces[0], TextPiece):
            return
        if llm._image_reader is not None:
            return  # which begins with an empty cache, or with all of the image
        llm._room.check_fit(n_cells_from(pieces, 0) + 1, 0)
        tokens = pieces[0].tokens
        llm._n_calls += 1
        if tokens == self._tokens and load_sequence(llm, self._state, np.asarray(tokens, np.intc)):
            return
        llm._rewind.cut(0)
        llm._decode_pieces(pieces[:1], np.asarray(tokens, np.intc), 0)
        self._tokens, self._state = tokens, save_sequence(llm)
