"""Taking back what the KV cache holds, exactly, as far as that is possible."""

from __future__ import annotations

from typing import TYPE_CHECKING

import llama_cpp
import numpy as np

from .errors import StateError, message
from .pieces import common_prefix, image_start

if TYPE_CHECKING:
    from .llama import ElasticLlama


class Rewinder:
    """Cuts sequence 0 of an `ElasticLlama`.

    A compressed sequence can be cut at its checkpoints only (`_core.Session.can_cut`). What a
    checkpoint lacks of the part that is to stay is decoded again.
    """

    def __init__(self, llm: ElasticLlama) -> None:
        self.llm = llm

    def end(self) -> int:
        """Position after the last one in the cache."""
        if self.llm._ctx.memory is None:
            return int(self.llm.n_tokens)
        n = self.llm._spans.end(self._behind_cells())
        # which knows images that another handler decoded
        return n if self.llm.session is None else max(n, int(self.llm.session.next_pos(0)))

    def _behind_cells(self) -> int:
        """Position after the last cell's, which may still be within an image (M-RoPE)."""
        if self.llm._ctx.memory is None:
            return int(self.llm.n_tokens)
        return int(llama_cpp.llama_memory_seq_pos_max(self.llm._ctx.memory, 0)) + 1

    def can_cut(self, n: int) -> int:
        """The largest position <= `n` from which on everything can be removed exactly."""
        n = min(n, self.end())
        session = self.llm.session
        if n >= self._behind_cells():
            return n
        return (n if self._has_window(n) else 0) if session is None else int(session.can_cut(n))

    @property
    def n_window(self) -> int:
        """Tokens that a sliding window of the model sees; 0: it has none."""
        return int(llama_cpp.llama_model_n_swa(self.llm.model))

    def _has_window(self, n: int) -> bool:
        """Whether the cells that position `n` sees in a sliding window are there still."""
        memory = self.llm._ctx.memory
        if memory is None:
            return True
        return int(llama_cpp.llama_memory_seq_pos_min(memory, 0)) <= max(0, n - self.n_window)

    def cut(self, n: int) -> int:
        """Remove everything from `can_cut(n)` on; returns that position, which is `n_tokens` then.

        A memory that cannot be cut there (recurrent models) is cleared.
        """
        n = self.can_cut(n)
        if not self.llm._ctx.kv_cache_seq_rm(0, n, -1):
            n = 0
            if not self.llm._ctx.kv_cache_seq_rm(0, 0, -1):
                self.llm._ctx.kv_cache_clear()
        self.llm.n_tokens = n
        self.llm._spans.cut(n)
        return n

    def common_prefix(self, ids: np.ndarray) -> int:
        """Positions at the beginning of the prompt `ids` that the cache holds or once held."""
        return common_prefix(self.llm.input_ids[: min(int(self.llm.n_tokens), self.end())], ids)

    def keep_prefix(self, ids: np.ndarray) -> int:
        """Keep the longest possible prefix of the prompt `ids` that the cache holds.

        Where it holds all of it, the logits of its last token are those of the context. If they are
        not known, the last token has to be decoded again, or all of an image that comes last.

        Returns
        -------
        int
            Positions kept, which is `n_tokens`.
        """
        llm = self.llm
        held = min(int(llm.n_tokens), self.end())
        n = self.common_prefix(ids)
        if n == len(ids) == held == llm.n_tokens and not llm._requires_eval:
            return n  # nothing came after it, and its logits are there
        n = self._cut_between_images(ids, n)
        if n == len(ids) and n > 0:
            if llm.session is not None and llm.session.restore_logits():
                llm._requires_eval = False
            else:
                n = self._cut_between_images(ids, n - 1)
        return n

    def _cut_between_images(self, ids: np.ndarray, n: int) -> int:
        """As `cut`, but not through the middle of an image."""
        while image_start(ids, self.can_cut(n)) < self.can_cut(n):
            n = image_start(ids, self.can_cut(n))
        return self.cut(n)

    def sync(self) -> np.ndarray:
        """Remove what the cache holds beyond `n_tokens`.

        Returns
        -------
        ndarray, int32
            Ids that have to be decoded before anything else, since the cut took more than that.
            `n_tokens` is where they begin.

        Raises
        ------
        StateError
            There is an image among them; nothing is changed.
        """
        llm = self.llm
        n = int(llm.n_tokens)
        missing = llm.input_ids[self.can_cut(n) : n].copy()
        if (missing < 0).any() or llm._spans.is_inside(n):
            raise StateError(
                message(
                    "eval",
                    f"the cache cannot be cut at position {n}, and an image would have to be read "
                    "again",
                    do="ask with create_chat_completion or Conversation, which have the image",
                )
            )
        self.cut(n)
        return missing
