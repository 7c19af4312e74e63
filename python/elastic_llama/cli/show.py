"""`elastic-llama show IMAGE`: a picture of what the elastic cache keeps of a prompt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import ConfigError, message
from . import options


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("show", help="picture of what is kept of an image and a question")
    parser.add_argument("image", nargs="+", help="image file(s)")
    parser.add_argument("-p", "--prompt", default="Describe the image.", help="the question")
    parser.add_argument(
        "--layer", type=int, metavar="N", help="this layer only, from 0 (all layers)"
    )
    parser.add_argument(
        "-o", "--output", default="kept.png", metavar="FILE", help="PNG, PDF or SVG (kept.png)"
    )
    options.add_model_options(parser)
    options.add_elastic_options(parser)
    parser.set_defaults(run=run, seed=options.RANDOM_SEED)


def run(args: argparse.Namespace) -> None:
    from ..images import load_image
    from ..picture import draw

    check_output(Path(args.output))  # and the images, before the model, which takes longer
    images = [load_image(name) for name in args.image]
    kept = look_once(args, images)
    try:
        draw(kept).savefig(args.output)
    except OSError as e:
        raise ConfigError(message("show", "output", args.output, "a file to write", str(e))) from e
    print("\n".join(filter(None, (kept.title, kept.bytes_note, args.output))))


def check_output(path: Path) -> None:
    """Refuse what cannot be drawn or written.

    Raises
    ------
    ConfigError
        No such folder, a format that matplotlib does not write, or no matplotlib.
    """
    from ..picture import matplotlib_figure

    formats = matplotlib_figure()().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ConfigError(message("show", "output", str(path), "a name that ends in .png"))
    if not path.parent.is_dir():
        raise ConfigError(message("show", "output", str(path), "a folder that exists"))


def look_once(args: argparse.Namespace, images: list[Any]) -> Any:
    """What the model that the options describe keeps."""
    from ..conversation import Conversation
    from ..show import look

    llm = options.load_llm(args, options.elastic_config(args))
    try:
        chat = Conversation(llm)
        try:
            return look(chat, args.prompt, images, args.layer)
        finally:
            chat.close()
    finally:
        llm.close()
