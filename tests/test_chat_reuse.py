"""Chat completions about images decode what is new: the cache is kept from call to call."""

from __future__ import annotations

from types import SimpleNamespace

import elastic_llama as el
import pytest
from elastic_llama.chat import PLAIN_CHATML, ElasticChatHandler
from elastic_llama.images import to_data_uri
from llama_cpp import Llama, LlamaRAMCache, mtmd_cpp
from llama_cpp.llama_chat_format import Llava15ChatHandler, MTMDChatHandler
from PIL import Image

TEXT = "the heat on the earth " * 8
N_IMAGE = 16
URLS = {c: to_data_uri(Image.new("RGB", (30, 20), c)) for c in ("red", "blue", "green")}


def user(question: str, *colors: str) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": URLS[color]}} for color in colors]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def said(answer: str) -> dict:
    return {"role": "assistant", "content": answer}


def ask(llm, *messages: dict, n: int = 12, **options) -> str:
    options = {"max_tokens": n, "temperature": 0.0, **options}
    out = llm.create_chat_completion(list(messages), **options)
    if options.get("stream"):
        return "".join(piece["choices"][0]["delta"].get("content", "") for piece in out)
    return out["choices"][0]["message"]["content"]


@pytest.fixture
def counts(monkeypatch) -> SimpleNamespace:
    """What was encoded and decoded: images, and positions of prompts."""
    out = SimpleNamespace(encoded=0, read=0)
    encode, prefill = mtmd_cpp.mtmd_encode_chunk, el.ElasticLlama.prefill

    def counted_encode(*args):
        out.encoded += 1
        return encode(*args)

    def counted_prefill(*args):
        n = prefill(*args)
        out.read += n
        return n

    monkeypatch.setattr(mtmd_cpp, "mtmd_encode_chunk", counted_encode)
    monkeypatch.setattr(el.ElasticLlama, "prefill", counted_prefill)

    def take() -> tuple[int, int]:
        result = (out.encoded, out.read)
        out.encoded = out.read = 0
        return result

    out.take = take
    return out


@pytest.fixture
def load(tiny_vlm):
    def make(**kwargs):
        options = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "mmproj_path": tiny_vlm[1]}
        return el.ElasticLlama(tiny_vlm[0], **{**options, **kwargs})

    return make


BUDGETS = [{"kv_budget": 0.3}, {"kv_budget": 100}, {"elastic": None}]


@pytest.mark.parametrize("options", BUDGETS, ids=str)
def test_the_same_request_again(load, counts, options):
    with load(**options) as llm:
        first = ask(llm, user(TEXT, "red"), n=40)
        n_encoded, n_read = counts.take()
        assert n_encoded == 1
        assert n_read > N_IMAGE
        # without a session the last token's logits are not kept
        n_again = 0 if llm.session else 1
        for stream in (False, True):
            assert ask(llm, user(TEXT, "red"), n=40, stream=stream) == first
            n_encoded, n_read = counts.take()
            assert (n_encoded, n_read <= n_again) == (0, True)


@pytest.mark.parametrize("options", BUDGETS, ids=str)
def test_the_next_question_reads_the_answer_and_itself(load, counts, options):
    with load(**options) as llm:
        first = ask(llm, user(TEXT, "red"))
        _, n_first = counts.take()
        n_prompt = n_first
        ask(llm, user(TEXT, "red"), said(first), user("the water"))
        n_encoded, n_read = counts.take()
        assert n_encoded == 0
        new = "<|im_end|>\n<|im_start|>user\nthe water<|im_end|>\n<|im_start|>assistant\n"
        # an answer that comes back as other tokens is read again, the prompt before it is not
        assert n_read <= len(llm.tokenize((first + new).encode(), False, special=True)) + 2
        assert n_read < n_prompt
        # an edited last question, about one image more
        ask(llm, user(TEXT, "red"), said(first), user("the sea", "blue"))
        n_encoded, n_read = counts.take()
        assert n_encoded == 1
        assert n_read < n_prompt + N_IMAGE


