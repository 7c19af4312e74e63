"""Prompts that come again, whole or changed: all callers say what a replay of the history says.

The replay (`tests/support/replay.py`) is a fresh context which is given what survived in the same
steps, and never saw what was removed.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import elastic_llama as el
import numpy as np
import pytest
from elastic_llama.config import policy_names
from elastic_llama.images import to_data_uri
from elastic_llama.pieces import ImagePiece, TextPiece, common_prefix
from elastic_llama.probe import probe
from llama_cpp import LlamaDiskCache, LlamaRAMCache
from PIL import Image

from tests.support.engine import Engine, nmse, random_tokens
from tests.support.replay import (
    NMSE,
    Record,
    Step,
    WatchedLlama,
    compare,
    decode,
    same_cells,
    watched,
)
from tests.test_oracles import N_VOCAB, image_rows
from tests.test_stages import Params, Stats

N_CTX = 1024
N_ANSWER = 40
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": N_ANSWER, "repeat_penalty": 1.0}
BUDGETS = ["0.1", "0.2", "0.5", "100 cells", "kv_cells"]
CONTENTS = ["text", "image", "turns"]


def config(policy: str, budget: str, **more: Any) -> el.ElasticConfig:
    """Of one place of the matrix. Some take the overdraft that the policy is made for."""
    options: dict[str, Any] = {"policy": policy, "min_cells": 8, "layers": "even", **more}
    if budget == "kv_cells":
        options.update({"budget": 0.5} if policy == "full" else {"budget": 0.5, "kv_cells": 90})
    else:
        options["budget"] = 100 if budget == "100 cells" else float(budget)
    if budget != "0.2" and policy == "elastic":
        options.setdefault("overdraft", 9)
    return el.ElasticConfig(**options)


class Caller:
    """One way to ask. A question is a list of parts: ids, or the number of an image.

    `ask` answers a prompt (several parts, of which a prefix may be known), greedily, and compares.
    """

    n_decoded = 0  # at the last question, without its answer
    n_least = 0  # that a prompt asked again takes: without a cache to ask, its last token

    def ask(self, parts: Sequence[Any], n_answer: int = N_ANSWER) -> Any:
        raise NotImplementedError

    def check(self, what: str) -> int:
        """Compare with the replay; returns how many logits are the same to the last bit."""
        raise NotImplementedError

    def answer(self) -> np.ndarray:
        """Logits of the last answer [n, n_vocab]."""
        raise NotImplementedError

    def save(self) -> Any:
        raise NotImplementedError

    def load(self, state: Any) -> None:
        raise NotImplementedError


# -- llama.cpp's C API


class CCaller(Caller):
    """What a caller of llama.cpp does that knows `elastic_can_cut` and `elastic_restore_logits`."""

    def __init__(self, path: Path, elastic: el.ElasticConfig) -> None:
        options = {
            "policy": elastic.policy,
            "budget": float(elastic.budget),
            "min_cells": elastic.min_cells,
            "max_cells": elastic.kv_cells or 0,
            "overdraft": -1 if elastic.overdraft is None else elastic.overdraft,
            "checkpoints": elastic.checkpoints,
        }
        self.config = elastic
        self.e = Engine(str(path), options, n_ctx=N_CTX, n_ubatch=64)
        self.twin = Engine(str(path), options, n_ctx=N_CTX, n_ubatch=64)
        self.record = Record()
        self.n_least = int(elastic.is_off)
        self.ids = np.empty(0, np.int64)
        self.logits = np.empty(0)
        self.said: list[np.ndarray] = []

    def close(self) -> None:
        self.e.close()
        self.twin.close()

    def decode(self, data: np.ndarray, pos: int, wants: bool) -> None:
        code = decode(self.e.ctx, data, pos, wants)
        assert code == 0, f"llama_decode returned {code}"
        self.record.add(Step("decode", pos, data, False, wants))
        if wants:
            self.note_logits()

    def note_logits(self) -> None:
        self.logits = self.e.logits(-1)
        self.said.append(self.logits)
        self.record.add(Step("logits", self.record.end(), self.logits))

    def cut(self, n: int) -> int:
        wanted, n = n, self.e.session.can_cut(n)
        if n < wanted:
            n_cells = self.e.session.n_cells(0)
            assert not self.e.seq_rm(0, wanted, -1)
            assert self.e.session.n_cells(0) == n_cells
        assert self.e.seq_rm(0, n, -1)
        self.record.cut(n)
        return n

    def ask(self, parts: Sequence[Any], n_answer: int = N_ANSWER) -> list[int]:
        rows = [image_rows(48, self.e.n_embd, p) if isinstance(p, int) else p for p in parts]
        ids = np.concatenate(
            [-1 - 1000 * p - np.arange(48) if isinstance(p, int) else np.asarray(p) for p in parts]
        )
        n = self.cut(common_prefix(self.ids, ids))
        restored = n == len(ids) and self.e.session.restore_logits()
        if restored:
            self.note_logits()
        elif n == len(ids):
            n = self.cut(n - 1)
        self.n_decoded = len(ids) - n
        first = 0
        for i, part in enumerate(rows):
            new = np.asarray(part)[max(0, n - first) :]
            if len(new):
                self.decode(new, first + len(part) - len(new), i == len(rows) - 1)
            first += len(part)
        answer: list[int] = []
        self.said = self.said[-1:]
        while len(answer) < n_answer:
            answer.append(int(self.logits.argmax()))
            if len(answer) == 1 and probe(self.e.ctx, self.e.session, self.config, {0: answer[0]}):
                self.record.add(Step("probe", first, answer[0]))
            self.decode(np.array(answer[-1:]), first, True)
            first += 1
        self.ids = np.concatenate([ids, answer])
        return answer

    def answer(self) -> np.ndarray:
        return np.stack(self.said)

    def check(self, what: str) -> int:
        pairs = self.record.replay(self.twin.ctx, self.twin.session, self.config)
        n = compare(pairs, what, 2)
        same_cells(self.e.session, self.twin.session, what)
        return n

    def save(self) -> Any:
        return self.e.save(), self.record.copy(), self.ids

    def load(self, state: Any) -> None:
        data, steps, self.ids = state
        assert self.e.load(data) == len(data)
        self.record.steps = list(steps)


# -- ElasticLlama


class LlamaCaller(Caller):
    """`llm(prompt)` for text; `prefill` and `generate` where there are images."""

    def __init__(
        self, path: Path, elastic: el.ElasticConfig, mmproj: Path | None = None, n_ubatch: int = 64
    ) -> None:
        options: dict[str, Any] = {
            "elastic": elastic,
            "n_ctx": N_CTX,
            "n_ubatch": n_ubatch,
            "n_threads": 1,
            "n_threads_batch": 1,
            "mmproj_path": mmproj,
        }
        self.n_least = int(elastic.is_off)
        self.llm = WatchedLlama(path, **options)
        self.twin = el.ElasticLlama(path, **options)
        self.watching = watched(self.llm)
        self.watching.__enter__()

    def close(self) -> None:
        self.watching.__exit__(None, None, None)
        self.llm.close()
        self.twin.close()

    def decode_rows(self, rows: np.ndarray) -> Callable[[int], int]:
        def at(n_past: int) -> int:
            assert decode(self.llm._ctx.ctx, rows, n_past, False) == 0
            self.llm.record.add(Step("decode", n_past, rows, True, False))
            self.llm.taken += len(rows)
            return n_past + len(rows)

        return at

    def ask(self, parts: Sequence[Any], n_answer: int = N_ANSWER) -> list[int]:
        llm = self.llm
        llm.taken, llm.answer = 0, []
        if any(isinstance(p, int) for p in parts):
            pieces = [
                ImagePiece(str(p), 48, self.decode_rows(image_rows(48, llm.n_embd(), p)))
                if isinstance(p, int)
                else TextPiece(tuple(p))
                for p in parts
            ]
            llm.prefill(pieces)
            self.n_decoded = llm.taken
            stream = llm.generate([], temp=0.0, repeat_penalty=1.0, reset=False)
            out = list(itertools.islice(stream, n_answer))
            stream.close()
            return out
        prompt = [int(t) for part in parts for t in part]
        stream = llm.generate(prompt, temp=0.0, repeat_penalty=1.0)
        out = [next(stream)]
        self.n_decoded = llm.taken
        out += itertools.islice(stream, n_answer - 1)
        stream.close()
        return out

    def answer(self) -> np.ndarray:
        return np.stack(self.llm.answer)

    def check(self, what: str) -> int:
        assert self.llm.record.end() == self.llm.n_tokens, what
        pairs = self.llm.record.replay(self.twin._ctx.ctx, self.twin.session, self.twin.elastic)
        n = compare(pairs, what)
        same_cells(self.llm.session, self.twin.session, what)
        return n

    def save(self) -> Any:
        return self.llm.save_state()

    def load(self, state: Any) -> None:
        self.llm.load_state(state)


@pytest.fixture
def opened() -> Iterator[Callable[[Any], Any]]:
    callers: list[Any] = []

    def add(caller: Any) -> Any:
        callers.append(caller)
        return caller

    yield add
    for caller in reversed(callers):
        caller.close()


def prompt_of(content: str, seed: int = 0) -> list[Any]:
    """Text of 130 tokens, or an image and its question, or that with an answer and a question."""

    def said(n: int, i: int) -> list[int]:
        return random_tokens(n, N_VOCAB, 100 * seed + i)

    if content == "text":
        return [said(130, 1)]
    turn = [said(20, 2), 1 + seed, said(45, 3)]
    return turn if content == "image" else [*turn, said(30, 4), said(40, 5)]


def edited(parts: list[Any], k: int) -> list[Any]:
    """Another token at place `k` of the last part."""
    last = list(parts[-1])
    last[k] = 10 + (last[k] + 100) % (N_VOCAB - 10)
    return [*parts[:-1], last]


def same_logits(caller: Caller, expected: np.ndarray) -> None:
    """To the last bit, unless the last token of a prompt had to be decoded again."""
    if caller.n_least == 0:
        np.testing.assert_array_equal(caller.answer(), expected)
    else:
        assert nmse(expected, caller.answer()) < NMSE


def walk(caller: Caller, content: str, fast: bool) -> None:
    """Everything that people do with a prompt that was there before."""
    every = 40 if fast else 10
    prompt = prompt_of(content)
    first = caller.ask(prompt)
    n_prompt = caller.n_decoded
    caller.check("first")
    assert n_prompt == sum(48 if isinstance(p, int) else len(p) for p in prompt)
    logits = caller.answer()

    for _ in range(2):
        assert caller.ask(prompt) == first, "the same prompt says something else"
        assert caller.n_decoded <= caller.n_least
        same_logits(caller, logits)

    caller.ask([*prompt[:-1], prompt[-1][:-15]])
    caller.check("prefix")
    caller.ask(prompt)  # more of the prefix, as it was compressed
    caller.check("whole again")

    for k in range(0, len(prompt[-1]), every):
        caller.ask(edited(prompt, k), 20)
        caller.check(f"edited at {k}")

    answer = caller.ask(prompt)
    longer = [*prompt, answer[:25], random_tokens(50, N_VOCAB, 7)]
    second = caller.ask(longer)
    caller.check("longer")
    assert caller.n_decoded < n_prompt
    assert caller.ask(longer) == second
    assert caller.n_decoded <= caller.n_least
    for k in range(0, 50, every):  # a new turn, edited
        caller.ask(edited(longer, k), 20)
        caller.check(f"longer, edited at {k}")
    for k in range(0, 25, every):  # its answer, edited
        caller.ask([*longer[:-2], edited([answer[:25]], k)[0], longer[-1]], 20)
        caller.check(f"answer edited at {k}")

    other = prompt_of(content, 1)
    caller.ask(other, 20)
    caller.check("other")
    assert caller.ask(prompt) == answer
    caller.check("back")

    state = caller.save()
    caller.ask(longer, 20)
    caller.ask(other, 20)
    caller.load(state)
    caller.check("loaded")
    assert caller.ask(prompt) == answer
    assert caller.n_decoded <= caller.n_least
    caller.check("the same, loaded")
    caller.load(state)
    caller.ask(longer)
    caller.check("longer, loaded")


PLACES = [
    (policy, budget, content)
    for policy in policy_names()
    for budget in BUDGETS
    for content in CONTENTS
    if policy != "full" or budget in ("0.5", "kv_cells")
]


def is_fast(policy: str, budget: str, content: str) -> bool:
    """Each policy with each content, and with each budget, once."""
    i = policy_names().index(policy)
    return (i + CONTENTS.index(content)) % 5 == BUDGETS.index(budget)


def marks(policy: str, budget: str, content: str) -> list[Any]:
    if not is_fast(policy, budget, content):
        return [pytest.mark.matrix]
    return [] if policy == "elastic" else [pytest.mark.slow]


def matrix(contents: Sequence[str] = CONTENTS) -> list[Any]:
    return [pytest.param(*place, marks=marks(*place)) for place in PLACES if place[2] in contents]


@pytest.mark.parametrize(("policy", "budget", "content"), matrix())
def test_c(tiny_gqa: Path, opened: Any, policy: str, budget: str, content: str) -> None:
    fast = is_fast(policy, budget, content)
    walk(opened(CCaller(tiny_gqa, config(policy, budget))), content, fast)


@pytest.mark.parametrize(("policy", "budget", "content"), matrix())
def test_llama(tiny_mha: Path, opened: Any, policy: str, budget: str, content: str) -> None:
    fast = is_fast(policy, budget, content)
    walk(opened(LlamaCaller(tiny_mha, config(policy, budget))), content, fast)


# -- what only ElasticLlama has


@pytest.mark.parametrize(("policy", "budget", "content"), matrix(["text"]))
def test_caches(
    tiny_mha: Path, opened: Any, tmp_path: Path, policy: str, budget: str, content: str
) -> None:
    """LlamaRAMCache and LlamaDiskCache: prompts in turn, and one that goes on after an answer."""
    kinds = [LlamaRAMCache, lambda: LlamaDiskCache(str(tmp_path))]
    if is_fast(policy, budget, content):
        kinds = kinds[policy_names().index(policy) % 2 :][:1]
    for cache in [kind() for kind in kinds]:
        caller = opened(LlamaCaller(tiny_mha, config(policy, budget)))
        llm = caller.llm
        llm.set_cache(cache)
        prompts = [prompt_of(content, seed)[0] for seed in (0, 1)]
        said: dict[int, str] = {}
        for i in (0, 1, 0, 1, 0, 0):
            out = llm(prompts[i], **GREEDY)["choices"][0]["text"]
            caller.check(f"{type(cache).__name__}, prompt {i}")
            assert said.setdefault(i, out) == out
        answer = llm.input_ids[130 : min(150, llm.n_tokens)].tolist()
        for end in (answer, answer[:7], [20, *answer[1:]]):
            llm([*prompts[0], *end, *random_tokens(30, N_VOCAB, 9)], **GREEDY)
            caller.check(f"{type(cache).__name__}, longer")
        llm(prompts[1][:100], **GREEDY)
        caller.check(f"{type(cache).__name__}, prefix")


@pytest.mark.parametrize(("policy", "budget", "content"), matrix())
def test_n_tokens_by_hand(
    tiny_mha: Path, opened: Any, policy: str, budget: str, content: str
) -> None:
    """What `eval` lacks after `n_tokens = k` is read again, but for images."""
    caller = opened(LlamaCaller(tiny_mha, config(policy, budget)))
    llm = caller.llm
    prompt = prompt_of(content)
    caller.ask(prompt)
    end = llm.n_tokens
    ids = llm.input_ids[:end].copy()
    n_refused = 0
    for k in [*range(1, end, 40 if is_fast(policy, budget, content) else 10), end]:
        caller.ask(prompt)
        np.testing.assert_array_equal(llm.input_ids[:end], ids)
        llm.n_tokens = k
        if (ids[llm._rewind.can_cut(k) : k] < 0).any():
            with pytest.raises(el.StateError, match="image"):
                llm.eval([30, 31, 32])
            assert llm.n_tokens == k
            n_refused += 1
            continue
        for tokens in ([30, 31, 32], [33], [34], [35]):
            llm.eval(tokens)
            llm.sample(temp=0.0)
        assert llm.n_tokens == k + 6
        assert llm.input_ids[: k + 6].tolist() == [*ids[:k], 30, 31, 32, 33, 34, 35]
        caller.check(f"n_tokens = {k}")
    if policy != "full":
        assert (n_refused > 0) == (content != "text")


# -- questions in words


class Chat:
    """`create_chat_completion`; every question with all that was said before it."""

    def __init__(self, caller: LlamaCaller) -> None:
        self.caller = caller
        self.clear()

    def clear(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def ask(self, question: str, image: Image.Image | None = None) -> str:
        parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if image is not None:
            parts.append({"type": "image_url", "image_url": {"url": to_data_uri(image)}})
        content: Any = parts if image is not None else question
        self.messages.append({"role": "user", "content": content})
        self.caller.llm.answer = []
        out = self.caller.llm.create_chat_completion(self.messages, **GREEDY)
        answer = str(out["choices"][0]["message"]["content"])
        self.messages.append({"role": "assistant", "content": answer})
        return answer


class Talk:
    """`Conversation`."""

    def __init__(self, caller: LlamaCaller) -> None:
        self.caller = caller
        self.talk = el.Conversation(caller.llm)

    def clear(self) -> None:
        self.talk.clear()

    def ask(self, question: str, image: Image.Image | None = None) -> str:
        self.caller.llm.answer = []
        images = [] if image is None else [image]
        return "".join(self.talk.ask(question, images, max_tokens=N_ANSWER))


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    return Image.fromarray(pixels)


QUESTION = "the heat on the earth in another ring or a sun that hears it; what is it then?"


def walk_in_words(make: Any, caller: LlamaCaller, content: str, fast: bool) -> None:
    every = 40 if fast else 10
    chat, other = make(caller), make(caller)

    def say(who: Any, question: str, seed: int = 0) -> list[str]:
        """All that `who` is asked, from the start."""
        who.clear()
        asked = [(question, None)]
        if content != "text":
            asked = [(question, picture(seed))]
        if content == "turns":
            asked = [("and the other one, where is it?", picture(seed)), (question, None)]
        out = []
        for q, image in asked:
            out.append(who.ask(q, image))
            caller.check(f"{q!r:.50}")
        return out

    first = say(chat, QUESTION)
    logits = np.stack(caller.llm.answer)
    for _ in range(2):
        caller.llm.taken = 0
        assert say(chat, QUESTION) == first
        same_logits(caller, logits)
        if make is Talk and content != "turns":  # where the first turn's is not kept any more
            assert caller.llm.taken < len(caller.llm.answer) + caller.n_least
    say(chat, QUESTION[:-12])
    for k in range(0, len(QUESTION), every):
        say(chat, QUESTION[:k] + "z" + QUESTION[k + 1 :])
    again = say(chat, QUESTION)
    for _ in range(2):
        chat.ask("and then?")
        caller.check("one more turn")
    say(other, QUESTION, 5)
    chat.ask("is it that?")  # the first conversation goes on, with its own image
    caller.check("two in turn")
    other.ask("or that?")
    caller.check("two in turn, the other")
    state = caller.save()
    n = caller.llm.n_tokens
    assert say(chat, QUESTION) == again
    caller.load(state)
    assert caller.llm.n_tokens == n
    caller.check("loaded")
    other.ask("what now?")
    caller.check("loaded, goes on")


@pytest.mark.parametrize(("policy", "budget", "content"), matrix())
@pytest.mark.parametrize("make", [Chat, Talk], ids=["chat", "conversation"])
def test_in_words(
    tiny_vlm: Any, opened: Any, make: Any, policy: str, budget: str, content: str
) -> None:
    fast = is_fast(policy, budget, content)
    mmproj = None if content == "text" else tiny_vlm[1]
    walk_in_words(
        make, opened(LlamaCaller(tiny_vlm[0], config(policy, budget), mmproj)), content, fast
    )


# -- what was removed does not come back

SECRET = " The secret word is zebra."


@pytest.mark.model
@pytest.mark.parametrize(
    "policy",
    [pytest.param(p, marks=pytest.mark.slow) for p in policy_names()],
)
def test_what_was_removed_does_not_come_back(
    embedded_model: Path, opened: Any, policy: str
) -> None:
    """An answer that says a word; the same prompt with other words after it."""
    elastic = el.ElasticConfig(policy=policy, layers="even", overdraft=16)
    caller = opened(LlamaCaller(embedded_model, elastic, n_ubatch=512))
    llm = caller.llm
    prompt = llm.tokenize(
        b"The heat of the sun warms the earth and the air above it, and the wind goes over the "
        b"sea. Every child in the village knew the old man who lived by the river, and all of them "
        b"had heard his stories of the war, of the snow in the mountains, and of the ship that "
        b"never came back. One of them asked him for the secret word. He said:"
    )
    rest = llm.tokenize(b" I know the secret word, it is", add_bos=False)
    word = llm.tokenize(b" zebra", add_bos=False)[0]
    said = llm.tokenize(SECRET.encode(), add_bos=False)

    def log_p(row: np.ndarray) -> float:
        row = row.astype(np.float64)
        return float(row[word] - np.log(np.exp(row - row.max()).sum()) - row.max())

    llm.eval(prompt)
    for token in (said * 20)[:90]:
        llm.eval([token])
    stream = llm.generate([*prompt, *rest], temp=0.0, repeat_penalty=1.0)
    next(stream)
    stream.close()
    twin = caller.twin
    pairs = llm.record.replay(twin._ctx.ctx, twin.session, twin.elastic)
    after, never = log_p(llm.answer[-1]), log_p(pairs[-1][2])
    assert abs(after - never) <= 1e-4
    assert llm.record.end() == len(prompt) + len(rest)
    llm.eval([*said, *said, *rest])  # where it was said, it is known
    heard = log_p(np.array(llm._ctx.get_logits_ith(-1)[: llm.n_vocab()]))
    assert never < -8 < -4 < heard


# -- the memory for it


@pytest.mark.parametrize("policy", [p for p in policy_names() if p != "full"])
def test_without_checkpoints(tiny_mha: Path, opened: Any, policy: str) -> None:
    """Nothing is kept, cuts behind a compression are refused, and all is read again."""
    caller = opened(LlamaCaller(tiny_mha, config(policy, "0.2", checkpoints=0)))
    llm = caller.llm
    prompt = prompt_of("text")
    first = caller.ask(prompt)
    n = len(prompt[0])
    assert llm.session.can_cut(n) == llm.session.can_cut(n + 20) == 0
    assert not llm._ctx.kv_cache_seq_rm(0, n, -1)
    assert not llm.session.restore_logits()
    assert caller.ask(prompt) == first
    assert caller.n_decoded == n
    caller.check("the same")
    caller.ask(edited(prompt, 60))
    caller.check("edited")
    caller.ask([*prompt, first[:20], [30, 31, 32]])
    caller.check("longer")
    state = caller.save()
    caller.ask(prompt_of("text", 1))
    caller.load(state)
    assert caller.ask(prompt) == first
    caller.check("loaded")
    assert llm.stats.checkpoint_bytes == 0


@pytest.mark.parametrize("policy", ["elastic", "h2o", "local"])
def test_bytes_of_checkpoints(tiny_mha: Path, opened: Any, policy: str) -> None:
    """Little while the cache still holds what they do; then about as much as it held."""
    caller = opened(CCaller(tiny_mha, config(policy, "0.5", overdraft=4)))
    session = caller.e.session
    assert session.stats()["checkpoint_bytes"] == 0
    caller.ask(prompt_of("text"), 1)
    row = session.kv_bytes_per_cell()
    n_vocab, n_cells = caller.e.n_vocab, session.stats()["cells_after"]
    lazy = session.stats()["checkpoint_bytes"]
    assert 4 * n_vocab <= lazy < 4 * n_vocab + n_cells * (row // 2)
    caller.ask(prompt_of("text"), 30)  # cells are evicted, or merged
    stored = session.stats()["checkpoint_bytes"]
    assert lazy + n_cells * row // 2 < stored < lazy + 2 * n_cells * row
    caller.e.clear()
    assert session.stats()["checkpoint_bytes"] == 0


def test_checkpoints_store_a_row_once(tiny_gqa: Path) -> None:
    """Those of an image, of its question and of an answer have most rows in common."""
    config = {"policy": "elastic", "budget": 60, "checkpoints": 4, "min_cells": 8}
    with Engine(tiny_gqa, elastic={**config, "n_question": 24}) as e:
        session = e.session

        def stored() -> int:
            return int(session.stats()["checkpoint_bytes"])

        e.image(image_rows(120, e.n_embd), 0)
        n_image = session.compress(0)
        e.prompt(random_tokens(10, N_VOCAB, 1), 120)
        e.token(20, 130)
        row = session.kv_bytes_per_cell()
        assert stored() < n_image * row // 2 + 2 * 4 * e.n_vocab  # K and V are the cache's own
        n = session.n_cells(0)
        for i in range(40):  # all is compressed again
            e.token(30 + i, 131 + i)
        assert session.n_cells(0) < n + 40
        assert n_image * row < stored() < 1.8 * n_image * row  # not twice, and what maps take
        for pos in (130, 120):
            assert session.can_cut(pos) == pos
            assert e.seq_rm(0, pos, -1)
            assert session.n_cells(0) == {130: n_image + 10, 120: n_image}[pos]


@pytest.mark.parametrize("policy", ["elastic", "h2o"])
def test_saving_copies_nothing(tiny_gqa: Path, policy: str) -> None:
    """A checkpoint whose rows lie in the cache is written from there."""
    elastic = {"policy": policy, "budget": 0.5, "min_cells": 8}
    with Engine(tiny_gqa, elastic=elastic) as e:
        e.prompt(random_tokens(130, N_VOCAB, 1))
        first = e.token(20, 130)
        before = e.session.stats()["checkpoint_bytes"]
        state = e.save(0)
        assert e.save(0) == state
        assert e.session.stats()["checkpoint_bytes"] == before
        e.token(21, 131)
        assert e.load(state, 0) == len(state)
        assert e.session.can_cut(130) == 130
        assert e.seq_rm(0, 130, -1)
        np.testing.assert_array_equal(e.token(20, 130), first)


# -- from C


@pytest.fixture
def lib() -> Any:
    out = ctypes.CDLL(str(next(el.lib_dir().glob("libllama.*"))))
    out.elastic_default_params.restype = Params
    out.elastic_get_stats.restype = Stats
    return out


class Program:
    """A program that uses llama.h and elastic.h."""

    def __init__(self, lib: Any, path: Path, n_checkpoints: int = 2) -> None:
        self.lib, self.e = lib, Engine(str(path), flash_attn=True)
        self.ctx = ctypes.cast(self.e.ctx, ctypes.c_void_p)
        params = lib.elastic_default_params()
        params.min_cells, params.n_checkpoints = 8, n_checkpoints
        assert lib.elastic_attach(self.ctx, ctypes.byref(params)) == 0

    def probe(self, token: int, pos: int) -> None:
        """As elastic.h shows it."""
        if self.lib.elastic_n_to_drop(self.ctx, 0) == 0:
            return
        assert self.lib.elastic_begin_probe(self.ctx) == 0
        for i in range(4):
            token = int(self.e.token(token, pos + i).argmax())
        self.lib.elastic_end_probe(self.ctx)

    def answer(self, pos: int, n: int = 50) -> list[np.ndarray]:
        """Logits of the prompt's end and of a greedy answer."""
        out = [self.e.logits(-1)]
        while len(out) <= n:
            token = int(out[-1].argmax())
            if len(out) == 1:
                self.probe(token, pos)
            out.append(self.e.token(token, pos + len(out) - 1))
        return out


