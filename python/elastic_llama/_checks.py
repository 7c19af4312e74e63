"""Arguments that llama.cpp would not survive, and llama-cpp-python's errors as ours."""

from __future__ import annotations

import ctypes
import math
import numbers
import os
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import llama_cpp
import numpy as np

from .callbacks import is_callers
from .config import ElasticConfig, whole
from .errors import (
    ConfigError,
    ContextOverflowError,
    ElasticError,
    ImageError,
    ModelFileError,
    StateError,
    UnsupportedModelError,
)
from .errors import (
    message as error_message,
)
from .gguf_check import Header, read_header
from .kv_types import KV_TYPES, PLAIN_TYPES, kv_type

INT_MAX = 2**31 - 1
MAX_THREADS = 512  # ggml's GGML_MAX_N_THREADS
MAX_TEXT = 127  # bytes of a key or a text of kv_overrides, with a zero behind them

OFF = "pass kv_budget=1 (--kv-budget 1)"
ENCODER = "use llama-cli, or llama_encode and llama_decode of llama_cpp's C interface"

# name -> least, most and whether None stands for a default of llama-cpp-python's
_WHOLE = {
    "n_gpu_layers": (-1, INT_MAX, False),
    "main_gpu": (-1, INT_MAX, False),
    "n_batch": (1, INT_MAX, False),
    "n_ubatch": (1, INT_MAX, False),
    "n_threads": (0, MAX_THREADS, True),
    "n_threads_batch": (0, MAX_THREADS, True),
    "seed": (-1, 2**32 - 1, True),
    "yarn_orig_ctx": (0, INT_MAX, False),
    "last_n_tokens_size": (0, 2**20, False),
}
# name -> the values of llama.cpp's enum
_CHOICES = {
    "split_mode": {0: "none", 1: "layer", 2: "row", 3: "tensor"},
    "rope_scaling_type": {-1: "the model's", 0: "none", 1: "linear", 2: "yarn", 3: "longrope"},
    "pooling_type": {-1: "the model's", 0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"},
    "attention_type": {-1: "the model's", 0: "causal", 1: "non-causal"},
    "numa": {0: "off", 1: "distribute", 2: "isolate", 3: "numactl", 4: "mirror"},
}
# name -> least
_REAL = {
    "rope_freq_base": 0.0,
    "rope_freq_scale": 0.0,
    "yarn_ext_factor": -math.inf,
    "yarn_attn_factor": -math.inf,
    "yarn_beta_fast": -math.inf,
    "yarn_beta_slow": -math.inf,
    "lora_scale": -math.inf,
}
_SWITCHES = (
    "vocab_only",
    "use_mmap",
    "use_mlock",
    "logits_all",
    "embedding",
    "offload_kqv",
    "flash_attn",
    "op_offload",
    "swa_full",
    "no_perf",
    "spm_infill",
)


def with_budget(
    elastic: ElasticConfig | str | None, budget: float | int | None
) -> ElasticConfig | None:
    """What is asked for, "auto" as what it means."""
    if isinstance(elastic, str) and elastic == "auto":
        elastic = ElasticConfig()
    if elastic is not None and not isinstance(elastic, ElasticConfig):
        raise ConfigError(
            error_message("config", "elastic", repr(elastic), 'an ElasticConfig, None or "auto"')
        )
    if budget is None:
        return elastic
    if elastic is None:
        raise ConfigError(
            error_message("config", "kv_budget with elastic=None", budget, "one of them")
        )
    return replace(elastic, budget=budget)


def with_flash(elastic: ElasticConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Flash attention while the elastic cache is on, whose V lies in rows.

    Callers of llama-cpp-python pass its own default on, False, so that it says nothing.
    """
    if elastic is not None and not elastic.is_off:
        return {**kwargs, "flash_attn": True}
    return {**kwargs, "flash_attn": bool(kwargs.get("flash_attn"))}


def check_arguments(
    elastic: ElasticConfig | None, n_ctx: int | None, kwargs: dict[str, Any]
) -> tuple[int | None, dict[str, Any]]:
    """n_ctx and the other arguments of `llama_cpp.Llama` as plain values.

    Raises
    ------
    ConfigError
        llama.cpp would abort on one of them, take it for another number, or answer with a null
        pointer.
    """
    if n_ctx is not None:
        n_ctx = whole("n_ctx", n_ctx, 0)
    kwargs = {name: _checked(name, value) for name, value in kwargs.items()}
    kwargs = with_flash(elastic, kwargs)
    if elastic is not None and not elastic.is_off and kwargs.get("swa_full") is None:
        kwargs["swa_full"] = False
    _check_together(elastic, kwargs)
    return n_ctx, kwargs


def _checked(name: str, value: Any) -> Any:
    if name in _WHOLE:
        least, most, optional = _WHOLE[name]
        return None if value is None and optional else whole(name, value, least, most)
    if name in _CHOICES:
        return _choice(name, value)
    if name in _REAL:
        return _real(name, value, _REAL[name])
    if name in _SWITCHES:
        return _switch(name, value)
    if name in ("type_k", "type_v"):
        return kv_type(name, value)
    if name == "tensor_split":
        return _tensor_split(value)
    if name == "kv_overrides":
        return _overrides(value)
    return value


def _choice(name: str, value: Any) -> int | None:
    known = _CHOICES[name]
    if value is None and name == "rope_scaling_type":
        return None
    if isinstance(value, bool) and name == "numa":
        value = int(value)
    whole_number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole_number or int(value) not in known:
        expected = ", ".join(f"{number} ({what})" for number, what in known.items())
        raise ConfigError(error_message("config", name, repr(value), f"one of {expected}"))
    return int(value)


def _real(name: str, value: Any, least: float = -math.inf) -> float:
    """The value as a float that llama.cpp's 32 bits hold."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        with np.errstate(over="ignore"), suppress(OverflowError):
            if math.isfinite(np.float32(value)) and float(value) >= least:
                return float(value)
    at_least = "" if math.isinf(least) else f" >= {least:g}"
    raise ConfigError(error_message("config", name, repr(value), f"a finite number{at_least}"))


def _switch(name: str, value: Any) -> bool | None:
    if value is None:
        return None
    if not isinstance(value, (bool, np.bool_, numbers.Integral)) or int(value) not in (0, 1):
        raise ConfigError(error_message("config", name, repr(value), "True or False"))
    return bool(value)


def _tensor_split(value: Any) -> list[float] | None:
    if value is None:
        return None
    most = int(llama_cpp.LLAMA_MAX_DEVICES)
    if (
        isinstance(value, (str, bytes, Mapping))
        or not hasattr(value, "__len__")
        or len(value) > most
    ):
        expected = f"at most {most} numbers >= 0, one for each GPU"
        raise ConfigError(error_message("config", "tensor_split", reprlib.repr(value), expected))
    return [_real("tensor_split", x, 0.0) for x in value]


def _overrides(value: Any) -> dict[str, Any] | None:
    """`kv_overrides`, whose texts llama.cpp reads up to a zero, in 128 bytes."""
    if value is None:
        return None
    good = isinstance(value, Mapping) and all(
        isinstance(key, str) and _fits(key) and _is_metadata(x) for key, x in value.items()
    )
    if not good:
        raise ConfigError(
            error_message(
                "config",
                "kv_overrides",
                reprlib.repr(value),
                f"a dict of bool, 64-bit int, float or str, texts of at most {MAX_TEXT} bytes",
            )
        )
    return dict(value)


def _is_metadata(value: Any) -> bool:
    if isinstance(value, str):
        return _fits(value)
    if isinstance(value, int):  # bool too
        return -(2**63) <= value < 2**63
    return isinstance(value, float)


def _fits(value: str) -> bool:
    return len(value.encode()) <= MAX_TEXT


def _check_together(elastic: ElasticConfig | None, kwargs: dict[str, Any]) -> None:
    type_v = kwargs.get("type_v")
    if type_v not in (None, *(KV_TYPES[name] for name in PLAIN_TYPES)) and not kwargs.get(
        "flash_attn"
    ):
        raise ConfigError(
            error_message(
                "config",
                "a quantized V cache without flash attention",
                f"type_v={type_v}",
                do="pass flash_attn=True",
            )
        )
    draft_model = kwargs.get("draft_model")
    if draft_model is None:
        return
    if not callable(draft_model):
        raise ConfigError(
            error_message("config", "draft_model", repr(draft_model), "a LlamaDraftModel")
        )
    if elastic is not None and not elastic.is_off:
        raise ConfigError(
            error_message("config", "draft_model together with an elastic cache", do=OFF)
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
            error_message(
                "config",
                "logits_all with kv_cells",
                do="leave one out: a prompt may be longer than the rows of logits kept for it",
            )
        )
    n_ubatch = min(kwargs.get("n_ubatch", 512), kwargs.get("n_batch", 512))
    least = elastic.kv_cells + n_ubatch
    if least > INT_MAX:
        raise ConfigError(
            error_message("config", "kv_cells + n_ubatch", least, f"at most {INT_MAX}")
        )
    if n_ctx and n_ctx < least:
        raise ConfigError(
            error_message(
                "config",
                "n_ctx with kv_cells",
                n_ctx,
                f"at least kv_cells + n_ubatch = {least}",
                "leave n_ctx out",
            )
        )
    return n_ctx or least, {**kwargs, "n_ubatch": n_ubatch, "n_batch": n_ubatch}


def check_lora(path: str, model: Header) -> None:
    """Refuse a file that is no LoRA adapter of the model's architecture.

    Raises
    ------
    ModelNotFoundError, ModelFileError
    """
    header = read_header(path, "lora")
    found = (header.meta.get("general.type"), header.meta.get("adapter.type"), header.architecture)
    if found != ("adapter", "lora", model.architecture):
        kind, adapter, architecture = found
        raise ModelFileError(
            error_message(
                "lora",
                path,
                f"a GGUF of type {adapter or kind or 'model'} for {architecture or '?'}",
                f"a LoRA adapter for {model.architecture}",
            )
        )


def add_lora(llm: Any, path: str, scale: float) -> None:
    """What `llama_cpp.Llama` does with `lora_path`; it takes a null pointer for an adapter.

    Raises
    ------
    ModelFileError
        llama.cpp refuses the adapter.
    """
    adapter = llama_cpp.llama_adapter_lora_init(llm._model.model, os.fsencode(path))
    if not adapter:
        raise ModelFileError(
            error_message("lora", path, "a file that llama.cpp refuses", "an adapter of this model")
        )
    llm.lora_path, llm._lora_adapter = path, adapter
    llm._stack.callback(_free_lora, llm)
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
    if llama_cpp.llama_set_adapters_lora(llm._ctx.ctx, adapters, 1, (ctypes.c_float * 1)(scale)):
        raise ModelFileError(error_message("lora", path, "an adapter that llama.cpp cannot apply"))


def _free_lora(llm: Any) -> None:
    if llm._lora_adapter is not None:
        llama_cpp.llama_adapter_lora_free(llm._lora_adapter)
        llm._lora_adapter = None


def check_memory(
    elastic: ElasticConfig | None, ctx: Any, path: str, kwargs: dict[str, Any]
) -> None:
    """Refuse a context without memory, unless nothing is to be decoded or embeddings are asked for.

    Parameters
    ----------
    ctx : llama_cpp._internals.LlamaContext
        What would take a cell is refused from now on where there are none.
    kwargs
        Arguments of `llama_cpp.Llama`.

    Raises
    ------
    UnsupportedModelError
    """
    if ctx.memory is not None:
        model = llama_cpp.llama_get_model(ctx.ctx)
        if llama_cpp.llama_model_has_encoder(model) and llama_cpp.llama_model_has_decoder(model):
            _refuse_tokens(ctx, path)
        return
    if kwargs.get("vocab_only"):
        _refuse_cells(ctx, f"{path} was loaded with vocab_only", "load it without to decode tokens")
        return
    what = f"{path} has no KV cache: it makes embeddings, or whole texts at once"
    is_on = elastic is not None and not elastic.is_off
    if not kwargs.get("embedding"):
        do = "pass embedding=True" + (" and kv_budget=1" if is_on else "")
        raise UnsupportedModelError(error_message("load", what, do=do))
    if is_on:
        raise UnsupportedModelError(error_message("load", what, do=OFF))
    _refuse_cells(ctx, what, "use embed or create_embedding")


def _refuse_cells(ctx: Any, what: str, do: str) -> None:
    # llama-cpp-python asserts; comes before anything is decoded
    ctx.kv_cache_seq_rm = _refusal(what, do)


def _refuse_tokens(ctx: Any, path: str) -> None:
    """llama.cpp ends the process where nothing was encoded, which llama-cpp-python never does."""
    what = f"{path} has an encoder, which llama-cpp-python does not run before its decoder"
    ctx.decode = _refusal(what, ENCODER)


def _refusal(what: str, do: str) -> Callable[..., None]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise UnsupportedModelError(error_message("decode", what, do=do))

    return refuse


def load_error(path: str, error: ValueError | MemoryError) -> ElasticError:
    if isinstance(error, MemoryError):
        return ConfigError(
            error_message(
                "load", path, str(error), "a context that fits memory", "lower n_ctx or n_batch"
            )
        )
    if "context" in str(error):
        return ConfigError(
            error_message(
                "load",
                path,
                str(error),
                "parameters that llama.cpp accepts",
                "try other KV types or a smaller n_ctx; verbose=True says why",
            )
        )
    return ModelFileError(
        error_message(
            "load", path, str(error), "a model that llama.cpp can load", "verbose=True says why"
        )
    )


def decode_error(error: RuntimeError, log: Sequence[str] = ()) -> ElasticError:
    """`log`: what the native libraries said meanwhile."""
    if isinstance(error, ElasticError):
        return type(error)(*error.args)
    if str(error).endswith("returned 1"):
        return ContextOverflowError(error_message("decode", "no free cells", do="raise n_ctx"))
    why = reason(log)
    return StateError(error_message("decode", f"{error}: {why}" if why else str(error)))


def reason(log: Sequence[str]) -> str:
    """The last complaints of the native libraries in one line."""
    return "; ".join(line.strip() for line in log[-3:])


def _overflow(message: str, limit: int | None) -> ContextOverflowError:
    asked = re.search(r"Requested tokens \((\d+)\) exceed context window", message)
    if asked is None or limit is None:
        found, expected = message, "a prompt that fits n_ctx"
    else:
        found, expected = f"{asked[1]} tokens", f"fewer than {limit}"
    return ContextOverflowError(
        error_message(
            "prompt", "the context is too small", found, expected, "raise n_ctx or shorten it"
        )
    )


@contextmanager
def translated_errors(limit: int | None = None) -> Iterator[None]:
    """llama-cpp-python's plain errors as ours, by their texts.

    Parameters
    ----------
    limit : int, optional
        Positions that a prompt and its answer may take; llama-cpp-python's text names cells.
    """
    try:
        yield
    except ElasticError:
        raise
    except ValueError as e:
        if is_callers(e):
            raise
        message = str(e)
        if "exceed" in message or ("error code 1" in message and "evaluate" in message):
            raise _overflow(message, limit) from e
        if "bitmap" in message or "tokenize input" in message:
            raise ImageError(
                error_message("image", message, do="pass one readable image per image_url")
            ) from e
        if "mtmd context" in message or "Vision is not supported" in message:
            raise ModelFileError(
                error_message(
                    "mmproj",
                    message,
                    expected="a vision tower for this model",
                    do="use the mmproj of this model",
                )
            ) from e
        raise
