"""Many questions at once: each answer is that of the question alone, over the same cells."""

from __future__ import annotations

import elastic_llama as el
import numpy as np
import pytest
from elastic_llama.memory.reader import leading_images
from elastic_llama.sequences import SequenceGroup
from llama_cpp import mtmd_cpp
from PIL import Image

IMAGE = Image.new("RGB", (30, 20), "red")
QUESTIONS = ["the heat on the earth", "a sea", "the water " * 9, "", "the sea " * 3]


@pytest.fixture
def load(tiny_vlm):
    def make(**kwargs):
        options = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "mmproj_path": tiny_vlm[1]}
        elastic = el.ElasticConfig(budget=0.3, min_cells=4)
        return el.ElasticLlama(tiny_vlm[0], **{"elastic": elastic, **options, **kwargs})

    return make


def alone(load, question: str, n: int, budget: float, **options) -> str:
    """One question in a context of its own, by the image's compression and plain decoding."""
    with load(**options) as llm:
        pieces = el.Conversation(llm).first_prompt(question, IMAGE)
        k = leading_images(pieces)
        llm.prefill(pieces[:k])
        if llm.session is not None:
            llm.session.compress_prefix(budget)
        llm.prefill(pieces)
        tokens = []
        with llm.prompt_phase():  # so that nothing is compressed
            for _ in range(n):
                tokens.append(llm.sample(temp=0.0))
                if tokens[-1] == llm.token_eos():
                    tokens.pop()
                    break
                llm.eval(tokens[-1:])
        said = b"".join(llm.detokenize([token]) for token in tokens)
        return said.decode("utf-8", errors="replace")


OPTIONS = [
    {"n_seq_max": 9},
    {"n_seq_max": 3},  # two at once
    {"n_seq_max": 9, "n_batch": 16, "n_ubatch": 16},
    {"n_seq_max": 9, "n_ctx": 256},  # not all at once
    {},
    {"checkpoints": 0},
    {"elastic": None, "n_seq_max": 9},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_answers_are_those_of_single_questions(load, options, monkeypatch):
    options = dict(options)
    if "checkpoints" in options:
        options["elastic"] = el.ElasticConfig(
            budget=0.3, min_cells=4, checkpoints=options.pop("checkpoints")
        )
    plain = {k: v for k, v in options.items() if k in ("elastic", "n_batch", "n_ubatch")}
    expected = [alone(load, question, 12, 0.5, **plain) for question in QUESTIONS]
    assert len(set(expected)) > 1
    encoded = []
    encode = mtmd_cpp.mtmd_encode_chunk
    monkeypatch.setattr(
        mtmd_cpp, "mtmd_encode_chunk", lambda *args: encoded.append(1) or encode(*args)
    )
    with load(**options) as llm:
        assert llm.ask(IMAGE, QUESTIONS, max_tokens=12) == expected
        assert llm.ask(IMAGE, QUESTIONS[::-1], max_tokens=12) == expected[::-1]
        assert [llm.ask(IMAGE, [q], max_tokens=12)[0] for q in QUESTIONS] == expected
        assert len(encoded) == 1
        # other uses of the context in between
        chat = el.Conversation(llm)
        first = "".join(chat.ask("the sea", IMAGE, max_tokens=12))
        assert llm.ask(IMAGE, QUESTIONS[:2], max_tokens=12) == expected[:2]
        chat.clear()
        assert "".join(chat.ask("the sea", IMAGE, max_tokens=12)) == first
    with load(**options) as llm:
        assert "".join(el.Conversation(llm).ask("the sea", IMAGE, max_tokens=12)) == first


def test_with_a_memory(load, tmp_path, monkeypatch):
    expected = [alone(load, question, 12, 0.4) for question in QUESTIONS]
    for n_seq_max in (9, 1):
        options = {"memory": tmp_path, "memory_budget": 0.4, "n_seq_max": n_seq_max}
        with load(**options) as llm:
            assert llm.ask(IMAGE, QUESTIONS, max_tokens=12) == expected
            if n_seq_max == 1:
                monkeypatch.setattr(mtmd_cpp, "mtmd_encode_chunk", None)
                assert llm.ask(IMAGE, QUESTIONS, max_tokens=12) == expected
    with load(memory=tmp_path, memory_budget=0.4) as llm:
        assert llm.ask(IMAGE, QUESTIONS, max_tokens=12) == expected


def test_an_answer_after_ask_is_as_if_nothing_had_been_asked(load):
    """What the questions looked at does not count, when the image comes from the memory."""
    found = []
    for asked in ([], QUESTIONS):
        with load(memory=True, n_seq_max=4, elastic=el.ElasticConfig(0.1, min_cells=4)) as llm:
            chat = el.Conversation(llm)
            chat.remember(IMAGE)
            llm.ask(IMAGE, asked, max_tokens=12)
            assert llm.memory is not None
            assert chat.llm.prefill(chat.first_prompt("the sea", IMAGE)) > 0
            found.append(llm.session.importance(0))
    assert np.array_equal(*found)


def test_cells_are_shared(load, monkeypatch):
    """All questions have the image, and it is there once; nothing is left behind."""
    held = []
    step = SequenceGroup.step

    def looking(group):
        cells = [set(group.llm.session.cells(i)["index"].tolist()) for i in range(9)]
        held.append([(len(c & cells[0]), len(c - cells[0])) for c in cells])
        step(group)

    monkeypatch.setattr(SequenceGroup, "step", looking)
    with load(n_seq_max=9, memory_budget=8) as llm:
        llm.ask(IMAGE, QUESTIONS[:3], max_tokens=4)
        assert [llm.session.n_cells(i) for i in range(9)] == [8] + [0] * 8
    n = 8  # cells of the image
    assert held[0][0] == (n, 0)
    taken = sorted(cells for cells in held[0][1:] if cells[0])
    assert [shared for shared, _ in taken] == [n] * 3
    assert min(own for _, own in taken) > 0


def test_bad_arguments(load):
    with load(n_ctx=256) as llm:
        assert llm.ask(IMAGE, []) == []
        for bad in ("text", b"text", {"a": "b"}, [3], [None], None, 3):
            with pytest.raises(el.ConfigError, match="questions"):
                llm.ask(IMAGE, bad)
        assert len(llm.ask(IMAGE, (q for q in ["the sea", "a sea"]), max_tokens=3)) == 2
        for bad in (3, b"the sea"):
            with pytest.raises(el.ConfigError, match="system"):
                llm.ask(IMAGE, ["the sea"], system=bad)
            with pytest.raises(el.ConfigError, match="system"):
                el.Conversation(llm, bad)
            with pytest.raises(el.ConfigError, match="question"):
                el.Conversation(llm).ask(bad)
        with pytest.raises(el.ConfigError):
            llm.ask(IMAGE, ["the sea"], max_tokens=0)
        for bad in ([], None):
            with pytest.raises(el.ConfigError, match="images, got 0, expected one or more"):
                llm.ask(bad, ["the sea"])
        with pytest.raises(el.ContextOverflowError):
            llm.ask(IMAGE, ["the sea", "the water " * 300])
        assert llm.ask(IMAGE, ["the sea"], max_tokens=3)
    with pytest.raises(el.ConfigError):
        load(n_seq_max=0)
