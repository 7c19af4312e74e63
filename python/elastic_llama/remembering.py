"""`ElasticLlama.remember`: images that are read before they are asked about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from .errors import ConfigError, message
from .memory.reader import PrefixReader
from .pieces import Piece

if TYPE_CHECKING:
    from .llama import ElasticLlama


class Remembering:
    """A part of `ElasticLlama`."""

    _image_reader: PrefixReader | None = None  # of the image memory; None: there is none

    def remember(self, pieces: Sequence[Piece]) -> bool:
        """Have the image memory hold the images that a prompt begins with.

        Returns
        -------
        bool
            Whether they were new to it. The cache holds them then, and nothing else.

        Raises
        ------
        ConfigError
            There is no memory, or no image.
        ContextOverflowError
            They do not fit; nothing is decoded.
        """
        llm = cast("ElasticLlama", self)
        llm._check_open("remember")
        llm._n_calls += 1
        if self._image_reader is None:
            raise ConfigError(message("remember", "memory", None, "one", "pass memory=True"))
        return self._image_reader.remember(pieces)
