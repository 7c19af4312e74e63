"""Several sequences of one context that answer side by side, one token of each per batch."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np

from ._checks import reason
from .batch import fill_batch
from .errors import StateError, message
from .native_log import take as take_log

if TYPE_CHECKING:
    from .llama import ElasticLlama


@dataclass
class Running:
    """An answer that is not complete yet.

    Attributes
    ----------
    name
        What it answers.
    seq_id : int
    position : int
        Of the next token.
    limit : int
        Tokens of the answer at most.
    tokens : list of int
        Chosen; the last one has not been decoded.
    """

    name: Any
    seq_id: int
    position: int
    limit: int
    tokens: list[int] = field(default_factory=list)


class SequenceGroup:
    """Greedy answers in sequences 1, 2, ... of a context, each of which begins as sequence 0 does.

    In a context of one sequence it is sequence 0 that answers, and what it held before is to be
    read again then.
    """

    def __init__(self, llm: ElasticLlama) -> None:
        self.llm = llm
        self._free = list(range(n_sequences(llm) - 1, 0, -1)) or [0]
        self.running: list[Running] = []

    def check(self) -> None:
        """Raise `StateError` if another call has taken the sequences."""
        self.llm._check_open("ask")
        if self.llm._group is not self:
            raise StateError(
                message(
                    "ask",
                    "the answers cannot go on, since another call used their sequences meanwhile",
                    do="read them to their end before the next call",
                )
            )

    @property
    def n_free(self) -> int:
        """Sequences that can be taken."""
        return len(self._free)

    def take(self) -> int:
        """A sequence that has the cells of sequence 0; it shares them."""
        self.check()
        seq_id = self._free.pop()
        if seq_id > 0:
            llama_cpp.llama_memory_seq_cp(self.llm._ctx.memory, 0, seq_id, -1, -1)
        return seq_id

    def add(self, name: Hashable, seq_id: int, position: int, limit: int, token: int) -> Running:
        """An answer whose first token is chosen."""
        out = Running(name, seq_id, position, limit, [token])
        self.running.append(out)
        return out

    def read(self, prompts: Sequence[tuple[int, int, Sequence[int]]]) -> list[int]:
        """Decode prompts side by side: sequence, position of the first token, tokens.

        Returns
        -------
        list of int
            The first token of each answer.
        """
        rows = [
            (token, start + i, seq_id)
            for seq_id, start, tokens in prompts
            for i, token in enumerate(tokens)
        ]
        ends = np.cumsum([len(tokens) for _, _, tokens in prompts]) - 1
        chosen: dict[int, int] = {}
        n_batch = self.llm.n_batch
        for first in range(0, len(rows), n_batch):
            wanted = [int(end) - first for end in ends if first <= end < first + n_batch]
            tokens = self._decode(rows[first : first + n_batch], wanted)
            chosen.update((first + i, token) for i, token in zip(wanted, tokens))
        return [chosen[int(end)] for end in ends]

    def finished(self) -> Iterator[Running]:
        """Answers that are complete; their sequences are free then."""
        vocab = self.llm._model.vocab
        for one in list(self.running):
            is_end = llama_cpp.llama_vocab_is_eog(vocab, one.tokens[-1])
            if is_end:
                one.tokens.pop()
            if is_end or len(one.tokens) >= one.limit:
                self.running.remove(one)
                self.free(one.seq_id)
                yield one

    def step(self) -> None:
        """One more token of each answer."""
        rows = [(one.tokens[-1], one.position, one.seq_id) for one in self.running]
        for one, token in zip(self.running, self._decode(rows, range(len(rows)))):
            one.tokens.append(token)
            one.position += 1

    def n_cells(self, one: Running) -> int:
        """Cells that the sequence of an answer takes."""
        session = self.llm.session
        return one.position if session is None else int(session.n_cells(one.seq_id))

    def free(self, seq_id: int) -> None:
        self.check()
        if seq_id > 0:
            llama_cpp.llama_memory_seq_rm(self.llm._ctx.memory, seq_id, -1, -1)
        self._free.append(seq_id)

    def _decode(self, rows: list[tuple[int, int, int]], wanted: Sequence[int]) -> list[int]:
        """The likeliest token after each of the wanted rows."""
        llm = self.llm
        self.check()
        llm._n_calls += 1
        llm._requires_eval = True  # the logits are not sequence 0's any more
        batch = llm._batch.batch
        fill_batch(batch, rows, set(wanted))
        take_log()
        with llm._scorer_guard.watch():
            code = llama_cpp.llama_decode(llm._ctx.ctx, batch)
        if code:
            raise StateError(
                message(
                    "ask",
                    "llama.cpp could not decode a batch",
                    f"code {code}",
                    do=reason(take_log()),
                )
            )
        out = []
        for i in wanted:
            logits = llama_cpp.llama_get_logits_ith(llm._ctx.ctx, i)
            out.append(int(np.ctypeslib.as_array(logits, (llm.n_vocab(),)).argmax()))
        return out

    def text_of(self, tokens: Sequence[int]) -> str:
        """As `Conversation.ask` says it."""
        said = b"".join(self.llm.detokenize([token], special=False) for token in tokens)
        return said.decode("utf-8", errors="replace")


@contextmanager
def sequences(llm: ElasticLlama) -> Iterator[SequenceGroup]:
    """A group whose sequences are all gone in the end; one that was left open has none any more."""
    group = SequenceGroup(llm)
    _clear(llm)
    llm._group = group
    try:
        yield group
    finally:
        if llm._group is group:
            llm._group = None
            _clear(llm)


def _clear(llm: ElasticLlama) -> None:
    for seq_id in range(1, n_sequences(llm)):
        llama_cpp.llama_memory_seq_rm(llm._ctx.memory, seq_id, -1, -1)


def n_sequences(llm: ElasticLlama) -> int:
    """Sequences that the context can hold."""
    return int(llama_cpp.llama_n_seq_max(llm._ctx.ctx))
