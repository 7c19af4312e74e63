"""Entries of the image memory, in RAM and in a folder."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import Any, Union

from ..config import whole
from ..errors import ConfigError, message
from .container import Entry
from .folder import MAX_BYTES, MemoryFolder

RAM_BYTES = 256 << 20


class ImageMemory:
    """Keeps entries by key; those that were not used for longest go first.

    Several `ElasticLlama` of one process may share one, from several threads.

    Parameters
    ----------
    folder : path, optional
        Where they are kept for other processes, too.
    max_bytes : int
        Of the files in the folder, >= 1.
    ram_bytes : int
        Of the entries in RAM, >= 0.

    Raises
    ------
    ConfigError
        The folder cannot be written, or a size is no whole number.

    Examples
    --------
    >>> len(ImageMemory())
    0
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        max_bytes: int = MAX_BYTES,
        ram_bytes: int = RAM_BYTES,
    ) -> None:
        max_bytes = whole("memory max_bytes", max_bytes, 1, 2**63 - 1)
        self.ram_bytes = whole("memory ram_bytes", ram_bytes, 0, 2**63 - 1)
        self.folder = None if folder is None else MemoryFolder(folder, max_bytes)
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._newest = ("", memoryview(b""))  # a state that need not be unpacked again
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Entries in RAM."""
        return len(self._entries)

    def get(self, key: str) -> Entry | None:
        """The entry of a key, or None."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
        if self.folder is not None and entry is not None:
            self.folder.touch(key)
        elif self.folder is not None:
            entry = self.folder.get(key)
            if entry is not None:
                self._keep(entry)
        return entry

    def has(self, key: str) -> bool:
        """Whether there is an entry, in the folder too; one that only RAM has is written again."""
        entry = self.get(key)
        if entry is not None and self.folder is not None and not self.folder.has(key):
            self.folder.put(entry)
        return entry is not None

    def state_of(self, entry: Entry) -> memoryview:
        """What `llama_state_seq_set_data` takes; that of the entry used last is at hand."""
        key, state = self._newest
        if key != entry.key:
            state = entry.state()
            self._newest = (entry.key, state)
        return state

    def put(self, entry: Entry, state: memoryview | None = None) -> None:
        """Keep an entry, in the folder too; `state` is that of the entry, where it is at hand."""
        if state is not None and self.ram_bytes > 0:
            self._newest = (entry.key, state)
        self._keep(entry)
        if self.folder is not None:
            self.folder.put(entry)

    def forget(self, key: str) -> None:
        """Not in RAM any more."""
        with self._lock:
            self._entries.pop(key, None)

    def _keep(self, entry: Entry) -> None:
        with self._lock:
            self._entries[entry.key] = entry
            self._entries.move_to_end(entry.key)
            while sum(e.n_bytes for e in self._entries.values()) > self.ram_bytes:
                self._entries.popitem(last=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """What is in RAM stays here."""
        if self.folder is None:
            return _make, (None, MAX_BYTES, self.ram_bytes)
        return _make, (str(self.folder.path), self.folder.max_bytes, self.ram_bytes)


def _make(folder: str | None, max_bytes: int, ram_bytes: int) -> ImageMemory:
    return ImageMemory(folder, max_bytes=max_bytes, ram_bytes=ram_bytes)


MemoryOption = Union[None, bool, str, "os.PathLike[str]", ImageMemory]


def as_memory(value: MemoryOption) -> ImageMemory | None:
    """What `ElasticLlama(memory=...)` takes.

    Raises
    ------
    ConfigError
    """
    if value is None or value is False:
        return None
    if value is True:
        return ImageMemory()
    if isinstance(value, ImageMemory):
        return value
    if isinstance(value, (str, os.PathLike)) and os.fspath(value):
        return ImageMemory(value)
    raise ConfigError(
        message("config", "memory", repr(value), "True, a folder, an ImageMemory or None")
    )
