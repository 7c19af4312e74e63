"""Cells of sequence 0: how many are held, and whether more fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._core import core
from .errors import ContextOverflowError, message

if TYPE_CHECKING:
    from .llama import ElasticLlama

_LETTER = 3  # tokens that llama-cpp-python adds to an answer to end a character of several bytes
_ANSWER_CELLS = 4  # a compression leaves as many free for the answer


class Room:
    """What an `ElasticLlama` holds in cells, while its `n_tokens` counts positions."""

    def __init__(self, llm: ElasticLlama) -> None:
        self.llm = llm

    def n_used(self) -> int:
        """Cells held once those behind position `n_tokens` are gone, which `eval` removes."""
        llm = self.llm
        n = int(llm.n_tokens)
        if llm.session is None or n == 0:
            return llm._spans.n_cells(n)
        if n >= llm._rewind.end():
            return int(llm.session.n_cells(0))
        return int((llm.session.cells(0)["pos"] < n).sum())

    def n_seen(self) -> int:
        """Tokens of text and embeddings of images in the first `n_tokens` positions."""
        llm = self.llm
        if llm.session is not None and 0 < llm._rewind.end() <= llm.n_tokens:
            return int(llm.session.n_tokens(0))  # which knows images of other handlers
        return llm._spans.n_cells(int(llm.n_tokens))

    def for_answer(self) -> int | None:
        """Tokens that an answer may have where llama-cpp-python takes positions for cells."""
        llm = self.llm
        if llm.session is not None or self.n_seen() == llm.n_tokens:
            return None
        return max(1, llm.n_ctx() - self.n_used() - _LETTER)

    def check(self, n_new: int, n_positions: int | None = None) -> None:
        """As `ElasticLlama.check_room`."""
        llm = self.llm
        end = llm.n_tokens + (n_new if n_positions is None else n_positions)
        if end > len(llm.input_ids):
            raise ContextOverflowError(
                message(
                    "prompt",
                    "past the positions of the model",
                    end,
                    f"at most {len(llm.input_ids)}",
                    "raise n_ctx or start over",
                )
            )
        used = self.n_used()
        if used + n_new > llm.n_ctx() and self._can_be_made(used, n_new):
            with llm._scorer_guard.watch():
                llm.session.make_room(n_new)
            used = self.n_used()
        self.check_fit(n_new, used)

    def check_fit(self, n_new: int, used: int) -> None:
        """Raise `ContextOverflowError` unless `n_new` cells fit beside `used` ones."""
        llm = self.llm
        if not llm._is_capped and used + n_new > llm.n_ctx():
            raise ContextOverflowError(
                message(
                    "prompt",
                    "the context is too small",
                    f"{n_new} tokens on top of {used} cells",
                    f"at most n_ctx = {llm.n_ctx()} together",
                    "raise n_ctx or shorten the prompt",
                )
            )

    def _can_be_made(self, used: int, n_new: int) -> bool:
        """Whether compressing may be enough; else a refusal leaves the cache as it is."""
        llm = self.llm
        if llm.session is None or llm._attached is None:
            return False
        target = core.budget_cells(float(llm._attached.budget), max(1, self.n_seen()))
        n_least = max(int(target), llm._attached.min_cells) - _ANSWER_CELLS
        return llm._is_capped or min(used, n_least) + n_new <= llm.n_ctx()
