"""Faults of everyday use: Ctrl-C, lazy answers, long logits, closed models, states of others."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tracemalloc
from pathlib import Path

import elastic_llama as el
import llama_cpp
import numpy as np
import pytest
from elastic_llama.images import to_data_uri
from llama_cpp import Llama, LlamaRAMCache, LogitsProcessorList, mtmd_cpp
from PIL import Image

TEXT = "the heat on the earth " * 8
N_IMAGE = 16
RED, BLUE = (Image.new("RGB", (30, 20), color) for color in ("red", "blue"))


def ask_image(llm, image: Image.Image = RED, n: int = 8, **options):
    parts = [
        {"type": "image_url", "image_url": {"url": to_data_uri(image)}},
        {"type": "text", "text": TEXT},
    ]
    return llm.create_chat_completion(
        [{"role": "user", "content": parts}], max_tokens=n, temperature=0, **options
    )


def answer(out) -> str:
    return out["choices"][0]["message"]["content"]


def complete(llm, prompt: str = TEXT, n: int = 8, **options) -> str:
    out = llm.create_completion(prompt, max_tokens=n, temperature=0, **options)
    return out["choices"][0]["text"]


def run_python(code: str, *args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=Path(__file__).parents[1],
    )


@pytest.fixture
def vlm(tiny_vlm):
    def load(**kwargs):
        options = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "mmproj_path": tiny_vlm[1]}
        return el.ElasticLlama(tiny_vlm[0], **{**options, **kwargs})

    return load


@pytest.fixture
def load(tiny_gqa):
    def make(**kwargs):
        return el.ElasticLlama(
            tiny_gqa, **{"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, **kwargs}
        )

    return make


# -- a: Ctrl-C while native code runs

INTERRUPT = """
import os, signal, sys, threading
import elastic_llama as el, llama_cpp
from llama_cpp import mtmd_cpp
from PIL import Image
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it


class Interrupted:
    # Ctrl-C comes while the thread that calls is inside, where it has given up the GIL
    def __init__(self, module, name):
        self.native, self.armed, self.inside, self.n = getattr(module, name), False, False, 0
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self.press, daemon=True).start()
        setattr(module, name, self)
    def press(self):
        while True:
            self.go.acquire()
            if self.inside:
                os.kill(os.getpid(), signal.SIGINT)
                self.n += 1
            self.done.release()
    def __call__(self, *args):
        self.inside = True
        try:
            if self.armed:
                self.armed = False
                self.go.release()
            return self.native(*args)
        finally:
            self.inside = False

sys.setswitchinterval(10)  # the other thread waits for the native call
"""

CALLS = """
def ask(talk):
    return "".join(talk.ask("the heat " * 20, [red], max_tokens=3))

red = Image.new("RGB", (9, 9), "red")
for budget in (0.5, 1.0):
    llm = el.ElasticLlama(sys.argv[1], mmproj_path=sys.argv[2], n_ctx=512, n_threads=1,
                          n_threads_batch=1, verbose=sys.argv[3] == "True", kv_budget=budget)
    talk = el.Conversation(llm)
    expected = ask(talk)
    for module, name in ((mtmd_cpp, "mtmd_encode_chunk"), (llama_cpp.llama_cpp, "llama_decode"),
                         (mtmd_cpp, "mtmd_helper_decode_image_chunk")):
        call, n = Interrupted(module, name), 0
        for _ in range(100):
            talk.clear()
            llm.reset()
            talk._encoded = type(talk._encoded)()
            call.armed = True
            try:
                ask(talk)
            except KeyboardInterrupt:
                n += 1
            call.done.acquire()
            talk.clear()
            assert ask(talk) == expected
            if call.n == 3:  # it may come too late
                break
        print(name, n, call.n)
        setattr(module, name, call.native)
"""


@pytest.mark.parametrize("verbose", [False, True])
def test_ctrl_c_is_not_lost(tiny_vlm, verbose):
    done = run_python(INTERRUPT + CALLS, *tiny_vlm, verbose)
    assert done.returncode == 0, done.stderr
    names = ("mtmd_encode_chunk", "llama_decode", "mtmd_helper_decode_image_chunk")
    assert done.stdout.splitlines() == [f"{name} 3 3" for name in names] * 2
    assert "ignored" not in done.stderr


def test_ctrl_c_ends_the_command_line(tiny_vlm, tmp_path):
    RED.save(tmp_path / "a.png")
    code = """
