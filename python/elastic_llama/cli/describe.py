"""`elastic-llama describe IMAGE`: one question about one or more images."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from . import options
from .report import print_table


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("describe", help="answer a question about an image")
    parser.add_argument("image", nargs="+", help="image file(s)")
    parser.add_argument("-p", "--prompt", default="Describe the image.", help="the question")
    parser.add_argument("--compare", action="store_true", help="answer with the full cache as well")
    options.add_model_options(parser)
    options.add_elastic_options(parser)
    options.add_answer_options(parser)
    options.add_memory_options(parser)
    options.add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..images import load_image

    images = [load_image(name) for name in args.image]  # before the model, which takes longer
    answer_all(args, images, compare=args.compare)


def answer_all(args: argparse.Namespace, images: list[Any], compare: bool) -> None:
    """Answer with the elastic cache, to compare with the full one first, and print the table."""
    from ..config import ElasticConfig

    elastic = options.elastic_config(args)
    runs = [(f"{elastic.policy} {elastic.budget:g}", elastic)]
    if compare:
        runs.insert(0, ("full", ElasticConfig.off()))
    rows = []
    for name, config in runs:
        if len(runs) > 1:
            print(f"--- {name}")
        stats, is_on = answer(args, config, images, args.prompt)
        rows.append((name if is_on or config.is_off else "off", stats))
    print_table(rows)


def answer(
    args: argparse.Namespace, config: Any, images: list[Any], prompt: str
) -> tuple[Any, bool]:
    """Stream one answer to stdout; the figures of the turn, and whether an elastic cache was on."""
    from ..conversation import Conversation

    llm = options.load_llm(args, config, swa_full=False)  # else only the full cache would have it
    try:
        chat = Conversation(llm)
        try:
            for piece in chat.ask(prompt, images, **options.ask_options(args)):
                print(piece, end="", flush=True)
            print("\n")
            sys.stdout.flush()
            return chat.stats, llm.session is not None
        finally:
            chat.close()
    finally:
        llm.close()
