"""What a text that was compressed for one question still says of others, in the same conversation.

python benchmarks/later_questions.py [--budget 0.2]
                                     [--out benchmarks/results/followup-questions.txt]

Each text of the facts (split dev) is given with its question; two other facts that it states are
asked for after the answer.
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path

from elastic_llama import ElasticConfig, ElasticLlama
from elastic_llama.conversation import Conversation
from elastic_llama.evaluation.items import Item, read_items
from elastic_llama.evaluation.metrics import is_right
from make_text_set import FORMS, N_ECHO

N_LATER = 2  # further questions for each text
N_ANSWER = 6 + N_ECHO  # tokens


def other_facts(item: Item) -> list[tuple[str, str]]:
    """Questions and answers of what the text states besides the fact that is asked for first."""
    out = []
    for form in FORMS:
        pattern = re.escape(form.statement)
        pattern = pattern.replace(r"\{thing\}", r"([\w ]{3,30})").replace(r"\{value\}", r"(\w+)")
        for thing, value in re.findall(pattern, item.prompt):
            if value != item.answer:
                out.append((form.question.format(thing=thing), value))
    return out


def ask(chat: Conversation, question: str) -> str:
    return "".join(chat.ask(question, max_tokens=N_ANSWER))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--limit", type=int, help="texts")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    data = Path(__file__).resolve().parent / "text_set" / "text.json"
    items = [item for item in read_items(data, "dev") if item.exact][: args.limit]
    rng = random.Random(0)
    later = [rng.sample(other_facts(item), N_LATER) for item in items]
    lines = []
    for name, elastic in {
        "full": None,
        "elastic": ElasticConfig(budget=args.budget),
        "elastic --probe 0": ElasticConfig(budget=args.budget, probe=0),
        "snapkv": ElasticConfig(budget=args.budget, policy="snapkv"),
        "h2o": ElasticConfig(budget=args.budget, policy="h2o"),
    }.items():
        n_first = n_later = 0
        with ElasticLlama(elastic=elastic, n_ctx=2048, n_threads=1, n_threads_batch=1) as llm:
            chat = Conversation(llm)
            for item, questions in zip(items, later):
                chat.clear()
                n_first += is_right(ask(chat, item.prompt), item.answer)
                n_later += sum(
                    is_right(ask(chat, question), value) for question, value in questions
                )
            chat.close()
        n = len(items)
        lines.append(f"{name}: first {n_first} of {n}, later {n_later} of {N_LATER * n}")
        print(lines[-1], flush=True)
    if args.out is not None:
        args.out.write_text(f"budget {args.budget:g}\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
