"""`elastic-llama demo`: the embedded model and image, with and without an elastic cache."""

from __future__ import annotations

import argparse
from typing import Any

from . import options


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("demo", help="full cache against elastic, on the embedded image")
    options.add_model_options(parser)
    options.add_elastic_options(parser)
    options.add_sampling_options(parser, predict=48)
    parser.add_argument("--image", metavar="FILE", help="another image")
    parser.add_argument("-p", "--prompt", default="Describe the image row by row.")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..embedded import demo_image
    from ..images import load_image
    from .describe import answer_all

    path = args.image or str(demo_image())
    image = load_image(path)
    print(f"image: {path}\nprompt: {args.prompt}\n")
    answer_all(args, [image], compare=True)
