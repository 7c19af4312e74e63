"""Which hunks of patches/*.patch apply to the llama.cpp of another llama-cpp-python release.

python scripts/check_patches.py [--pin VERSION] [--archive FILE] [--markdown] [--strict]

Without --pin, the release before the pinned one. The patches are tried in order; a hunk that fails
is left out, and the next one is tried. A hunk whose outer context lines have changed applies with
fuzz, as `patch` has it. --markdown writes the tables of patches/README.md.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "cmake"))

from apply_patch import FilePatch, Hunk, parse  # noqa: E402
from prepare_llama_cpp import (  # noqa: E402
    PrepareError,
    cache_dir,
    download,
    read_pin,
    series_hash,
    series_of,
)

PACKAGE = "llama-cpp-python"
STEM = PACKAGE.replace("-", "_")
MAX_FUZZ = 2  # as `patch`
BEGIN, END = "<!-- check_patches: begin -->", "<!-- check_patches: end -->"


@dataclass
class Outcome:
    """What became of one hunk."""

    patch: str
    path: str
    header: str
    offset: int | None  # lines between where it fits and where it says; None: it fails
    fuzz: int = 0  # context lines left out at both ends so that it fits
    why: str = ""

    def __str__(self) -> str:
        if self.offset is None:
            return f"FAILS ({self.why})"
        moved = f", {self.offset:+d} lines" if self.offset else ""
        return "applies" + moved + (f", fuzz {self.fuzz}" if self.fuzz else "")


def find(lines: list[bytes], old: list[bytes], near: int) -> int | None:
    """Where all of `old` stands, as near to `near` as possible."""
    places = [i for i in range(len(lines) - len(old) + 1) if lines[i : i + len(old)] == old]
    return min(places, key=lambda i: abs(i - near), default=None)


def shortened(hunk: Hunk, fuzz: int) -> tuple[list[bytes], list[bytes], int]:
    """Old and new lines with less context at both ends, and how many lines went at the top."""
    old, new = hunk.old, hunk.new
    same = [a == b for a, b in zip(old, new)]
    top = min(fuzz, (same + [False]).index(False))
    same = [a == b for a, b in zip(old[:top:-1], new[:top:-1])]
    bottom = min(fuzz, (same + [False]).index(False))
    return old[top : len(old) - bottom], new[top : len(new) - bottom], top


def try_file(lines: list[bytes] | None, file: FilePatch, patch: str) -> tuple:
    """The lines after all hunks that apply (None: no such file), and an outcome per hunk."""

    def failed(hunk: Hunk, why: str) -> Outcome:
        return Outcome(patch, file.path, hunk.header, None, why=why)

    if file.is_new != (lines is None):
        why = "the file exists" if file.is_new else "no such file"
        return lines, [failed(hunk, why) for hunk in file.hunks]
    lines = list(lines or [])
    outcomes = []
    grown = moved = 0  # by the hunks before; by what changed in the file
    for hunk in file.hunks:
        near = hunk.start + grown
        for fuzz in range(MAX_FUZZ + 1):
            old, new, skipped = shortened(hunk, fuzz)
            if hunk.old:
                at = find(lines, old, near + moved + skipped) if old else None
            else:  # a new file
                at = near
            if at is not None:
                break
        else:
            outcomes.append(failed(hunk, "its lines are not there"))
            continue
        moved = at - skipped - near
        outcomes.append(Outcome(patch, file.path, hunk.header, moved, fuzz))
        lines[at : at + len(old)] = new
        grown += len(new) - len(old)
    return lines, outcomes


def try_series(patches: list[Path], archive: Path) -> list[Outcome]:
    """All hunks of all patches on the archive's vendor/llama.cpp, each on what is before it."""
    wanted = {file.path for patch in patches for file in parse(patch)}
    tree: dict[str, list[bytes]] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            path = member.name.partition("/vendor/llama.cpp/")[2]
            content = tar.extractfile(member) if path in wanted else None
            if content is not None:
                tree[path] = content.read().splitlines(keepends=True)
    outcomes = []
    for patch in patches:
        for file in parse(patch):
            lines, own = try_file(tree.get(file.path), file, patch.stem)
            if lines is not None:
                tree[file.path] = lines
            outcomes += own
    return outcomes


