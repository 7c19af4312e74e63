"""Prompts prefilled once and saved, so that every policy starts from the same keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np

from ..conversation import Conversation
from ..errors import ConfigError
from ..errors import message as error_message
from ..pieces import TextPiece
from ..sequence_state import save_sequence
from ..vision import MARKER
from .items import Item
from .streams import Streams

PROXY = "Describe the image."


@dataclass(frozen=True)
class Prompt:
    """A prefilled prompt.

    Attributes
    ----------
    state : memoryview
        Of the sequence, with every score that a policy may look at.
    n_positions : int
        Positions it takes. A proxy question is not among them, only what it looked at.
    logits : ndarray [n_vocab], f32
        After its last token.
    tail : list of int
        Tokens to decode after compression (the true question), empty when it was known before.
    target : ndarray of int
        Tokens of the reference answer, with the end of turn where the format has one.
    end : int
        The token that ends an answer.
    """

    state: memoryview
    n_positions: int
    logits: np.ndarray
    tail: list[int]
    target: np.ndarray
    end: int


class Prefiller:
    """Prefills items while all scores are recorded and nothing is compressed."""

    def __init__(self, streams: Streams, before: bool = False, proxy: str = PROXY) -> None:
        self.streams, self.llm = streams, streams.llm
        self.before, self.proxy = before, proxy
        self.chat = Conversation(self.llm)

    def prompt(self, item: Item) -> Prompt:
        """Decode the item's prompt in sequence 0 and save it; `streams.record` comes before."""
        llm, chat = self.llm, self.chat
        chat.clear()
        end = llm.token_eos()
        target = llm.tokenize(item.answer.encode(), add_bos=False, special=False)
        tail: list[int] = []
        if item.raw:
            with llm.prompt_phase():
                llm.eval(llm.tokenize(item.text.encode(), add_bos=True, special=False))
        else:
            target = [*target, end]
            images = [] if item.image is None else [item.image]
            if self.before:
                if not images:
                    raise ConfigError(
                        error_message("eval", f"item {item.id} has no image to compress beforehand")
                    )
                self._prefill_before(images)
                tail = self._after_image(item.prompt)
            else:
                chat.prefill(item.prompt, images)
        return Prompt(save_sequence(llm), llm.n_tokens, self._logits(), tail, np.array(target), end)

    def _prefill_before(self, images: list[Any]) -> None:
        """Decode images, and what the proxy question looks at in them."""
        llm, chat = self.llm, self.chat
        *start, question = chat._extended(*chat._question(self.proxy, images))[1]
        assert isinstance(question, TextPiece)
        llm.prefill(start)
        with llm.prompt_phase():
            llm.session.begin_probe()
            try:
                llm.eval(question.tokens)
            finally:
                llm.session.end_probe()
                llm.n_tokens -= len(question)

    def _after_image(self, question: str) -> list[int]:
        message = {"role": "user", "content": MARKER + question}
        rendered = self.chat._template.render([message], MARKER)
        after = rendered.split(MARKER, 1)[1]
        return self.llm.tokenize(after.encode(), add_bos=False, special=True)

    def _logits(self) -> np.ndarray:
        row = llama_cpp.llama_get_logits_ith(self.llm._ctx.ctx, -1)
        return np.ctypeslib.as_array(row, (self.llm.n_vocab(),)).copy()

    def close(self) -> None:
        self.chat.close()
