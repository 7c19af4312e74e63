"""A conversation about images that stays in the KV cache from turn to turn.

llama-cpp-python's chat handlers clear the cache and encode every image again at each call. Here a
turn decodes only what is new, at its true positions, over the cells that the elastic cache kept.
"""

from __future__ import annotations

import codecs
import hashlib
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import jinja2
import llama_cpp
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image

from .chat import template_for, without_marker
from .errors import ConfigError, ContextOverflowError, text
from .images import ImageSource, load_image
from .llama import ElasticLlama
from .stats import TurnStats
from .vision import MARKER, Chunk, Vision

__all__ = ["Conversation"]

_N_ENCODED = 8  # images whose embeddings are kept, about 1 to 10 MiB each


class Conversation:
    """Turns of one conversation with a model that sees images.

    Parameters
    ----------
    llm : ElasticLlama
        Its sequence 0 is used and must not be used otherwise meanwhile.
    system : str, optional
        System prompt.

    Examples
    --------
    >>> chat = Conversation(ElasticLlama())  # doctest: +SKIP
    >>> print("".join(chat.ask("What is in row 1, column 2?", ["scene.png"])))  # doctest: +SKIP
    """

    def __init__(self, llm: ElasticLlama, system: str | None = None) -> None:
        self.llm = llm
        self.vision = Vision(llm.mmproj_path, llm) if llm.mmproj_path else None
        self.stats = TurnStats()  # of the last turn
        self._system = system
        self._encoded: OrderedDict[str, np.ndarray] = OrderedDict()
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._template = env.from_string(template_for(llm.metadata.get("tokenizer.chat_template")))
        self.clear()

    def clear(self) -> None:
        """Forget all turns; encoded images are kept."""
        self.llm.reset()
        self.llm._ctx.kv_cache_clear()
        self._messages: list[dict[str, Any]] = []
        if self._system:
            self._messages.append({"role": "system", "content": self._system})
        self._decoded = ""  # text of the prompt and the answers that is in the cache

    def close(self) -> None:
        """Free the vision tower; the model stays."""
        if self.vision is not None:
            self.vision.close()

    def ask(
        self,
        question: str,
        images: list[ImageSource] | tuple[ImageSource, ...] = (),
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 0.95,
        top_k: int = 40,
        repeat_penalty: float = 1.0,
    ) -> Iterator[str]:
        """The answer, piece by piece. `stats` is complete when the iterator is exhausted.

        Raises
        ------
        ImageError, ContextOverflowError, ConfigError
            Before anything of this turn is decoded; the conversation stays as it was.
        """
        prompt, message, loaded = self._next_turn(question, images)
        return self._turn(
            prompt,
            message,
            loaded,
            max_tokens,
            {"temp": temperature, "top_p": top_p, "top_k": top_k, "repeat_penalty": repeat_penalty},
        )

    def prefill(
        self, question: str, images: list[ImageSource] | tuple[ImageSource, ...] = ()
    ) -> None:
        """Decode a question without answering it; `llm` is ready to sample or to be forced."""
        prompt, message, loaded = self._next_turn(question, images)
        self._decode_prompt(prompt, message, loaded)

    def _next_turn(
        self, question: str, images: list[ImageSource] | tuple[ImageSource, ...]
    ) -> tuple[str, dict[str, Any], list[Image.Image]]:
        loaded = [load_image(image) for image in images]
        if loaded and self.vision is None:
            raise ConfigError(
                text(
                    "ask",
                    "images",
                    len(loaded),
                    "none: the model has no vision tower",
                    "pass mmproj_path",
                )
            )
        content = MARKER * len(loaded) + without_marker(question, MARKER)
        message = {"role": "user", "content": content}
        prompt = self._render([*self._messages, message], generation=True)
        if not prompt.startswith(self._decoded):
            raise ConfigError(
                text(
                    "ask",
                    "the chat template rewrites earlier turns",
                    do="clear the conversation and ask again",
                )
            )
        return prompt, message, loaded

    def _decode_prompt(
        self, prompt: str, message: dict[str, Any], images: list[Image.Image]
    ) -> None:
        self.stats = TurnStats()
        n_past = self.llm.n_tokens
        try:
            self._prefill(prompt[len(self._decoded) :], images, first=not self._decoded)
        except BaseException:  # Ctrl-C too
            self._roll_back(n_past)
            raise
        self._messages.append(message)
        self._decoded = prompt

    def _roll_back(self, n_past: int) -> None:
        """Forget a prompt that was not decoded to its end."""
        if n_past and self.llm._ctx.kv_cache_seq_rm(-1, n_past, -1):
            self.llm.n_tokens = n_past
        else:
            self.clear()

    def _turn(
        self,
        prompt: str,
        message: dict[str, Any],
        images: list[Image.Image],
        max_tokens: int,
        sampling: dict[str, Any],
    ) -> Iterator[str]:
        self._decode_prompt(prompt, message, images)
        answer = ""
        try:
            for piece in self._generate(max_tokens, sampling):
                answer += piece
                yield piece
        finally:
            self._messages.append({"role": "assistant", "content": answer})

    def _render(self, messages: list[dict[str, Any]], generation: bool) -> str:
        def refuse(reason: str) -> None:
            raise ConfigError(text("chat template", reason))

        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=generation,
                raise_exception=refuse,
                bos_token="",
                eos_token="",
            )
        except jinja2.TemplateError as e:
            raise ConfigError(text("chat template", "the model's template failed", str(e))) from e

    def _prefill(self, delta: str, images: list[Image.Image], first: bool) -> None:
        if self.vision is None:
            tokens = self.llm.tokenize(delta.encode(), add_bos=first, special=True)
            self._eval_chunks([Chunk(tokens, None, len(tokens))], [])
            return
        with self.vision.chunks(delta, images, add_special=first) as chunks:
            self._eval_chunks(chunks, images)

    def _eval_chunks(self, chunks: list[Chunk], images: list[Image.Image]) -> None:
        llm, stats = self.llm, self.stats
        n_new = sum(c.n_tokens for c in chunks)
        try:
            llm.check_room(n_new + 1)  # and an answer
        except ContextOverflowError as e:
            raise ContextOverflowError(f"{e}, or clear the conversation") from None
        waiting = iter(images)
        with llm.prompt_phase():
            for chunk in chunks:
                if chunk.is_image:
                    embeddings = self._encode(chunk, next(waiting, None))
                    start = time.perf_counter()
                    assert self.vision is not None
                    llm.n_tokens = self.vision.decode(chunk, embeddings, llm.n_tokens)
                    stats.n_image += chunk.n_tokens
                else:
                    start = time.perf_counter()
                    llm.eval(chunk.tokens)
                    stats.n_text += chunk.n_tokens
                llama_cpp.llama_synchronize(llm._ctx.ctx)
                stats.prefill_ms += 1000 * (time.perf_counter() - start)

    def _encode(self, chunk: Chunk, image: Image.Image | None) -> np.ndarray:
        assert self.vision is not None
        if image is None:  # a tower that cuts one image into several chunks
            out, ms = self.vision.encode(chunk)
            self.stats.encode_ms += ms
            return out
        key = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
        out_cached = self._encoded.get(key)
        if out_cached is not None and len(out_cached) == chunk.n_tokens:
            self._encoded.move_to_end(key)
            return out_cached
        out, ms = self.vision.encode(chunk)
        self.stats.encode_ms += ms
        self._encoded[key] = out
        while len(self._encoded) > _N_ENCODED:
            self._encoded.popitem(last=False)
        return out

    def _generate(self, max_tokens: int, sampling: dict[str, Any]) -> Iterator[str]:
        llm, stats = self.llm, self.stats
        vocab = llm._model.vocab
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        stats.finish = "length"
        waiting = ""  # text of the token that was sampled but is not in the cache yet
        start = time.perf_counter()
        for token in llm.generate([], reset=False, **sampling):
            # the pause that the consumer takes between pieces is no decoding
            now = time.perf_counter()
            if stats.n_answer > 0:
                stats.decode_ms += 1000 * (now - start)
                stats.n_decoded += 1
                self._decoded += waiting
            if stats.n_answer == (self.llm.elastic.delay if self.llm.elastic else 0):
                self._compress(token)
            elif stats.n_answer == 0:
                self._note_cells()
            if llama_cpp.llama_vocab_is_eog(vocab, token):
                stats.finish = "stop"
                break
            stats.n_answer += 1
            piece = decoder.decode(llm.detokenize([token], special=False))
            waiting = piece
            if piece:
                yield piece
            if stats.n_answer >= max_tokens or not self._room():
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
        n_cells = self.llm.n_tokens if session is None else session.n_held(0)
        stats.cells_prompt = stats.cells_kept = n_cells
        if session is not None:
            stats.bytes_prompt = stats.bytes_kept = session.kv_bytes(0)

    def _compress(self, token: int) -> None:
        """The prompt's compression, when the token that it is due for is about to be decoded."""
        stats, session = self.stats, self.llm.session
        self._note_cells()
        if session is None:
            return
        before = session.stats()
        self.llm._look_ahead(token)
        start = time.perf_counter()
        session.compress(0)
        stats.cells_kept = session.n_held(0)
        stats.compress_ms = 1000 * (time.perf_counter() - start)
        after = session.stats()
        stats.look_ms = (after["look_us"] - before["look_us"]) / 1000
        if after["compressions"] > before["compressions"]:
            stats.bytes_prompt, stats.bytes_kept = after["bytes_before"], after["bytes_after"]
