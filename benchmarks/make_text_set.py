"""Make the text benchmark: documents, lists, raw continuations, and facts to be found.

    python benchmarks/make_text_set.py

Writes a JSON list of {"id", "kind", "split", "text", "question", "answer", "exact"}. A prompt is
text + "\\n\\n" + question in the user's turn; for kind "raw" the text alone, without a template.
Documents: the answer is the language model's own, greedy with the full cache. Lists: the lines
asked for. Raw: the true next tokens. Facts (exact): a number or a name, kept only where the full
cache answers right.

The same seed, model file and machine give the same file; another machine may round differently and
so change the model's own answers and the choice of facts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from elastic_llama import ElasticLlama
from elastic_llama.conversation import Conversation
from elastic_llama.embedded import embedded_model

FOLDER = Path(__file__).resolve().parent / "text_set"
SPLITS = ("test", "dev")
N_TOKENS = (379, 846)  # of a prompt, template included
N_RAW = (379, 700)  # tokens of a raw prompt
N_ANSWER = 96  # tokens
N_SAME = 3  # facts of the form that is asked for, the right one among them
N_ECHO = 8  # tokens that an answer to a fact may have besides the fact itself
MIN_VARIETY = 0.75  # of a reference answer, 1 without any repetition


@dataclass(frozen=True)
class Item:
    """One prompt with its reference answer."""

    id: str
    kind: str
    split: str
    text: str
    question: str
    answer: str = ""
    exact: bool = False


class Model:
    """The full cache."""

    def __init__(self, path: Path, n_threads: int) -> None:
        self.llm = ElasticLlama(
            path, elastic=None, n_ctx=1024, n_threads=n_threads, n_threads_batch=n_threads
        )
        self.chat = Conversation(self.llm)

    def tokens(self, text: str, special: bool = False) -> list[int]:
        return self.llm.tokenize(text.encode(), add_bos=False, special=special)

    def text(self, tokens: list[int]) -> str:
        return self.llm.detokenize(tokens).decode()

    def n_prompt(self, item: Item) -> int:
        """Tokens of the prompt, template included."""
        if item.kind == "raw":
            return len(self.tokens(item.text))
        self.chat.clear()
        message, images = self.chat._question(f"{item.text}\n\n{item.question}", [])
        prompt, _, _ = self.chat._extended(message, images)
        return len(self.tokens(prompt, special=True))

    def answer(self, item: Item, max_tokens: int) -> str:
        """Greedy."""
        self.chat.clear()
        pieces = self.chat.ask(f"{item.text}\n\n{item.question}", max_tokens=max_tokens)
        return "".join(pieces).strip()

    def check_prompt(self, item: Item) -> None:
        """Refuse a size outside `N_TOKENS`, `N_RAW` for raw text."""
        n = self.n_prompt(item)
        low, high = N_RAW if item.kind == "raw" else N_TOKENS
        if not low <= n <= high:
            raise ValueError(f"{item.id}: prompt of {n} tokens, expected {low} to {high}")

    def check_answer(self, item: Item) -> None:
        n = len(self.tokens(item.answer))
        if not 0 < n <= N_ANSWER:
            raise ValueError(f"{item.id}: answer of {n} tokens, expected 1 to {N_ANSWER}")


# -- passages


def read_passages(path: Path) -> dict[tuple[str, str], list[str]]:
    """Passages by (kind, split), in the order of the file."""
    out: dict[tuple[str, str], list[str]] = {}
    for part in re.split(r"^## ", path.read_text(), flags=re.M)[1:]:
        heading, body = part.split("\n", 1)
        kind, split = heading.split(":")[0].split(", ")
        out.setdefault((kind, split), []).append(body.strip())
    return out


INSTRUCTIONS = [
    "Summarise the text above.",
    "What are the main points of the text above?",
    "Explain the text above to a beginner.",
    "Summarise the text above in a few sentences.",
    "What is the text above about?",
    "Write a short summary of the text above.",
]


def documents(passages: Sequence[str], split: str) -> list[Item]:
    out = []
    for i, passage in enumerate(passages):
        paragraphs = passage.split("\n\n")
        if i % 3 == 1 and len(paragraphs) < 7:  # for prompts of different lengths
            paragraphs.pop()
        text = "\n\n".join(paragraphs)
        question = INSTRUCTIONS[i % len(INSTRUCTIONS)]
        out.append(Item(f"document-{split}-{i:02d}", "document", split, text, question))
    return out


def variety(answer: str) -> float:
    """Share of different ones among the runs of six words: a small model may fall into a loop."""
    words = answer.split()
    runs = list(zip(*(words[i:] for i in range(6))))
    return len(set(runs)) / len(runs) if len(words) >= 30 else 0.0


def answered_document(model: Model, item: Item) -> Item:
    """The first instruction that the model answers without repeating itself, or else the best."""
    first = INSTRUCTIONS.index(item.question)
    best, best_variety = item, 0.0
    for question in INSTRUCTIONS[first:] + INSTRUCTIONS[:first]:
        asked = replace(item, question=question)
        asked = replace(asked, answer=model.answer(asked, N_ANSWER))
        if variety(asked.answer) > best_variety:
            best, best_variety = asked, variety(asked.answer)
        if best_variety > 0.9:
            break
    say(f"{best.id}: variety {best_variety:.2f}, {best.question} {best.answer!r}")
    if best_variety < MIN_VARIETY:
        raise ValueError(f"{item.id}: no sensible answer to any instruction")
    return best


def raw_items(model: Model, passages: Sequence[str], split: str, rng: random.Random) -> list[Item]:
    out = []
    for i, passage in enumerate(passages):
        tokens = model.tokens(passage)
        # The cut then moves back, by a few tokens at most, to where a word starts.
        n = rng.randrange(N_RAW[0] + 20, min(N_RAW[1], len(tokens) - N_ANSWER))
        while True:
            text, answer = model.text(tokens[:n]), model.text(tokens[n : n + N_ANSWER])
            # The two must be the same tokens apart as together.
            whole = model.tokens(text) + model.tokens(answer) == tokens[: n + N_ANSWER]
            if whole and re.match(r" [A-Za-z]", answer) and text[-1] not in ".?!":
                break
            n -= 1
        out.append(Item(f"raw-{split}-{i:02d}", "raw", split, text, "", answer))
    return out


# -- lists

COLOURS = "red blue green yellow black white brown grey pink purple".split()
MATERIALS = "copper wooden steel glass paper leather plastic stone silver cotton".split()
TOWNS = "Aldery Brenford Colmar Dunwick Elstow Farnham Gorley Hexby Ilmouth Kelder".split()

# (split, one line of the list, what it is about); slots are filled at random
LISTS = [
    ("test", "a {colour} {noun}, {n} kg, shelf {m}", "kettle lamp chair basket drum clock bucket"),
    (
        "test",
        "{n} {material} {noun}, box {m}, {colour} label",
        "rings cups spoons pins bowls bells",
    ),
    ("test", "{noun} from {town}, {n} pages, room {m}", "diary atlas letter novel ledger songbook"),
    ("test", "a {noun} with {colour} sails, {n} metres, pier {m}", "sloop cutter yawl barge ketch"),
    ("test", "{town} to {town2}, {noun}, {n} km, platform {m}", "express local sleeper railcar"),
    ("test", "{colour} {noun}, {n} cm tall, bed {m}", "tulip iris poppy aster dahlia lupin rose"),
    ("dev", "a {material} {noun}, {n} coins, stall {m}", "flute mask whistle sword puppet crown"),
    ("dev", "{noun} in {colour}, size {n}, drawer {m}", "jacket scarf shirt glove hat coat sock"),
    ("dev", "a {noun} from {town}, {n} years old, stable {m}", "horse donkey pony mule goat bull"),
]


def lists(model: Model, split: str, rng: random.Random) -> list[Item]:
    """Numbered lists with the instruction to repeat a part of them."""
    out = []
    chosen = [(line, nouns.split()) for s, line, nouns in LISTS if s == split]
    for i, (line, nouns) in enumerate(chosen):
        items = []
        for number in range(1, 100):
            town, town2 = rng.sample(TOWNS, 2)
            slots = {
                "colour": rng.choice(COLOURS),
                "material": rng.choice(MATERIALS),
                "noun": rng.choice(nouns),
                "n": rng.randrange(2, 60),
                "m": rng.randrange(1, 10),
                "town": town,
                "town2": town2,
            }
            items.append(f"{number}. {line.format(**slots)}")
        size = rng.randrange(400, 780)
        n = next(n for n in range(100) if len(model.tokens("\n".join(items[: n + 1]))) > size)
        item = Item(f"list-{split}-{i:02d}", "list", split, "\n".join(items[:n]), "")
        first = 1 if i % 2 == 0 else n // 2
        where = "from the beginning" if first == 1 else f"from item {first} on"
        lines = "\n".join(items[first - 1 : n])
        answer = model.text(model.tokens(lines)[:N_ANSWER])
        question = f"Repeat the list above {where}, word for word."
        out.append(replace(item, question=question, answer=answer))
    return out


# -- facts


@dataclass(frozen=True)
class Form:
    """A kind of fact: `statement` and `question` have a slot for the name of a thing."""

    statement: str
    question: str
    things: Sequence[str]
    values: Sequence[str]


@dataclass(frozen=True)
class Fact:
    form: Form
    thing: str
    value: str

    @property
    def sentence(self) -> str:
        return self.form.statement.format(thing=self.thing, value=self.value)


@dataclass(frozen=True)
class Candidate:
    """A question that the full cache may or may not answer.

    Attributes
    ----------
    depth : float
        Where the fact stands, 0 (start) to 1 (end of the text).
    wrong : set of str
        The other values in the text.
    """

    item: Item
    depth: float
    wrong: set[str]


def make_form(statement: str, question: str, things: str, values: Sequence[str]) -> Form:
    return Form(statement, question, things.split(", "), values)


NAMES = (
    "Agnes Bruno Clara Dmitri Elena Felix Greta Hugo Irene Jonas Katya Leon Mona Nils Olga Pablo "
    "Rosa Stefan Tilda Victor"
).split()
CITIES = (
    "Lisbon Oslo Vienna Madrid Dublin Prague Athens Warsaw Helsinki Cairo Toronto Lima Seoul "
    "Nairobi Sydney Boston"
).split()
CODES = [str(n) for n in range(1013, 9990, 97)]
AMOUNTS = [str(n) for n in range(112, 990, 13)]

# Short statements: the model answers in a whole sentence, whatever it is told.
FORMS = [
    make_form(
        "The code of the {thing} is {value}.",
        "What is the code of the {thing}? Answer with the code only.",
        "north gate, south gate, east gate, west gate, upper gate, "
        "north tower, south tower, east tower, west tower, old tower",
        CODES,
    ),
    make_form(
        "The price of the {thing} is {value} dollars.",
        "What is the price of the {thing}? Answer with the number only.",
        "lantern, tent, saddle, telescope, canoe, sewing machine, carpet, violin, globe, mirror",
        AMOUNTS,
    ),
    make_form(
        "The manager of the {thing} is {value}.",
        "Who is the manager of the {thing}? Answer with the name only.",
        "bakery, post office, museum, swimming pool, print shop, nursery, hotel, theatre, zoo, inn",
        NAMES,
    ),
    make_form(
        "The weight of the {thing} is {value} kilograms.",
        "What is the weight of the {thing}? Answer with the number only.",
        "statue, church bell, anchor, piano, cannon, millstone, safe, oven, horse, boat",
        AMOUNTS,
    ),
    make_form(
        "The birthplace of the {thing} is {value}.",
        "What is the birthplace of the {thing}? Answer with the city only.",
        "pianist, painter, dentist, pilot, lawyer, captain, poet, singer, judge, gardener",
        CITIES,
    ),
    make_form(
        "The mayor of {thing} is {value}.",
        "Who is the mayor of {thing}? Answer with the name only.",
        ", ".join(TOWNS),
        NAMES,
    ),
]


def split_half(things: Sequence[str], split: str) -> list[str]:
    """The dev split names none of the test split's things."""
    return list(things[SPLITS.index(split) :: 2])


