"""`elastic-llama caption DIR`: one question about every image of a folder, into a file of lines."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError, message
from . import options

SOME_FAILED = 3  # exit code: some images have an error for an answer

_CELLS = 1024  # of the context for each image that is answered at once


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("caption", help="ask about every image of a folder")
    parser.add_argument("folder", help="folder of images")
    parser.add_argument("-p", "--prompt", default="Describe the image.", help="the question")
    parser.add_argument(
        "-o",
        "--out",
        default="captions.jsonl",
        metavar="FILE",
        help="one line for each image: file and caption, or file and error; images that are in it "
        "already are left out (captions.jsonl)",
    )
    parser.add_argument(
        "-np",
        "--parallel",
        type=int,
        default=8,
        metavar="N",
        help="images that each model answers at once (8)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="models that work at the same time, with -t threads each (one for each core as far as "
        "half of the free memory takes them; 1 on a GPU, with -t, or without an elastic cache)",
    )
    options.add_model_options(parser)
    options.add_elastic_options(parser)
    options.add_answer_options(parser)
    options.add_memory_options(parser)
    parser.add_argument(
        "-n",
        "--predict",
        type=int,
        default=256,
        metavar="N",
        help="most tokens of an answer (256)",
    )
    parser.set_defaults(run=run, seed=options.RANDOM_SEED)


def run(args: argparse.Namespace) -> int:
    from ..config import whole
    from ..image_files import image_files

    whole("--parallel", args.parallel, 1, 255)
    if args.workers is not None:
        whole("--workers", args.workers, 1, 64)
    whole("--predict", args.predict, 1)
    folder = Path(args.folder).expanduser()
    files = {file.relative_to(folder).as_posix(): file for file in image_files(folder)}
    with CaptionFile(Path(args.out).expanduser()) as out:
        waiting = {name: file for name, file in files.items() if name not in out.failed}
        n_known = len(files) - len(waiting)
        if waiting:
            with _second_interrupt_kills():
                _caption(args, waiting, out)
        failed = [name for name in files if out.failed.get(name)]
    n_good = len(files) - len(failed)
    print(f"{n_good} captions, {len(failed)} errors, {n_known} known before, in {args.out}")
    return SOME_FAILED if failed else 0


@contextmanager
def _second_interrupt_kills() -> Iterator[None]:
    """After Ctrl-C models finish the image that they read; another one does not wait for that.

    Nothing is lost: every line was written as a whole.
    """

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # which alone may set it
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _caption(args: argparse.Namespace, files: dict[str, Path], out: CaptionFile) -> None:
    from ..caption_workers import captions_by
    from .report import progress

    names = {str(file): name for name, file in files.items()}
    with ExitStack() as stack:
        chats = stack.enter_context(_conversations(args, len(files)))
        found = captions_by(chats, names, args.prompt, args.predict)
        stack.callback(found.close)  # no thread uses a model that is freed
        for one in progress(found, "caption", len(names)):
            name = names[one.name]
            if one.error:
                print(f"error: {name}: {one.error}", file=sys.stderr)
                out.add({"file": name, "error": one.error})
            else:
                out.add({"file": name, "caption": one.text, "tokens": one.n_tokens})


@contextmanager
def _conversations(args: argparse.Namespace, n_images: int) -> Iterator[list[Any]]:
    """A conversation for each model that answers at the same time."""
    from ..caption_workers import default_workers, n_cores
    from ..conversation import Conversation

    n = args.workers
    if n is None:
        on_device = args.gpu_layers != 0 or args.rpc
        takes_all = options.elastic_config(args).is_off  # the memory of all of its context
        is_given = args.threads is not None
        alone = on_device or takes_all or is_given
        n = 1 if alone else min(default_workers(_files(args)), n_images)
    if n > 1 and args.threads is None:
        args.threads = max(1, n_cores() // n)
    if args.ctx_size is None and args.kv_cells is None:
        args.ctx_size = _CELLS * (args.parallel + 1)
    with ExitStack() as stack:
        chats = []
        for _ in range(n):
            llm = options.load_llm(args, options.elastic_config(args), args.parallel + 1)
            stack.callback(llm.close)
            chats.append(Conversation(llm))
            stack.callback(chats[-1].close)
        yield chats


def _files(args: argparse.Namespace) -> list[str | Path]:
    """Of the model and its vision tower."""
    from ..embedded import embedded_mmproj, embedded_model
    from ..memory.keys import model_parts

    model, mmproj = options.model_files(args)
    if model is None:
        return [embedded_model(), embedded_mmproj()]
    return [*model_parts(model), *([] if mmproj is None else [mmproj])]


class CaptionFile:
    """Lines of JSON, each of them written at once, by one process at a time.

    Attributes
    ----------
    failed : dict of str to bool
        Whether an image of this name has an error for an answer.

    Raises
    ------
    ConfigError
        It cannot be written, another process writes it, or it is a file of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failed: dict[str, bool] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as e:
            raise self._refused(str(e)) from e
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(self._fd)
            raise self._refused("another process writes it") from e
        try:
            self._read()
        except ConfigError:
            self.close()
            raise

    def __enter__(self) -> CaptionFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._fd)

    def add(self, line: dict[str, Any]) -> None:
        """Write a line."""
        os.write(self._fd, _encoded(line))
        self.failed[line["file"]] = "error" in line

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                said = json.loads(line)
                self.failed[said["file"]] = "error" in said
            except (ValueError, KeyError, TypeError) as e:
                raise self._refused("a line that is no caption") from e
        if len(whole) < len(data):  # a process was killed in the middle of a line
            os.ftruncate(self._fd, len(whole))

    def _refused(self, why: str) -> ConfigError:
        return ConfigError(message("caption", str(self.path), why, "a file to write"))


def _encoded(line: dict[str, Any]) -> bytes:
    """A line; bytes of a file's name that are no character are escaped, as JSON has them."""
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
