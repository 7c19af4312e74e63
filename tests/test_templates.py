"""Chat templates of vision models: where their images go, and what of a message they show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import elastic_llama as el
import pytest
from elastic_llama.images import to_data_uri
from elastic_llama.templates import PLAIN_CHATML, VICUNA, ChatTemplate
from PIL import Image

from tests.support.chat_templates import FAMILIES, SMOLVLM
from tests.support.tiny_llama import CHAT_TEMPLATE

ROOT = Path(__file__).parent.parent
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def assistant(said: str) -> dict[str, str]:
    return {"role": "assistant", "content": said}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    """The marker stands for the image; the family's own markers come from libmtmd alone."""
    source, expected = FAMILIES[name]
    messages = [user(text("Q1"), IMAGE, IMAGE), assistant("A1"), {"role": "user", "content": "Q2"}]
    assert ChatTemplate(source, "[BOS]", "[EOS]").render(messages, "M") == expected


def test_texts_are_joined_by_newlines_but_beside_images() -> None:
    template = ChatTemplate(FAMILIES["pixtral"][0])
    parts = (text("a"), text("b"), IMAGE, text("c"), IMAGE, IMAGE, text("d"), text("e"))
    assert template.render([user(*parts)], "M") == "[INST]a\nbMcMMd\ne[/INST]"


def test_images_go_first_where_a_template_knows_none() -> None:
    for source in (None, CHAT_TEMPLATE, FAMILIES["llava-1.6"][0]):
        out = ChatTemplate(source).render([user(text("a"), IMAGE, text("b"))], "<M>")
        assert out.count("<M>") == 1
        assert out.index("<M>") < out.index("a", out.index("<M>"))
    assert (
        ChatTemplate(None)
        .render([user(text("a"), IMAGE, text("b"))], "<M>")
        .endswith("USER: <M>abASSISTANT: ")
    )


@pytest.mark.parametrize("source", [PLAIN_CHATML, VICUNA])
def test_what_llava_models_are_asked_is_as_it_was(source: str) -> None:
    template = ChatTemplate(None if source is VICUNA else "named SmolLM, trained by us")
    assert template.source.endswith(source)
    assert template.content([text("a"), IMAGE, text("b")], "<M>") == "<M>ab"


def test_the_end_of_an_answer_is_a_token(tiny_vlm: Any) -> None:
    with el.ElasticLlama(tiny_vlm[0], n_ctx=64, n_threads=1) as llm:
        template = ChatTemplate.of(llm)
    assert "eos_token = '<|im_end|>'" in template.source
    assert "bos_token = ''" in template.source  # which the tokenizer adds


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for", "cannot be parsed"),
        ("{{ raise_exception('only one message') }}", "only one message"),
        ("{{ messages[0]['content'] + 1 }}", "template failed"),
    ],
)
def test_templates_that_fail(source: str, says: str) -> None:
    with pytest.raises(el.ConfigError, match=says):
        ChatTemplate(source).render([user(text("a"))], "M")


def test_a_template_without_content_shows_no_image(tiny_vlm: Any) -> None:
    model, mmproj = tiny_vlm
    options = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1}
    with el.ElasticLlama(model, mmproj_path=mmproj, **options) as llm:
        llm.metadata["tokenizer.chat_template"] = "the same for everything"
        picture = Image.new("RGB", (20, 20))
        with pytest.raises(el.ConfigError, match="got 0, expected 1"):
            el.Conversation(llm).ask("the", [picture])
        part = {"type": "image_url", "image_url": {"url": to_data_uri(picture)}}
        with pytest.raises(el.ConfigError, match="got 0, expected 1"):
            llm.create_chat_completion([user(text("the"), part)])


def test_a_template_of_parts_reads_the_same_in_both_ways(tiny_vlm: Any) -> None:
    model, mmproj = tiny_vlm
    options = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "elastic": None}
    with el.ElasticLlama(model, mmproj_path=mmproj, **options) as llm:
        llm.metadata["tokenizer.chat_template"] = SMOLVLM
        picture = Image.new("RGB", (20, 20), "red")
        talk = el.Conversation(llm)
        list(talk.ask("the heat", [picture], max_tokens=1))
        ours = llm.input_ids[: llm.n_tokens].copy()
        part = {"type": "image_url", "image_url": {"url": to_data_uri(picture)}}
        llm.create_chat_completion([user(part, text("the heat"))], max_tokens=1)
        theirs = llm.input_ids[: len(ours)]
        assert ((ours == theirs) | (ours < 0)).all()
        assert (ours < 0).sum() == (theirs < 0).sum() == 16
        talk.close()


@pytest.fixture(scope="module")
def collection() -> list[Path]:
    """The templates in the pinned llama.cpp."""
    out = subprocess.run(
        [sys.executable, str(ROOT / "cmake" / "prepare_llama_cpp.py")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    tree = next(line.partition("=")[2] for line in out.splitlines() if line.startswith("tree="))
    found = sorted((Path(tree) / "models" / "templates").glob("*.jinja"))
    assert len(found) > 60
    return found


#: Asks for variables that llama.cpp gives to it by name.
NEEDS_MORE = ("fireworks-ai-llama-3-firefunction-v2",)


def test_every_template_of_llama_cpp_shows_each_image_once(collection: list[Path]) -> None:
    for path in collection:
        if path.stem in NEEDS_MORE:
            continue
        template = ChatTemplate(path.read_text(encoding="utf-8"), "[BOS]", "[EOS]")
        first = [user(text("Zebra?"), IMAGE)]
        later = [*first, assistant("Yak!"), user(IMAGE, text("Xerus."))]
        for messages, n_images in ((first, 1), (later, 2)):
            out = template.render(messages, "<M>")
            assert out.count("<M>") == n_images, path.stem
            assert out.count("Zebra?") == 1, path.stem
            for marker in ("<|vision_start|>", "<start_of_image>", "[IMG]", "<|image|>", "<image>"):
                assert marker not in out.rpartition("Zebra?")[2], path.stem
        assert "Xerus." in out, path.stem
        assert out.index("Yak!") < out.index("Xerus."), path.stem
