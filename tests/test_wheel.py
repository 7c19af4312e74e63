"""What the wheel carries: the package, one extension and its libraries, no more of llama.cpp."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LIBRARY = r"lib(llama|mtmd|ggml|ggml-(base|cpu|blas|cuda|hip|metal|vulkan|rpc|sycl|opencl))"
SUFFIX = r"\.(so|dylib)"
ALLOWED = [rf"elastic_llama/lib/{LIBRARY}{SUFFIX}", r"elastic_llama/_core\.[\w.-]+\.(so|pyd)"]
NEEDED = ["llama", "mtmd", "ggml", "ggml-base", "ggml-cpu"]


def build_dir() -> Path:
    """The build tree that this Python's package came from."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    caches = sorted((ROOT / "build").glob(f"{tag}-*/CMakeCache.txt"))
    if not caches:
        pytest.skip("no build tree in build/: the package was not built here")
    return caches[0].parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What cmake installs into a wheel."""
    scripts = Path(sysconfig.get_path("scripts"))
    cmake = shutil.which("cmake", path=str(scripts)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    prefix = tmp_path_factory.mktemp("wheel")
    command = [cmake, "--install", str(build_dir()), "--component", "python", "--prefix"]
    done = subprocess.run([*command, str(prefix)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return prefix


def files(prefix: Path) -> list[str]:
    return sorted(p.relative_to(prefix).as_posix() for p in prefix.rglob("*") if not p.is_dir())


def test_only_libraries_are_installed(installed: Path) -> None:
    """No headers, static libraries, tools, or files for CMake and pkg-config."""
    strangers = [f for f in files(installed) if not any(re.fullmatch(a, f) for a in ALLOWED)]
    assert strangers == []


def test_everything_needed_is_installed(installed: Path) -> None:
    found = files(installed)
    assert len([f for f in found if f.startswith("elastic_llama/_core.")]) == 1
    names = {Path(f).name.split(".")[0] for f in found}
    assert {f"lib{name}" for name in NEEDED} <= names


def test_no_symbolic_links(installed: Path) -> None:
    """Wheels hold none: a link would become a second copy."""
    assert [p for p in installed.rglob("*") if p.is_symlink()] == []


def dynamic(path: Path) -> str:
    if sys.platform != "linux" or shutil.which("readelf") is None:
        pytest.skip("readelf is needed")
    done = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True)
    return done.stdout


def test_libraries_find_each_other_beside_themselves(installed: Path) -> None:
    for path in (installed / "elastic_llama").rglob("*.so"):
        found = re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic(path))
        expected = "$ORIGIN/lib" if path.name.startswith("_core.") else "$ORIGIN"
        assert found == [expected], path.name


def test_libraries_carry_no_version_in_their_names(installed: Path) -> None:
    """What one library asks for is a file that is there."""
    there = {p.name for p in installed.rglob("*.so")}
    for path in (installed / "elastic_llama").rglob("*.so"):
        wanted = re.findall(r"\(NEEDED\).*\[(lib(?:llama|ggml|mtmd).*)\]", dynamic(path))
        assert set(wanted) <= there, path.name