from elastic_llama.cli import main
call = Interrupted(mtmd_cpp, "mtmd_encode_chunk")
while True:
    call.armed = True
    code = main(["describe", sys.argv[3], "-m", sys.argv[1], "--mmproj", sys.argv[2], "-n", "1"])
    call.done.acquire()
    if call.n:
        sys.exit(code)
"""
    done = run_python(INTERRUPT + code, *tiny_vlm, tmp_path / "a.png")
    assert done.returncode == 130, done.stderr
    assert "ignored" not in done.stderr


PLACES = {
    "encode": (mtmd_cpp, "mtmd_encode_chunk"),
    "image": (mtmd_cpp, "mtmd_helper_decode_image_chunk"),
    "text": (llama_cpp.llama_cpp, "llama_decode"),
    "answer": (el.ElasticLlama, "sample"),
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("budget", [0.3, 1.0])
@pytest.mark.parametrize("place", PLACES)
def test_a_conversation_after_an_interrupt(vlm, monkeypatch, place, budget, after):
    """A question that was not read yet never was; an answer ends where it is."""
    target, name = PLACES[place]
    native = getattr(target, name)

    def interrupted(*args, **kwargs):
        if after:
            native(*args, **kwargs)
        raise KeyboardInterrupt

    def first(talk) -> str:
        return "".join(talk.ask(TEXT, [RED], max_tokens=6))

    def then(talk) -> str:
        return "".join(talk.ask("the sea", [BLUE], max_tokens=6))

    with vlm(kv_budget=budget) as llm:
        talk = el.Conversation(llm)
        first(talk)
        if place == "answer":
            list(talk.ask("the sea", [BLUE], max_tokens=0))
        expected = then(talk)
    with vlm(kv_budget=budget) as llm:
        talk = el.Conversation(llm)
        first(talk)
        with monkeypatch.context() as patch:
            patch.setattr(target, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                then(talk)
        assert then(talk) == expected


def test_what_a_logits_processor_raises(load):
    """It is called out of native code, where an exception would be printed and forgotten."""
    for error in (KeyboardInterrupt, ZeroDivisionError):

        def fail(ids, scores, error=error):
            raise error

        with load() as llm:
            for processor in (fail, lambda ids, scores: scores):
                options = {"logits_processor": LogitsProcessorList([processor])}
                if processor is fail:
                    with pytest.raises(error):
                        complete(llm, **options)
                else:
                    assert complete(llm, **options) == complete(llm)


# -- b, h: answers that are read late, two conversations on one model


@pytest.mark.parametrize("options", [{"kv_budget": 0.3}, {"elastic": None}], ids=str)
def test_two_questions_asked_before_either_answer_is_read(vlm, options):
    with vlm(**options) as llm:
        talk = el.Conversation(llm)
        expected = ["".join(talk.ask(q, [RED], max_tokens=6)) for q in (TEXT, "the sea")]
        expected.append("".join(talk.ask("the earth", max_tokens=6)))
    with vlm(**options) as llm:
        talk = el.Conversation(llm)
        lazy = [talk.ask(q, [RED], max_tokens=6) for q in (TEXT, "the sea")]
        assert ["".join(one) for one in lazy] == expected[:2]
        assert "".join(talk.ask("the earth", max_tokens=6)) == expected[2]


def test_an_answer_that_another_question_ended(vlm):
    with vlm(kv_budget=0.3) as llm:
        talk = el.Conversation(llm)
        first, second = talk.ask(TEXT, [RED], max_tokens=30), talk.ask("the sea", max_tokens=6)
        next(first)
        next(second)
        with pytest.raises(el.StateError, match="another question"):
            next(first)
        assert "".join(second) is not None
        assert "".join(talk.ask("the", max_tokens=6)) is not None


@pytest.mark.parametrize("options", [{"kv_budget": 0.3}, {"elastic": None}], ids=str)
def test_two_conversations_on_one_model(vlm, options):
    """Each goes on as if it had to read all of it again, its image too."""
    questions = (TEXT, "the sea", "the earth")
    images = (RED, BLUE)

    def turn(talk, i: int) -> str:
        out = "".join(talk.ask(questions[i], [images[talk.number]] if i == 0 else [], max_tokens=6))
        assert talk.stats.n_image == N_IMAGE
        assert (talk.stats.encode_ms > 0) == (i == 0)
        return out

    with vlm(**options) as llm:
        talks = [el.Conversation(llm) for _ in images]
        for number, talk in enumerate(talks):
            talk.number = number
        together = [[turn(talk, i) for talk in talks] for i in range(3)]
    for number in range(2):
        with vlm(**options) as llm:
            talk = el.Conversation(llm)
            talk.number = number
            for i in range(3):
                llm.reset()
                llm._ctx.kv_cache_clear()
                assert turn(talk, i) == together[i][number]


@pytest.mark.parametrize("options", [{"kv_budget": 0.3}, {"elastic": None}], ids=str)
def test_other_calls_between_two_turns(vlm, options):
    def completion(llm):
        complete(llm)

    def chat(llm):
        ask_image(llm, BLUE)

    def rewind(llm):
        llm.n_tokens = 5

    def load_state(llm):
        complete(llm)
        llm.load_state(llm.save_state())

    def second(call) -> str:
        with vlm(**options) as llm:
            talk = el.Conversation(llm)
            list(talk.ask(TEXT, [RED], max_tokens=6))
            call(llm)
            answer = "".join(talk.ask("the sea", max_tokens=6))
            assert talk.stats.n_image == N_IMAGE
            assert int((llm.input_ids[: llm.n_tokens] < 0).sum()) == N_IMAGE
            return answer

    expected = second(lambda llm: (llm.reset(), llm._ctx.kv_cache_clear()))
    for call in (completion, chat, rewind, load_state):
        assert second(call) == expected


# -- d: no limit, and seeds


@pytest.mark.parametrize("limit", [-1, None, 0])
def test_limits_of_an_answer(vlm, limit):
    def ask(n):
        talk = el.Conversation(llm)
        return "".join(talk.ask(TEXT, [RED], max_tokens=n)), talk

    with vlm(kv_budget=0.3) as llm:
        whole, talk = ask(10_000)
        assert talk.stats.finish == "stop"
        assert talk.stats.n_answer > 1
        text, talk = ask(limit)
        if limit == 0:
            assert (text, talk.stats.n_answer, talk.stats.finish) == ("", 0, "length")
        else:
            assert (text, talk.stats.finish) == (whole, "stop")
        assert "".join(talk.ask("the", max_tokens=3)) is not None


def test_seeds(vlm):
    def drawn(seed) -> str:
        talk = el.Conversation(llm)
        return "".join(talk.ask(TEXT, max_tokens=12, temperature=2.0, top_k=0, seed=seed))

    with vlm(kv_budget=0.5) as llm:
        assert drawn(0) == drawn(0)
        assert drawn(7) == drawn(7) != drawn(0)
        assert len({drawn(None) for _ in range(3)}) > 1


def test_bytes_of_a_cache_that_is_off(vlm):
    with vlm(elastic=None) as llm:
        talk = el.Conversation(llm)
        list(talk.ask(TEXT, [RED], max_tokens=4))
        n_cells = talk.stats.cells_prompt
        # 2 layers, K and V of one head of 64 in 16 bits, and some for each cell
        least = n_cells * 2 * 2 * llm.n_embd() // 2 * 2
        assert (
            least <= talk.stats.bytes_prompt == talk.stats.bytes_kept < least + 64 * n_cells + 999
        )


# -- c: logits of all positions


def test_logits_all_past_n_ctx(load):
    """Positions go on where cells were freed; so do the rows of logits."""
    with load(kv_budget=60, n_ctx=256, logits_all=True) as llm:
        tokens = [5 + i % 200 for i in range(180)]
        out = list(itertools.islice(llm.generate(tokens, temp=0), 150))
        assert llm.n_tokens > 256
        assert len(llm.scores) >= llm.n_tokens
        for i in range(150 - 1):
            assert int(llm.scores[180 + i].argmax()) == out[i + 1]


@pytest.mark.parametrize("options", [{"kv_budget": 0.3}, {"elastic": None}], ids=str)
def test_logprobs_are_stocks(load, tiny_gqa, options):
    stock = Llama(
        str(tiny_gqa), n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
    )
    request = {"max_tokens": 1, "temperature": 0, "logprobs": 3}
    with load(logits_all=True, **options) as llm:
        for prompt in (TEXT, TEXT, TEXT + "the sea", TEXT):
            ours = llm.create_completion(prompt, **request)["choices"][0]["logprobs"]
            theirs = stock.create_completion(prompt, **request)["choices"][0]["logprobs"]
            assert ours["tokens"] == theirs["tokens"]
            np.testing.assert_allclose(ours["token_logprobs"], theirs["token_logprobs"], atol=1e-2)
    stock.close()


def test_logits_all_with_images_and_turns(vlm):
    with vlm(kv_budget=0.3, n_ctx=300, logits_all=True) as llm:
        first = answer(ask_image(llm, logprobs=True, top_logprobs=2))
        out = ask_image(llm, logprobs=True, top_logprobs=2)
        assert answer(out) == first
        talk = el.Conversation(llm)
        for _ in range(12):
            list(talk.ask("the heat on the earth", max_tokens=16))
        assert llm.n_tokens > 300


# -- g: stderr


def test_stderr_is_empty_and_a_failure_says_why(tiny_gqa, tiny_vlm):
    done = run_python(
        """
