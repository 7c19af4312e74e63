"""The vision tower of a model, loaded once for all of its conversations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from .vision import Vision

if TYPE_CHECKING:
    from .llama import ElasticLlama


class SharedTower:
    """Loads a tower for the first conversation; it stays for the next one.

    It is freed with the model, or when the last conversation that is there is closed.
    """

    def __init__(self) -> None:
        self._vision: Vision | None = None
        self._users: WeakSet[Any] = WeakSet()

    def take(self, user: Any, llm: ElasticLlama) -> Vision | None:
        """The tower of `llm`, for a conversation; None: the model has none.

        Raises
        ------
        ConfigError, ModelFileError
        """
        if llm.mmproj_path is None:
            return None
        if self._vision is None:
            self._vision = Vision(llm.mmproj_path, llm, llm.image_tokens)
        self._users.add(user)
        return self._vision

    def leave(self, user: Any) -> None:
        """A conversation is closed."""
        was_user = user in self._users
        self._users.discard(user)
        if was_user and not self._users:
            self.close()

    def close(self) -> None:
        vision, self._vision = self._vision, None
        if vision is not None:
            vision.close()
