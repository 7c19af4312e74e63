"""Captions by several models at once, each in a thread of its own.

Two models with one thread each do more than one model with two: nothing waits for the slower
thread after each matrix, and one encodes or reads an image while the other one answers.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .caption import Caption, captions, captions_until

if TYPE_CHECKING:
    from .conversation import Conversation

_MOST = 8  # beyond it the memory's bandwidth is shared by too many


def captions_by(
    chats: Sequence[Conversation], images: Iterable[Any], prompt: str, max_tokens: int = 256
) -> Generator[Caption, None, None]:
    """As `captions`, by several conversations, each with an `ElasticLlama` of its own.

    Each takes the next image when it has room for it. Answers come in the order in which they are
    complete. Where the caller stops early, it waits until the models have read the image or made
    the token that they are at.

    Parameters
    ----------
    chats : sequence of Conversation
        One or more. Threads of each (`n_threads`, `n_threads_batch`): best so that all models
        together have one for each core.
    images : iterable
        What `load_image` takes, read when they are needed, from several threads in turn.

    Raises
    ------
    ConfigError, StateError
        As `captions`.
    """
    if len(chats) == 1:
        yield from captions(chats[0], images, prompt, max_tokens)
        return
    source = _Source(images)
    found: queue.SimpleQueue[Caption | BaseException | None] = queue.SimpleQueue()

    def work(chat: Conversation) -> None:
        try:
            for one in captions_until(lambda: source.is_stopped, chat, source, prompt, max_tokens):
                found.put(one)
            found.put(None)
        except BaseException as e:  # is the caller's, whose thread raises it
            found.put(e)

    threads = [threading.Thread(target=work, args=(chat,), daemon=True) for chat in chats]
    for thread in threads:
        thread.start()
    n_left = len(threads)
    try:
        while n_left > 0:
            one = found.get()
            if isinstance(one, BaseException):
                raise one
            if one is None:
                n_left -= 1
            else:
                yield one
    finally:
        source.is_stopped = True
        _wait_for(threads)


def _wait_for(threads: Sequence[threading.Thread]) -> None:
    """Until they have ended, whatever interrupts it: the caller may free their models then."""
    interrupt: KeyboardInterrupt | None = None
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except KeyboardInterrupt as e:
                interrupt = e
    if interrupt is not None:
        raise interrupt


class _Source:
    """The images, for several threads; none any more once it is stopped."""

    def __init__(self, images: Iterable[Any]) -> None:
        self._images = iter(images)
        self._lock = threading.Lock()
        self.is_stopped = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with self._lock:
            if self.is_stopped:
                raise StopIteration
            return next(self._images)


def default_workers(files: Sequence[str | os.PathLike[str]]) -> int:
    """How many models to load on this machine, at most one for each core.

    All together may take half of the memory that is free. A model takes as much as its files do,
    which is more than is true where they are mapped.
    """
    n_bytes = sum(os.path.getsize(file) for file in files if os.path.isfile(file))
    return max(1, min(n_cores(), _MOST, free_memory() // 2 // max(1, n_bytes)))


def n_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def free_memory() -> int:
    """Bytes that programs can have without swapping; a quarter of all where it is not known."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    except (AttributeError, ValueError, OSError):
        return 0