def test_from_c(tiny_gqa: Path, lib: Any) -> None:
    prompt = random_tokens(150, N_VOCAB, 1)
    program = Program(lib, tiny_gqa)
    with program.e as e:
        e.prompt(prompt)
        assert lib.elastic_can_cut(program.ctx, 0, 150) == 150
        first = program.answer(150)
        for p0 in (151, 170, 199, 10**6):
            n = lib.elastic_can_cut(program.ctx, 0, p0)
            assert n == (200 if p0 >= 200 else n)
            assert 150 <= n <= p0
        assert lib.elastic_can_cut(program.ctx, 0, 149) == 0
        assert lib.elastic_get_stats(program.ctx).n_bytes_checkpoints > 0
        for _ in range(3):
            assert lib.elastic_can_cut(program.ctx, 0, 150) == 150
            assert e.seq_rm(0, 150, -1)
            assert lib.elastic_n_tokens(program.ctx, 0) == 150
            assert lib.elastic_restore_logits(program.ctx, 0) == 0
            np.testing.assert_array_equal(np.stack(program.answer(150)), np.stack(first))
        assert lib.elastic_restore_logits(program.ctx, 0) == -1  # an answer comes last
        assert lib.elastic_get_stats(program.ctx).n_compressions >= 1


@pytest.mark.parametrize("n_checkpoints", [0, 2])
def test_from_c_without_asking(tiny_gqa: Path, lib: Any, n_checkpoints: int) -> None:
    """A caller that does not know `elastic_can_cut` is told false, and removes all."""
    prompt = random_tokens(150, N_VOCAB, 1)
    program = Program(lib, tiny_gqa, n_checkpoints)
    with program.e as e:
        e.prompt(prompt)
        first = program.answer(150)
        stats = lib.elastic_get_stats(program.ctx)
        assert (stats.n_bytes_checkpoints > 0) == (n_checkpoints > 0)
        assert not e.seq_rm(0, 100, -1)
        assert not e.seq_rm(-1, 100, -1)
        assert e.seq_rm(0, 150, -1) == (n_checkpoints > 0)
        assert lib.elastic_n_tokens(program.ctx, 0) == (150 if n_checkpoints else 200)
        assert e.seq_rm(0, 0, -1)
        e.prompt(prompt)
        np.testing.assert_array_equal(np.stack(program.answer(150)), np.stack(first))
    with Engine(tiny_gqa) as e:  # where nothing is attached, every position is such a one
        e.prompt(prompt)
        ctx = ctypes.cast(e.ctx, ctypes.c_void_p)
        assert lib.elastic_can_cut(ctx, 0, 70) == 70
        assert lib.elastic_restore_logits(ctx, 0) == -1
