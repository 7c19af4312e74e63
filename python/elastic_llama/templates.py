"""Chat templates: messages with images become the text of a prompt, as llama.cpp's server does it.

A marker stands in the text where an image goes. Most templates take the content of a message as one
text; some only as a list of parts. Which of both is found out by rendering a message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from .errors import ConfigError
from .errors import message as error_message

__all__ = ["PLAIN_CHATML", "VICUNA", "ChatTemplate", "template_for"]

# What the embedded model was trained with: no system prompt, the image before the question.
PLAIN_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% elif message['content'] %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_EMBEDDED = "named SmolLM, trained by"  # in the template of the embedded language model

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

_PROBE = "a message that stands in no template"


def template_for(template: str | None) -> str:
    """The Jinja template that renders messages with images for a model: its own, if there is one.

    A missing one is replaced by Vicuna's, and the embedded language model's by what the embedded
    vision tower was trained with.
    """
    if not template:
        return VICUNA
    return PLAIN_CHATML if _EMBEDDED in template else template


class ChatTemplate:
    """A model's chat template, and which form of content it takes.

    Parameters
    ----------
    text : str or None
        Jinja, as in the key ``tokenizer.chat_template`` of a GGUF file.
    bos, eos : str
        Texts of these tokens. `bos` is empty where the tokenizer adds it by itself.

    Attributes
    ----------
    source : str
        What is rendered.
    images_first : bool
        Whether images go before the text of their message: the template knows none, and such
        models were trained so.

    Raises
    ------
    ConfigError
        The template cannot be parsed.
    """

    def __init__(self, text: str | None, bos: str = "", eos: str = "") -> None:
        own = template_for(text)
        self.images_first = "image" not in own
        self._joint = "" if own in (VICUNA, PLAIN_CHATML) else "\n"
        # where llama-cpp-python renders it, too
        self.source = f"{{% set bos_token = {bos!r} %}}{{% set eos_token = {eos!r} %}}{{{{ '' }}}}"
        self.source += own
        try:
            self._template = _environment().from_string(self.source)
        except jinja2.TemplateError as e:
            raise ConfigError(
                error_message("chat template", "the model's template cannot be parsed", str(e))
            ) from e
        self._takes_text = self._shows(_PROBE) or not self._shows(_typed(_PROBE))

    @classmethod
    def of(cls, llm: Any) -> ChatTemplate:
        """That of a `llama_cpp.Llama`."""
        adds_bos = bool(llm._model.add_bos_token())
        bos = "" if adds_bos else _special(llm, llm.token_bos())
        return cls(llm.metadata.get("tokenizer.chat_template"), bos, _special(llm, llm.token_eos()))

    def content(self, content: Any, marker: str) -> Any:
        """The content of a message in the form that the template takes.

        Parameters
        ----------
        content : str, list of parts, or None
            Parts of type ``text`` and ``image_url``.
        marker : str
            Stands for an image.
        """
        if isinstance(content, list):
            content = self._joined(content, marker)
        return _typed(content) if isinstance(content, str) and not self._takes_text else content

    def _joined(self, parts: Sequence[Mapping[str, Any]], marker: str) -> str:
        """One text: a newline between two texts, none beside an image."""
        if self.images_first:
            parts = sorted(parts, key=lambda part: part.get("type") != "image_url")
        out = ""
        after_image = True
        for part in parts:
            is_image = part.get("type") == "image_url"
            if not is_image and not after_image:
                out += self._joint
            out += marker if is_image else str(part.get("text", ""))
            after_image = is_image or not out
        return out

    def render(
        self, messages: Sequence[Mapping[str, Any]], marker: str, generation: bool = True
    ) -> str:
        """The prompt that messages make, with `marker` where images go.

        Raises
        ------
        ConfigError
            The template refuses the messages, or fails.
        """

        def refuse(reason: str) -> None:
            raise ConfigError(error_message("chat template", reason))

        ready = [{**m, "content": self.content(m.get("content"), marker)} for m in messages]
        try:
            return str(self._render(ready, refuse, generation))
        except ConfigError:
            raise
        except Exception as e:  # whatever the template's expressions raise
            raise ConfigError(
                error_message("chat template", "the model's template failed", str(e))
            ) from e

    def _render(self, messages: list[dict[str, Any]], refuse: Any, generation: bool) -> str:
        return self._template.render(
            messages=messages,
            add_generation_prompt=generation,
            raise_exception=refuse,
            strftime_now=Jinja2ChatFormatter.strftime_now,
        )

    def _shows(self, content: Any) -> bool:
        """Whether content of this form is in the prompt that it makes."""

        def refuse(reason: str) -> None:
            raise ValueError(reason)

        try:
            return _PROBE in self._render([{"role": "user", "content": content}], refuse, True)
        except Exception:  # a template may raise anything for what it does not take
            return False


def _environment() -> ImmutableSandboxedEnvironment:
    """As in llama-cpp-python, whose handlers render the same templates."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Jinja2ChatFormatter.IgnoreGenerationTags, jinja2.ext.loopcontrols],
    )
    env.filters["tojson"] = Jinja2ChatFormatter.tojson
    return env


def _typed(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _special(llm: Any, token: int) -> str:
    return "" if token < 0 else llm.detokenize([token], special=True).decode(errors="replace")
