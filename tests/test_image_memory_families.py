"""The image memory and `ask` with vision towers and memories of other families."""

from __future__ import annotations

from pathlib import Path

import elastic_llama as el
import llama_cpp
import numpy as np
import pytest
from elastic_llama.memory.reader import leading_images

from tests.support.mmproj_zoo import FAMILIES, write_mmproj
from tests.support.vision_text import N_EMBD, WIDTHS, write_text_model

#: M-RoPE, deepstack, tiles and their overview, slices, a sliding window, a recurrent part.
NAMES = ("qwen2vl", "qwen3vl", "idefics3", "minicpmv", "gemma3", "lfm2")
QUESTIONS = ["what is it? ", "and where? ", "why"]


@pytest.fixture(scope="module", params=NAMES)
def files(request, tmp_path_factory) -> tuple[Path, Path]:
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = write_text_model(folder / "text.gguf", family.text, family.tokens)
    n_embd = WIDTHS.get(family.text, N_EMBD)
    return model, write_mmproj(folder / "mmproj.gguf", family, n_embd)


@pytest.fixture
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, size, np.uint8) for size in ((56, 112, 3), (112, 56, 3))]


def load(files, **kwargs) -> el.ElasticLlama:
    elastic = el.ElasticConfig(budget=0.3, min_cells=4)
    options = {"elastic": elastic, "n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1}
    return el.ElasticLlama(files[0], mmproj_path=files[1], **{**options, **kwargs})


def logits_after(chat: el.Conversation, question: str, images) -> bytes:
    chat.prefill(question, images)
    logits = llama_cpp.llama_get_logits_ith(chat.llm._ctx.ctx, -1)
    return np.ctypeslib.as_array(logits, (chat.llm.n_vocab(),)).tobytes()


@pytest.mark.parametrize("options", [{}, {"elastic": None}], ids=str)
def test_answers_from_memory(files, images, tmp_path, options):
    """The same bits as where the images were compressed by hand."""
    expected = []
    for question in QUESTIONS:
        with load(files, **options) as llm:
            chat = el.Conversation(llm)
            pieces = chat.first_prompt(question, images)
            k = leading_images(pieces)
            assert len(pieces) == k + 1, "all images, and the question"
            llm.prefill(pieces[:k])
            if llm.session is not None:
                llm.session.compress_prefix(0.5)
            expected.append(logits_after(chat, question, images))
    assert len(set(expected)) == len(expected)
    for _ in range(2):
        with load(files, memory=tmp_path, **options) as llm:
            chat = el.Conversation(llm)
            for question, logits in zip(QUESTIONS, expected):
                chat.clear()
                assert logits_after(chat, question, images) == logits
            assert chat.stats.n_image == 0


def test_many_questions(files, images):
    with load(files) as llm:
        alone = [llm.ask(images, [question], max_tokens=8)[0] for question in QUESTIONS]
    with load(files, n_seq_max=4) as llm:
        assert llm.ask(images, QUESTIONS, max_tokens=8) == alone
