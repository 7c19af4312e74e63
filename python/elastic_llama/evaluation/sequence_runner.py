"""Several sequences decoded side by side, each from a saved prompt, under one policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import llama_cpp
import numpy as np

from ..batch import fill_batch
from ..config import ElasticConfig
from ..errors import StateError, message
from ..probe import probe
from ..sequence_state import put_sequence
from .prompts import Prompt
from .streams import Streams


@dataclass
class Answer:
    """What one sequence said.

    Attributes
    ----------
    logits : list of ndarray [n_vocab], f32
        For each token of the answer, before it was decoded.
    tokens : list of int
        The answer: the forced one, or greedy.
    cells : tuple of int
        Held after compression, and after the last token decoded; on average over the layers.
    other_bytes : int
        Held after the compression by windows and recurrent states, which are not compressed.
    """

    logits: list[np.ndarray]
    tokens: list[int]
    cells: tuple[int, int] = (0, 0)
    other_bytes: int = 0


class SequenceRunner:
    """Decodes saved prompts, one in each sequence of `streams`."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.n_vocab = streams.llm.n_vocab()
        self.config = ElasticConfig.off()
        self.batch = llama_cpp.llama_batch_init(streams.llm.n_batch, 0, 1)

    def close(self) -> None:
        if self.batch is not None:
            llama_cpp.llama_batch_free(self.batch)
            self.batch = None

    def forced(self, config: ElasticConfig, prompts: list[Prompt]) -> list[Answer]:
        """Decode every prompt's reference answer; logits are those that predict its tokens."""
        answers = self._start(config, prompts)
        last = [len(p.target) - 1 for p in prompts]
        self._run(answers, prompts, lambda i, n: int(prompts[i].target[n]), last)
        return answers

    def greedy(
        self, config: ElasticConfig, prompts: list[Prompt], limits: list[int]
    ) -> list[Answer]:
        """Answers of at most `limits` tokens each, the end of turn not among them."""
        answers = self._start(config, prompts)

        def choose(i: int, n: int) -> int | None:
            token = int(answers[i].logits[-1].argmax())
            return None if token == prompts[i].end or n == limits[i] else token

        self._run(answers, prompts, choose, limits)
        return answers

    def _start(self, config: ElasticConfig, prompts: list[Prompt]) -> list[Answer]:
        """Load the prompts; where the question comes after compression, compress and decode it."""
        assert len(prompts) <= self.streams.n_seqs
        self.streams.attach(config)
        self.config = config
        answers = []
        for i, prompt in enumerate(prompts):
            if not put_sequence(self.streams.ctx, prompt.state, i):
                raise StateError(message("eval", "llama.cpp refused a saved prompt"))
            answer = Answer([prompt.logits], [])
            if prompt.tail:
                self.streams.session.compress(i)
                answer.logits = [self._feed(i, prompt)]
            answers.append(answer)
        return answers

    def _feed(self, i: int, prompt: Prompt) -> np.ndarray:
        rows = [(t, prompt.n_positions + k, i) for k, t in enumerate(prompt.tail)]
        return self._decode(rows, {len(rows) - 1})[0]

    def _run(
        self,
        answers: list[Answer],
        prompts: list[Prompt],
        choose: Callable[[int, int], int | None],
        last: list[int],
    ) -> None:
        """Take token n of answer i from `choose(i, n)` and decode it, until that is None.

        Token `last[i]` ends an answer too, without being decoded: nothing follows it.
        """
        active = list(range(len(answers)))
        while active:
            rows, going = [], []
            for i in active:
                n, answer = len(answers[i].tokens), answers[i]
                token = choose(i, n)
                if token is None:
                    continue
                answer.tokens.append(token)
                if n == last[i]:
                    continue
                behind = prompts[i].n_positions + len(prompts[i].tail)
                rows.append((token, behind + n, i))
                going.append(i)
            if not rows:
                break
            # nothing has to be dropped but before an answer's first token
            first = {i: token for token, _, i in rows}
            start = {i: position for _, position, i in rows}
            probe(self.streams.ctx, self.streams.session, self.config, first, start)
            for i, logits in zip(going, self._decode(rows, set(range(len(rows))))):
                answers[i].logits.append(logits)
                held = self.streams.session.n_per_layer(i)
                if not answers[i].cells[0]:
                    answers[i].other_bytes = int(self.streams.session.other_bytes(i))
                answers[i].cells = (answers[i].cells[0] or held - 1, held)
            active = going

    def _decode(self, rows: list[tuple[int, int, int]], wanted: set[int]) -> list[np.ndarray]:
        fill_batch(self.batch, rows, wanted)
        code = llama_cpp.llama_decode(self.streams.ctx, self.batch)
        if code:
            raise StateError(message("eval", "llama_decode failed", f"code {code}"))
        out = []
        for k in sorted(wanted):
            row = llama_cpp.llama_get_logits_ith(self.streams.ctx, k)
            out.append(np.ctypeslib.as_array(row, (self.n_vocab,)).copy())
        return out
