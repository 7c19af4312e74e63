"""A folder with one file for each remembered image; many processes may use it at once.

Files appear by `os.replace`, whole, so readers need no lock. Whoever prunes holds a lock.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, message
from .container import DamagedFileError, Entry, pack, unpack

log = logging.getLogger("elastic_llama")

MAX_BYTES = 4 << 30
_SUFFIX = ".safetensors"
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_TEMP_AGE = 3600.0  # seconds after which nobody writes a temporary file any more


@dataclass(frozen=True)
class FileStatus:
    """What `verify` found out about a file; `problem` is empty where it is whole."""

    path: Path
    n_bytes: int
    last_used: float  # seconds since the epoch
    info: dict[str, str]
    problem: str = ""


class MemoryFolder:
    """Entries as files.

    Parameters
    ----------
    path : path
        Made if it does not exist, for this user alone.
    max_bytes : int
        Beyond it the files that were not used for longest are deleted. >= 1.

    Raises
    ------
    ConfigError
        It is not a folder that can be written.
    """

    def __init__(self, path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> None:
        self.path = Path(path).expanduser()
        self.max_bytes = max_bytes
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            writable = os.access(self.path, os.W_OK | os.X_OK)
        except OSError as e:
            raise self._unusable(str(e)) from e
        if not writable:
            raise self._unusable("no permission to write")

    def _unusable(self, why: str) -> ConfigError:
        return ConfigError(
            message("memory", str(self.path), why, "a folder that can be written", "name another")
        )

    # -- one entry

    def get(self, key: str) -> Entry | None:
        """The entry of a key, or None. A damaged file is set aside, with a warning."""
        path = self._file(key)
        try:
            with path.open("rb") as file:
                data, opened = file.read(), os.fstat(file.fileno())
        except FileNotFoundError:
            return None
        except OSError as e:
            log.warning("image memory: %s cannot be read: %s", path, e)
            return None
        try:
            entry = unpack(data, key)
        except DamagedFileError as e:
            self._set_aside(path, opened, e)
            return None
        self.touch(key)
        return entry

    def touch(self, key: str) -> None:
        """What has this key was used last now, wherever it was read from."""
        with suppress(OSError):
            _touch(self._file(key))

    def has(self, key: str) -> bool:
        """Whether there is a file of this key; `get` finds out whether it is whole."""
        return self._file(key).is_file()

    def put(self, entry: Entry) -> None:
        """Write an entry, all of it or nothing. A full disk is warned about."""
        path = self._file(entry.key)
        try:
            self._write(path, pack(entry))
        except OSError as e:
            log.warning("image memory: %s cannot be written: %s", path, e)
            return
        self.prune()

    def _write(self, path: Path, data: bytes) -> None:
        fd, temp = tempfile.mkstemp(prefix=f".{path.stem[:16]}-", suffix=".tmp", dir=self.path)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            _touch(temp)
            os.replace(temp, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temp)
            raise
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _file(self, key: str) -> Path:
        return self.path / f"{key}{_SUFFIX}"

    def _set_aside(self, path: Path, opened: os.stat_result, why: Exception) -> None:
        """Move a damaged file away, unless a good one has taken its place."""
        target = self.path / "damaged" / f"{time.time_ns()}-{path.name}"
        try:
            target.parent.mkdir(mode=0o700, exist_ok=True)
            now = path.stat()
            if (now.st_ino, now.st_mtime_ns) != (opened.st_ino, opened.st_mtime_ns):
                return
            os.rename(path, target)
        except FileNotFoundError:
            return  # another process was faster
        except OSError as e:
            log.warning("image memory: %s is left out (%s), and stays: %s", path, why, e)
            return
        log.warning("image memory: %s; it is now %s and is computed again", why, target)

    # -- all of them

    def files(self) -> list[Path]:
        """Files of entries, those that were not used for longest first."""
        found = []
        for path in self.path.iterdir():
            if _NAME.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    found.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found)]

    def verify(self, set_aside: bool = True) -> Iterator[FileStatus]:
        """Read every file; those with a problem are set aside, if that is wanted."""
        for path in self.files():
            try:
                with path.open("rb") as file:
                    data, opened = file.read(), os.fstat(file.fileno())
            except FileNotFoundError:
                continue  # pruned meanwhile
            problem, info = "", {}
            try:
                info = unpack(data, path.stem).info
            except DamagedFileError as e:
                problem = str(e)
                if set_aside:
                    self._set_aside(path, opened, e)
            yield FileStatus(path, len(data), opened.st_mtime, info, problem)
        self._sweep()

    def prune(self, max_bytes: int | None = None) -> int:
        """Delete what was not used for longest until all files together are small enough.

        Returns
        -------
        int
            Files deleted; those that were set aside go first.
        """
        limit = self.max_bytes if max_bytes is None else max_bytes
        if self._total() <= limit:
            return 0
        with self._lock():
            self._sweep()
            aside = sorted(self._aside())
            total, n_deleted = self._total(), 0
            for path in [*aside, *self.files()]:
                if total <= limit:
                    break
                with suppress(OSError):
                    n_bytes = path.stat().st_size
                    path.unlink()
                    total -= n_bytes
                    n_deleted += 1
            return n_deleted

    def _aside(self) -> list[Path]:
        folder = self.path / "damaged"
        return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []

    def _total(self) -> int:
        total = 0
        for path in [*self.files(), *self._aside()]:
            with suppress(OSError):
                total += path.stat().st_size
        return total

    def _sweep(self) -> None:
        """Delete what writers left that were killed."""
        for path in self.path.glob(".*.tmp"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _TEMP_AGE:
                    path.unlink()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One process at a time; the lock of one that was killed is gone with it."""
        fd = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _touch(path: str | Path) -> None:
    """Used now. The system's own clock of files is too coarse to order what is used in a row."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))
