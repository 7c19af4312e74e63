"""`elastic-llama info`: what this build is made of, and the policies it knows."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("info", help="build, backends, policies")
    parser.set_defaults(run=run)


def run(_args: argparse.Namespace) -> None:
    from .. import _core, build_info, lib_dir

    for key, value in build_info().items():
        print(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    print(f"libraries: {lib_dir()}")
    print("policies:")
    for row in _core.core.policies():
        print(f"  {row['name']:14} {row['summary']}")
