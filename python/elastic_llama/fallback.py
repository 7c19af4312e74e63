"""Going on with the elastic cache off where nobody asked for it and the model does not take it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .config import ElasticConfig
from .errors import UnsupportedModelError

if TYPE_CHECKING:
    from .llama import ElasticLlama

__all__ = ["AUTO", "attach_if_possible", "why_not"]

AUTO = "auto"  # `elastic` of `ElasticLlama` where nothing is passed

log = logging.getLogger("elastic_llama")


def attach_if_possible(llm: ElasticLlama, elastic: ElasticConfig) -> None:
    """Attach, or warn in one line of the log and leave the cache off."""
    try:
        llm._attach(elastic)
    except UnsupportedModelError as e:
        llm.elastic = None
        log.warning("warning: the elastic cache is off: %s", why_not(e))


def why_not(error: Exception) -> str:
    """The reason of a refusal, without what to do about it."""
    said = str(error.__cause__ or error).partition("; ")[0]
    return said.partition("] ")[2] or said