def sentences(passages: Sequence[str]) -> list[str]:
    """Those that stand on their own well enough to be filler."""
    found = re.split(r"(?<=[.?])\s+", " ".join(p.replace("\n\n", " ") for p in passages))
    return [s for s in found if 6 <= len(s.split()) <= 22 and s[0].isupper()]


def records(form: Form, split: str, n: int, taken: set[str], rng: random.Random) -> list[Fact]:
    """`n` facts of one form; no value comes twice in a text."""
    things = rng.sample(split_half(form.things, split), n)
    values = rng.sample([v for v in form.values if v not in taken], n)
    taken.update(values)
    return [Fact(form, thing, value) for thing, value in zip(things, values)]


def facts(
    model: Model, filler: Sequence[str], split: str, n: int, rng: random.Random
) -> list[Candidate]:
    """Candidates at all depths of a text."""
    depths = [(i + 0.5) / n for i in range(n)]
    rng.shuffle(depths)
    out = []
    for i, depth in enumerate(depths):
        own = FORMS[i % len(FORMS)]
        taken: set[str] = set()
        fact, *others = records(own, split, N_SAME, taken, rng)
        for form in FORMS:
            if form is not own:
                others += records(form, split, 1, taken, rng)
        size = rng.randrange(400, 780)  # tokens
        lines = [other.sentence for other in others]
        for sentence in rng.sample(list(filler), len(filler)):
            if len(model.tokens(" ".join([*lines, fact.sentence]))) > size:
                break
            lines.append(sentence)
        rng.shuffle(lines)
        lines.insert(int(depth * (len(lines) + 1)), fact.sentence)
        item = Item(
            f"fact-{split}-{i:03d}",
            "fact",
            split,
            " ".join(lines),
            own.question.format(thing=fact.thing),
            fact.value,
            exact=True,
        )
        out.append(Candidate(item, depth, taken - {fact.value}))
    return out


