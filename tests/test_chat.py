"""ElasticLlama where a llama_cpp.Llama is expected, and conversations that stay in the cache."""

from __future__ import annotations

import gc
import pickle

import elastic_llama as el
import numpy as np
import pytest
from elastic_llama.chat import PLAIN_CHATML, VICUNA, template_for
from elastic_llama.images import to_data_uri
from llama_cpp import LlamaRAMCache, mtmd_cpp
from llama_cpp.llama_chat_format import Llava15ChatHandler
from PIL import Image

from tests.support.oracle_plan import left_free

TEXT = "the heat on the earth " * 12
N_IMAGE = 16


def picture(color: str) -> Image.Image:
    return Image.new("RGB", (30, 20), color)


def messages(question: str = TEXT, color: str | None = "red") -> list[dict]:
    parts: list[dict] = [{"type": "text", "text": question}]
    if color:
        parts.append({"type": "image_url", "image_url": {"url": to_data_uri(picture(color))}})
    return [{"role": "user", "content": parts}]


def chat(llm, *args, n=6, **kwargs) -> str:
    out = llm.create_chat_completion(messages(*args), max_tokens=n, temperature=0, **kwargs)
    if kwargs.get("stream"):
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in out)
    return out["choices"][0]["message"]["content"]


@pytest.fixture
def vlm(tiny_vlm):
    def load(**kwargs):
        options = {
            "n_ctx": 512,
            "n_threads": 1,
            "n_threads_batch": 1,
            "mmproj_path": tiny_vlm[1],
            **kwargs,
        }
        return el.ElasticLlama(tiny_vlm[0], **options)

    return load


# -- llama-cpp-python's own calls


