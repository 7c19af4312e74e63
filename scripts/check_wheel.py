"""Builds the wheel, checks what is in it, and runs the demo where there is no compiler.

python scripts/check_wheel.py [--keep]

The build goes on from the build tree of `make build`. The wheel is installed into a fresh virtual
environment with nothing but it on PATH; llama-cpp-python, which comes as source only, as a wheel
that was made once without its own copy of llama.cpp. --keep leaves both wheels in dist/.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LIBRARY = r"lib(llama|mtmd|ggml|ggml-(base|cpu|blas|cuda|hip|metal|vulkan|rpc|sycl|opencl))"
HEADER = r"(elastic|llama|ggml|ggml-(alloc|backend|cpu|opt)|gguf)\.h"
# what cmake installs, and the rest of the wheel; nothing else may be in it
NATIVE = (
    r"elastic_llama/_core\.[\w.-]+\.(so|pyd)",
    rf"elastic_llama/lib/{LIBRARY}\.(so|dylib)",
    rf"elastic_llama/include/{HEADER}",
    # of a build with -DELASTIC_TOOLS=ON
    r"elastic_llama/lib/libllama-(common|(server|cli|batched-bench)-impl)\.(so|dylib)",
    r"elastic_llama/bin/llama-(server|cli|mtmd-cli|batched-bench)",
)
PYTHON = (
    r"elastic_llama/[a-z_]+\.py",
    r"elastic_llama/(bench|cli|evaluation|memory|scenes)/[a-z_]+\.py",
    r"elastic_llama/_core/(__init__|core)\.pyi",
    r"elastic_llama/py\.typed",
    r"elastic_llama/page/(index\.html|page\.(css|js))",
    r"elastic_llama/data/(demo\.png|mmproj-scenes-f16\.gguf)",
)
METADATA = (
    r"elastic_llama-[\w.+]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt)",
    r"elastic_llama-[\w.+]+\.dist-info/licenses/(LICENSE|NOTICE\.md)",
)
NEEDED = ("llama", "mtmd", "ggml", "ggml-base", "ggml-cpu")
MAX_BYTES = 12_000_000  # half of it the vision tower
TOOLS_BYTES = 4_000_000  # more, with the server and the tools


def strangers(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in names if not any(re.fullmatch(p, name) for p in patterns)]


def check_contents(wheel: Path, tracked: set[str]) -> list[str]:
    """What is wrong with the wheel; `tracked`: files of the package under version control."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    faults = [f"stray: {x}" for x in strangers(names, (*NATIVE, *PYTHON, *METADATA))]
    package = {name for name in names if not strangers([name], PYTHON)}
    faults += [f"not under version control: {x}" for x in sorted(package - tracked)]
    faults += [f"missing: {x}" for x in sorted(tracked - package)]
    libraries = {Path(x).name.split(".")[0] for x in names if x.startswith("elastic_llama/lib/")}
    faults += [f"missing: lib{x}" for x in NEEDED if f"lib{x}" not in libraries]
    if "elastic_llama/include/elastic.h" not in names:
        faults.append("missing: elastic.h")
    most = MAX_BYTES + (TOOLS_BYTES if "elastic_llama/bin/llama-server" in names else 0)
    if wheel.stat().st_size > most:
        faults.append(f"{wheel.stat().st_size} bytes, {most} at most")
    return faults


def run(*command: object, **options: object) -> str:
    """Output of a command; its own message if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def tracked_files() -> set[str]:
    listed = run("git", "ls-files", "python/elastic_llama", cwd=ROOT).split("\n")
    there = [name for name in listed if name and (ROOT / name).is_file()]
    return {name.partition("python/")[2] for name in there}


def make_wheel(source: object, folder: Path, *options: str) -> Path:
    env = {**os.environ, "CMAKE_ARGS": f"{os.environ.get('CMAKE_ARGS', '')} -DLLAMA_BUILD=OFF"}
    before = set(folder.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, *options]
    run(*pip, source, cwd=ROOT, env=env)
    (wheel,) = set(folder.glob("*.whl")) - before
    return wheel


def install(wheel: Path, env_dir: Path) -> dict[str, str]:
    """Into a fresh environment without a compiler; returns the variables to use it with."""
    run(sys.executable, "-m", "venv", env_dir)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CMAKE_ARGS")}
    env.update(PATH=str(env_dir / "bin"), CC="/bin/false", CXX="/bin/false")
    pip = [env_dir / "bin" / "python", "-m", "pip", "install", "-q", "--only-binary", ":all:"]
    run(*pip, "--find-links", wheel.parent, wheel, env=env)
    return env


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="leave the wheels in dist/")
    args = parser.parse_args()
    requirement = next(
        line.split('"')[1]
        for line in (ROOT / "pyproject.toml").read_text().splitlines()
        if line.strip().startswith('"llama-cpp-python==')
    )
    started = time.monotonic()

    def tell(what: str) -> None:
        print(f"{time.monotonic() - started:5.0f} s  {what}", flush=True)

    with tempfile.TemporaryDirectory() as temp:
        wheels = Path(temp) / "wheels"
        wheels.mkdir()
        wheel = make_wheel(".", wheels, "--no-build-isolation")
        tell(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
        faults = check_contents(wheel, tracked_files())
        if faults:
            print("\n".join(faults), file=sys.stderr)
            return 1
        binding = make_wheel(requirement, wheels, "--no-binary", requirement.split("=")[0])
        tell(f"{binding.name}: {binding.stat().st_size / 1e6:.1f} MB")
        env = install(wheel, Path(temp) / "env")
        tell("installed without a compiler")
        where = "import elastic_llama; print(elastic_llama.get_include())"
        include = Path(run("python", "-c", where, env=env, cwd=temp).strip())
        if Path(temp) not in include.parents or not (include / "elastic.h").is_file():
            raise SystemExit(f"error: get_include() says {include}")
        out = run("elastic-llama", "demo", env=env, cwd=temp)
        if "elastic" not in out or "row 1:" not in out:
            raise SystemExit(f"error: the demo says\n{out}")
        tell("elastic-llama demo")
        if args.keep:
            (ROOT / "dist").mkdir(exist_ok=True)
            for path in (wheel, binding):
                shutil.copy(path, ROOT / "dist")
    return 0


if __name__ == "__main__":
    sys.exit(main())
