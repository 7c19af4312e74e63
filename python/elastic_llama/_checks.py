"""Arguments that llama.cpp would not survive, and llama-cpp-python's errors as ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from .config import ElasticConfig
from .errors import (
    ConfigError,
    ContextOverflowError,
    ElasticError,
    ImageError,
    ModelFileError,
    StateError,
    text,
)
from .kv_types import KV_TYPES, PLAIN_TYPES


def with_budget(elastic: ElasticConfig | None, budget: float | int | None) -> ElasticConfig | None:
    if budget is None:
        return elastic
    if elastic is None:
        raise ConfigError(text("config", "kv_budget with elastic=None", budget, "one of them"))
    return replace(elastic, budget=budget)


def with_flash(elastic: ElasticConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Flash attention unless it is said otherwise, where layers may keep different numbers of
    cells: its V lies row by row, so that what a layer does without is memory."""
    if kwargs.get("flash_attn") is not None:
        return kwargs
    on_host = sys.platform.startswith("linux") and kwargs.get("n_gpu_layers", 0) == 0
    uneven = elastic is not None and elastic.may_be_uneven
    return {**kwargs, "flash_attn": on_host and uneven}


def check_arguments(
    elastic: ElasticConfig | None, n_ctx: int | None, kwargs: dict[str, Any]
) -> None:
    """Refuse what llama.cpp would abort on, or answer with a null pointer."""
    if n_ctx is not None and (not isinstance(n_ctx, int) or not 0 <= n_ctx < 2**31):
        raise ConfigError(text("config", "n_ctx", repr(n_ctx), "a whole number >= 0"))
    for name in ("n_batch", "n_ubatch"):
        value = kwargs.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(text("config", name, repr(value), "a whole number >= 1"))
    type_v = kwargs.get("type_v")
    if type_v not in (None, *(KV_TYPES[name] for name in PLAIN_TYPES)) and not kwargs.get(
        "flash_attn"
    ):
        raise ConfigError(
            text(
                "config",
                "a quantized V cache without flash attention",
                f"type_v={type_v}",
                do="pass flash_attn=True",
            )
        )
    if elastic is not None and elastic.policy != "full" and kwargs.get("draft_model") is not None:
        raise ConfigError(
            text("config", "draft_model together with an elastic cache", do="pass elastic=None")
        )


def size_cache(
    elastic: ElasticConfig | None, n_ctx: int | None, kwargs: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    """n_ctx, 2048 by default, and the other arguments of `llama_cpp.Llama`.

    Under a hard cap the context holds the cap and one ubatch, and a batch is one ubatch: what is
    held is looked at before each.
    """
    if elastic is None or elastic.kv_cells is None:
        return 2048 if n_ctx is None else n_ctx, kwargs
    if kwargs.get("logits_all"):
        raise ConfigError(
            text(
                "config",
                "logits_all with kv_cells",
                do="leave one out: a prompt may be longer than the rows of logits kept for it",
            )
        )
    n_ubatch = min(kwargs.get("n_ubatch", 512), kwargs.get("n_batch", 512))
    least = elastic.kv_cells + n_ubatch
    if n_ctx and n_ctx < least:
        raise ConfigError(
            text(
                "config",
                "n_ctx with kv_cells",
                n_ctx,
                f"at least kv_cells + n_ubatch = {least}",
                "leave n_ctx out",
            )
        )
    return n_ctx or least, {**kwargs, "n_ubatch": n_ubatch, "n_batch": n_ubatch}


def load_error(path: str, error: ValueError) -> ElasticError:
    if "context" in str(error):
        return ConfigError(
            text(
                "load",
                path,
                str(error),
                "parameters that llama.cpp accepts",
                "try other KV types or a smaller n_ctx; verbose=True says why",
            )
        )
    return ModelFileError(
        text("load", path, str(error), "a model that llama.cpp can load", "verbose=True says why")
    )


def decode_error(error: RuntimeError) -> ElasticError:
    if str(error).endswith("returned 1"):
        return ContextOverflowError(text("decode", "no free cells", do="raise n_ctx"))
    return StateError(text("decode", str(error)))


@contextmanager
def translated_errors() -> Iterator[None]:
    """llama-cpp-python's plain errors as ours, by their texts."""
    try:
        yield
    except ElasticError:
        raise
    except ValueError as e:
        message = str(e)
        if "exceed" in message or ("error code 1" in message and "evaluate" in message):
            raise ContextOverflowError(
                text(
                    "prompt",
                    "the context is too small",
                    message,
                    "a prompt that fits n_ctx",
                    "raise n_ctx or shorten the prompt",
                )
            ) from e
        if "bitmap" in message or "tokenize input" in message:
            raise ImageError(
                text("image", message, do="pass one readable image per image_url")
            ) from e
        if "mtmd context" in message or "Vision is not supported" in message:
            raise ModelFileError(
                text(
                    "mmproj",
                    message,
                    expected="a vision tower for this model",
                    do="use the mmproj of this model",
                )
            ) from e
        raise
