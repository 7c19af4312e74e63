"""The first prompt of a conversation, decoded once and loaded under every setting."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
from elastic_llama.errors import StateError, message
from elastic_llama.evaluation.items import Item
from elastic_llama.evaluation.prompts import Prefiller
from elastic_llama.evaluation.streams import Streams
from elastic_llama.sequence_state import put_sequence


class FirstPrompt:
    """A prompt saved while all scores were recorded, so that each policy finds its own.

    Once it is loaded, `Conversation.ask` with the same question and image finds it in the cache and
    reads nothing.
    """

    def __init__(self, streams: Streams, prefiller: Prefiller, question: str, image: Any) -> None:
        self.llm = streams.llm
        streams.record()
        self.prompt = prefiller.prompt(Item("", "", question, "", image))
        self.ids = self.llm.input_ids[: self.prompt.n_positions].copy()

    def load(self) -> None:
        """Into an empty cache."""
        llm, state = self.llm, self.prompt.state
        ctx = llm._ctx.ctx
        if not put_sequence(ctx, state):
            raise StateError(message("turns", "llama.cpp refused a saved prompt"))
        llm.n_tokens = self.prompt.n_positions
        llm.input_ids[: llm.n_tokens] = self.ids
        # the answer's first token is sampled from these, not from what was decoded last
        logits = self.prompt.logits
        row = llama_cpp.llama_get_logits_ith(ctx, -1)
        ctypes.memmove(row, logits.ctypes.data, logits.nbytes)
        llm._requires_eval = False
