"""What is left of a model after `close`: every use is an exception, none a freed address."""

from __future__ import annotations

from typing import Any

from .errors import StateError, message

_PARTS = {"_model": ("model", "vocab"), "_ctx": ("ctx", "memory"), "_batch": ("batch",)}
_USERS = (*_PARTS, "_sampler", "tokenizer_")  # attributes of `llama_cpp.Llama`


class Closed:
    """Stands for a part of a closed model, or for the address of one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise closed_error("address" if name == "_as_parameter_" else name)


def closed_error(op: str) -> StateError:
    return StateError(message(op, "the model is closed", do="load it again"))


def take_apart(llm: Any) -> None:
    """Put `Closed` in place of what a `llama_cpp.Llama` has freed.

    Its tokenizers and others may hold its parts, so their addresses go too.
    """
    for name, addresses in _PARTS.items():
        part = vars(llm).get(name)
        if part is not None and not isinstance(part, Closed):
            for address in addresses:
                setattr(part, address, Closed())
    for name in _USERS:
        setattr(llm, name, Closed())
