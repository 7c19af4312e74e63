"""`elastic-llama info`: this build and its policies, or what the elastic cache does for a model."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..config import whole
from ..errors import ConfigError, message
from ..kv_types import KV_TYPES

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "info", help="build and policies; with -m what the elastic cache does for a model"
    )
    parser.add_argument("-m", "--model", metavar="FILE", help="GGUF of the language model")
    parser.add_argument("--mmproj", metavar="FILE", help="GGUF of the vision tower and projector")
    parser.add_argument(
        "--image-size", type=_size, default=None, metavar="WxH", help="in pixels (1024x768)"
    )
    parser.add_argument(
        "--kv-budget", type=float, default=0.2, metavar="B", help="what is kept (0.2)"
    )
    parser.add_argument("-ub", "--ubatch-size", type=int, default=512, metavar="N", help="(512)")
    parser.add_argument("-ctk", "--cache-type-k", choices=tuple(KV_TYPES), default="f16")
    parser.add_argument("-ctv", "--cache-type-v", choices=tuple(KV_TYPES), default="f16")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.set_defaults(run=run)


def _size(value: str) -> tuple[int, int]:
    width, _, height = value.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{value!r}, expected a width and a height: 1024x768")
    return int(width), int(height)


def run(args: argparse.Namespace) -> None:
    if args.mmproj and not args.model:
        raise ConfigError(message("info", "--mmproj without -m", do="name the language model too"))
    whole("--ubatch-size", args.ubatch_size, 1)
    if not args.model:
        _print_build(args.json)
        return
    from ..model_info import IMAGE_SIZE, model_info
    from ..native_log import silence

    silence()
    info = model_info(
        args.model,
        args.mmproj,
        budget=args.kv_budget,
        image_size=args.image_size or IMAGE_SIZE,
        n_ubatch=args.ubatch_size,
        type_k=KV_TYPES[args.cache_type_k],
        type_v=KV_TYPES[args.cache_type_v],
    )
    if args.json:
        print(json.dumps(info.as_dict(), indent=1))
    else:
        _print_model(info)


def _print_build(as_json: bool) -> None:
    from .. import _core, build_info, lib_dir

    build = {**build_info(), "libraries": str(lib_dir())}
    policies = {row["name"]: row["summary"] for row in _core.core.policies()}
    if as_json:
        print(json.dumps({**build, "policies": policies}, indent=1))
        return
    for key, value in build.items():
        print(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    print("policies:")
    for name, summary in policies.items():
        print(f"  {name:14} {summary}")


def _print_model(info: Any) -> None:
    print(f"model: {info.path} ({info.architecture}, {info.n_params / 1e6:.4g} M parameters)")
    if not info.works:
        print(f"elastic cache: no; {info.why}")
        print(f"instead: {info.instead}")
        return
    print(f"elastic cache: works, on {info.n_layer} of {info.n_layer_model} layers ({info.kind})")
    bias = f", and {_bytes(info.bias_bytes)} of the elastic cache's own" if info.bias_bytes else ""
    print(f"a cell there: {_bytes(info.cell_bytes)} of K and V{bias}")
    if info.window_cells:
        print(
            f"not compressed: windows of {info.window_tokens} tokens, "
            f"{info.window_cells} cells of {_bytes(info.window_cell_bytes)}"
        )
    if info.state_bytes:
        print(f"not compressed: recurrent states, {_bytes(info.state_bytes)} per sequence")
    if info.image is not None:
        _print_image(info.image)
    _print_sizes(info)


def _print_image(image: Any) -> None:
    positions = f" at {image.positions} positions" if image.positions != image.cells else ""
    print(
        f"an image of {image.width}x{image.height}: {image.cells} cells{positions}, "
        f"{_bytes(image.n_bytes)}; {image.cells_kept} of them stay, {_bytes(image.bytes_kept)}"
    )


def _print_sizes(info: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    windowed = bool(info.window_cells)
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = ["tokens", "llama-cpp-python"]
    names += ["swa_full=False"] if windowed else []
    names += [f"budget {info.budget:g}", "of it not compressed", "saved"]
    for name in names:
        table.add_column(name, justify="right")
    for s in info.sizes:
        row = [str(s.n_tokens), _bytes(s.stock)]
        row += [_bytes(s.windowed)] if windowed else []
        table.add_row(*row, _bytes(s.elastic), _bytes(s.other), f"{100 * s.saved:.0f} %")
    print()
    Console(width=120, soft_wrap=False).print(table)
    if windowed:
        s = info.sizes[-1]
        print(
            f"\nsaved: of swa_full=False, which is on with the elastic cache. swa_full=True takes "
            f"{_bytes(s.stock - s.windowed)} more at {s.n_tokens} tokens; without it a prompt that "
            "agrees with the cache only before the window is read again from its start."
        )


def _bytes(n: int) -> str:
    value, unit = float(n), _UNITS[0]
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{value:.4g} {unit}"
