"""What the wheel carries: the package, one extension, its libraries and headers, no more.

`make wheel-test` builds a wheel, and installs and runs it where there is no compiler.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from scripts.check_wheel import (
    NATIVE,
    NEEDED,
    NEEDED_PORTABLE,
    PYTHON,
    beyond_its_level,
    check_contents,
    library,
    strangers,
    tracked_files,
)

ROOT = Path(__file__).resolve().parents[1]


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


def test_nothing_else_is_installed(installed: Path) -> None:
    """No static libraries, tools, or files for CMake and pkg-config."""
    assert strangers(files(installed), NATIVE) == []


def test_everything_needed_is_installed(installed: Path) -> None:
    found = files(installed)
    assert len([f for f in found if f.startswith("elastic_llama/_core.")]) == 1
    names = {Path(f).name.split(".")[0] for f in found}
    assert {f"lib{name}" for name in NEEDED} <= names
    assert {"elastic", "llama", "ggml"} <= names  # headers


def wheel_of(path: Path, names: set[str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return path


def test_a_wheel_is_judged(tmp_path: Path) -> None:
    """What belongs into a wheel passes; what does not, and what is not there, is named."""
    tracked = tracked_files()
    assert "elastic_llama/__init__.py" in tracked
    assert strangers(sorted(tracked), PYTHON) == []
    info = {
        f"elastic_llama-0.1.0.dist-info/{x}" for x in ("METADATA", "RECORD", "licenses/LICENSE")
    }
    native = {f"elastic_llama/lib/lib{name}.so" for name in NEEDED}
    good = tracked | info | native | {"elastic_llama/include/elastic.h"}
    assert check_contents(wheel_of(tmp_path / "good.whl", good), tracked) == []
    bad = good - {"elastic_llama/llama.py", "elastic_llama/lib/libggml.so"}
    bad |= {"elastic_llama/data/h2o.gguf", "tests/conftest.py", "elastic_llama/scratch.py"}
    assert set(check_contents(wheel_of(tmp_path / "bad.whl", bad), tracked)) == {
        "stray: elastic_llama/data/h2o.gguf",
        "stray: tests/conftest.py",
        "not under version control: elastic_llama/scratch.py",
        "missing: elastic_llama/llama.py",
        "missing: libggml",
    }


def test_a_portable_wheel_is_judged(tmp_path: Path) -> None:
    """It has a CPU backend per kind of processor and the kernels at every level."""
    tracked = tracked_files()
    lib = "elastic_llama/lib"
    native = {f"{lib}/{library(name)}.so" for name in NEEDED_PORTABLE}
    good = tracked | native | {"elastic_llama/include/elastic.h", "elastic_llama.libs/libgomp-1.so"}
    good |= {"elastic_llama/", "elastic_llama-0.1.0.dist-info/sboms/auditwheel.cdx.json"}
    assert check_contents(wheel_of(tmp_path / "good.whl", good), tracked, portable=True) == []
    bad = good - {f"{lib}/libggml-cpu-x64.so"}
    bad -= {f"{lib}/glibc-hwcaps/x86-64-v4/libelastic-kernels.so"}
    bad |= {"elastic_llama.libs/libcuda.so", f"{lib}/glibc-hwcaps/x86-64-v4/libllama.so"}
    assert set(check_contents(wheel_of(tmp_path / "bad.whl", bad), tracked, portable=True)) == {
        "stray: elastic_llama.libs/libcuda.so",
        f"stray: {lib}/glibc-hwcaps/x86-64-v4/libllama.so",
        "missing: libggml-cpu-x64",
        "missing: glibc-hwcaps/x86-64-v4/libelastic-kernels",
    }
    assert "missing: libggml-cpu" in check_contents(tmp_path / "good.whl", tracked)


@pytest.mark.parametrize(
    ("line", "levels"),
    [
        ("12: vfmadd231ps %zmm1,%zmm2,%zmm3", ["generic", "x86-64-v3"]),
        ("12: vcmpltps %ymm0,%ymm1,%k1", ["generic", "x86-64-v3"]),
        ("12: vaddps %ymm0,%ymm1,%ymm2", ["generic"]),
        ("12: vfmadd231ss %xmm0,%xmm1,%xmm2", ["generic"]),
        ("12: addps %xmm0,%xmm1", []),
        ("12: mov %rax,%rbx", []),
    ],
)
def test_instructions_are_judged(line: str, levels: list[str]) -> None:
    assert [x for x in ("generic", "x86-64-v3") if beyond_its_level(line, x)] == levels


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