def test_chat_with_an_image_is_compressed(vlm):
    with vlm(kv_budget=0.5) as llm:
        chat(llm)
        s = llm.stats
        assert s.compressions == 1
        assert s.cells_before > N_IMAGE
        half = -(-s.cells_before // 2)
        assert s.cells_after == half - left_free(half)
        assert 0 < s.bytes_after < s.bytes_before
        assert llm.n_tokens > s.cells_before >= s.cells
        assert str(s.cells_before) in str(s)


def test_streaming_says_the_same(vlm):
    with vlm(kv_budget=0.5) as llm:
        assert chat(llm, stream=True) == chat(llm)


def test_full_policy_and_none_say_the_same(vlm):
    answers = set()
    for elastic in (None, el.ElasticConfig.off(), el.ElasticConfig(budget=1.0)):
        with vlm(elastic=elastic) as llm:
            answers.add(
                (
                    chat(llm),
                    llm.create_completion(TEXT, max_tokens=4, temperature=0)["choices"][0]["text"],
                )
            )
    assert len(answers) == 1


def test_completion_is_compressed(tiny_gqa):
    with el.ElasticLlama(tiny_gqa, kv_budget=0.5, n_ctx=512, n_threads=1) as llm:
        whole = llm.create_completion(TEXT, max_tokens=8, temperature=0)
        assert llm.stats.compressions == 1
        llm.reset()
        pieces = llm.create_completion(TEXT, max_tokens=8, temperature=0, stream=True)
        assert "".join(p["choices"][0]["text"] for p in pieces) == whole["choices"][0]["text"]


@pytest.mark.parametrize("n_batch", [1, 7, 198, 512])
def test_a_prompt_in_pieces_is_one_prompt(tiny_gqa, n_batch):
    """Pieces of a single token too: 198 leaves one at the end."""
    with el.ElasticLlama(tiny_gqa, kv_budget=0.5, n_ctx=512, n_batch=n_batch, n_threads=1) as llm:
        prompt = [5 + i for i in range(199)]
        tokens = llm.generate(prompt, temp=0)
        next(tokens)
        assert llm.session.n_cells() == 199
        next(tokens)
        assert llm.session.n_cells() == 100 - left_free(100) + 1
        assert llm.stats.compressions == 1
        tokens.close()


def test_own_handlers_work(tiny_vlm):
    handler = Llava15ChatHandler(clip_model_path=str(tiny_vlm[1]), verbose=False)
    with el.ElasticLlama(
        tiny_vlm[0], chat_handler=handler, kv_budget=0.5, n_ctx=1024, n_threads=1
    ) as llm:
        chat(llm)
        assert llm.stats.compressions == 1


def test_images_go_first_and_markers_in_text_are_text(vlm):
    with vlm() as llm:
        chat(llm, "<__media__> the", n=1)
        ids = llm.input_ids[: llm.n_tokens]
        start = int(np.argmax(ids < 0))
        assert list(np.flatnonzero(ids < 0)) == list(range(start, start + N_IMAGE))
        head = llm.detokenize(ids[:start].tolist(), special=True).decode()
        tail = llm.detokenize(ids[start + N_IMAGE :].tolist(), special=True).decode()
        assert head.replace(" ", "").endswith("<|im_start|>user\n")
        assert tail.strip().startswith("__media__ the<|im_end|>")


def test_bad_images_in_messages(vlm):
    with vlm() as llm:
        for url in ("data:image/png;base64,AAAA", "file:///no/such.png"):
            bad = messages()
            bad[0]["content"][1]["image_url"]["url"] = url
            with pytest.raises(el.ImageError):
                llm.create_chat_completion(bad)
        assert chat(llm)


def test_an_image_that_does_not_fit(vlm):
    with vlm(n_ctx=256) as llm:
        with pytest.raises(el.ContextOverflowError):
            chat(llm, "the " * 240)
        assert chat(llm, "the")


# -- prefix reuse never takes one image for another


def test_two_images_never_share_a_prefix(vlm):
    with vlm(elastic=None) as llm:
        chat(llm, TEXT, "red")
        first = llm.input_ids[: llm.n_tokens].copy()
        chat(llm, TEXT, "blue")
        second = llm.input_ids[: llm.n_tokens]
        places = first < 0
        assert places.sum() == N_IMAGE
        assert not (first[places] == second[: len(first)][places]).any()


def test_a_text_prompt_after_an_image_starts_over(vlm):
    with vlm(elastic=None) as llm:
        prompt = llm.tokenize(b"<|im_start|>user\n", special=True) + [0] * 40
        expected = next(llm.generate(prompt, temp=0))
        chat(llm)
        assert next(llm.generate(prompt, temp=0)) == expected


def test_llama_cache_does_not_mix_images(vlm):
    with vlm(kv_budget=0.5) as plain:
        expected = {color: chat(plain, TEXT, color) for color in ("red", "blue")}
    with vlm(kv_budget=0.5) as llm:
        llm.set_cache(LlamaRAMCache())
        for color in ("red", "blue", "red"):
            assert chat(llm, TEXT, color) == expected[color]


# -- states


def test_save_load_continue(vlm):
    with vlm(kv_budget=0.5) as llm:
        chat(llm)
        state = llm.save_state()

        def go_on() -> list[int]:
            llm.eval([11])
            out = []
            for _ in range(8):
                out.append(llm.sample(temp=0))
                llm.eval([out[-1]])
            return out

        expected = go_on()
        chat(llm, "the", "blue")
        llm.load_state(state)
        assert go_on() == expected


def test_pickle(vlm):
    with vlm(kv_budget=0.5) as llm:
        answer, config = chat(llm), llm.elastic
        copy = pickle.loads(pickle.dumps(llm))
    with copy:
        assert (copy.elastic, chat(copy)) == (config, answer)


# -- Conversation


def test_conversation_keeps_its_turns(vlm):
    with vlm(kv_budget=0.5) as llm:
        talk = el.Conversation(llm)
        assert "".join(talk.ask(TEXT, [picture("red")], max_tokens=4)) is not None
        s = talk.stats
        assert s.n_image == N_IMAGE
        assert s.encode_ms > 0
        half = -(-s.cells_prompt // 2)
        assert s.cells_prompt == s.n_image + s.n_text
        assert s.cells_kept == half - left_free(half)
        assert s.bytes_kept < s.bytes_prompt
        assert s.n_answer == 4
        before = llm.n_tokens
        list(talk.ask("the", max_tokens=4))
        assert talk.stats.n_image == 0
        assert talk.stats.encode_ms == 0
        assert talk.stats.n_text < 40
        assert llm.n_tokens > before
        talk.close()


def test_conversation_says_what_the_handler_says(vlm):
    for elastic in (None, el.ElasticConfig(budget=0.5)):
        with vlm(elastic=elastic) as llm:
            talk = el.Conversation(llm)
            list(talk.ask(TEXT, [picture("red")], max_tokens=6))
            ours = llm.input_ids[: llm.n_tokens].copy()
            talk.close()
            chat(llm, repeat_penalty=1.0)
            # a completion goes on to the end of a multi-byte character
            theirs = llm.input_ids[: len(ours)]
            assert ((ours == theirs) | (ours < 0)).all()


def test_conversation_goes_past_n_ctx(vlm):
    """Positions go on where compressed cells leave room."""
    with vlm(elastic=el.ElasticConfig(budget=100, policy="local"), n_ctx=256) as llm:
        talk = el.Conversation(llm)
        list(talk.ask("the heat", [picture("red")], max_tokens=8))
        for _ in range(12):
            list(talk.ask("the heat on the earth", max_tokens=8))
            assert llm.session.n_cells() <= 256
        assert llm.n_tokens > 256
        talk.close()


def first_answer(vlm, question, images):
    with vlm(kv_budget=0.5, n_ctx=256) as llm:
        return "".join(el.Conversation(llm).ask(question, images, max_tokens=4))


def test_a_refused_turn_leaves_the_conversation(vlm):
    with vlm(kv_budget=0.5, n_ctx=256) as llm:
        talk = el.Conversation(llm)
        list(talk.ask("the", [picture("red")], max_tokens=4))
        with pytest.raises(el.ContextOverflowError, match="clear the conversation"):
            list(talk.ask("the " * 300))
        with pytest.raises(el.ImageError):
            talk.ask("the", ["no.png"])
        answer = "".join(talk.ask("the heat", max_tokens=4))
        assert talk.stats.n_image == 0  # is still there
        ids = llm.input_ids[: llm.n_tokens].copy()
        talk.clear()
        assert "".join(talk.ask("the", max_tokens=4)) == first_answer(vlm, "the", [])
        assert not (llm.input_ids[: llm.n_tokens] < 0).any()
        talk.close()
    with vlm(kv_budget=0.5, n_ctx=256) as llm:  # as if nothing had been refused
        talk = el.Conversation(llm)
        list(talk.ask("the", [picture("red")], max_tokens=4))
        assert "".join(talk.ask("the heat", max_tokens=4)) == answer
        np.testing.assert_array_equal(llm.input_ids[: llm.n_tokens], ids)
        talk.close()


def test_images_need_a_vision_tower(tiny_gqa):
    with el.ElasticLlama(tiny_gqa, n_ctx=256, n_threads=1) as llm:
        talk = el.Conversation(llm)
        with pytest.raises(el.ConfigError, match="mmproj"):
            talk.ask("the", [picture("red")])
        assert "".join(talk.ask("the", max_tokens=3)) is not None


def test_leaving_an_answer_early(vlm):
    with vlm(kv_budget=0.5) as llm:
        talk = el.Conversation(llm)
        for _piece in talk.ask(TEXT, [picture("red")], max_tokens=50):
            break
        list(talk.ask("the", max_tokens=4))
        assert talk.stats.n_answer == 4
        talk.close()


def test_conversations_share_a_tower(vlm, monkeypatch):
    """It is loaded once, and freed with the model or with the last conversation."""
    n_loaded, n_freed = [], []
    load, free = mtmd_cpp.mtmd_init_from_file, mtmd_cpp.mtmd_free
    monkeypatch.setattr(
        mtmd_cpp, "mtmd_init_from_file", lambda *args: n_loaded.append(1) or load(*args)
    )
    monkeypatch.setattr(mtmd_cpp, "mtmd_free", lambda ctx: n_freed.append(1) or free(ctx))
    with vlm(kv_budget=0.5) as llm:
        for _ in range(3):  # that nobody closes
            answer = "".join(el.Conversation(llm).ask("the", [picture("red")], max_tokens=4))
        one, two = el.Conversation(llm), el.Conversation(llm)
        assert len(n_loaded) == 1
        late = two.ask("the", [picture("blue")])
        one.close()
        one.close()
        assert not n_freed
        assert "".join(two.ask("the", [picture("red")], max_tokens=4)) == answer
        gc.collect()  # those of the loop
        two.close()
        assert len(n_freed) == 1
        for closed in (one, two):
            for use in (closed.ask, closed.first_prompt, closed.prefill):
                with pytest.raises(el.StateError, match="conversation is closed"):
                    use("the", [picture("red")])
        with pytest.raises(el.StateError, match="conversation is closed"):
            next(late)
        three = el.Conversation(llm)
        assert "".join(three.ask("the", [picture("red")], max_tokens=4)) == answer
        assert len(n_loaded) == 2
    assert len(n_freed) == 2
    three.close()
    assert len(n_freed) == 2
    with pytest.raises(el.StateError, match="closed"):
        el.Conversation(llm)


@pytest.mark.parametrize("max_tokens", [1, 8])
def test_the_first_piece_does_not_wait_for_the_compression(vlm, max_tokens):
    with vlm(kv_budget=0.5) as llm:
        talk = el.Conversation(llm)
        answer = talk.ask(TEXT, [picture("red")], max_tokens=max_tokens)
        next(answer)
        assert llm.stats.compressions == 0
        next(answer, None)
        assert llm.stats.compressions == 1
        list(answer)
        assert llm.stats.compressions == 1
        assert talk.stats.cells_kept < talk.stats.cells_prompt


@pytest.mark.parametrize("other", ["ask", "complete", "close"])
def test_nothing_of_another_call_is_compressed(vlm, other):
    """An answer that goes on late finds another prompt in the cache, or none."""
    with vlm(kv_budget=0.5) as llm:
        talk = el.Conversation(llm)
        answer = talk.ask(TEXT, [picture("red")], max_tokens=8)
        next(answer)
        if other == "ask":
            el.Conversation(llm).prefill(TEXT + "the sea")
        elif other == "complete":
            llm.prefill([el.pieces.TextPiece(tuple(llm.tokenize(TEXT.encode())))])
        else:
            llm.close()
        with pytest.raises(el.StateError):
            next(answer)
        assert other == "close" or llm.stats.compressions == 0


# -- templates


def test_templates():
    assert template_for(None) == VICUNA
    chatml = "{% for m in messages %}{{'<|im_start|>' + m['role'] + m['content']}}{% endfor %}"
    assert template_for(chatml) == chatml
    smol = "You are a helpful AI assistant named SmolLM, trained by Hugging Face" + chatml
    assert template_for(smol) == PLAIN_CHATML


def test_plain_chatml_is_what_the_embedded_model_was_trained_with():
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        PLAIN_CHATML
    )
    parts = [{"type": "text", "text": "<image>"}, {"type": "text", "text": "Q?"}]
    out = template.render(messages=[{"role": "user", "content": parts}], add_generation_prompt=True)
    assert out == "<|im_start|>user\n<image>Q?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.slow
@pytest.mark.model
def test_a_real_model_still_answers(embedded_model):
    with el.ElasticLlama(embedded_model, kv_budget=0.8, n_ctx=512, n_threads=1) as llm:
        question = "The capital of France is Paris. " * 8 + "What is the capital of France?"
        out = llm.create_chat_completion(
            [{"role": "user", "content": question}], max_tokens=24, temperature=0
        )
        assert "Paris" in out["choices"][0]["message"]["content"]
        assert llm.stats.compressions == 1
