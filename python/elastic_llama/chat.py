"""Which chat handler, and which prompt format, a model needs."""

from __future__ import annotations

import os
from typing import Any

from llama_cpp import llama_chat_format as formats

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
    """What a person wrote, in which the marker of an image stands for no image."""
    return text.replace(marker, marker.strip("<>"))


class ElasticChatHandler(formats.MTMDChatHandler):
    """llama-cpp-python's handler for images, with a template that knows images."""

    def _get_chat_template(self, llama_model: Any) -> str:
        return template_for(llama_model.metadata.get("tokenizer.chat_template"))

    def _get_template_messages(self, messages: list[Any], media_marker: str) -> list[Any]:
        """Images before the text of a message, as the models were trained."""
        out = []
        for message in messages:
            content = message.get("content")
            if isinstance(content, str):
                content = without_marker(content, media_marker)
            elif isinstance(content, list):
                parts = [_plain(part, media_marker) for part in content]
                content = sorted(parts, key=lambda part: part.get("type") != "image_url")
            out.append({**message, "content": content})
        return super()._get_template_messages(out, media_marker)

    def load_image(self, image_url: str) -> bytes:
        from .images import load_image, to_png

        return to_png(load_image(image_url))


def _plain(part: dict[str, Any], marker: str) -> dict[str, Any]:
    """A part of a message in whose text the marker stands for no image."""
    if part.get("type") != "text":
        return part
    return {**part, "text": without_marker(str(part.get("text", "")), marker)}


def make_chat_handler(
    mmproj_path: str | os.PathLike[str], verbose: bool = False
) -> ElasticChatHandler:
    """Chat handler for a vision tower; the model's own template is read at the first call."""
    return ElasticChatHandler(clip_model_path=os.fspath(mmproj_path), verbose=verbose)
