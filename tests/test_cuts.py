"""The table of cuts: what people do with a prompt that was there before, by every caller.

Cuts x (text, image) x policies x budgets x (Llama, Conversation, llama-server). Every answer is
that of a replay: a fresh native context that is given what survived in the same steps, and never
saw what was removed (`tests/support/replay.py`). Nothing raises, and no server aborts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import elastic_llama as el
import numpy as np
import pytest
from elastic_llama.config import policy_names
from elastic_llama.images import to_data_uri
from llama_cpp import LlamaRAMCache, mtmd_cpp

from tests.support.engine import nmse
from tests.support.replay import NMSE
from tests.support.served import LETTERS, Served
from tests.support.server import binary
from tests.test_asked_again import GREEDY, N_ANSWER, LlamaCaller, config, picture

BUDGETS = ["0.2", "0.5", "100 cells"]
CONTENTS = ["text", "image"]
Turn = tuple[str, tuple[int, ...]]  # a question, and the images before it


def words(n: int, seed: int) -> str:
    return "".join(np.random.default_rng(seed).choice(list(LETTERS), n))


def edited(turn: Turn, k: int) -> Turn:
    """Another token at place `k` of a question."""
    text, images = turn
    other = LETTERS[(LETTERS.index(text[k]) + 7) % len(LETTERS)]
    return text[:k] + other + text[k + 1 :], images


# -- callers


class Caller:
    """Dialogues. An answer, once given to a history, is what the next question comes after."""

    n_least = 0  # tokens that are read where a question comes again
    n_read = -1  # at the last question
    answers: dict[tuple[Turn, ...], str]

    def ask(self, turns: Sequence[Turn]) -> str:
        """The last question, after all that was said before it; compared with the replay."""
        raise NotImplementedError

    def logits(self) -> np.ndarray:
        """Of the last answer, up to a constant [n, n_vocab]."""
        raise NotImplementedError

    def with_cache(self) -> None:
        """Prompts that are put aside are kept."""

    def save(self) -> Any:
        raise NotImplementedError

    def load(self, state: Any) -> None:
        raise NotImplementedError


class Llama(Caller):
    """`create_chat_completion` of an ElasticLlama: the whole dialogue at every question."""

    def __init__(self, caller: LlamaCaller) -> None:
        self.caller, self.answers, self.n_least = caller, {}, caller.n_least

    def messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = []
        for i, (text, images) in enumerate(turns):
            urls = [to_data_uri(picture(seed)) for seed in images]
            parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            content: Any = [*parts, {"type": "text", "text": text}] if urls else text
            out.append({"role": "user", "content": content})
            if i < len(turns) - 1:
                out.append({"role": "assistant", "content": self.answers[tuple(turns[: i + 1])]})
        return out

    def ask(self, turns: Sequence[Turn]) -> str:
        llm = self.caller.llm
        llm.answer, llm.taken = [], 0
        out = llm.create_chat_completion(self.messages(turns), **GREEDY)
        self.n_read = llm.taken - len(llm.answer) + 1
        answer = str(out["choices"][0]["message"]["content"])
        self.answers[tuple(turns)] = answer
        self.caller.check(f"{turns}")
        return answer

    def logits(self) -> np.ndarray:
        return np.stack(self.caller.llm.answer)

    def with_cache(self) -> None:
        self.caller.llm.set_cache(LlamaRAMCache())

    def save(self) -> Any:
        return self.caller.save()

    def load(self, state: Any) -> None:
        self.caller.load(state)


class Conversation(Llama):
    """`Conversation`, which is asked all of its questions again from the start."""

    def ask(self, turns: Sequence[Turn]) -> str:
        llm = self.caller.llm
        talk = el.Conversation(llm)
        for i, (text, images) in enumerate(turns):
            llm.answer, llm.taken = [], 0
            answer = "".join(talk.ask(text, [picture(s) for s in images], max_tokens=N_ANSWER))
            self.n_read = llm.taken - len(llm.answer) + 1
            self.caller.check(f"{turns[: i + 1]}")
            self.answers[tuple(turns[: i + 1])] = answer
        talk.close()
        return answer


class LlamaServer(Caller):
    """llama-server, by HTTP; the dialogue is put into ChatML here."""

    def __init__(self, served: Served) -> None:
        self.served, self.answers, self.n_least = served, {}, served.n_least

    def ask(self, turns: Sequence[Turn]) -> str:
        marker = mtmd_cpp.mtmd_default_marker().decode()
        prompt, pictures = "", []
        for i, (text, images) in enumerate(turns):
            pictures += [picture(seed) for seed in images]
            prompt += f"<|im_start|>user\n{marker * len(images)}{text}<|im_end|>\n"
            prompt += "<|im_start|>assistant\n"
            if i < len(turns) - 1:
                prompt += self.answers[tuple(turns[: i + 1])] + "<|im_end|>\n"
        answer = self.served.ask(prompt, pictures, N_ANSWER)
        self.n_read = self.served.n_read
        self.answers[tuple(turns)] = answer
        self.served.check(f"{turns}")
        return answer

    def logits(self) -> np.ndarray:
        return np.array([sorted(row.items()) for row in self.served.said])

    def save(self) -> Any:
        return self.served.save()

    def load(self, state: Any) -> None:
        self.served.load(state)


# -- cuts


REST = (20, 21, 22, 23, 24)  # images of 16 cells each, so that there is something to compress


def question(content: str, seed: int = 0) -> Turn:
    return words(100, 10 + seed), ((*REST, seed) if content == "image" else ())


def more(seed: int) -> Turn:
    return words(30, 50 + seed), ()


def the_same(c: Caller, content: str, every: int) -> None:
    a = question(content)
    answer = c.ask([a])
    logits = c.logits()
    for _ in range(2):
        assert c.ask([a]) == answer
        assert c.n_read <= c.n_least
        assert nmse(logits, c.logits()) <= (NMSE if c.n_least else 0.0)


def shorter(c: Caller, content: str, every: int) -> None:
    text, images = question(content)
    c.ask([(text, images)])
    c.ask([(text[:-30], images)])
    c.ask([(text, images)])


def edits(c: Caller, content: str, every: int) -> None:
    a, b = question(content), more(0)
    c.ask([a])
    for k in range(0, len(a[0]), every):
        c.ask([edited(a, k)])
    c.ask([a])
    c.ask([a, b])
    for k in range(0, len(b[0]), every):
        c.ask([a, edited(b, k)])


def another(c: Caller, content: str, every: int) -> None:
    """Another image of the same size under the same words, or another text."""
    text, images = question(content)
    other = (text, (*REST, 1)) if images else (words(100, 99), ())
    answer = c.ask([(text, images)])
    c.ask([other])
    assert c.ask([(text, images)]) == answer
    c.ask([other, more(0)])


def swapped(c: Caller, content: str, every: int) -> None:
    """Two images change places, or two halves of a text."""
    text, images = question(content)
    if images:
        a, b = (text, (*REST, 0, 1)), (text, (*REST, 1, 0))
    else:
        a, b = (text, ()), (text[50:] + text[:50], ())
    for turn in (a, b, a):
        c.ask([turn])
    c.ask([a, more(0)])
    c.ask([b])


def branches(c: Caller, content: str, every: int) -> None:
    a = question(content)
    c.ask([a])
    c.ask([a, more(0)])
    c.ask([a, more(1)])
    c.ask([a, more(1), more(2)])
    c.ask([a, more(0)])
    c.ask([a])


def cache_objects(c: Caller, content: str, every: int) -> None:
    """Dialogues in turn, of which the others are put aside."""
    c.with_cache()
    a, b = question(content), question(content, 2)
    answers = [c.ask([a]), c.ask([b])]
    assert c.ask([a]) == answers[0]
    c.ask([a, more(0)])
    c.ask([b, more(1)])
    c.ask([a, more(0)])
    assert c.ask([b]) == answers[1]


def saved(c: Caller, content: str, every: int) -> None:
    a, b = question(content), question(content, 2)
    answer = c.ask([a])
    state = c.save()
    c.ask([a, more(0)])
    c.ask([b])
    c.load(state)
    assert c.ask([a]) == answer
    assert c.n_read <= c.n_least
    c.ask([a, more(1)])
    c.load(state)
    c.ask([a, more(0)])


CUTS = (the_same, shorter, edits, another, swapped, branches, cache_objects, saved)


# -- the table

PLACES = [
    (policy, budget)
    for policy in policy_names()
    for budget in BUDGETS
    if policy != "full" or budget == "0.5"
]
NAMES = ["Llama", "Conversation", "llama-server"]


def is_fast(name: str, policy: str, budget: str, content: str) -> bool:
    """A few of the default policy, so that each caller, budget and content is there once."""
    i = NAMES.index(name) + CONTENTS.index(content)
    return policy == "elastic" and BUDGETS.index(budget) == i % 3


def table() -> list[Any]:
    out = []
    for policy, budget in PLACES:
        for name in NAMES:
            for content in CONTENTS:
                place = (name, policy, budget, content)
                marks = [] if is_fast(*place) else [pytest.mark.matrix]
                out.append(pytest.param(*place, marks=marks))
    return out


@pytest.fixture(scope="module")
def servers(
    tmp_path_factory: pytest.TempPathFactory, tiny_vlm: tuple[Path, Path]
) -> Iterator[Callable[[str, str], Served]]:
    """The server of a policy and a budget; the one before is stopped, and must not have failed."""
    running: dict[tuple[str, str], Served] = {}

    def stop() -> None:
        for served in running.values():
            code = served.close()
            assert code == 0, f"exit code {code}:\n" + served.server.log.read_text()[-999:]
        running.clear()

    def get(policy: str, budget: str) -> Served:
        if (policy, budget) not in running:
            stop()
            folder = tmp_path_factory.mktemp("server")
            number = 100.0 if budget == "100 cells" else float(budget)
            running[policy, budget] = Served(folder, *tiny_vlm, policy, number)
        return running[policy, budget]

    yield get
    stop()


@pytest.fixture
def opened(tiny_vlm: tuple[Path, Path], servers: Any) -> Iterator[Callable[..., Caller]]:
    callers: list[LlamaCaller] = []

    def make(name: str, policy: str, budget: str, content: str) -> Caller:
        if name == "llama-server":
            binary()
            return LlamaServer(servers(policy, budget))
        mmproj = tiny_vlm[1] if content == "image" else None
        callers.append(LlamaCaller(tiny_vlm[0], config(policy, budget), mmproj))
        return {"Llama": Llama, "Conversation": Conversation}[name](callers[-1])

    yield make
    for caller in callers:
        caller.close()


@pytest.mark.parametrize(("name", "policy", "budget", "content"), table())
def test_cuts(opened: Any, name: str, policy: str, budget: str, content: str) -> None:
    every = 10 if not is_fast(name, policy, budget, content) else 50
    caller = opened(name, policy, budget, content)
    for cut in CUTS:
        cut(caller, content, every)


def test_a_cut_between_two_images(servers: Any) -> None:
    """Side by side, and the second one is another in the next prompt."""
    binary()
    caller = LlamaServer(servers("full", "0.5"))
    caller.ask([(words(20, 1), (0, 1))])
    n_first = caller.n_read
    caller.ask([(words(20, 1), (0, 2))])
    assert caller.n_read <= n_first - 16
