"""A `llama_cpp.Llama` whose KV cache is elastic."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from typing import Any

import llama_cpp
import numpy as np

from . import gguf_check
from ._checks import (
    add_lora,
    check_arguments,
    check_lora,
    check_memory,
    decode_error,
    load_error,
    reason,
    size_cache,
    translated_errors,
    with_budget,
)
from .asking import Asking
from .callbacks import Guard, is_callers
from .closed import closed_error, take_apart
from .config import ElasticConfig, budget_value, whole
from .errors import (
    ConfigError,
    ElasticError,
    StateError,
    message,
)
from .fallback import AUTO, attach_if_possible
from .memory.reader import PrefixReader
from .memory.store import MemoryOption, as_memory
from .messages import clean, json_format, text_messages
from .native_log import route
from .native_log import take as take_log
from .pieces import ImagePiece, Piece, image_start, n_cells_from, piece_ids
from .positions import ImageSpans
from .probe import probe
from .remembering import Remembering
from .rewind import Rewinder
from .room import Room
from .session import Resolved, attach, lazy_buffers, resolve
from .shared_tower import SharedTower
from .stats import ElasticStats
from .vision import ImageTokens

__all__ = ["ElasticLlama"]


class _Phase(Enum):
    FREE = "free"  # by hand: several tokens are a prompt, one is generation
    PROMPT = "prompt"  # everything belongs to one prompt
    FIRST = "first"  # the next call of eval is the rest of a prompt, however short


class ElasticLlama(Asking, Remembering, llama_cpp.Llama):
    """Everything that takes a `llama_cpp.Llama` takes this; its KV cache shrinks after each prompt.

    Parameters
    ----------
    model_path : path, optional
        GGUF of the language model. None: the embedded model, and its vision tower.
    mmproj_path : path, optional
        GGUF of the vision tower and projector; makes a chat handler that reads images.
    elastic : ElasticConfig, None or "auto"
        None leaves llama.cpp's cache as it is, and so does one that keeps every cell. "auto" is
        `ElasticConfig()`, or None with a warning in the log where the model does not take it.
    kv_budget : float or int, optional
        Short for `elastic` with this budget.
    chat_handler : optional
        As in llama-cpp-python; used instead of the one for `mmproj_path`.
    n_seq_max : int
        Sequences of the context, which share its cells: `ask` answers one question less than that
        at once. 1 to 256.
    image_min_tokens, image_max_tokens : int, optional
        Fewest and most embeddings of an image, for towers that take images of any size; those of
        the tower by default.
    memory : bool, path or ImageMemory, optional
        Keep the K/V of the images that a prompt begins with, compressed before the question is
        known: True: in RAM; a path: in that folder too, for other processes. A later question
        behind the same prompt starts from there, in `Conversation` and `create_chat_completion`.
        Off by default.
    memory_budget : float or int
        What is kept of them, as `ElasticConfig.budget`. `kv_budget` holds once the question is
        known.
    **kwargs
        All other arguments of `llama_cpp.Llama`. `n_ctx`, in cells, is 2048 by default here, or
        what `elastic.kv_cells` takes; `verbose` is False. `flash_attn` is on while the elastic
        cache is, whatever is passed: its V lies in rows. `swa_full` is False while it is on: layers
        with a sliding window then hold its cells and not `n_ctx`, and a prompt that agrees with
        the cache only before the window is read again from its start.

    Raises
    ------
    ModelNotFoundError, ModelFileError
        A file is missing, damaged, of the wrong kind, or does not go with the other.
    ConfigError
        A budget of more cells than the context has, or parameters that llama.cpp refuses.
    UnsupportedModelError
        The model does not take an elastic cache that was asked for; or there is no KV cache, and
        `embedding` is not set.
    """

    # of llama_cpp.Llama, which says nothing of their types
    n_tokens: int
    input_ids: np.ndarray
    scores: np.ndarray
    _seed: int
    image_tokens: ImageTokens

    def __init__(
        self,
        model_path: str | os.PathLike[str] | None = None,
        *,
        mmproj_path: str | os.PathLike[str] | None = None,
        elastic: ElasticConfig | str | None = AUTO,
        kv_budget: float | int | None = None,
        chat_handler: Any = None,
        image_min_tokens: int | None = None,
        image_max_tokens: int | None = None,
        memory: MemoryOption = None,
        memory_budget: float | int = 0.5,
        n_seq_max: int = 1,
        n_ctx: int | None = None,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        self._session: Any = None
        self._attached: ElasticConfig | None = None  # what the session is made of
        self._phase = _Phase.FREE
        self._in_chat = False
        self._closed = False
        self._tower = SharedTower()
        self._probe_ms = 0.0
        self._n_calls = 0  # of what changes the cache, so that a stream notices another's
        self._spans = ImageSpans()
        self._rewind = Rewinder(self)
        self._room = Room(self)
        self._guard = Guard()
        self._scorer_guard = Guard()
        self.image_tokens = ImageTokens(image_min_tokens, image_max_tokens)
        is_auto = elastic == AUTO and kv_budget is None
        self.memory = as_memory(memory)
        self.memory_budget = budget_value("memory_budget", memory_budget)
        self._n_seq_max = whole("n_seq_max", n_seq_max, 1, llama_cpp.llama_max_parallel_sequences())
        self._group: Any = None  # what has the other sequences
        elastic = with_budget(elastic, kv_budget)
        n_ctx, kwargs = check_arguments(elastic, n_ctx, kwargs)
        n_ctx, kwargs = size_cache(elastic, n_ctx, kwargs)
        lora_path = kwargs.pop("lora_path", None)
        if model_path is None:
            from .embedded import embedded_mmproj, embedded_model

            model_path = embedded_model()
            if mmproj_path is None and chat_handler is None:
                mmproj_path = embedded_mmproj()
        if self.image_tokens != ImageTokens() and mmproj_path is None:
            raise ConfigError(
                message(
                    "config",
                    "image_min_tokens, image_max_tokens",
                    "no vision tower",
                    "mmproj_path",
                    "name it, or leave them out",
                )
            )
        model = gguf_check.check_model(model_path)
        if lora_path is not None:
            check_lora(os.fspath(lora_path), model)
        if mmproj_path is not None:
            gguf_check.check_mmproj(mmproj_path, model)
            if chat_handler is None:
                from .chat import make_chat_handler

                chat_handler = make_chat_handler(
                    mmproj_path, verbose=verbose, image_tokens=self.image_tokens
                )
        self.mmproj_path = None if mmproj_path is None else os.fspath(mmproj_path)
        self.elastic: ElasticConfig | None = elastic
        route(verbose)
        try:
            with lazy_buffers(elastic):
                super().__init__(
                    os.fspath(model_path),
                    n_ctx=n_ctx,
                    verbose=verbose,
                    chat_handler=chat_handler,
                    **kwargs,
                )
        except (ValueError, MemoryError) as e:
            self.close()
            raise load_error(str(model_path), e) from e
        # Positions go on where cells do not: with a compressed cache they may pass n_ctx.
        n_positions = max(self.n_ctx(), self._model.n_ctx_train())
        self.input_ids = np.empty((n_positions,), dtype=np.intc)
        if self._is_capped:
            self._n_ctx = n_positions  # completions are not limited by the cells
        self.reset()
        try:
            if lora_path is not None:
                add_lora(self, os.fspath(lora_path), self.lora_scale)
            check_memory(None if is_auto else elastic, self._ctx, self.model_path, kwargs)
            if self._ctx.memory is None:
                self.elastic = None if is_auto else elastic
            elif elastic is not None and not elastic.is_off:
                elastic.check_cells(self.n_ctx())
                if is_auto:
                    attach_if_possible(self, elastic)
                else:
                    self._attach(elastic)
            if self.memory is not None:
                self._image_reader = PrefixReader(self, self.memory, self.memory_budget)
        except ElasticError:
            self.close()
            raise

    @property
    def context_params(self) -> Any:
        """`llama_context_params` of the context."""
        return self._context_params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        if self._n_seq_max > 1:
            params.n_seq_max, params.kv_unified = self._n_seq_max, True
        self._context_params = params

    def _attach(self, elastic: ElasticConfig) -> None:
        self._session = attach(self, self._ctx.ctx, elastic)
        self._attached = elastic

    # -- the elastic side

    @property
    def _is_capped(self) -> bool:
        """Whether a prompt may have more tokens than the context has cells."""
        return self.elastic is not None and self.elastic.kv_cells is not None

    @property
    def session(self) -> Any:
        """The native `_core.Session`, or None while the elastic cache is off."""
        return self._session

    @property
    def elastic_resolved(self) -> Resolved | None:
        """What `elastic` came to with this model and context; None while the elastic cache is off.

        Examples
        --------
        >>> ElasticLlama("model.gguf").elastic_resolved.layer_share  # doctest: +SKIP
        (0.82, 0.82, 1.34)
        """
        if self._session is None or self._attached is None:
            return None
        return resolve(self._session, self._attached)

    @property
    def stats(self) -> ElasticStats:
        """Figures since the model was loaded; all zero while the elastic cache is off."""
        if self._session is None:
            return ElasticStats(cells=self._room.n_used(), tokens=self._room.n_seen())
        s = self._session.stats()
        return ElasticStats(
            **{
                k: s[k]
                for k in (
                    "compressions",
                    "evictions",
                    "cells_before",
                    "cells_after",
                )
            },
            bytes_before=s["bytes_before"] + s["bytes_other"],
            bytes_after=s["bytes_after"] + s["bytes_other"],
            other_bytes=s["bytes_other"],
            score_ms=s["score_us"] / 1000,
            plan_ms=s["plan_us"] / 1000,
            merge_ms=s["merge_us"] / 1000,
            probe_ms=self._probe_ms,
            checkpoint_bytes=s["checkpoint_bytes"],
            cells=self._session.n_per_layer(0),
            tokens=self._room.n_seen(),
        )

    @contextmanager
    def prompt_phase(self) -> Iterator[None]:
        """Everything decoded inside belongs to one prompt, single tokens too.

        `generate` ends the phase.
        """
        self._enter(_Phase.PROMPT)
        try:
            yield
        finally:
            self._enter(_Phase.FREE)

    def _enter(self, phase: _Phase) -> None:
        self._phase = phase
        self._set_prefill(phase is _Phase.PROMPT)

    def _set_prefill(self, value: bool) -> None:
        if self._session is not None:
            self._session.set_prefill(value)

    def _probe(self, token: int) -> None:
        """Before the prompt is compressed, see what an answer that begins with `token` looks at."""
        if self._session is None or self.elastic is None:
            return
        start = time.perf_counter()
        n_steps = -1
        try:
            with self._scorer_guard.watch():
                position = {0: self._rewind.end()}
                n_steps = probe(self._ctx.ctx, self._session, self.elastic, {0: token}, position)
        finally:
            if n_steps != 0:
                self._requires_eval = True  # the logits are not the prompt's any more
                self._probe_ms += 1000 * (time.perf_counter() - start)

    def _calls_scorer(self) -> bool:
        """Whether the next token of an answer compresses its prompt by a scorer in Python."""
        has_scorer = self._attached is not None and self._attached.scorer is not None
        return has_scorer and self._session is not None and self._session.n_to_drop(0) > 0

    def _compress(self) -> None:
        """Compress the prompt; all cells stay if a scorer written in Python raises."""
        with self._scorer_guard.watch():
            self._session.compress(0)

    def check_room(self, n_new: int, n_positions: int | None = None) -> None:
        """Raise `ContextOverflowError` unless `n_new` more cells fit.

        The cache is compressed for them where that is enough.

        Parameters
        ----------
        n_new : int
            Tokens of text and embeddings of images: each takes a cell.
        n_positions : int, optional
            Positions that they take; as many by default. With M-RoPE an image takes fewer.
        """
        self._room.check(n_new, n_positions)

    # -- llama_cpp.Llama

    def n_ctx(self) -> int:
        """Cells of the context.

        For the chat handlers, which compare it with the tokens of a prompt, it is the positions
        while `kv_cells` makes more tokens fit than cells.
        """
        return len(self.input_ids) if self._is_capped and self._in_chat else int(super().n_ctx())

    def reset(self) -> None:
        """As in llama-cpp-python.

        Handlers that this package does not know leave the places of image tokens as they are;
        random negative ids there match no other prompt, so that no image is taken for another.
        """
        self._check_open("reset")
        self._n_calls += 1
        super().reset()
        self._spans = ImageSpans()
        self.input_ids[:] = _placeholders(len(self.input_ids))

    def eval(self, tokens: Sequence[int]) -> None:
        """Decode tokens; several at once are a prompt, whatever batches they are cut into.

        Where `n_tokens` was set back by hand, what lies behind it is removed first; if a compressed
        cache cannot be cut there, what comes before is decoded again as far as that takes.

        Raises
        ------
        ContextOverflowError
            They do not fit behind the `n_tokens` already decoded; nothing is decoded then.
        StateError
            llama.cpp could not decode them; or an image would have to be read again, and nothing
            is decoded.
        """
        self._check_open("eval")
        tokens = [int(token) for token in tokens]
        bad = next((token for token in tokens if not 0 <= token < self.n_vocab()), 0)
        if bad < 0:
            raise StateError(
                message(
                    "eval",
                    "the places of image tokens cannot be decoded again",
                    do="ask with create_chat_completion",
                )
            )
        if bad:
            raise StateError(
                message("eval", "a token that does not exist", bad, f"0 to {self.n_vocab() - 1}")
            )
        self._n_calls += 1
        missing = self._rewind.sync()
        if len(missing):
            self.check_room(len(missing))
            self._decode(missing.tolist(), in_prompt=True)
        self.check_room(len(tokens))
        phase = self._phase
        if phase is _Phase.FIRST:
            self._phase = _Phase.FREE
        in_prompt = phase in (_Phase.PROMPT, _Phase.FIRST) or len(tokens) > 1
        if not in_prompt and tokens:
            self._probe(tokens[0])
            if self._calls_scorer():
                self._compress()  # what it raises comes before anything is decoded
        self._decode(tokens, in_prompt)

    def _decode(self, tokens: list[int], in_prompt: bool) -> None:
        """Decode tokens at `n_tokens`, where the cache ends."""
        take_log()
        self._grow_scores(self.n_tokens + len(tokens))
        self._spans.cut(self.n_tokens)
        try:
            self._set_prefill(in_prompt)
            with self._scorer_guard.watch():
                super().eval(tokens)
        except RuntimeError as e:
            if is_callers(e):
                raise
            raise decode_error(e, take_log()) from e
        finally:
            self._set_prefill(self._phase is _Phase.PROMPT)

    def _grow_scores(self, n: int) -> None:
        """Rows for `n` positions, which may be more than the cells (`logits_all`)."""
        if self._logits_all and n > len(self.scores):
            scores = np.empty((max(n, 2 * len(self.scores)), self.n_vocab()), np.single)
            scores[: len(self.scores)] = self.scores
            self.scores = scores

    def prefill(self, pieces: Sequence[Piece]) -> int:
        """Decode a prompt, or as much of it as the cache does not hold already.

        Parameters
        ----------
        pieces : sequence of TextPiece and ImagePiece
            The whole prompt from position 0 on.

        Returns
        -------
        int
            Tokens of text and embeddings of images that had to be decoded.
            `generate([], reset=False)` answers the prompt.

        Raises
        ------
        ContextOverflowError
            It does not fit; nothing is decoded.
        """
        self._check_open("prefill")
        self._n_calls += 1
        self._forget_asked()
        ids = piece_ids(pieces)
        n_new = n_cells_from(pieces, image_start(ids, self._rewind.common_prefix(ids)))
        self._room.check_fit(n_new + 1, 0)  # before anything is cut
        n_kept = self._rewind.keep_prefix(ids)
        n_read = 0
        if self._image_reader is not None:
            n_kept, n_read = self._image_reader.read(pieces, ids, n_kept)
        n_new = n_cells_from(pieces, n_kept)
        self.check_room(n_new + 1, len(ids) - n_kept + 1)  # and an answer
        self._decode_pieces(pieces, ids, n_kept)
        return n_new + n_read

    def _decode_pieces(self, pieces: Sequence[Piece], ids: np.ndarray, n_kept: int) -> None:
        """Decode what comes behind the first `n_kept` positions."""
        first = 0
        with self.prompt_phase():
            for piece in pieces:
                last = first + len(piece)
                if last > n_kept and isinstance(piece, ImagePiece):
                    self._decode_image(piece, ids[first:last])
                elif last > n_kept:
                    self.eval(piece.tokens[max(0, n_kept - first) :])
                first = last

    def _decode_image(self, piece: ImagePiece, ids: np.ndarray) -> None:
        self._grow_scores(self.n_tokens + len(ids))
        take_log()
        try:
            with self._scorer_guard.watch():
                n_past = piece.decode(self.n_tokens)
        except StateError as e:
            if is_callers(e):
                raise
            why = reason(take_log())
            raise StateError(f"{e}: {why}" if why else str(e)) from e
        n_positions = n_past - self.n_tokens
        self.input_ids[self.n_tokens : n_past] = ids[:n_positions]
        self._spans.cut(int(self.n_tokens))
        if piece.grid is not None:
            self._spans.put(int(self.n_tokens), n_positions, piece.n_cells)
        self.n_tokens = n_past
        self._requires_eval = False

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        """As in llama-cpp-python. After the prompt, a single token is generation.

        Of a prompt that the cache holds already, nothing is decoded again, and an answer that came
        after it is taken back.

        Raises
        ------
        StateError
            The stream goes on after another call used the model, or after `close`.
        """
        self._check_open("generate")
        tokens = [int(token) for token in tokens]
        reset = args[6] if len(args) > 6 else kwargs.get("reset", True)
        if reset and self.n_tokens > 0 and (self._session is not None or self._rewind.n_window):
            self._rewind.keep_prefix(np.asarray(tokens, np.intc))
        self._enter(_Phase.FIRST)
        stream = super().generate(tokens, *args, **kwargs)
        sent = None
        n_calls = -1
        try:
            while True:
                try:
                    token = stream.send(sent)
                except StopIteration:
                    return
                n_calls = self._n_calls
                sent = yield token
                self._check_open("generate")
                if n_calls != self._n_calls:
                    raise StateError(
                        message(
                            "generate",
                            "the stream cannot go on, since another call used the model meanwhile",
                            do="read a stream to its end before the next call",
                        )
                    )
        finally:
            stream.close()
            # a stream left open may end inside a later call
            if n_calls in (-1, self._n_calls) and self._phase is not _Phase.PROMPT:
                self._enter(_Phase.FREE)

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        processors = kwargs.pop("logits_processor", None)
        if processors is not None:
            kwargs["logits_processor"] = self._guard.around(processors)
        return super()._init_sampler(*args, **kwargs)

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """As in llama-cpp-python.

        Raises
        ------
        StateError
            Nothing was decoded since the cache was emptied, loaded or cut.
        """
        self._check_open("sample")
        stale = self.n_tokens == 0 or self._requires_eval
        if stale or not llama_cpp.llama_get_logits_ith(self._ctx.ctx, -1):
            raise StateError(message("sample", "there are no logits", do="decode a token first"))
        token = int(super().sample(*args, **kwargs))
        self._guard.raise_lost()
        return token

    def _check_open(self, op: str) -> None:
        if self._closed:
            raise closed_error(op)

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        self._check_open("create_completion")
        for name in ("prompt", "suffix", "stop"):
            if name == "stop" or isinstance(kwargs.get(name), str):  # else tokens
                kwargs[name] = clean(kwargs.get(name))
        with translated_errors(self._n_ctx):
            yield from super()._create_completion(*args, **kwargs)

    def create_chat_completion(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        """As in llama-cpp-python; images are compressed with the rest of the prompt.

        With the handler that `mmproj_path` makes, what the cache holds of a prompt is neither
        encoded nor decoded again: earlier turns, and images by their content. `response_format`
        may be OpenAI's for a JSON schema, too, which llama-cpp-python ignores.

        Raises
        ------
        ConfigError
            The messages or the format cannot be understood, or the model cannot see images.
        ImageError, ContextOverflowError, ModelFileError
            Nothing is decoded.
        StateError
            llama.cpp could not decode it; the next call starts from an empty cache.
        """
        self._check_open("create_chat_completion")
        if self.chat_handler is None:
            messages = clean(text_messages(messages))
            for name in ("functions", "function_call", "tools", "tool_choice"):
                if name in kwargs:
                    kwargs[name] = clean(kwargs[name])
        if "response_format" in kwargs:
            kwargs["response_format"] = json_format(kwargs["response_format"])
        self._in_chat = True
        try:
            with translated_errors(self._n_ctx), self.prompt_phase():
                return super().create_chat_completion(messages, *args, **kwargs)
        except StateError:
            self.reset()
            self._ctx.kv_cache_clear()
            raise
        finally:
            self._in_chat = False

    def embed(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        self._check_open("embed")
        return super().embed(clean(input), *args, **kwargs)

    def save_state(self) -> Any:
        """As in llama-cpp-python; scores are saved only where they are kept (`logits_all`)."""
        self._check_open("save_state")
        state = llama_cpp.LlamaState(
            scores=self._scores.copy() if self._logits_all else self.scores[:1].copy(),
            input_ids=self.input_ids[: self.n_tokens].copy(),
            n_tokens=self.n_tokens,
            llama_state=(data := native_state(self._ctx.ctx)),
            llama_state_size=len(data),
            seed=self._seed,
        )
        state.image_spans = self._spans.copy()
        return state

    def load_state(self, state: Any) -> None:
        """As in llama-cpp-python; everything is as before if it fails.

        Raises
        ------
        StateError
            The state is of another model or was saved with another policy.
        """
        self._check_open("load_state")
        self._n_calls += 1
        n = int(state.n_tokens)
        if n > len(self.input_ids):
            raise StateError(
                message("load_state", "tokens", n, f"at most {len(self.input_ids)}", "raise n_ctx")
            )
        before = native_state(self._ctx.ctx)
        self._group = None  # a state is one of all sequences
        take_log()
        if not set_native_state(self._ctx.ctx, state.llama_state):
            reasons = reason(take_log()) or "another model, context or policy"
            if not set_native_state(self._ctx.ctx, before):
                self.reset()
                self._ctx.kv_cache_clear()
            raise StateError(
                message(
                    "load_state",
                    "llama.cpp refused the state",
                    reasons,
                    "one saved with the same model, n_ctx, KV types, flash_attn and policy",
                )
            )
        self.input_ids[:] = _placeholders(len(self.input_ids))
        self.input_ids[:n] = state.input_ids[:n]
        if self._logits_all:
            self._grow_scores(n)
            self.scores[: min(n, len(state.scores))] = state.scores[:n]
        self.n_tokens = n
        self._spans = ImageSpans(getattr(state, "image_spans", None))
        self._seed = state.seed
        self._requires_eval = True

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        if self.mmproj_path is not None:
            state.update(chat_handler=None, mmproj_path=self.mmproj_path)  # it holds native memory
        state.update(
            image_min_tokens=self.image_tokens.least,
            image_max_tokens=self.image_tokens.most,
            memory=self.memory,
            memory_budget=self.memory_budget,
            n_seq_max=self._n_seq_max,
            elastic=self.elastic,
        )
        return state

    def close(self) -> None:
        """Free the model and its context; the elastic cache goes with it."""
        self._closed, self._group = True, None
        self._end_asking()
        tower = getattr(self, "_tower", None)
        if tower is not None:
            tower.close()
        session, self._session = getattr(self, "_session", None), None
        if session is not None:
            session.forget()
        if hasattr(self, "_stack"):  # not where __init__ refused its arguments
            super().close()
            take_apart(self)

    def __enter__(self) -> ElasticLlama:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):  # modules may be gone at exit
            self.close()


def _placeholders(n: int) -> np.ndarray:
    """Ids that no tokenizer and no earlier call has made, int32 [n], all < 0."""
    ids = np.frombuffer(os.urandom(4 * n), dtype=np.int32)
    return np.minimum(ids, ~ids) - (ids == 0)


def native_state(ctx: Any) -> bytes:
    """The state of a llama_context."""
    size = llama_cpp.llama_state_get_size(ctx)
    buffer = (ctypes.c_uint8 * size)()
    n = llama_cpp.llama_state_get_data(ctx, buffer, size)
    return bytes(memoryview(buffer)[:n])


def set_native_state(ctx: Any, data: bytes) -> bool:
    """Whether a llama_context took a state."""
    buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    return bool(llama_cpp.llama_state_set_data(ctx, buffer, len(data)) == len(data))
