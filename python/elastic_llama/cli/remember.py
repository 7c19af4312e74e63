"""`elastic-llama remember PHOTO|FOLDER`: images read once, for questions that come later."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from . import options

SOME_FAILED = 3  # exit code: some images could not be read


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "remember", help="read images into the image memory, for questions that come later"
    )
    parser.add_argument("image", nargs="+", help="image file(s), or folders of them")
    parser.add_argument("--system", help="system prompt of the conversations to come")
    options.add_model_options(parser)
    options.add_elastic_options(parser)
    options.add_answer_options(parser)
    options.add_memory_options(parser, always=True)
    parser.set_defaults(run=run, seed=options.RANDOM_SEED)


def run(args: argparse.Namespace) -> int:
    from ..conversation import Conversation
    from ..errors import ConfigError, ElasticError
    from ..image_files import image_files
    from .report import progress

    files = [file for name in args.image for file in image_files(name)]
    llm = options.load_llm(args, options.elastic_config(args))
    n_new = n_failed = 0
    try:
        chat = Conversation(llm, system=args.system)
        try:
            for file in progress(files, "remember", len(files)):
                try:
                    n_new += chat.remember(str(file))
                except ConfigError:
                    raise  # it is no image's fault
                except ElasticError as e:
                    n_failed += 1
                    print(f"error: {file}: {' '.join(str(e).split())}", file=sys.stderr)
        finally:
            chat.close()
    finally:
        llm.close()
    n_known = len(files) - n_new - n_failed
    print(f"{n_new} images remembered, {n_known} known before, {n_failed} failed")
    print(f"in {Path(args.memory).expanduser()}")
    return SOME_FAILED if n_failed else 0
