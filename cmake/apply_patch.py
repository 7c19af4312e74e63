"""Apply git-style patches without git.

Strict on purpose: a hunk fits at the line it names with every context line, or nothing is written.
A patch that would need an offset has not been looked at since the code under it moved.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_REFUSED = (b"rename ", b"copy ", b"old mode ", b"GIT binary patch", b"Binary files ")


class PatchError(RuntimeError):
    """Names the patch, the file and the hunk."""


@dataclass
class Hunk:
    """Lines keep their line ends."""

    start: int  # index of the first old line, from 0
    old: list[bytes] = field(default_factory=list)
    new: list[bytes] = field(default_factory=list)
    header: str = ""


@dataclass
class FilePatch:
    path: str
    is_new: bool = False
    is_deleted: bool = False
    hunks: list[Hunk] = field(default_factory=list)


def _take_hunk(lines: list[bytes], at: int, where: str) -> tuple[Hunk, int]:
    """The hunk whose header is lines[at], and the index of the line after it."""
    match = _HUNK.match(lines[at])
    if match is None:
        raise PatchError(f"{where}: not a hunk: {lines[at]!r}")
    n_old, n_new = (1 if match[i] is None else int(match[i]) for i in (2, 4))
    # a hunk without old lines names the line before it
    hunk = Hunk(int(match[1]) - 1 if n_old else int(match[1]))
    hunk.header = lines[at].decode(errors="replace").rstrip()
    at += 1
    sides: list[list[bytes]] = []
    while at < len(lines):
        mark, text = lines[at][:1], lines[at][1:]
        if mark == b"\\":  # no newline at the end of the file
            for side in sides:
                side[-1] = side[-1].rstrip(b"\n")
        elif len(hunk.old) == n_old and len(hunk.new) == n_new:
            break
        elif mark in (b" ", b"\n"):  # mail programs strip the space of an empty context line
            sides = [hunk.old, hunk.new]
        elif mark in (b"-", b"+"):
            sides = [hunk.old if mark == b"-" else hunk.new]
        else:
            break
        if mark != b"\\":
            for side in sides:
                side.append(text or b"\n")
        at += 1
    if len(hunk.old) != n_old or len(hunk.new) != n_new:
        raise PatchError(f"{where}: the hunk is cut short or longer than it says")
    return hunk, at


def parse(patch: Path) -> list[FilePatch]:
    """The files of one patch; what stands before the first `diff --git` is its message."""
    lines = patch.read_bytes().splitlines(keepends=True)
    files: list[FilePatch] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        if line.startswith(b"diff --git "):
            path = line.rstrip(b"\n").split(b" b/", 1)[-1].decode()
            files.append(FilePatch(path))
        elif files and line.startswith(_REFUSED):
            raise PatchError(
                f"{patch.name}: {files[-1].path}: {line.decode().strip()!r} is not supported"
            )
        elif files and line.startswith(b"new file mode "):
            files[-1].is_new = True
        elif files and line.startswith(b"deleted file mode "):
            files[-1].is_deleted = True
        elif files and line.startswith(b"@@ "):
            where = f"{patch.name}: {files[-1].path}, hunk {len(files[-1].hunks) + 1}"
            hunk, at = _take_hunk(lines, at, where)
            files[-1].hunks.append(hunk)
            continue
        at += 1
    if not files:
        raise PatchError(f"{patch.name}: holds no `diff --git`")
    return files


def _patched(before: list[bytes], file: FilePatch, name: str) -> list[bytes]:
    after: list[bytes] = []
    done = 0
    for number, hunk in enumerate(file.hunks, start=1):
        found = before[hunk.start : hunk.start + len(hunk.old)]
        if found != hunk.old:
            pairs = zip(hunk.old, found + [b"(end of file)"] * len(hunk.old))
            i, (want, got) = next((i, p) for i, p in enumerate(pairs) if p[0] != p[1])
            raise PatchError(
                f"{name}: {file.path}, hunk {number} does not fit at line {hunk.start + i + 1}:\n"
                f"  expected: {want.decode(errors='replace').rstrip()}\n"
                f"  found:    {got.decode(errors='replace').rstrip()}"
            )
        after += before[done : hunk.start] + hunk.new
        done = hunk.start + len(hunk.old)
    return after + before[done:]


def apply(patch: Path, tree: Path) -> list[str]:
    """Apply one patch to the tree, all of it or nothing; returns the paths it changed."""
    results: dict[str, list[bytes] | None] = {}
    for file in parse(patch):
        target = tree / file.path
        if file.is_new and target.exists():
            raise PatchError(f"{patch.name}: {file.path} is new in the patch, but exists")
        if not file.is_new and not target.is_file():
            raise PatchError(f"{patch.name}: {file.path} does not exist")
        before = [] if file.is_new else target.read_bytes().splitlines(keepends=True)
        after = _patched(before, file, patch.name)
        if file.is_deleted and after:
            raise PatchError(f"{patch.name}: {file.path} is deleted, but has other lines too")
        results[file.path] = None if file.is_deleted else after
    for path, content in results.items():
        target = tree / path
        if content is None:
            target.unlink()
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(b"".join(content))
    return list(results)