@pytest.mark.parametrize("options", BUDGETS, ids=str)
def test_other_images_and_back(load, counts, options):
    """Each answer is that of a model which saw nothing else; no image is encoded twice."""
    expected = {}
    for color in URLS:
        with load(**options) as llm:
            expected[color] = ask(llm, user(TEXT, color), repeat_penalty=1.0)
    with load(**options) as llm:
        counts.take()
        for color in (*URLS, *URLS):
            assert ask(llm, user(TEXT, color), repeat_penalty=1.0) == expected[color]
        assert counts.take()[0] == len(URLS)
        llm.set_cache(LlamaRAMCache())
        for color in (*URLS, *URLS):
            assert ask(llm, user(TEXT, color), repeat_penalty=1.0) == expected[color]


@pytest.mark.parametrize("checkpoints", [0, 2, 4])
@pytest.mark.parametrize("budget", [0.3, 100, 1.0])
def test_turns_are_those_of_a_replay(load, budget, checkpoints):
    """What was asked and taken back in between leaves no trace."""
    options = {"elastic": el.ElasticConfig(budget=budget, checkpoints=checkpoints)}
    with load(**options) as llm:
        at_once = ask(llm, user(TEXT, "red"), said("the heat"), user("the water"))
    with load(**options) as llm:
        # history and question in one prompt
        for _ in range(3):
            ask(
                llm, user(TEXT, "red"), said("the heat"), user("the water"), said("no"), user("the")
            )
            again = ask(llm, user(TEXT, "red"), said("the heat"), user("the water"))
            assert again == at_once
    with load(**options) as llm:
        first = ask(llm, user(TEXT, "red"))
        history = (user(TEXT, "red"), said(first))
        expected = ask(llm, *history, user("the water"))
    with load(**options) as llm:
        assert ask(llm, user(TEXT, "red")) == first
        ask(llm, *history, user("the earth and the sea " * 5, "blue"), n=30)
        assert ask(llm, *history, user("the water")) == expected
        if checkpoints != 2:  # two turns back is one more than those
            ask(llm, *history, user("the water"), said("no"), user("the"))
            assert ask(llm, *history, user("the water")) == expected


def test_the_same_image_twice_and_two_side_by_side(load, counts):
    with load(kv_budget=0.5) as llm:
        ask(llm, user(TEXT, "red", "red"))
        assert counts.take()[0] == 1  # by content, wherever it stands
        ask(llm, user(TEXT, "red", "blue"))
        assert counts.take()[0] == 1
        places = llm.input_ids[: llm.n_tokens]
        places = places[places < 0].reshape(2, N_IMAGE)
        assert (places[0] != places[1]).all()


class Stock(MTMDChatHandler):
    """As it comes, but for a template: the tiny model's takes no parts."""

    def _get_chat_template(self, llama_model):
        return PLAIN_CHATML


def test_off_says_what_stock_says(tiny_vlm, load):
    model, mmproj = map(str, tiny_vlm)
    handler = Stock(clip_model_path=mmproj, verbose=False)
    stock = Llama(
        model, chat_handler=handler, n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False
    )
    with load(elastic=None) as ours:
        first = ask(stock, user(TEXT, "red"))
        history = (user(TEXT, "red"), said(first))
        for messages in (
            (user(TEXT, "red"),),
            (*history, user("the water")),
            (*history, user("the sea", "blue")),
            (user(TEXT, "red"),),
            (user("the", "blue"), said("no"), user("the sea", "red")),
        ):
            for stream in (False, True):
                # more tokens would tell how batches round
                assert ask(ours, *messages, stream=stream) == ask(stock, *messages, stream=stream)
            options = {"max_tokens": 3, "temperature": 0}
            usage = [
                llm.create_chat_completion(list(messages), **options)["usage"]
                for llm in (ours, stock)
            ]
            assert usage[0] == usage[1]
    stock.close()


def test_ours_with_a_plain_llama(tiny_vlm, load):
    model, mmproj = map(str, tiny_vlm)
    handler = ElasticChatHandler(clip_model_path=mmproj, verbose=False)
    plain = Llama(
        model, chat_handler=handler, n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False
    )
    with load(elastic=None) as ours:
        assert ask(plain, user(TEXT, "red")) == ask(ours, user(TEXT, "red"))
    plain.close()


def test_stock_handlers_start_over(tiny_vlm, load, counts):
    handler = Llava15ChatHandler(clip_model_path=str(tiny_vlm[1]), verbose=False)
    with load(chat_handler=handler, mmproj_path=None, kv_budget=0.5) as llm:
        first = ask(llm, user(TEXT, "red"))
        assert ask(llm, user(TEXT, "blue"))
        assert ask(llm, user(TEXT, "red")) == first
        assert counts.take() == (0, 0)  # they encode without us


