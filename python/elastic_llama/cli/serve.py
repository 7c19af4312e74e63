"""`elastic-llama serve`: llama.cpp's own server, with the elastic cache."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ElasticError, message

_ABOUT = """\
llama-server with the elastic KV cache: OpenAI's and Anthropic's HTTP interfaces, slots, streaming.
Without -m it serves the embedded model. All options of llama-server are taken (below, and with
their LLAMA_ARG_... variables); these are set unless you set them:

  --kv-budget 0.2          fraction of the cells that stay; 1 turns the elastic cache off
  --kv-image-checkpoint    compress an image before its question is known, so that another question
                           about it starts there
  -np 4 --no-kv-unified    four requests at once, each with cells of its own
  --cache-ram 512          MiB for conversations that have lost their slot
  --no-remote-media        image URLs are refused; data: URLs are taken
  --media-max-count 16 --media-max-mib 20 --media-max-mpixels 50
  --path DIR --metrics     a page to try it with, at /, and what it shows
  --host 127.0.0.1         only this machine can reach it
"""

_MODEL = (
    *("-m", "--model", "-mu", "--model-url", "-hf", "-hfr", "--hf-repo"),
    *("-dr", "--docker-repo", "--models-dir", "--models-preset"),
)
_MODEL_VARIABLES = ("MODEL", "MODEL_URL", "HF_REPO", "DOCKER_REPO", "MODELS_DIR", "MODELS_PRESET")
_CONTEXT = 2048  # of each of the embedded model's slots

# names of an option, its environment variable, and what stands for it
_DEFAULTS: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
    (("--host",), "HOST", ("--host", "127.0.0.1")),
    (("--kv-budget",), "KV_BUDGET", ("--kv-budget", "0.2")),
    (
        ("--kv-image-checkpoint", "--no-kv-image-checkpoint"),
        "KV_IMAGE_CHECKPOINT",
        ("--kv-image-checkpoint",),
    ),
    (("-np", "--parallel"), "N_PARALLEL", ("-np", "4")),
    (
        ("-kvu", "--kv-unified", "-no-kvu", "--no-kv-unified"),
        "KV_UNIFIED",
        ("--no-kv-unified",),
    ),
    (("-cram", "--cache-ram"), "CACHE_RAM", ("--cache-ram", "512")),
    (("--remote-media", "--no-remote-media"), "REMOTE_MEDIA", ("--no-remote-media",)),
    (("--media-max-count",), "MEDIA_MAX_COUNT", ("--media-max-count", "16")),
    (("--media-max-mib",), "MEDIA_MAX_MIB", ("--media-max-mib", "20")),
    (("--media-max-mpixels",), "MEDIA_MAX_MPIXELS", ("--media-max-mpixels", "50")),
    (("--metrics",), "ENDPOINT_METRICS", ("--metrics",)),
    (("--path",), "STATIC_PATH", ("--path", "PAGE")),
)

# glibc's: else each of the server's many threads keeps freed memory for itself, and large buffers
# that are freed stay in the heap
_MALLOC = {"MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "131072"}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="llama.cpp's server with the elastic cache",
        add_help=False,
        prefix_chars="\0",  # nothing is an option of ours: all go to llama-server
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run)


def find_server() -> Path:
    """The program llama-server of this package.

    Raises
    ------
    ElasticError
        It is not built.
    """
    from .._libraries import lib_dir

    path = lib_dir().parent / "bin" / "llama-server"
    if not path.is_file():
        raise ElasticError(
            message(
                "serve",
                "llama-server is not built",
                do="run make server in a clone, or install with "
                'CMAKE_ARGS="-DELASTIC_TOOLS=ON" pip install --no-binary elastic-llama .',
            )
        )
    return path


def page_dir() -> Path:
    """The folder of the page that is served at /."""
    return Path(__file__).resolve().parent.parent / "page"


def _given(arguments: list[str], names: Iterable[str]) -> bool:
    return any(a.split("=", 1)[0] in names for a in arguments)


def _value(arguments: list[str], name: str) -> str | None:
    """The argument of an option of ours, taken out."""
    if name not in arguments:
        return None
    at = arguments.index(name)
    if at + 1 == len(arguments):
        raise ConfigError(message("serve", f"{name} without a value", do="give it one"))
    value = arguments[at + 1]
    del arguments[at : at + 2]
    return value


def _from_hub(arguments: list[str]) -> list[str]:
    """--hf-repo with --hf-file, fetched by huggingface_hub: this llama-server has no TLS."""
    arguments = list(arguments)
    if not _given(arguments, ("--hf-file", "-hff")):
        return arguments
    from ..hub import fetch

    name = _value(arguments, "--hf-file") or _value(arguments, "-hff")
    repo = next((r for r in (_value(arguments, n) for n in ("--hf-repo", "-hf", "-hfr")) if r), "")
    mmproj = _value(arguments, "--hf-mmproj")
    if not repo or not name:
        raise ConfigError(message("serve", "--hf-file without --hf-repo", do="name both"))
    arguments += ["-m", str(fetch(repo, name))]
    return arguments + (["--mmproj", str(fetch(repo, mmproj))] if mmproj else [])


def server_arguments(arguments: list[str], environ: Mapping[str, str]) -> list[str]:
    """The arguments that llama-server gets for those of `elastic-llama serve`.

    Parameters
    ----------
    arguments : list of str
        As llama-server takes them, and ``--hf-file``, ``--hf-mmproj`` with ``--hf-repo``.
    environ : mapping
        Where a LLAMA_ARG_... variable is set, its option is left alone.

    Raises
    ------
    ConfigError
        An option that lacks its value, or half of a repository's file.
    DownloadError
        The embedded model, or the file of a repository, cannot be fetched.
    """
    out = _from_hub(arguments)
    of_user = any(f"LLAMA_ARG_{name}" in environ for name in _MODEL_VARIABLES)
    if not of_user and not _given(out, _MODEL):
        from ..embedded import embedded_mmproj, embedded_model

        out += ["-m", str(embedded_model()), "--alias", "embedded"]
        if not _given(out, ("-mm", "--mmproj", "--no-mmproj")):
            out += ["--mmproj", str(embedded_mmproj())]
        if not _given(out, ("--chat-template", "--chat-template-file")):
            out += ["--chat-template", "chatml"]  # without the default system prompt
        if not _given(out, ("-c", "--ctx-size")) and "LLAMA_ARG_CTX_SIZE" not in environ:
            n_slots = next((out[i + 1] for i, a in enumerate(out) if a in ("-np", "--parallel")), 4)
            with contextlib.suppress(ValueError):  # llama-server says so
                out += ["-c", str(_CONTEXT * int(n_slots))]
    for names, variable, default in _DEFAULTS:
        if _given(out, names) or f"LLAMA_ARG_{variable}" in environ:
            continue
        out += [str(page_dir()) if part == "PAGE" else part for part in default]
    return out


def run(args: argparse.Namespace) -> int:
    server = find_server()
    if _given(args.arguments, ("-h", "--help", "--usage")):
        print(_ABOUT, flush=True)
        return subprocess.run([str(server), "--help"], check=False).returncode
    command = [str(server), *server_arguments(args.arguments, os.environ)]
    for name, setting in _MALLOC.items():
        os.environ.setdefault(name, setting)
    sys.stdout.flush()
    sys.stderr.flush()
    # the server becomes this process: signals and the exit code are its own
    os.execv(command[0], command)