def right(said: str, candidate: Candidate) -> bool:
    """The value as a word of its own, and no other value of the text."""
    words = set(re.findall(r"\w+", said))
    return candidate.item.answer in words and not words & candidate.wrong


def answered_facts(model: Model, candidates: Sequence[Candidate], n_keep: int) -> list[Item]:
    """The first `n_keep` that the full cache answers right."""
    kept: list[Candidate] = []
    n_tried = 0
    for candidate in candidates:
        if len(kept) == n_keep:
            break
        n_tried += 1
        item = candidate.item
        said = model.answer(item, len(model.tokens(item.answer)) + N_ECHO)
        if right(said, candidate):
            kept.append(candidate)
        say(f"{item.id}: {item.answer}, said {said!r}; {len(kept)} of {n_tried} right")
    thirds = [sum(int(3 * c.depth) == third for c in kept) for third in range(3)]
    say(f"facts: {len(kept)} of {n_tried} right; first, second, last third of the text: {thirds}")
    return [candidate.item for candidate in kept]


# -- all


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def make(model: Model, args: argparse.Namespace) -> list[Item]:
    passages = read_passages(args.passages)
    out: list[Item] = []
    candidates: dict[str, list[Candidate]] = {}
    for split, n in zip(SPLITS, args.candidates):
        # One generator each: a change of one kind leaves the others as they are.
        rngs = {k: random.Random(f"{args.seed} {k} {split}") for k in ("raw", "list", "fact")}
        out += documents(passages["document", split], split)
        out += lists(model, split, rngs["list"])
        out += raw_items(model, passages["raw", split], split, rngs["raw"])
        filler = sentences(passages["document", split])
        candidates[split] = facts(model, filler, split, n, rngs["fact"])
    for item in out + [c.item for group in candidates.values() for c in group]:
        model.check_prompt(item)  # all of them, before the long part
    out = [answered_document(model, item) if item.kind == "document" else item for item in out]
    for split, n_keep in zip(SPLITS, args.keep):
        out += answered_facts(model, candidates[split], n_keep)
    for item in out:
        model.check_prompt(item)
        model.check_answer(item)
    return out


