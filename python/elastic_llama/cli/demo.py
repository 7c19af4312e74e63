"""`elastic-llama demo`: the embedded model and image, with and without an elastic cache."""

from __future__ import annotations

import argparse
from typing import Any

from . import options
from .report import print_table


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("demo", help="full cache against elastic, on the embedded image")
    options.add_model_options(parser)
    options.add_elastic_options(parser)
    options.add_sampling_options(parser)
    parser.add_argument("--image", metavar="FILE", help="another image")
    parser.add_argument("-p", "--prompt", default="Describe the image row by row.")
    parser.set_defaults(run=run, predict=48)


def run(args: argparse.Namespace) -> None:
    from ..config import ElasticConfig
    from ..embedded import demo_image
    from ..images import load_image
    from .describe import answer

    path = args.image or str(demo_image())
    image = load_image(path)
    elastic = options.elastic_config(args)
    print(f"image: {path}\nprompt: {args.prompt}\n")
    rows = []
    for name, config in (
        ("full", ElasticConfig.off()),
        (f"{elastic.policy} {elastic.budget:g}", elastic),
    ):
        print(f"--- {name}")
        rows.append((name, answer(args, config, [image], args.prompt)))
    print_table(rows)
