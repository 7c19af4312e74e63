"""`ElasticLlama.ask`: questions about the same image, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from .ask import SharedImage
from .config import whole
from .errors import ConfigError, message
from .images import as_images, load_image
from .memory.reader import PrefixReader
from .messages import as_text, as_texts

if TYPE_CHECKING:
    from .llama import ElasticLlama


class Asking:
    """A part of `ElasticLlama`."""

    _asking: Any = None  # a Conversation that cuts up the prompts of `ask`
    _is_of_ask = False  # sequence 0 is an image that `ask` compressed, and scored

    def ask(
        self, image: Any, questions: Sequence[str], *, max_tokens: int = 256, system: str = ""
    ) -> list[str]:
        """Greedy answers to questions about the same image, or images, decoded side by side.

        What the cache holds of the images is shared: they are encoded, decoded and compressed
        (`memory_budget`) once, or come from the image memory. Questions and answers are not
        compressed. As many are decoded at once as `n_seq_max` and the cells of the context allow.

        Parameters
        ----------
        image : image or list of images
            What `elastic_llama.images.load_image` takes.
        questions : sequence of str
        max_tokens : int
            Of each answer, at most, >= 1.
        system : str
            System prompt.

        Returns
        -------
        list of str
            In the order of the questions.

        Raises
        ------
        ImageError, ConfigError
            Nothing is decoded.
        ContextOverflowError
            The image and a question do not fit.
        """
        llm = cast("ElasticLlama", self)
        llm._check_open("ask")
        max_tokens = whole("max_tokens", max_tokens, 1)
        from .conversation import Conversation  # which imports ElasticLlama

        questions, system = as_texts("questions", questions), as_text("system", system)
        images = [load_image(one) for one in as_images(image)]
        if not images:
            raise ConfigError(message("ask", "images", 0, "one or more"))
        if self._asking is None:
            self._asking = Conversation(llm)
        self._asking._system = system
        prompts = [self._asking.first_prompt(question, images) for question in questions]
        if not prompts:
            return []
        llm._n_calls += 1
        reader = llm._image_reader or PrefixReader(llm, None, llm.memory_budget)
        self._is_of_ask = llm._session is not None
        return SharedImage(llm, prompts).answers(reader, max_tokens)

    def _forget_asked(self) -> None:
        """An answer does not depend on what was asked of the image before."""
        if self._is_of_ask:
            cast("ElasticLlama", self)._rewind.cut(0)
            self._is_of_ask = False

    def _end_asking(self) -> None:
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.close()