import sys
import elastic_llama as el, llama_cpp
from PIL import Image
llm = el.ElasticLlama(sys.argv[1], n_ctx=512, n_threads=1, n_threads_batch=1, kv_budget=0.3)
for _ in range(3):
    llm("the heat on the earth " * 20, max_tokens=20)
    llm("the heat on the earth " * 10, max_tokens=20)
see = el.ElasticLlama(sys.argv[2], mmproj_path=sys.argv[3], n_ctx=512, n_threads=1,
                      n_threads_batch=1, kv_budget=0.3)
talk = el.Conversation(see)
for _ in range(3):
    list(talk.ask("the heat " * 20, [Image.new("RGB", (9, 9))], max_tokens=9))
    talk.clear()
print("quiet", flush=True)
print("now", file=sys.stderr, flush=True)
native = llama_cpp.llama_cpp.llama_decode
def wrong(ctx, batch):
    batch.pos[0] += 7  # positions that do not follow each other
    return native(ctx, batch)
llama_cpp.llama_cpp.llama_decode = wrong
for call in (lambda: llm.eval([5]), lambda: llm("a new prompt")):
    try:
        call()
    except el.StateError as e:
        print(e)
""",
        tiny_gqa,
        *tiny_vlm,
    )
    assert done.returncode == 0, done.stderr
    quiet, *failures = done.stdout.splitlines()
    assert quiet == "quiet"
    assert len(failures) == 2, failures
    for line in failures:
        assert line.startswith("[decode] ")
        assert "returned -1: " in line
        assert "position" in line
    assert done.stderr.splitlines()[0] == "now"


# -- i: streams that go on, models that are closed


@pytest.mark.parametrize("options", [{"kv_budget": 0.3}, {"elastic": None}], ids=str)
def test_a_stream_that_goes_on_after_another_call(load, options):
    with load(**options) as llm:
        tokens = llm.tokenize(TEXT.encode())
        complete(llm)
        state = llm.save_state()
        # one letter a token: halves of characters would be held back
        request = {"max_tokens": 20, "logit_bias": {tokens[-1]: 1e6}, "stream": True}
        for call in (
            lambda: llm.eval([5]),
            lambda: complete(llm, "the sea"),
            llm.reset,
            lambda: llm.load_state(state),
        ):
            for stream in (
                llm.generate(tokens, temp=0),
                llm.create_completion(TEXT, **request),
                llm.create_chat_completion([{"role": "user", "content": TEXT}], **request),
            ):
                next(stream)
                next(stream)
                call()
                with pytest.raises(el.StateError, match="cannot go on"):
                    list(stream)
                assert complete(llm)


CLOSED = """
import sys
import elastic_llama as el
from elastic_llama.images import to_data_uri
from PIL import Image

