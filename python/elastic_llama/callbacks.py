"""Python that native code calls, without losing what it raises, Ctrl-C too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from .errors import ConfigError, message

__all__ = ["Guard", "is_callers"]

Processor = Callable[[Any, Any], Any]
Scorer = Callable[[Any], Any]


class Guard:
    """Notes the first exception of the callables that native code calls.

    For logits processors: ctypes would print it and go on. For scorers: where llama.cpp decodes,
    a compression that fails is logged, and the cache stays uncompressed.
    """

    def __init__(self) -> None:
        self._lost: BaseException | None = None

    def around(self, processors: Iterable[Processor]) -> list[Processor]:
        return [self._guarded(process) for process in processors]

    def around_scorer(self, score: Scorer) -> Scorer:
        """The scorer, whose scores are checked where what is wrong with them can be raised."""

        def call(view: Any) -> Any:
            try:
                return _checked_scores(score(view), view.importance.shape)
            except BaseException as e:
                self._lost = self._lost or e
                raise

        return call

    def raise_lost(self) -> None:
        """Raise what was noted since the last call."""
        lost, self._lost = self._lost, None
        if lost is not None:
            with suppress(AttributeError):
                lost._elastic_callers = True  # type: ignore[attr-defined]
            raise lost

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Raise what is noted inside, in place of what native code made of it."""
        self._lost = None
        try:
            yield
        finally:
            self.raise_lost()

    def _guarded(self, process: Processor) -> Processor:
        def call(ids: Any, scores: Any) -> Any:
            try:
                return process(ids, scores)
            except BaseException as e:
                self._lost = self._lost or e
                return scores

        return call


def is_callers(error: BaseException) -> bool:
    """Whether it comes from a callable of the caller's, so that its text says nothing to us."""
    return getattr(error, "_elastic_callers", False) is True


def _checked_scores(scores: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Scores as float32 [n_layer, n_head_kv, n_cells].

    Raises
    ------
    ConfigError
        They are of another shape, not finite, or negative.
    """
    expected = f"an array of numbers [n_layer, n_head_kv, n_cells] = {list(shape)}"
    try:
        with np.errstate(over="ignore"):
            out = np.ascontiguousarray(scores, dtype=np.float32)
    except (TypeError, ValueError):
        got = type(scores).__name__
        raise ConfigError(message("scorer", "scores", got, expected)) from None
    if scores is None or out.shape != shape:  # NumPy takes None for a NaN
        got = "None" if scores is None else str(list(np.shape(scores)))
        raise ConfigError(message("scorer", "scores", got, expected))
    good = np.isfinite(out) & (out >= 0)
    if not good.all():
        raise ConfigError(message("scorer", "scores", out[~good][0], "finite values >= 0"))
    return out
