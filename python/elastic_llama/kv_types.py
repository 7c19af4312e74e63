"""Types of keys and values that the elastic cache can hold, and ggml's numbers for them."""

from __future__ import annotations

import numbers
from typing import Any

from .errors import ConfigError
from .errors import message as error_message

KV_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q8_0": 8,
    "q5_0": 6,
    "q5_1": 7,
    "q4_0": 2,
    "q4_1": 3,
    "iq4_nl": 20,
}

# without flash attention V is stored transposed, which only these allow
PLAIN_TYPES = ("f32", "f16", "bf16")


def kv_type(name: str, value: Any) -> int | None:
    """ggml's number for a type of keys or values; None stays None, llama.cpp's own default.

    Parameters
    ----------
    name : str
        Of the argument, for the message.
    value : str, int or None
        A name of `KV_TYPES`, in any case, or one of its numbers.

    Raises
    ------
    ConfigError

    Examples
    --------
    >>> kv_type("type_k", "Q8_0"), kv_type("type_k", 8)
    (8, 8)
    """
    if value is None:
        return None
    if isinstance(value, str) and value.lower() in KV_TYPES:
        return KV_TYPES[value.lower()]
    is_number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if is_number and value in KV_TYPES.values():
        return int(value)
    known = ", ".join(f"{name} ({number})" for name, number in KV_TYPES.items())
    raise ConfigError(error_message("config", name, repr(value), f"one of {known}"))


def stock_bytes(ctx: Any) -> int:
    """Bytes that sequence 0 holds in a context without an elastic cache.

    What llama.cpp would save of it: keys and values (in a sliding window, those that can still be
    seen), recurrent states, and some bytes for each cell.

    Parameters
    ----------
    ctx : llama_context (a ctypes pointer)
    """
    import llama_cpp  # not for those who only want the names

    return int(llama_cpp.llama_state_seq_get_size(ctx, 0))
