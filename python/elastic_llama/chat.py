"""Which chat handler, and which prompt format, a model needs."""

from __future__ import annotations

import io
import itertools
import os
import re
import secrets
from typing import Any

from llama_cpp import llama_chat_format as formats
from llama_cpp import mtmd_cpp
from PIL import Image

from .errors import ConfigError
from .errors import message as error_message
from .images import load_image, to_png
from .llama import ElasticLlama
from .messages import clean_text, read_messages
from .pieces import pixel_key
from .prompt_reader import EncodedImages, Mtmd, PromptReader
from .templates import PLAIN_CHATML, VICUNA, ChatTemplate, template_for
from .vision import ImageTokens

__all__ = [
    "PLAIN_CHATML",
    "VICUNA",
    "ElasticChatHandler",
    "make_chat_handler",
    "template_for",
    "without_marker",
]

_PLACE = f"image-{secrets.token_hex(16)}"  # of an image in a prompt; nobody can have written it


def without_marker(text: str, marker: str) -> str:
    """What a person or a model wrote, in which the marker of an image stands for no image."""
    name = marker.strip("<>")
    # with all brackets around it: the inner ones alone would leave a marker
    return re.sub(rf"(?<!<)<+{re.escape(name)}>+", name, text)


class ElasticChatHandler(formats.MTMDChatHandler):
    """llama-cpp-python's handler for images, with a template that knows images.

    With an `ElasticLlama`, only what its cache lacks of a prompt is encoded and decoded.
    """

    def __init__(self, *args: Any, image_tokens: ImageTokens | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._mtmd_cpp = Mtmd(image_tokens)
        self._template = ChatTemplate(None)
        self._encoded = EncodedImages()
        self._counter = itertools.count()

    def _init_mtmd_context(self, llama_model: Any) -> None:
        try:
            super()._init_mtmd_context(llama_model)
        except ValueError:
            self._mtmd_cpp._image_tokens.check_refusal()
            raise

    def __call__(self, *, llama: Any, messages: Any, **kwargs: Any) -> Any:
        messages = read_messages(messages)
        if isinstance(llama, ElasticLlama):
            same = llama.mmproj_path == self.clip_model_path
            llama = PromptReader(llama, self._encoded, "" if same else self.clip_model_path)
        return super().__call__(llama=llama, messages=messages, **kwargs)

    def _create_bitmap_from_bytes(self, image_bytes: bytes) -> Any:
        """With an id of its pixels, as `Conversation` has it, and a number of its own."""
        bitmap = super()._create_bitmap_from_bytes(image_bytes)
        with Image.open(io.BytesIO(image_bytes)) as image:  # of `load_image`
            content = pixel_key(image)
        number = next(self._counter)
        mtmd_cpp.mtmd_bitmap_set_id(bitmap, f"{content}/{number}".encode())
        return bitmap

    def _get_chat_template(self, llama_model: Any) -> str:
        self._template = ChatTemplate.of(llama_model)
        return self._template.source

    def _get_template_messages(self, messages: list[Any], media_marker: str) -> list[Any]:
        """Messages in the form that the template takes.

        Images leave `_PLACE` in the text. Text cannot say that, but it can say `media_marker`, in
        any role, in a tool, or across two parts.
        """
        content = self._template.content
        return [{**m, "content": content(m.get("content"), _PLACE)} for m in messages]

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
                error_message(
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


def make_chat_handler(
    mmproj_path: str | os.PathLike[str],
    verbose: bool = False,
    image_tokens: ImageTokens | None = None,
) -> ElasticChatHandler:
    """Chat handler for a vision tower; the model's own template is read at the first call."""
    return ElasticChatHandler(
        clip_model_path=os.fspath(mmproj_path), verbose=verbose, image_tokens=image_tokens
    )
