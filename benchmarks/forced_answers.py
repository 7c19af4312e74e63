"""The right answers decoded in place of a model's own, and how likely each was."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import llama_cpp
import numpy as np
from elastic_llama import ElasticLlama


class ForcedAnswers:
    """While it is entered, `llm` samples the tokens of `expect` instead of its own.

    One wrong token of many counts as one wrong answer of few conversations, but a likelihood says
    how near a right one was.
    """

    def __init__(self, llm: ElasticLlama) -> None:
        self.llm = llm
        self.n_tokens = 0
        self.nll = 0.0  # -log p of the answer and its end, nats
        self.right = True  # whether each token is the likeliest one
        self.rows: list[np.ndarray] = []  # log p of all tokens at each, f32 [n_vocab]

    def expect(self, answer: str) -> int:
        """The answer that comes next; returns its tokens, its end among them."""
        self._tokens = [*self.llm.tokenize(answer.encode(), False, False), self.llm.token_eos()]
        self.n_tokens, self.nll, self.right, self.rows = 0, 0.0, True, []
        return len(self._tokens)

    def __enter__(self) -> ForcedAnswers:
        self.llm.sample = self._sample
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del self.llm.sample  # the method of its class again

    def _sample(self, *args: Any, **kwargs: Any) -> int:
        row = llama_cpp.llama_get_logits_ith(self.llm._ctx.ctx, -1)
        logits = np.ctypeslib.as_array(row, shape=(self.llm.n_vocab(),)).astype(np.float64)
        token = self._tokens[self.n_tokens]
        best = logits.max()
        log_p = logits - (best + np.log(np.exp(logits - best).sum()))
        self.nll -= float(log_p[token])
        self.right &= bool(logits.argmax() == token)
        self.rows.append(log_p.astype(np.float32))
        self.n_tokens += 1
        return token


def divergence(reference: list[np.ndarray], rows: list[np.ndarray]) -> float:
    """KL(reference || rows) summed over the tokens of an answer, nats."""
    pairs = [(p.astype(np.float64), q) for p, q in zip(reference, rows)]
    return float(sum((np.exp(p) * (p - q)).sum() for p, q in pairs))