def version_of(archive: Path) -> str:
    match = re.fullmatch(rf"{STEM}-(.+)\.tar\.gz", archive.name)
    return match[1] if match else archive.name


def fetch(version: str | None, pinned: str) -> Path:
    """The source archive of a release, kept where the pinned one is."""
    archives = cache_dir() / "archives"
    if version and (archives / f"{STEM}-{version}.tar.gz").is_file():
        return archives / f"{STEM}-{version}.tar.gz"
    archives.mkdir(parents=True, exist_ok=True)
    requirement = f"{PACKAGE}=={version}" if version else f"{PACKAGE}<{pinned}"
    with tempfile.TemporaryDirectory(dir=archives) as temp:
        done = download(PACKAGE, requirement, Path(temp))
        found = list(Path(temp).glob(f"{STEM}-*.tar.gz"))
        if not found:
            raise PrepareError(f"pip could not download {requirement}:\n{done.stdout}")
        os.replace(found[0], archives / found[0].name)
        return archives / found[0].name


def counts(outcomes: list[Outcome]) -> dict[str, int]:
    clean = [o for o in outcomes if o.offset is not None and not o.fuzz]
    return {
        "hunks": len(outcomes),
        "at their line": sum(o.offset == 0 for o in clean),
        "at another line": sum(o.offset != 0 for o in clean),
        "with fuzz": sum(o.fuzz > 0 for o in outcomes),
        "fail": sum(o.offset is None for o in outcomes),
    }


def report(outcomes: list[Outcome], version: str) -> str:
    out = []
    for patch in dict.fromkeys(o.patch for o in outcomes):
        out.append(patch)
        out += [f"  {o.path}: {o.header}: {o}" for o in outcomes if o.patch == patch]
    total = ", ".join(f"{n} {what}" for what, n in counts(outcomes).items())
    out.append(f"{PACKAGE} {version}: {total}")
    return "\n".join(out)


def markdown(outcomes: list[Outcome], version: str, series: str) -> str:
    names = counts([])
    out = [
        f"The series `{series}` on the llama.cpp of {PACKAGE} {version} "
        "(`make check-patches` writes this):",
        "",
        "| patch | " + " | ".join(names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    for patch in dict.fromkeys(o.patch for o in outcomes):
        own = counts([o for o in outcomes if o.patch == patch])
        out.append(f"| `{patch}` | " + " | ".join(map(str, own.values())) + " |")
    out.append("| all | " + " | ".join(map(str, counts(outcomes).values())) + " |")
    hard = [o for o in outcomes if o.offset is None or o.fuzz]
    if hard:
        out += ["", "| patch | file | hunk | |", "| --- | --- | --- | --- |"]
    for o in hard:
        hunk = o.header.replace("|", "\\|")
        out.append(f"| {o.patch.split('-')[0]} | `{o.path}` | `{hunk}` | {o} |")
    return "\n".join(out)


def write_into(readme: Path, table: str) -> None:
    """Between the two marks; everything else stays."""
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise PrepareError(f"{readme}: the lines {BEGIN} and {END} are missing")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pin", metavar="VERSION", help="a release of llama-cpp-python")
    parser.add_argument("--archive", type=Path, help="its source archive, instead of fetching it")
    parser.add_argument("--patches", type=Path, default=ROOT / "patches")
    parser.add_argument("--markdown", action="store_true", help="write the table of the README too")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a hunk fails")
    args = parser.parse_args(argv)

    pinned = read_pin(args.patches / "llama-cpp.pin")["requirement"].split("==")[1]
    patches = series_of(args.patches)
    try:
        archive = args.archive or fetch(args.pin, pinned)
        version = version_of(archive)
        outcomes = try_series(patches, archive)
        print(report(outcomes, version))
        if args.markdown:
            table = markdown(outcomes, version, series_hash(patches))
            write_into(args.patches / "README.md", table)
    except (PrepareError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return int(args.strict and any(o.offset is None for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
