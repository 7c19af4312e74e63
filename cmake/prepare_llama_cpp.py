"""Fetch, verify, unpack and patch the llama.cpp that the build uses.

Prints one `key=value` line each for `tree`, `commit`, `sha256`, `series` and `patches`.
Running it again does nothing: a finished tree is named after the pin and the patch series.

Usage: prepare_llama_cpp.py [--archive FILE] [--stock] [--patches DIR] [--into DIR]
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from apply_patch import PatchError, apply

ROOT = Path(__file__).resolve().parent.parent
STAMP = ".elastic-stamp"
NOT_BUILT = ("benches", "docs", "media", "models", "tests")  # 120 of 176 MB, which no build reads


class PrepareError(RuntimeError):
    """What went wrong, and what to do about it."""


def cache_dir() -> Path:
    """Where downloads and patched trees live: outside of every build tree."""
    if os.environ.get("ELASTIC_LLAMA_CACHE"):
        return Path(os.environ["ELASTIC_LLAMA_CACHE"]).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "elastic-llama"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "elastic-llama"


def read_pin(path: Path) -> dict[str, str]:
    lines = (line.strip() for line in path.read_text().splitlines())
    return dict(
        (part.strip() for part in line.split("=", 1))
        for line in lines
        if line and not line.startswith("#")
    )


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def verified(archive: Path, expected: str) -> Path:
    got = sha256(archive)
    if got != expected:
        raise PrepareError(
            f"{archive}: sha256 is {got}, expected {expected}; delete the file and try again"
        )
    return archive


def download(name: str, requirement: str, into: Path) -> subprocess.CompletedProcess[str]:
    """The source archive that pip chooses; what pip said is in `stdout`."""
    # the source of this one package: ":all:" would build its build tools from source as well
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", name]
    # pip asks the archive for its metadata; with LLAMA_BUILD off nothing is compiled for it
    env = {**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}
    return subprocess.run(
        [*command, "--dest", str(into), requirement],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def fetch(pin: dict[str, str], cache: Path) -> Path:
    """The pinned source archive, downloaded by pip once."""
    archive = cache / "archives" / pin["archive"]
    if archive.is_file():
        return verified(archive, pin["sha256"])
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as temp:
        name = pin["requirement"].split("=", 1)[0]
        done = download(name, pin["requirement"], Path(temp))
        found = Path(temp) / pin["archive"]
        if not found.is_file():
            raise PrepareError(
                f"pip could not download {pin['requirement']} (exit code {done.returncode}):\n"
                f"{done.stdout}\nPut {pin['archive']} into {archive.parent}, or pass "
                "-DELASTIC_LLAMA_CPP_ARCHIVE=FILE"
            )
        os.replace(verified(found, pin["sha256"]), archive)
    return archive


def series_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.patch"))


def series_hash(patches: list[Path]) -> str:
    digest = hashlib.sha256()
    for patch in patches:
        digest.update(patch.name.encode() + b"\0" + patch.read_bytes() + b"\0")
    return digest.hexdigest()[:12] if patches else "stock"


def unpack(archive: Path, member: str, target: Path) -> None:
    with tarfile.open(archive) as tar, tempfile.TemporaryDirectory(dir=target.parent) as temp:
        prefix = member + "/"
        members = [m for m in tar.getmembers() if m.name.startswith(prefix)]
        if not members:
            raise PrepareError(f"{archive}: holds no {member}")
        if hasattr(tarfile, "data_filter"):
            tar.extractall(temp, members=members, filter="data")
        else:
            tar.extractall(temp, members=members)
        shutil.move(str(Path(temp) / member), str(target))
    # a dangling submodule pointer that confuses git when it looks for a commit
    (target / ".git").unlink(missing_ok=True)


def apply_series(patches: list[Path], tree: Path) -> None:
    for patch in patches:
        try:
            apply(patch, tree)
        except PatchError as error:
            raise PrepareError(
                f"{error}\nThe series does not fit the pinned llama.cpp: rebase it as "
                "patches/README.md says."
            ) from error


def tree_hash(tree: Path) -> str:
    """Of the names and contents of all files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in tree.rglob("*") if p.is_file() and p.name != STAMP):
        digest.update(
            path.relative_to(tree).as_posix().encode() + b"\0" + path.read_bytes() + b"\0"
        )
    return digest.hexdigest()


def tree_key(pin: dict[str, str], patches: list[Path]) -> str:
    return f"{pin['commit']}-{series_hash(patches)}"


def prepare(pin: dict[str, str], patches: list[Path], archive: Path | None, cache: Path) -> Path:
    """The patched tree; made in a temporary folder and renamed when it is complete."""
    tree = cache / "src" / tree_key(pin, patches)
    if (tree / STAMP).is_file():
        return tree
    tree.parent.mkdir(parents=True, exist_ok=True)
    source = verified(archive, pin["sha256"]) if archive else fetch(pin, cache)
    with tempfile.TemporaryDirectory(dir=tree.parent) as temp:
        work = Path(temp) / tree.name
        unpack(source, pin["tree"], work)
        apply_series(patches, work)
        lines = [*(p.name for p in patches), f"sha256 {tree_hash(work)}"]
        (work / STAMP).write_text("".join(line + "\n" for line in lines))
        if tree.exists() and not (tree / STAMP).is_file():
            shutil.rmtree(tree)  # left by a build that was killed
        try:
            os.replace(work, tree)
        except OSError:
            if not (tree / STAMP).is_file():  # else another build was faster
                shutil.rmtree(tree)  # left half removed by a build that was killed
                os.replace(work, tree)
    return tree


def mirror(tree: Path, into: Path) -> Path:
    """Make `into` a copy of the tree's buildable part, writing only files that differ.

    A changed series makes a new tree. Built in one place, only what the patch touched is compiled
    again, and compiler caches see the same paths whatever the series and the clone.
    """
    stamp = into / STAMP
    content = f"{tree.name}\n{(tree / STAMP).read_text()}"
    if stamp.is_file() and stamp.read_text() == content:
        return into
    stamp.unlink(missing_ok=True)
    kept = {STAMP}
    for path in tree.rglob("*"):
        name = path.relative_to(tree)
        if path.is_dir() or name.parts[0] in NOT_BUILT or path.name == STAMP:
            continue
        kept.add(name.as_posix())
        target = into / name
        if not target.is_file() or not filecmp.cmp(path, target, shallow=False):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)  # with the time of now: newer than what was built before
    for path in into.rglob("*"):
        if path.is_file() and path.relative_to(into).as_posix() not in kept:
            path.unlink()
    stamp.write_text(content)
    return into


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archive", type=Path)
    parser.add_argument("--stock", action="store_true", help="apply no patches")
    parser.add_argument("--patches", type=Path, default=ROOT / "patches")
    parser.add_argument("--into", type=Path, help="mirror what is built of the tree there")
    args = parser.parse_args(argv)

    pin = read_pin(args.patches / "llama-cpp.pin")
    patches = [] if args.stock else series_of(args.patches)
    try:
        tree = prepare(pin, patches, args.archive, cache_dir())
        if args.into:
            tree = mirror(tree, args.into)
    except (PrepareError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"tree={tree}")
    print(f"commit={pin['commit']}")
    print(f"sha256={pin['sha256']}")
    print(f"series={series_hash(patches)}")
    print(f"patches={','.join(p.stem for p in patches)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
