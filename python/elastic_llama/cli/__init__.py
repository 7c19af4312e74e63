"""The command line: `elastic-llama COMMAND`, such as `describe`, `chat` or `eval`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from . import (
    bench,
    caption,
    chat,
    demo,
    describe,
    eval,
    info,
    memory,
    remember,
    rpc_server,
    serve,
    show,
)

_COMMANDS = (
    describe,
    show,
    chat,
    caption,
    remember,
    memory,
    eval,
    bench,
    demo,
    info,
    rpc_server,
    serve,
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, and the exit code of every other mistake of the user's."""
        self.exit(1, f"error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="elastic-llama", description="Chat about images with an elastic KV cache."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in _COMMANDS:
        module.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 on success, 1 on an error of the user's, 130 on Ctrl-C."""
    from ..errors import ElasticError

    args = build_parser().parse_args(argv)
    try:
        code = int(args.run(args) or 0)
        sys.stdout.flush()
        return code
    except ElasticError as e:
        message = " ".join(str(e).split())
        print(f"error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader has gone; keep Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
