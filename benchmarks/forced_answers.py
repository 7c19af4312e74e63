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

    def expect(self, answer: str) -> int:
        """The answer that comes next; returns its tokens, its end among them."""
        self._tokens = [*self.llm.tokenize(answer.encode(), False, False), self.llm.token_eos()]
        self.n_tokens, self.nll, self.right = 0, 0.0, True
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
        self.nll += float(best + np.log(np.exp(logits - best).sum()) - logits[token])
        self.right &= bool(logits.argmax() == token)
        self.n_tokens += 1
        return token