red = Image.new("RGB", (9, 9), "red")
parts = [{"type": "image_url", "image_url": {"url": to_data_uri(red)}},
         {"type": "text", "text": "the"}]
messages = [{"role": "user", "content": parts}]
llm = el.ElasticLlama(sys.argv[1], mmproj_path=sys.argv[2], n_ctx=256, n_threads=1,
                      n_threads_batch=1)
talk = el.Conversation(llm)
state = llm.save_state()
tokenizer, model, ctx, batch = llm.tokenizer(), llm._model, llm._ctx, llm._batch

def started(stream):
    next(stream)
    return stream

# one at a time: a stream that another call follows is refused for that
streams = {
    "generate": llm.generate([5, 6], temp=0),
    "completion": llm("the", stream=True),
    "chat": llm.create_chat_completion(messages, stream=True),
    "answer": talk.ask("the", [red]),
}
begun = started(llm.create_completion("the heat", max_tokens=50, stream=True))
llm.close()
calls = {
    "tokenize": lambda: llm.tokenize(b"the"),
    "detokenize": lambda: llm.detokenize([5]),
    "embed": lambda: llm.embed("the"),
    "create_embedding": lambda: llm.create_embedding("the"),
    "eval": lambda: llm.eval([5]),
    "sample": lambda: llm.sample(),
    "generate": lambda: next(llm.generate([5])),
    "prefill": lambda: llm.prefill([]),
    "check_room": lambda: llm.check_room(1),
    "create_completion": lambda: llm.create_completion("the"),
    "stream": lambda: list(llm.create_completion("the", stream=True)),
    "call": lambda: llm("the"),
    "chat": lambda: llm.create_chat_completion(messages),
    "save_state": lambda: llm.save_state(),
    "load_state": lambda: llm.load_state(state),
    "reset": lambda: llm.reset(),
    "n_ctx": lambda: llm.n_ctx(),
    "n_embd": lambda: llm.n_embd(),
    "n_vocab": lambda: llm.n_vocab(),
    "tokenizer": lambda: llm.tokenizer().tokenize(b"the"),
    "token_eos": lambda: llm.token_eos(),
    "token_bos": lambda: llm.token_bos(),
    "token_nl": lambda: llm.token_nl(),
    "pooling_type": lambda: llm.pooling_type(),
    "ctx": lambda: llm.ctx,
    "model": lambda: llm.model,
    "handler": lambda: llm.chat_handler(llama=llm, messages=messages),
    "ask": lambda: "".join(talk.ask("the", [red])),
    "read": lambda: talk.prefill("the"),
    "conversation": lambda: el.Conversation(llm),
    "begun": lambda: next(begun),
    **{"begin " + name: (lambda stream: lambda: next(stream))(s) for name, s in streams.items()},
}
for name, call in calls.items():
    try:
        print(name, "returned", call())
    except el.StateError as e:
        if "closed" not in str(e):
            print(name, e)
    except Exception as e:
        print(name, type(e).__name__, e)
