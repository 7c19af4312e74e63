"""Which hunks apply to another release, with a tiny archive in its place."""

from __future__ import annotations

import importlib
import io
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIN = "requirement = llama-cpp-python==1.2\n"
PATCH = """\
diff --git a/src/a.txt b/src/a.txt
--- a/src/a.txt
+++ b/src/a.txt
@@ -1,3 +1,3 @@ the first
 one
-two
+TWO
 three
@@ -5,3 +5,4 @@ the second
 five
 six
+six and a half
 seven
"""
NEW_FILE = """\
diff --git a/src/new.txt b/src/new.txt
new file mode 100644
--- /dev/null
+++ b/src/new.txt
@@ -0,0 +1,1 @@
+hello
"""
LATER = """\
diff --git a/src/a.txt b/src/a.txt
--- a/src/a.txt
+++ b/src/a.txt
@@ -5,4 +5,4 @@ on what the first patch wrote
 five
 six
-six and a half
+6.5
 seven
"""


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("check_patches")


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    folder = tmp_path / "patches"
    folder.mkdir()
    (folder / "llama-cpp.pin").write_text(PIN)
    (folder / "0001-a.patch").write_text(PATCH)
    (folder / "0002-b.patch").write_text(LATER)
    (folder / "0003-new.patch").write_text(NEW_FILE)
    return folder


def archive(folder: Path, **files: str) -> Path:
    path = folder / "llama_cpp_python-1.1.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"llama_cpp_python-1.1/vendor/llama.cpp/src/{name}.txt")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content.encode()))
    return path


def lines(words: str) -> str:
    return words.replace(" ", "\n") + "\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("one two three four five six seven", ["applies", "applies", "applies"]),
        ("zero one two three four five six seven", ["applies, +1 lines"] * 3),
        ("one two three 4 4 5 5 five six seven", ["applies", *["applies, +3 lines"] * 2]),
        ("ONE two three four five six seven", ["applies, fuzz 1", "applies", "applies"]),
        ("one 2 three four five six seven", ["FAILS", "applies", "applies"]),
        ("one two three four five sixty seven", ["applies", *["applies, fuzz 2"] * 2]),
        ("one two three four", ["applies", "FAILS", "FAILS"]),
    ],
)
def test_each_hunk_is_tried(check, patches, tmp_path, words, expected):
    found = check.try_series(check.series_of(patches), archive(tmp_path, a=lines(words)))
    assert [str(o).partition(" (")[0] for o in found] == [*expected, "applies"]


def test_missing_and_present_files(check, patches, tmp_path):
    found = check.try_series(check.series_of(patches), archive(tmp_path, new="there\n"))
    assert [o.offset for o in found] == [None] * 4
    assert [o.why for o in found] == ["no such file"] * 3 + ["the file exists"]


def test_report_and_exit_status(check, patches, tmp_path, capsys):
    path = archive(tmp_path, a=lines("one 2 three four five six seven"))
    args = ["--patches", str(patches), "--archive", str(path)]
    assert check.main(args) == 0
    out = capsys.readouterr().out
    assert "src/a.txt: @@ -1,3 +1,3 @@ the first: FAILS" in out
    assert (
        "llama-cpp-python 1.1: 4 hunks, 3 at their line, 0 at another line, 0 with fuzz, 1 fail"
        in out
    )
    assert check.main([*args, "--strict"]) == 1


def test_the_table_replaces_the_one_before(check, patches, tmp_path):
    path = archive(tmp_path, a=lines("one 2 three four five six seven"))
    readme = patches / "README.md"
    readme.write_text(f"above\n{check.BEGIN}\nold\n{check.END}\nbelow\n")
    for _ in range(2):
        assert check.main(["--patches", str(patches), "--archive", str(path), "--markdown"]) == 0
        text = readme.read_text()
        assert text.startswith("above\n")
        assert text.endswith("below\n")
        assert "old" not in text
        assert "| `0001-a` | 2 | 1 | 0 | 0 | 1 |" in text
        assert "| 0001 | `src/a.txt` | `@@ -1,3 +1,3 @@ the first` | FAILS" in text


def test_the_series_applies_cleanly_to_its_pin(check):
    """The same answer as the build's own patcher."""
    pin = check.read_pin(ROOT / "patches" / "llama-cpp.pin")
    path = check.cache_dir() / "archives" / pin["archive"]
    if not path.is_file():
        pytest.skip("the pinned archive is not in the cache")
    found = check.try_series(check.series_of(ROOT / "patches"), path)
    assert found
    assert {str(o) for o in found} == {"applies"}


def test_the_readme_has_a_place_for_the_table(check):
    text = (ROOT / "patches" / "README.md").read_text()
    assert text.index(check.BEGIN) < text.index(check.END)
