"""`elastic-llama memory list | verify | prune`: what the image memory holds."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import ConfigError, message
from ..stats import mib
from . import options

DAMAGED = 3  # exit code of verify

_COLUMNS = ("model", "policy", "budget", "positions", "cells")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("memory", help="list, check or shrink the image memory")
    parser.add_argument(
        "action",
        choices=("list", "verify", "prune"),
        help="list: the entries; verify: read them all, and set aside what is damaged; prune: "
        "delete what was not used for longest",
    )
    parser.add_argument(
        "--size",
        type=float,
        metavar="GIB",
        help="prune: what may stay; 0: nothing (that of --memory-size)",
    )
    options.add_memory_options(parser, always=True)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..memory import MemoryFolder

    path = Path(args.memory).expanduser()
    if not path.exists():
        raise ConfigError(
            message("memory", str(path), "no such folder", "one that images are remembered in")
        )
    folder = MemoryFolder(path, options.memory_bytes(args.memory_size))
    if args.action == "prune":
        if args.size is not None and not 0 <= args.size < 2**33:
            raise ConfigError(message("options", "--size", args.size, "0 or more"))
        n = folder.prune(None if args.size is None else int(args.size * 2**30))
        print(f"{n} files deleted")
        return 0
    n_bad = n_bytes = n_files = 0
    for status in folder.verify(set_aside=args.action == "verify"):
        n_files += 1
        n_bytes += status.n_bytes
        if status.problem:
            n_bad += 1
            print(f"{status.path.name}: {status.problem}", file=sys.stderr)
        elif args.action == "list":
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.last_used))
            about = "  ".join(f"{name} {status.info.get(name, '?')}" for name in _COLUMNS)
            print(f"{status.path.stem[:12]}  {used}  {mib(status.n_bytes)}  {about}")
    print(f"{n_files} images, {mib(n_bytes)}, {n_bad} damaged, in {folder.path}")
    return DAMAGED if n_bad else 0