# what others hold of it has no address any more
for name, call in {
    "tokenizer": lambda: tokenizer.tokenize(b"the"), "n_vocab": model.n_vocab, "n_ctx": ctx.n_ctx,
    "cut": lambda: ctx.kv_cache_seq_rm(-1, 0, -1), "state": ctx.get_state_size,
    "decode": lambda: ctx.decode(batch),
}.items():
    try:
        print(name, "returned", call())
    except Exception as e:
        if "closed" not in str(e):
            print(name, type(e).__name__, e)
print(llm.stats.compressions)
llm.close()
talk.close()
print("ok")
"""


def test_everything_after_close_says_so(tiny_vlm):
    done = run_python(CLOSED, *tiny_vlm)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0", "ok"], done.stdout
    assert done.stderr == ""


def test_rewinding_by_hand_says_what_to_do(vlm):
    with vlm(kv_budget=0.3) as llm:
        ask_image(llm)
        first = int(np.argmax(llm.input_ids[: llm.n_tokens] < 0))
        llm.n_tokens = first + N_IMAGE + 3
        with pytest.raises(el.StateError, match=r"cannot be cut at position \d+.*ask with"):
            llm.eval([5])
        assert answer(ask_image(llm))


def test_sampling_without_logits(load):
    """llama.cpp aborts."""
    with load() as llm:
        with pytest.raises(el.StateError, match="no logits"):
            llm.sample()
        complete(llm)
        llm.load_state(llm.save_state())
        with pytest.raises(el.StateError, match="no logits"):
            llm.sample()
        llm.eval([5])
        assert llm.sample() >= 0


# -- j: states of others


def test_states_of_stock(tiny_gqa, load):
    one = {"n_threads": 1, "n_threads_batch": 1, "verbose": False}
    stock = Llama(str(tiny_gqa), n_ctx=256, flash_attn=True, **one)
    expected = complete(stock, TEXT[:120], 1)
    complete(stock, TEXT[:120])
    stock_state = stock.save_state()
    with load(kv_budget=0.5, n_ctx=1024) as llm:
        llm.load_state(stock_state)
        assert llm.n_tokens == stock_state.n_tokens
        assert complete(llm, TEXT[:120], 1) == expected
        # not capped at the old n_ctx
        out = llm.create_completion("the heat on the earth " * 30, max_tokens=40, temperature=0)
        assert out["usage"]["prompt_tokens"] > 300
        assert out["usage"]["completion_tokens"] == 40
    stock.close()


def test_a_state_with_another_setting_says_which(load):
    with load(elastic=None, flash_attn=False) as plain, load(kv_budget=0.5) as fa:
        expected = complete(fa)
        complete(plain)
        for one, other in ((plain, fa), (fa, plain)):
            state = one.save_state()
            with pytest.raises(el.StateError, match=r"(?i)transpos|flash") as error:
                other.load_state(state)
            assert "flash_attn" in str(error.value)
        assert complete(fa) == expected


@pytest.mark.parametrize("off", [{"elastic": None}, {"kv_budget": 1.0}], ids=str)
def test_a_state_of_a_cache_that_is_off(load, off):
    with load(flash_attn=True, **off) as llm:
        first = complete(llm, n=1)
        expected = complete(llm)
        state = llm.save_state()
    with load(kv_budget=0.5) as llm:
        llm.load_state(state)
        assert llm.n_tokens == state.n_tokens
        assert complete(llm, n=1) == first
        assert len(complete(llm)) > 0
    with load(flash_attn=True, **off) as llm:
        llm.load_state(state)
        assert complete(llm) == expected


# -- o: what a cache of states costs


def test_states_are_as_large_as_what_they_hold(load):
    with load(kv_budget=0.3, n_ctx=512) as llm:
        complete(llm)
        n_all = llm.n_ctx() * llm.n_vocab() * 4
        state = llm.save_state()
        assert state.scores.nbytes <= llm.n_vocab() * 4 < n_all / 100
        assert state.input_ids.nbytes == 4 * llm.n_tokens
        assert len(state.llama_state) == state.llama_state_size
        scores = llm.scores
        llm.load_state(state)
        assert llm.scores is scores


def test_a_hit_in_the_ram_cache_is_cheap(tiny_gqa):
    """A and B in turns: no memory for rows of logits that nobody asked for."""
    with el.ElasticLlama(
        tiny_gqa, n_ctx=8192, n_batch=8192, n_threads=1, n_threads_batch=1, kv_budget=0.3
    ) as llm:
        prompts = ["the heat on the earth " * 10, "a sea of water " * 10]
        expected = [complete(llm, prompt) for prompt in prompts]
        llm.reset()
        llm._ctx.kv_cache_clear()
        cache = LlamaRAMCache()
        llm.set_cache(cache)
        for prompt, text in zip(prompts * 3, expected * 3):
            assert complete(llm, prompt) == text
        states = list(cache.cache_state.values())
        largest = max(state.llama_state_size for state in states)
        assert largest < llm.scores.nbytes / 8
        tracemalloc.start()
        try:
            for state in states * 2:
                llm.load_state(state)
                llm.save_state()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 4 * largest + 2**20
