"""Python that native code calls, without losing what it raises, Ctrl-C too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Processor = Callable[[Any, Any], Any]


class Guard:
    """Notes the first exception of the logits processors that llama.cpp's sampler calls.

    ctypes would print it and go on.
    """

    def __init__(self) -> None:
        self._lost: BaseException | None = None

    def around(self, processors: Iterable[Processor]) -> list[Processor]:
        return [self._guarded(process) for process in processors]

    def raise_lost(self) -> None:
        """Raise what was noted since the last call."""
        lost, self._lost = self._lost, None
        if lost is not None:
            raise lost

    def _guarded(self, process: Processor) -> Processor:
        def call(ids: Any, scores: Any) -> Any:
            try:
                return process(ids, scores)
            except BaseException as e:
                self._lost = self._lost or e
                return scores

        return call
