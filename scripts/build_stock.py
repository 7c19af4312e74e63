"""Build the pinned llama.cpp without any patch, with the flags of the package.

Prints the folder of the libraries, which LLAMA_CPP_LIB_PATH and MTMD_CPP_LIB can name. Built once
per pin and flags into the cache folder (ELASTIC_LLAMA_CACHE); an interrupted build goes on where it
stopped. Nothing else is printed unless it fails.

Usage: python scripts/build_stock.py [--archive FILE] [--jobs N]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CMAKE = ROOT / "cmake"
sys.path.insert(0, str(CMAKE))

import prepare_llama_cpp as source  # noqa: E402  (a script beside the CMake files that run it)


class BuildError(RuntimeError):
    """A step of the build failed; its output is the message."""


def cmake_args() -> list[str]:
    """Options of the environment, without the one that is for llama-cpp-python."""
    return [a for a in os.environ.get("CMAKE_ARGS", "").split() if a != "-DLLAMA_BUILD=OFF"]


def environment() -> dict[str, str]:
    """The compilers of the package's build, and the tools of this Python's environment in PATH."""
    path = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    env = {**os.environ, "PATH": path}
    for name in ("CC", "CXX"):  # as scikit-build-core chooses them
        words = (sysconfig.get_config_var(name) or "").split()
        if words and name not in env and shutil.which(words[0]):
            env[name] = words[0]
    return env


def stock_key(pin: dict[str, str], env: dict[str, str]) -> str:
    """Names everything that the libraries depend on."""
    digest = hashlib.sha256()
    for name in ("llama_cpp_options.cmake", "llama_cpp_targets.cmake", "stock/CMakeLists.txt"):
        digest.update((CMAKE / name).read_bytes() + b"\0")
    for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS"):
        digest.update(f"{name}={env.get(name, '')}\0".encode())
    digest.update(" ".join(cmake_args()).encode() + b"\0")
    digest.update(f"{platform.system()} {platform.machine()} {pin['sha256']}".encode())
    return f"{pin['commit']}-{digest.hexdigest()[:12]}"


def run(command: list[str], env: dict[str, str]) -> None:
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One build at a time."""
    with path.open("w") as file:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def folder() -> Path:
    """Where the stock libraries lie, or will."""
    pin = source.read_pin(ROOT / "patches" / "llama-cpp.pin")
    return source.cache_dir() / "stock" / stock_key(pin, environment())


def build(archive: Path | None = None, jobs: int | None = None) -> Path:
    """The folder of the stock libraries."""
    pin = source.read_pin(ROOT / "patches" / "llama-cpp.pin")
    env = environment()
    target = folder()
    cache = target.parent
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / f"{target.name}.lock"):
        if target.is_dir():  # another process built it meanwhile
            return target
        work = cache / f"{target.name}.build"
        tree = source.prepare(pin, [], archive, source.cache_dir())
        # at the place where the package's build has it: ccache then knows what is not patched
        tree = source.mirror(tree, work / "llama.cpp-src")
        cmake = shutil.which("cmake", path=env["PATH"])
        if cmake is None:
            raise BuildError("there is no cmake: pip install cmake ninja")
        generator = ["-G", "Ninja"] if shutil.which("ninja", path=env["PATH"]) else []
        options = ["-DCMAKE_BUILD_TYPE=Release", f"-DSTOCK_TREE={tree}"]
        options += cmake_args()
        run([cmake, "-S", str(CMAKE / "stock"), "-B", str(work), *generator, *options], env)
        parallel = str(jobs or os.cpu_count() or 1)
        run([cmake, "--build", str(work), "--target", "stock", "--parallel", parallel], env)
        os.replace(work / "lib", target)
        shutil.rmtree(work)
    return target


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archive", type=Path, help="the pinned archive, instead of fetching it")
    parser.add_argument("--jobs", type=int, help="compilers at a time")
    args = parser.parse_args(argv)
    try:
        print(build(args.archive, args.jobs))
    except (BuildError, source.PrepareError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