def report(model: Model, items: Sequence[Item]) -> None:
    """Counts and sizes in tokens per kind and split."""
    for split, kind in dict.fromkeys((item.split, item.kind) for item in items):
        chosen = [item for item in items if (item.split, item.kind) == (split, kind)]
        sizes = [model.n_prompt(item) for item in chosen]
        answers = [len(model.tokens(item.answer)) for item in chosen]
        say(
            f"{split} {kind}: {len(chosen)} items, prompts {min(sizes)} to {max(sizes)} "
            f"tokens, answers {min(answers)} to {max(answers)}"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", type=Path, help="GGUF (the embedded language model)")
    parser.add_argument("--passages", type=Path, default=FOLDER / "passages.md")
    parser.add_argument("--out", type=Path, default=FOLDER / "text.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--candidates", nargs=2, type=int, default=[80, 40], help="facts tried")
    parser.add_argument("--keep", nargs=2, type=int, default=[48, 24], help="facts kept at most")
    parser.add_argument("-t", "--threads", type=int, default=1)
    args = parser.parse_args(argv)

    model = Model(args.model or embedded_model(), args.threads)
    items = make(model, args)
    report(model, items)
    # facts are right or wrong, texts are not: they are summed up apart
    rows = [{**asdict(item), "group": "facts" if item.exact else "texts"} for item in items]
    data = (json.dumps(rows, indent=1) + "\n").encode()
    args.out.write_bytes(data)
    print(hashlib.sha256(data).hexdigest())
    return 0


if __name__ == "__main__":
    sys.exit(main())
