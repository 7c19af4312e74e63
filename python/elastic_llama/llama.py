"""A `llama_cpp.Llama` whose KV cache is elastic."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llama_cpp

from . import _core, gguf_check
from .config import ElasticConfig
from .errors import (
    ConfigError,
    ContextOverflowError,
    ElasticError,
    ModelFileError,
    StateError,
    UnsupportedModelError,
    text,
)
from .stats import ElasticStats

__all__ = ["ElasticLlama"]


class ElasticLlama(llama_cpp.Llama):
    """Everything that takes a `llama_cpp.Llama` takes this; its KV cache shrinks after each prompt.

    Parameters
    ----------
    model_path : path, optional
        GGUF of the language model. None: the embedded model, and its vision tower.
    mmproj_path : path, optional
        GGUF of the vision tower and projector; makes a chat handler that reads images.
    elastic : ElasticConfig or None
        None leaves llama.cpp's cache as it is.
    kv_budget : float or int, optional
        Short for ``elastic=ElasticConfig(budget=kv_budget)``.
    chat_handler : optional
        As in llama-cpp-python; used instead of the one for `mmproj_path`.
    **kwargs
        All other arguments of `llama_cpp.Llama`. `n_ctx` is 2048 by default here, `verbose` False.

    Raises
    ------
    ModelNotFoundError, ModelFileError
        A file is missing, damaged, of the wrong kind, or does not go with the other.
    ConfigError
        A budget of more cells than the context has.
    UnsupportedModelError
        The model's memory is not a plain KV cache.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str] | None = None,
        *,
        mmproj_path: str | os.PathLike[str] | None = None,
        elastic: ElasticConfig | None = ElasticConfig(),  # noqa: B008 (immutable)
        kv_budget: float | int | None = None,
        chat_handler: Any = None,
        n_ctx: int = 2048,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        self._session: Any = None
        self._in_prompt = False
        if kv_budget is not None:
            elastic = ElasticConfig(budget=kv_budget)
        if model_path is None:
            from .embedded import embedded_mmproj, embedded_model

            model_path = embedded_model()
            if mmproj_path is None and chat_handler is None:
                mmproj_path = embedded_mmproj()
        model = gguf_check.check_model(model_path)
        if mmproj_path is not None:
            gguf_check.check_mmproj(mmproj_path, model)
            if chat_handler is None:
                from .chat import make_chat_handler

                chat_handler = make_chat_handler(mmproj_path, model, verbose=verbose)
        self.mmproj_path = None if mmproj_path is None else os.fspath(mmproj_path)
        self.elastic = elastic
        try:
            super().__init__(os.fspath(model_path), n_ctx=n_ctx, verbose=verbose,
                             chat_handler=chat_handler, **kwargs)
        except ValueError as e:
            raise ModelFileError(text("load", str(model_path), str(e), "a model that llama.cpp "
                                      "can load with these parameters")) from e
        if elastic is not None:
            elastic.check_cells(self.n_ctx())
            self._attach(elastic)

    def _attach(self, elastic: ElasticConfig) -> None:
        address = ctypes.cast(self._ctx.ctx, ctypes.c_void_p).value
        try:
            self._session = _core.Session(
                address, policy=elastic.policy, budget=float(elastic.budget),
                n_sink=elastic.n_sink, offset=elastic.offset, min_cells=elastic.min_cells,
                n_threads=elastic.n_threads)
        except NotImplementedError as e:
            self.close()
            raise UnsupportedModelError(str(e)) from e
        except ValueError as e:
            self.close()
            raise ConfigError(str(e)) from e

    # -- the elastic side

    @property
    def session(self) -> Any:
        """The native `_core.Session`, or None while the elastic cache is off."""
        return self._session

    @property
    def stats(self) -> ElasticStats:
        """Figures since the model was loaded; all zero while the elastic cache is off."""
        if self._session is None:
            return ElasticStats(cells=self.n_tokens, tokens=self.n_tokens)
        s = self._session.stats()
        return ElasticStats(
            **{k: s[k] for k in ("compressions", "evictions", "cells_before", "cells_after",
                                 "bytes_before", "bytes_after")},
            score_ms=s["score_us"] / 1000, plan_ms=s["plan_us"] / 1000,
            merge_ms=s["merge_us"] / 1000, cells=self._session.n_cells(0), tokens=self.n_tokens)

    @contextmanager
    def prompt_phase(self) -> Iterator[None]:
        """Everything decoded inside belongs to one prompt, single tokens too."""
        before, self._in_prompt = self._in_prompt, True
        self._hold(True)
        try:
            yield
        finally:
            self._in_prompt = before
            self._hold(before)

    def _hold(self, value: bool) -> None:
        if self._session is not None:
            self._session.hold(value)

    # -- llama_cpp.Llama

    def eval(self, tokens: Sequence[int]) -> None:
        """Decode tokens; several at once are a prompt, whatever batches they are cut into.

        Raises
        ------
        ContextOverflowError
            They do not fit behind the `n_tokens` already decoded; nothing is decoded then.
        """
        if self.n_tokens + len(tokens) > self.n_ctx():
            raise ContextOverflowError(text(
                "eval", "the context is too small", f"{self.n_tokens} + {len(tokens)} tokens",
                f"at most n_ctx = {self.n_ctx()}", "raise n_ctx or shorten the prompt"))
        self._hold(self._in_prompt or len(tokens) > 1)
        try:
            super().eval(tokens)
        finally:
            self._hold(self._in_prompt)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in llama-cpp-python. From here on a single token is generation."""
        self._in_prompt = False
        self._hold(False)
        return super().generate(*args, **kwargs)

    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        """As in llama-cpp-python; a prompt that does not fit raises `ContextOverflowError`."""
        with _translated_errors():
            out = super().create_completion(*args, **kwargs)
        return _translated(out) if hasattr(out, "__next__") else out

    def create_chat_completion(self, *args: Any, **kwargs: Any) -> Any:
        """As in llama-cpp-python; images are compressed with the rest of the prompt."""
        # handlers leave the places of image tokens as they were: nothing of an earlier image
        # may look like a prefix of this prompt
        self.input_ids[:] = 0
        self._in_prompt = True
        try:
            with _translated_errors():
                out = super().create_chat_completion(*args, **kwargs)
        finally:
            self._in_prompt = False
            self._hold(False)
        return _translated(out) if hasattr(out, "__next__") else out

    def load_state(self, state: Any) -> None:
        """As in llama-cpp-python.

        Raises
        ------
        StateError
            The state is of another model or was saved with another policy; the cache is empty then.
        """
        try:
            super().load_state(state)
        except (RuntimeError, ValueError) as e:
            if isinstance(e, ElasticError):
                raise
            self.reset()
            self._ctx.kv_cache_clear()
            raise StateError(text("load_state", "llama.cpp refused the state", str(e),
                                  "one saved with this model, n_ctx, KV types and policy")) from e

    def close(self) -> None:
        """Free the model and its context; the elastic cache goes with it."""
        if getattr(self, "_session", None) is not None:
            self._session.forget()
            self._session = None
        super().close()


@contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except ElasticError:
        raise
    except ValueError as e:
        if "exceed" in str(e):
            raise ContextOverflowError(text(
                "prompt", "the context is too small", str(e), "a prompt that fits n_ctx",
                "raise n_ctx or shorten the prompt")) from e
        raise


def _translated(chunks: Iterator[Any]) -> Iterator[Any]:
    with _translated_errors():
        yield from chunks
