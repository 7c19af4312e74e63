"""A conversation about images that stays in the KV cache from turn to turn.

llama-cpp-python's chat handlers clear the cache and encode every image again at each call. Here a
turn decodes only what is new, at its true positions, over the cells that the elastic cache kept.
"""

from __future__ import annotations

import codecs
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
import numpy as np
from PIL import Image

from .chat import without_marker
from .errors import ConfigError, ContextOverflowError, StateError
from .errors import message as error_message
from .images import as_images, load_image
from .in_use import bytes_in_use, other_parts
from .llama import ElasticLlama
from .messages import as_text, clean_text
from .pieces import ImagePiece, Piece, TextPiece, pixel_key
from .prompt_reader import EncodedImages
from .stats import TurnStats
from .templates import ChatTemplate
from .vision import MARKER, Chunk

__all__ = ["Conversation"]

_Extended = tuple[str, list[Piece], list[Image.Image]]  # text, pieces and images of a conversation


@dataclass
class _Turn:
    """A question that is being answered."""

    answer: str = ""
    tokens: list[int] = field(default_factory=list)  # of the answer, without the end of turn
    is_open: bool = True


class Conversation:
    """Turns of one conversation with a model that sees images.

    A turn decodes what the cache does not hold already. Other calls may use `llm` between two
    turns: what they removed is read again.

    Parameters
    ----------
    llm : ElasticLlama
        Its sequence 0 is used.
    system : str, optional
        System prompt.

    Examples
    --------
    >>> chat = Conversation(ElasticLlama())  # doctest: +SKIP
    >>> print("".join(chat.ask("What is in row 1, column 2?", ["scene.png"])))  # doctest: +SKIP
    """

    def __init__(self, llm: ElasticLlama, system: str | None = None) -> None:
        self.llm = llm
        llm._check_open("ask")
        self.vision = llm._tower.take(self, llm)
        self._closed = False
        self.stats = TurnStats()  # of the last turn
        self._system = as_text("system", system)
        self._encoded = EncodedImages()
        self._template = ChatTemplate.of(llm)
        self.clear()

    def clear(self) -> None:
        """Forget all turns; encoded images are kept."""
        self._messages: list[dict[str, Any]] = []
        self._images: list[Image.Image] = []  # of all turns
        self._pieces: list[Piece] = []  # of the prompts and the answers
        self._text = ""  # what the pieces say
        self._turn = _Turn(is_open=False)
        if self._system:
            self._messages.append(_message("system", self._system))

    def close(self) -> None:
        """Free the vision tower, if no other conversation has it; the model stays."""
        self._closed = True
        self.llm._tower.leave(self)

    def ask(
        self,
        question: str,
        images: Any = (),
        *,
        max_tokens: int | None = 256,
        temperature: float = 0.0,
        top_p: float = 0.95,
        top_k: int = 40,
        repeat_penalty: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """The answer, piece by piece. `stats` is complete when the iterator is exhausted.

        Questions come in the order in which their first pieces are asked for. The next one ends an
        answer that was not read to its end.

        Parameters
        ----------
        images : image or list of images
            What `elastic_llama.images.load_image` takes.
        max_tokens : int or None
            Tokens of the answer at most; None or a number below 0: until it ends, or the context is
            full; 0: the question is only read.
        seed : int, optional
            Of what is drawn where `temperature` is above 0; another one each time by default.

        Raises
        ------
        ImageError, ConfigError
            Before anything of this turn is decoded; the conversation stays as it was.
        ContextOverflowError
            At the first piece, likewise.
        StateError
            The answer goes on after the next question, or another call, used the model.
        """
        message, loaded = self._question(question, images)
        ready = self._extended(message, loaded)  # what refuses it does so now
        ready_for = (self._messages, len(self._messages))
        sampling = {
            "temp": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "repeat_penalty": repeat_penalty,
        }
        limit = -1 if max_tokens is None else int(max_tokens)

        def extended() -> _Extended:
            messages, n = ready_for
            is_same = messages is self._messages and n == len(messages)
            return ready if is_same else self._extended(message, loaded)

        return self._answer(message, extended, limit, sampling, seed)

    def prefill(self, question: str, images: Any = ()) -> None:
        """Decode a question without answering it; `llm` is ready to sample or to be forced."""
        message, loaded = self._question(question, images)
        self._read(message, lambda: self._extended(message, loaded))

    def remember(self, images: Any) -> bool:
        """Have the image memory of `llm` hold what a conversation about these images begins with.

        The next turn of this conversation reads again what it needs.

        Returns
        -------
        bool
            Whether that was new.

        Raises
        ------
        ImageError, ConfigError, ContextOverflowError
        """
        return self.llm.remember(self.first_prompt("", images))

    def first_prompt(self, question: str, images: Any = ()) -> list[Piece]:
        """The prompt of a conversation that begins with this question, whatever was said here.

        Raises
        ------
        ImageError, ConfigError
        """
        self._check_open()
        message, loaded = self._question(question, images)
        before = [_message("system", self._system)] if self._system else []
        return self._cut_up(self._render([*before, message], len(loaded)), loaded)

    def _check_open(self) -> None:
        self.llm._check_open("ask")
        if self._closed:
            raise StateError(error_message("ask", "the conversation is closed", do="begin another"))

    def _question(self, question: str, images: Any) -> tuple[dict[str, Any], list[Image.Image]]:
        loaded = [load_image(image) for image in as_images(images)]
        if loaded and self.vision is None:
            raise ConfigError(
                error_message(
                    "ask",
                    "images",
                    len(loaded),
                    "none: the model has no vision tower",
                    "pass mmproj_path",
                )
            )
        return _message("user", as_text("question", question), len(loaded)), loaded

    def _extended(self, message: dict[str, Any], images: list[Image.Image]) -> _Extended:
        """Text and pieces of the conversation with one more question, and the images in it."""
        self._check_open()
        images = [*self._images, *images]
        prompt = self._render([*self._messages, message], len(images))
        if self._pieces and prompt.startswith(self._text):
            n_old = sum(m["n_images"] for m in self._messages)
            new = self._cut_up(prompt[len(self._text) :], images[n_old:], n_old)
            return prompt, [*self._pieces, *new], images
        return prompt, self._cut_up(prompt, images), images

    def _render(self, messages: list[dict[str, Any]], n_images: int) -> str:
        prompt = str(self._template.render(messages, MARKER))
        if prompt.count(MARKER) != n_images:
            raise ConfigError(
                error_message(
                    "chat template",
                    "images in what the model's template makes of the conversation",
                    prompt.count(MARKER),
                    str(n_images),
                    "use a model whose template takes images",
                )
            )
        return prompt

    def _read(self, message: dict[str, Any], extended: Callable[[], _Extended]) -> None:
        """Decode what the cache lacks of the conversation with one more question.

        `extended` gives that conversation; other questions may have come since it was asked.
        """
        self._end_turn()
        self.stats = TurnStats()
        prompt, pieces, images = extended()
        n_encode = self.stats.encode_ms
        start = time.perf_counter()
        try:
            n_new = self.llm.prefill(pieces)
        except ContextOverflowError as e:
            raise ContextOverflowError(f"{e}, or clear the conversation") from None
        llama_cpp.llama_synchronize(self.llm._ctx.ctx)
        elapsed = 1000 * (time.perf_counter() - start)
        self.stats.prefill_ms = elapsed - (self.stats.encode_ms - n_encode)
        self.stats.n_text = n_new - self.stats.n_image
        self._messages.append(message)
        self._pieces, self._text, self._images = pieces, prompt, images

    def _answer(
        self,
        message: dict[str, Any],
        extended: Callable[[], _Extended],
        limit: int,
        sampling: dict[str, Any],
        seed: int | None,
    ) -> Iterator[str]:
        self._read(message, extended)
        turn = self._turn = _Turn()
        self.llm.set_seed(random.Random(self.llm._seed).randint(0, 2**32) if seed is None else seed)
        try:
            for piece in self._generate(turn, limit, sampling):
                turn.answer += piece
                yield piece
                if not turn.is_open:
                    raise StateError(
                        error_message(
                            "ask",
                            "the answer cannot go on, since another question was asked meanwhile",
                            do="read an answer to its end before the next question",
                        )
                    )
        finally:
            self._end_turn(turn)

    def _end_turn(self, turn: _Turn | None = None) -> None:
        """What was said so far becomes part of the conversation."""
        turn = self._turn if turn is None else turn
        if not turn.is_open:
            return
        turn.is_open = False
        message = _message("assistant", turn.answer)
        self._messages.append(message)
        if message["content"] == turn.answer:  # else its tokens say something else
            self._pieces.append(TextPiece(tuple(turn.tokens)))
            self._text += turn.answer

    def _cut_up(
        self, prompt: str, images: list[Image.Image], n_old: int | None = None
    ) -> list[Piece]:
        """The pieces of a text in which `MARKER` stands for each image in turn.

        `n_old` images come before a text that goes on; None: it is the beginning.
        """
        first = n_old is None
        if self.vision is None:
            return [TextPiece(tuple(self.llm.tokenize(prompt.encode(), first, special=True)))]
        pieces: list[Piece] = []
        keys = [pixel_key(image) for image in images]
        n_image = part = -1  # image, and which of its chunks
        with self.vision.chunks(prompt, images, add_special=first) as chunks:
            for chunk in chunks:
                if not chunk.is_image:
                    pieces.append(TextPiece(tuple(chunk.tokens)))
                    continue
                same = chunk.bitmap_id is not None and chunk.bitmap_id == str(n_image)
                n_image, part = (n_image, part + 1) if same else (n_image + 1, 0)
                self.vision.check_batch(chunk)
                number = (n_old or 0) + n_image if chunk.knows_its_number else 0
                pieces.append(
                    self._image_piece(images[n_image], keys[n_image], part, chunk, number)
                )
        return pieces

    def _image_piece(
        self, image: Image.Image, key: str, part: int, like: Chunk, number: int
    ) -> ImagePiece:
        """The chunk of an image that is `like` this one, and is made anew when it is needed."""
        counted = [*[None] * number, image]
        key, n_cells = f"{key}-{part}", like.n_tokens

        def decode(n_past: int) -> int:
            self._check_open()
            assert self.vision is not None
            prompt = MARKER * len(counted)
            with self.vision.chunks(prompt, counted, add_special=False) as chunks:
                chunk = [c for c in chunks if c.is_image][number + part]
                embeddings = self._encoded.get(key, lambda: self._encode(chunk))
                n_past = self.vision.decode(chunk, embeddings, n_past)
            self.stats.n_image += n_cells
            return n_past

        return ImagePiece(key, like.n_positions, decode, n_cells, part, like.grid)

    def _encode(self, chunk: Chunk) -> np.ndarray:
        assert self.vision is not None
        out, ms = self.vision.encode(chunk)
        self.stats.encode_ms += ms
        return out

    def _generate(self, turn: _Turn, limit: int, sampling: dict[str, Any]) -> Iterator[str]:
        llm, stats = self.llm, self.stats
        vocab = llm._model.vocab
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        stats.finish = "length"
        if limit == 0:
            return
        start = time.perf_counter()
        for token in llm.generate([], reset=False, **sampling):
            # the pause that the consumer takes between pieces is no decoding
            now, n_calls = time.perf_counter(), llm._n_calls
            if stats.n_answer > 0:
                stats.decode_ms += 1000 * (now - start)
                stats.n_decoded += 1
            is_first, is_end = stats.n_answer == 0, llama_cpp.llama_vocab_is_eog(vocab, token)
            if not is_end:
                stats.n_answer += 1
                turn.tokens.append(token)
                piece = decoder.decode(llm.detokenize([token], special=False))
                if piece:
                    yield piece
            if is_first and n_calls == llm._n_calls and not llm._closed:
                self._compress(token)  # whoever reads the first piece need not wait for it
            if is_end:
                stats.finish = "stop"
                break
            if stats.n_answer == limit or not self._room():
                break
            start = time.perf_counter()
        rest = decoder.decode(b"", final=True)
        if rest:
            yield rest

    def _room(self) -> bool:
        try:
            self.llm.check_room(1)
        except ContextOverflowError:
            return False
        return True

    def _note_cells(self) -> None:
        """Nothing is compressed yet."""
        stats, session = self.stats, self.llm.session
        if session is None:
            n_cells = self.llm._room.n_used()
            n_bytes, other = bytes_in_use(self.llm._ctx.ctx)
        else:
            n_cells, other = session.n_per_layer(0), session.other_bytes(0)
            n_bytes = session.kv_bytes(0) + other
        stats.cells_prompt = stats.cells_kept = n_cells
        stats.bytes_prompt = stats.bytes_kept = n_bytes
        stats.other_bytes, stats.other_parts = other, other_parts(self.llm) if other else ""

    def _compress(self, token: int) -> None:
        """The prompt's compression, before `token`, the answer's first, is decoded."""
        stats, session = self.stats, self.llm.session
        self._note_cells()
        if session is None:
            return
        before, probe_ms = session.stats(), self.llm._probe_ms
        self.llm._probe(token)
        stats.probe_ms = self.llm._probe_ms - probe_ms
        start = time.perf_counter()
        self.llm._compress()
        stats.cells_kept = session.n_per_layer(0)
        stats.compress_ms = 1000 * (time.perf_counter() - start)
        after = session.stats()
        if after["compressions"] > before["compressions"]:
            other = stats.other_bytes = after["bytes_other"]
            stats.bytes_prompt = after["bytes_before"] + other
            stats.bytes_kept = after["bytes_after"] + other


def _message(role: str, content: str, n_images: int = 0) -> dict[str, Any]:
    """A message in whose text the marker of an image stands for none but its own images."""
    said = without_marker(clean_text(content), MARKER)
    return {"role": role, "content": MARKER * n_images + said, "n_images": n_images}
