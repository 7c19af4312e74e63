"""Which chat handler, and which prompt format, a model needs."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from llama_cpp import llama_chat_format as formats

from .errors import ConfigError
from .errors import text as error_text
from .images import load_image, shorten, to_png

# What the embedded model was trained with: no system prompt, the image before the question.
PLAIN_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% elif message['content'] %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# LLaVA-1.5 files carry no template; this is the Vicuna form they were trained with.
VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions. "
    "{% for message in messages %}{% if message['role'] == 'assistant' %}\nASSISTANT: "
    "{% else %}\nUSER: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% elif message['content'] %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}\nASSISTANT: {% endif %}"
)

_PLACE = f"image-{secrets.token_hex(16)}"  # of an image in a prompt; nobody can have written it

_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image_url", "image", "input_image")
_IMAGE_KEYS = ("image_url", "image", "source", "url", "data", "base64", "bytes", "path")


def template_for(template: str | None) -> str:
    """The Jinja template that renders messages with images for a model.

    Templates that cannot loop over the parts of a message are replaced: ChatML by its form without
    a default system prompt, a missing one by Vicuna's.
    """
    if not template:
        return VICUNA
    if "image" in template or "part" in template or "content in" in template:
        return template
    return PLAIN_CHATML if "<|im_start|>" in template else VICUNA


def without_marker(text: str, marker: str) -> str:
    """What a person or a model wrote, in which the marker of an image stands for no image."""
    name = marker.strip("<>")
    # with all brackets around it: the inner ones alone would leave a marker
    return re.sub(rf"(?<!<)<+{re.escape(name)}>+", name, text)


def clean_text(text: str) -> str:
    """Text that can be encoded: the halves of a character join, one alone becomes U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class ElasticChatHandler(formats.MTMDChatHandler):
    """llama-cpp-python's handler for images, with a template that knows images."""

    def __call__(self, *, messages: Any, **kwargs: Any) -> Any:
        stop = kwargs.get("stop")
        if isinstance(stop, str):
            kwargs["stop"] = clean_text(stop)
        elif isinstance(stop, (list, tuple)):
            kwargs["stop"] = [clean_text(one) if isinstance(one, str) else one for one in stop]
        return super().__call__(messages=read_messages(messages), **kwargs)

    def _get_chat_template(self, llama_model: Any) -> str:
        return template_for(llama_model.metadata.get("tokenizer.chat_template"))

    def _get_template_messages(self, messages: list[Any], media_marker: str) -> list[Any]:
        """Images before the text of a message, as the models were trained.

        They leave `_PLACE` in the text. Text cannot say that, but it can say `media_marker`, in
        any role, in a tool, or across two parts.
        """
        out = []
        for message in messages:
            content = message.get("content")
            if isinstance(content, list):
                content = sorted(content, key=lambda part: part.get("type") != "image_url")
            out.append({**message, "content": content})
        return super()._get_template_messages(out, _PLACE)

    def _postprocess_template_text(
        self, text: str, image_urls: list[Any], media_marker: str
    ) -> str:
        """A prompt in which the marker stands for images alone.

        Raises
        ------
        ConfigError
            The template left images out.
        """
        text = without_marker(clean_text(text), media_marker)
        n_places = text.count(_PLACE)
        if n_places != len(image_urls):
            raise ConfigError(
                error_text(
                    "chat",
                    "images in what the model's chat template makes of the messages",
                    n_places,
                    str(len(image_urls)),
                    "use a model whose template knows images",
                )
            )
        return text.replace(_PLACE, media_marker)

    def load_image(self, image_url: Any) -> bytes:
        return to_png(load_image(image_url))


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as people have them, with clean text, whose parts are text or an ``image_url``.

    Raises
    ------
    ConfigError
        A part of another kind, an image that is not the user's, or no messages at all.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise ConfigError(
            error_text("chat", "messages", type(messages).__name__, "a list of messages")
        )
    return [_read_message(message) for message in messages]


def _read_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        got = sorted(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
        raise ConfigError(
            error_text("chat", "message", shorten(got), "a dictionary with role and content")
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
            error_text("chat", "content of a message", type(content).__name__, "text or parts")
        )
    return dict(message)


def _read_part(part: Any, role: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": clean_text(part)}
    if not isinstance(part, Mapping):
        raise ConfigError(
            error_text("chat", "part of a message", type(part).__name__, "a dictionary with a type")
        )
    kind = part.get("type") or next((k for k in ("text", "image_url", "image") if k in part), None)
    if kind in _TEXT_TYPES:
        if not isinstance(part.get("text"), str):
            got = type(part.get("text")).__name__
            raise ConfigError(error_text("chat", f"text of a part of type {kind}", got, "text"))
        return {**part, "type": "text", "text": clean_text(part["text"])}
    if kind not in _IMAGE_TYPES:
        raise ConfigError(
            error_text(
                "chat",
                "part of type",
                shorten(repr(kind)),
                "one of " + ", ".join((*_TEXT_TYPES, *_IMAGE_TYPES)),
            )
        )
    if role != "user":
        raise ConfigError(
            error_text(
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
                error_text(
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


def make_chat_handler(
    mmproj_path: str | os.PathLike[str], verbose: bool = False
) -> ElasticChatHandler:
    """Chat handler for a vision tower; the model's own template is read at the first call."""
    return ElasticChatHandler(clip_model_path=os.fspath(mmproj_path), verbose=verbose)