def test_streams_in_any_order(load):
    """A prompt that another call removed is read again at the first piece."""
    with load(kv_budget=0.5) as llm:
        expected = [ask(llm, user(TEXT, color)) for color in ("red", "blue")]
        streams = [
            llm.create_chat_completion(
                [user(TEXT, color)], max_tokens=12, temperature=0, stream=True
            )
            for color in ("red", "blue")
        ]
        for stream, answer in zip(streams, expected):
            text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in stream)
            assert text == answer


def test_a_prompt_longer_than_the_cells(load, counts):
    config = el.ElasticConfig(budget=60, kv_cells=100)
    with load(elastic=config, n_ctx=None, n_batch=64, n_ubatch=64) as llm:
        question = "the heat on the earth " * 40
        first = ask(llm, user(question, "red"))
        assert llm.n_tokens > super(el.ElasticLlama, llm).n_ctx()
        counts.take()
        assert ask(llm, user(question, "red")) == first
        assert counts.take() == (0, 0)


def test_mistakes_keep_the_cache(load, counts):
    with load(kv_budget=0.5, n_ctx=512) as llm:
        first = ask(llm, user(TEXT, "red"))
        counts.take()
        bad = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        for error, content in (
            (el.ImageError, [bad]),
            (el.ConfigError, [{"type": "video"}]),
            (el.ContextOverflowError, TEXT * 40),
        ):
            with pytest.raises(error):
                ask(llm, {"role": "user", "content": content})
            assert ask(llm, user(TEXT, "red")) == first
            assert counts.take() == (0, 0)


def test_an_image_that_cannot_be_decoded(load, monkeypatch):
    with load(kv_budget=0.5) as llm:
        first = ask(llm, user(TEXT, "red"))
        with monkeypatch.context() as patch:
            patch.setattr(mtmd_cpp, "mtmd_helper_decode_image_chunk", lambda *_: -3)
            with pytest.raises(el.StateError, match="code -3"):
                ask(llm, user(TEXT, "blue"))
        assert llm.n_tokens == 0
        assert ask(llm, user(TEXT, "red")) == first


# -- text alone


@pytest.fixture
def text_only(tiny_gqa):
    with el.ElasticLlama(tiny_gqa, n_ctx=512, n_threads=1, n_threads_batch=1, kv_budget=0.5) as llm:
        yield llm


def test_text_alone_with_parts_and_halves_of_characters(text_only):
    parts = [{"type": "text", "text": "the \ud83d"}, "heat"]
    expected = ask(text_only, {"role": "user", "content": "the \ufffdheat"})
    assert ask(text_only, {"role": "user", "content": parts}) == expected
    tool = {"type": "function", "function": {"name": "f", "description": "\ud83d"}}
    odd = {"role": "user", "content": "the", "name": "\ude00"}
    assert ask(text_only, odd, tools=[tool], stop="\ud83d") is not None
    for options in ({"suffix": "\ud83d"}, {"stop": ["\ud83d"]}, {"stop": "\ud83d"}, {"echo": True}):
        out = text_only.create_completion("the \ud83d", max_tokens=2, **options)
        assert out["usage"]["completion_tokens"] > 0
    assert (
        "".join(
            piece["choices"][0]["text"]
            for piece in text_only("the \ud83d", stream=True, max_tokens=3, temperature=0)
        )
        == text_only("the \ufffd", max_tokens=3, temperature=0)["choices"][0]["text"]
    )


def test_text_alone_refuses_images(text_only):
    for message in (user("the", "red"), {"role": "user", "content": {"image": b"x"}}):
        with pytest.raises(el.ConfigError, match=r"images in the messages, got 1.*pass mmproj"):
            ask(text_only, message)
    with pytest.raises(el.ConfigError, match="got str, expected a list"):
        text_only.create_chat_completion("hello")
    assert ask(text_only, {"role": "user", "content": "the"}) is not None


def test_messages_of_the_caller_stay(text_only):
    messages = [{"role": "user", "content": [{"type": "text", "text": "a\ud83d"}]}]
    before = repr(messages)
    ask(text_only, *messages)
    assert repr(messages) == before
