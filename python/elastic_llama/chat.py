"""Which chat handler, and which prompt format, a model needs."""

from __future__ import annotations

import os
from typing import Any

from llama_cpp import llama_chat_format as formats

from .gguf_check import Header

# What the embedded model was trained with: no system prompt, the image before the question.
PLAIN_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# LLaVA-1.5 files carry no template; this is the Vicuna form they were trained with.
VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions. "
    "{% for message in messages %}{% if message['role'] == 'assistant' %}\nASSISTANT: "
    "{% else %}\nUSER: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}\nASSISTANT: {% endif %}"
)


def template_for(template: str | None) -> str:
    """The Jinja template that renders messages with images for a model.

    Templates that cannot loop over the parts of a message are replaced: ChatML by its form without a
    default system prompt, a missing one by Vicuna's.
    """
    if not template:
        return VICUNA
    if "image" in template or "part" in template or "content in" in template:
        return template
    return PLAIN_CHATML if "<|im_start|>" in template else VICUNA


class ElasticChatHandler(formats.MTMDChatHandler):
    """llama-cpp-python's handler for images, with a template that knows images."""

    def _get_chat_template(self, llama_model: Any) -> str:
        return template_for(llama_model.metadata.get("tokenizer.chat_template"))

    def load_image(self, image_url: str) -> bytes:
        from .images import load_image, to_png

        return to_png(load_image(image_url))


def make_chat_handler(
    mmproj_path: str | os.PathLike[str], model: Header, verbose: bool = False
) -> ElasticChatHandler:
    """Chat handler for a vision tower."""
    del model
    return ElasticChatHandler(clip_model_path=os.fspath(mmproj_path), verbose=verbose)
