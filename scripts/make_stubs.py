"""Generate the stubs of the compiled extension, or check that they are current."""

from __future__ import annotations

import argparse
import difflib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "python" / "elastic_llama" / "_core"


def generate() -> dict[str, str]:
    """File name -> text of the stubs, formatted."""
    with tempfile.TemporaryDirectory() as temp:
        command = [sys.executable, "-m", "pybind11_stubgen", "elastic_llama._core", "-o", temp]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        out = {}
        for path in sorted(Path(temp).rglob("*.pyi")):
            ruff = [sys.executable, "-m", "ruff", "format", "--quiet", "--isolated", str(path)]
            subprocess.run([*ruff, "--line-length", "100"], check=True)
            out[path.name] = path.read_text()
        return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if they differ")
    args = parser.parse_args()
    stubs = generate()
    if not args.check:
        shutil.rmtree(TARGET, ignore_errors=True)
        TARGET.mkdir()
        for name, text in stubs.items():
            (TARGET / name).write_text(text)
        return 0
    now = {p.name: p.read_text() for p in TARGET.glob("*.pyi")}
    for name in sorted({*stubs, *now}):
        old, new = now.get(name, "").splitlines(), stubs.get(name, "").splitlines()
        sys.stdout.writelines(line + "\n" for line in difflib.unified_diff(old, new, lineterm=""))
    if now != stubs:
        print("error: the stubs are out of date: make stubs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
