"""`elastic-llama rpc-server`: lend this machine to models that another one runs."""

from __future__ import annotations

import argparse
import os


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "rpc-server",
        help="lend this machine's memory and processor to models of another one",
        description="Lend this machine to models that another one runs (--rpc HOST:PORT there). "
        "The connection is neither encrypted nor protected: only in a network you trust.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument("--port", type=int, default=50052, help="TCP port (%(default)s)")
    parser.add_argument(
        "-t", "--threads", type=int, default=os.cpu_count() or 1, help="threads (%(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..rpc import serve_rpc

    serve_rpc(args.host, args.port, args.threads)
