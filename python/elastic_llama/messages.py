"""Messages of a chat as people have them: understood, or refused in one sentence."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import ConfigError
from .errors import message as error_message
from .images import shorten

_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image_url", "image", "input_image")
_IMAGE_KEYS = ("image_url", "image", "source", "url", "data", "base64", "bytes", "path")


def clean_text(text: str) -> str:
    """Text that can be encoded: the halves of a character join, one alone becomes U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def as_text(name: str, value: object) -> str:
    """A text as it was given; "" for None.

    Raises
    ------
    ConfigError
        It is something else.
    """
    if value is not None and not isinstance(value, str):
        raise ConfigError(error_message("ask", name, reprlib.repr(value), "a text"))
    return value or ""


def as_texts(name: str, values: object) -> list[str]:
    """Texts as a list.

    Raises
    ------
    ConfigError
        They are something else, or one text.
    """
    is_several = isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping))
    texts = list(values) if is_several else [None]  # type: ignore[call-overload]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(error_message("ask", name, reprlib.repr(values), "a list of texts"))
    return texts


def clean(value: Any) -> Any:
    """As `clean_text`, for every text in lists and dictionaries."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, (list, tuple)):
        return [clean(one) for one in value]
    if isinstance(value, Mapping):
        return {clean(key): clean(one) for key, one in value.items()}
    return value


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as people have them, with clean text, whose parts are text or an ``image_url``.

    Raises
    ------
    ConfigError
        A part of another kind, an image that is not the user's, or no messages at all.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise ConfigError(
            error_message("chat", "messages", type(messages).__name__, "a list of messages")
        )
    return [_read_message(message) for message in messages]


def _read_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        got = sorted(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
        raise ConfigError(
            error_message("chat", "message", shorten(got), "a dictionary with role and content")
        )
    content = message.get("content")
    if isinstance(content, Mapping):
        content = [content]
    if isinstance(content, (list, tuple)):
        return {**message, "content": [_read_part(part, message["role"]) for part in content]}
    if isinstance(content, str):
        return {**message, "content": clean_text(content)}
    if content is not None:
        raise ConfigError(
            error_message("chat", "content of a message", type(content).__name__, "text or parts")
        )
    return dict(message)


def _read_part(part: Any, role: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": clean_text(part)}
    if not isinstance(part, Mapping):
        raise ConfigError(
            error_message(
                "chat", "part of a message", type(part).__name__, "a dictionary with a type"
            )
        )
    kind = part.get("type") or next((k for k in ("text", "image_url", "image") if k in part), None)
    if kind in _TEXT_TYPES:
        if not isinstance(part.get("text"), str):
            got = type(part.get("text")).__name__
            raise ConfigError(error_message("chat", f"text of a part of type {kind}", got, "text"))
        return {**part, "type": "text", "text": clean_text(part["text"])}
    if kind not in _IMAGE_TYPES:
        raise ConfigError(
            error_message(
                "chat",
                "part of type",
                shorten(repr(kind)),
                "one of " + ", ".join((*_TEXT_TYPES, *_IMAGE_TYPES)),
            )
        )
    if role != "user":
        raise ConfigError(
            error_message(
                "chat",
                "image in a message of role",
                shorten(repr(role)),
                "images in messages of role 'user'",
                "move it to the question",
            )
        )
    return {"type": "image_url", "image_url": {"url": _image_of(part)}}


def _image_of(part: Any) -> Any:
    """What `load_image` takes, out of the forms that interfaces wrap it in."""
    while isinstance(part, Mapping):
        key = next((key for key in _IMAGE_KEYS if part.get(key) is not None), None)
        if key is None:
            raise ConfigError(
                error_message(
                    "chat",
                    "an image part without its image",
                    shorten("keys " + ", ".join(map(str, part))),
                    "one of " + ", ".join(_IMAGE_KEYS),
                )
            )
        part = part[key]
        if key in ("data", "base64") and isinstance(part, str) and part[:5].lower() != "data:":
            part = "data:;base64," + part  # never a path
    return part


def text_messages(messages: Any) -> list[dict[str, Any]]:
    """As `read_messages`, for a model that reads text alone: every content is one text, or None.

    Raises
    ------
    ConfigError
        There is an image among them, or as from `read_messages`.
    """
    out = read_messages(messages)
    for message in out:
        content = message.get("content")
        if not isinstance(content, list):
            continue
        n_images = sum(part["type"] != "text" for part in content)
        if n_images:
            raise ConfigError(
                error_message(
                    "chat",
                    "images in the messages",
                    n_images,
                    "none: the model has no vision tower",
                    "pass mmproj_path",
                )
            )
        message["content"] = "".join(part["text"] for part in content)
    return out


def json_format(value: Any) -> Any:
    """`response_format` as llama-cpp-python knows it; OpenAI's for a JSON schema has another form.

    Raises
    ------
    ConfigError
        Of that form, without a schema.

    Examples
    --------
    >>> json_format({"type": "json_schema", "json_schema": {"name": "x", "schema": {}}})
    {'type': 'json_object', 'schema': {}}
    """
    if not isinstance(value, Mapping) or value.get("type") != "json_schema":
        return value
    about = value.get("json_schema")
    schema = about.get("schema") if isinstance(about, Mapping) else None
    if not isinstance(schema, Mapping):
        expected = '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
        raise ConfigError(error_message("chat", "response_format", repr(value), expected))
    return {"type": "json_object", "schema": schema}
