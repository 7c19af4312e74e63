"""`elastic-llama chat`: several turns over one KV cache."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import Any

from ..errors import ConfigError, message
from ..stats import mib
from . import options

_HELP = """/image FILE   show the next question this image; several are possible, "as this.png" too
/clear        forget the conversation
/stats        what the cache holds
/quit         leave (or Ctrl-D)"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        help="a conversation about images",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="image of the first question"
    )
    parser.add_argument("--system", help="system prompt")
    options.add_model_options(parser)
    options.add_elastic_options(parser)
    options.add_answer_options(parser)
    options.add_memory_options(parser)
    options.add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..conversation import Conversation
    from ..errors import ElasticError
    from ..images import load_image

    waiting = [load_image(name) for name in args.image]
    llm = options.load_llm(args, options.elastic_config(args))
    chat = Conversation(llm, system=args.system)
    try:
        print(_HELP)
        while True:
            line = _read()
            if line is None or line in ("/quit", "/exit"):
                return
            try:
                command, rest = [*line.split(maxsplit=1), "", ""][:2]
                if command == "/image":
                    images = [load_image(name) for name in image_names(rest)]
                    waiting += images
                    print("(image ready)" if len(images) == 1 else f"({len(images)} images ready)")
                elif line == "/clear":
                    chat.clear()
                    waiting = []
                    print("(cleared)")
                elif line == "/stats":
                    print(llm.stats)
                elif line.startswith("/"):
                    print(_HELP)
                elif line:
                    _turn(chat, line, waiting, args)
                    waiting = []
            except ElasticError as e:
                print(f"error: {e}", file=sys.stderr)
    finally:
        chat.close()
        llm.close()


def image_names(line: str) -> list[str]:
    """Files that a line names as a shell takes it, or the one file that all of it names.

    Raises
    ------
    ConfigError
        It names none.
    """
    line = line.strip()
    whole = os.path.expanduser(line)
    if os.path.exists(whole):
        return [whole]
    try:
        names = shlex.split(line)
    except ValueError:  # a quote that stays open
        names = [line]
    if not any(names):
        raise ConfigError(message("chat", "/image without a file", do="name one"))
    return [os.path.expanduser(name) for name in names]


def _read() -> str | None:
    try:
        return input("\n> ").strip()
    except EOFError:
        print()
        return None


def _turn(chat: Any, line: str, images: list[Any], args: argparse.Namespace) -> None:
    try:
        for piece in chat.ask(line, images, **options.ask_options(args)):
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" (stopped)")
    s = chat.stats
    cells = f"{s.cells_prompt} -> {s.cells_kept} cells"
    if s.other_bytes:
        cells += (
            f"; {mib(s.bytes_prompt)} -> {mib(s.bytes_kept)}, of which {mib(s.other_bytes)} are "
            f"not compressed: {s.other_parts}"
        )
    print(f"({cells}, {s.tokens_per_second:.1f} tokens/s)")
