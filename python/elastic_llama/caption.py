"""One question about each of many images, several of them answered side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, ElasticError
from .pieces import Piece, n_cells_from
from .sequences import SequenceGroup, sequences
from .text_before import TextBefore

if TYPE_CHECKING:
    from .conversation import Conversation


@dataclass(frozen=True)
class Caption:
    """What was said about an image, or why nothing was.

    Attributes
    ----------
    name
        The image, as it was given.
    text : str
        Empty where there is an error.
    n_tokens : int
        Of the answer.
    error : str
        Empty where there is an answer.
    """

    name: Any
    text: str = ""
    n_tokens: int = 0
    error: str = ""


def captions(
    chat: Conversation, images: Iterable[Any], prompt: str, max_tokens: int = 256
) -> Iterator[Caption]:
    """Greedy answers to a question about each image, in the order in which they are complete.

    Each is what `Conversation.ask` says of the image alone. That is tested for answers within the
    overdraft of the cache only. Images are encoded and read one after the other; their answers
    are decoded together, each in a sequence of the context (`ElasticLlama(n_seq_max=...)`), as many
    as have room.

    An image that cannot be read, or does not fit, is an error of its own.

    Parameters
    ----------
    images : iterable
        What `load_image` takes, read when they are needed.

    Raises
    ------
    ConfigError
        The model cannot be asked about images at all.
    StateError
        `ask`, other captions or `load_state` used the sequences before the last one was complete.
    """
    yield from captions_until(lambda: False, chat, images, prompt, max_tokens)


def captions_until(
    is_stopped: Callable[[], bool],
    chat: Conversation,
    images: Iterable[Any],
    prompt: str,
    max_tokens: int,
) -> Iterator[Caption]:
    """As `captions`; asked before every image and every token whether to give up the rest."""
    runner = _Captioner(chat, prompt, max_tokens)
    waiting = iter(images)
    with sequences(chat.llm) as group:
        while True:
            group.check()
            while runner.can_begin(group) and not is_stopped():
                name = runner.name if runner.pieces else next(waiting, None)
                if name is None:
                    break
                failed = runner.begin(group, name)
                if failed is not None:
                    yield failed
                elif runner.pieces:
                    break  # no room before an answer is complete
            if not group.running or is_stopped():
                return
            for one in group.finished():
                yield Caption(one.name, group.text_of(one.tokens), len(one.tokens))
            if group.running:
                group.step()


class _Captioner:
    """Begins answers in sequences of a group."""

    def __init__(self, chat: Conversation, prompt: str, max_tokens: int) -> None:
        self.chat, self.prompt, self.max_tokens = chat, prompt, max_tokens
        self.name: Any = None
        self.pieces: Sequence[Piece] = ()  # of an image that waits for room
        self._before = TextBefore(chat.llm)

    def can_begin(self, group: SequenceGroup) -> bool:
        return group.n_free > 0

    def begin(self, group: SequenceGroup, name: Any) -> Caption | None:
        """Read an image; it stays in `pieces` if there is no room before another is complete."""
        try:
            if not self.pieces:
                self.name, self.pieces = name, self.chat.first_prompt(self.prompt, name)
            if group.running and not self._fits(group):
                return None
            self._read(group)
        except ConfigError:
            raise  # it is no image's fault
        except ElasticError as e:
            self.pieces = ()
            return Caption(name, error=" ".join(str(e).split()))
        self.pieces = ()
        return None

    def _fits(self, group: SequenceGroup) -> bool:
        """Whether the image fits besides what the running answers may still take."""
        llm = self.chat.llm
        taken = sum(one.limit - len(one.tokens) + group.n_cells(one) for one in group.running)
        return taken + n_cells_from(self.pieces, 0) + self.max_tokens <= llm.n_ctx()

    def _read(self, group: SequenceGroup) -> None:
        llm = self.chat.llm
        self._before.hold(self.pieces)
        llm.prefill(self.pieces)
        token = llm.sample(temp=0.0)
        if llm.session is not None:
            llm._compress()
        seq_id = group.take()
        position, used = int(llm.n_tokens), llm._room.n_used()
        if seq_id > 0:
            llm._rewind.cut(0)  # its cells are the other sequence's alone
        limit = max(1, min(self.max_tokens, llm.n_ctx() - used))
        group.add(self.name, seq_id, position, limit, token)
