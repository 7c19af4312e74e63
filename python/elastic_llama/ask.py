"""Many questions at once about one image, whose cells they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .errors import ConfigError, ContextOverflowError, message
from .memory.reader import PrefixReader, leading_images
from .pieces import ImagePiece, Piece
from .sequences import SequenceGroup, sequences

if TYPE_CHECKING:
    from .llama import ElasticLlama


class SharedImage:
    """Greedy answers to prompts that begin with the same images.

    The images are compressed before the questions are read. The questions and their answers are
    not: a sequence can give up cells of its own only, and nearly all of its cells are shared.

    Parameters
    ----------
    prompts : sequence of pieces
        Whole prompts from position 0 on.

    Raises
    ------
    ConfigError
        A prompt has no image, or text between its images.
    """

    def __init__(self, llm: ElasticLlama, prompts: Sequence[Sequence[Piece]]) -> None:
        self.llm = llm
        self.prompts = prompts
        self.tails = [_tail(prompt) for prompt in prompts]
        self._n = sum(len(piece) for piece in prompts[0][: leading_images(prompts[0])])

    def answers(self, reader: PrefixReader, max_tokens: int) -> list[str]:
        """The answers, in the order of the prompts.

        Raises
        ------
        ContextOverflowError
            An image and a question do not fit.
        StateError
            llama.cpp could not decode them.
        """
        out = [""] * len(self.tails)
        waiting = list(range(len(self.tails)))
        with sequences(self.llm) as group:
            while waiting:
                reader.hold(self.prompts[0])  # again where sequence 0 has answered itself
                n_cells = self.llm._room.n_used()
                limits, waiting = self._fit(waiting, group, n_cells, max_tokens)
                for i, tokens in self._wave(group, limits).items():
                    out[i] = group.text_of(tokens)
        return out

    def _fit(
        self, waiting: list[int], group: SequenceGroup, n_cells: int, max_tokens: int
    ) -> tuple[dict[int, int], list[int]]:
        """Tokens that the next answers may have, and what is left for later."""
        free = self.llm.n_ctx() - n_cells
        limits: dict[int, int] = {}
        for i in waiting:
            room = free - len(self.tails[i])
            if len(limits) == group.n_free or (limits and room < max_tokens):
                break
            if room < 1:
                raise ContextOverflowError(
                    message(
                        "ask",
                        "the context is too small",
                        f"{len(self.tails[i])} tokens on top of {n_cells} cells",
                        f"at most n_ctx = {self.llm.n_ctx()} together",
                        "raise n_ctx or shorten the question",
                    )
                )
            limits[i] = min(room, max_tokens)
            free = room - limits[i]
        return limits, waiting[len(limits) :]

    def _wave(self, group: SequenceGroup, limits: dict[int, int]) -> dict[int, list[int]]:
        """Tokens of the answers to some of the questions, decoded together."""
        ids = {i: group.take() for i in limits}
        out = {}
        self.llm._set_prefill(True)  # compresses nothing
        try:
            first = group.read([(ids[i], self._n, self.tails[i]) for i in limits])
            for (i, limit), token in zip(limits.items(), first):
                group.add(i, ids[i], self._n + len(self.tails[i]), limit, token)
            while group.running:
                for one in group.finished():
                    out[one.name] = one.tokens
                if group.running:
                    group.step()
        finally:
            self.llm._set_prefill(False)
        return out


def _tail(prompt: Sequence[Piece]) -> list[int]:
    """Tokens behind the images that a prompt begins with."""
    k = leading_images(prompt)
    if k == 0 or any(isinstance(piece, ImagePiece) for piece in prompt[k:]):
        raise ConfigError(
            message(
                "ask",
                "the chat template does not put the images before the question",
                do="ask one question after the other, in a Conversation",
            )
        )
    return [token for piece in prompt[k:] for token in piece.tokens]
