"""The patch series: what does not fit exactly is refused, and a changed series costs little."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILE = "one\ntwo\nthree\nfour\nfive\n"
CHANGE = """\
Subject: [PATCH] a change

---
diff --git a/src/a.txt b/src/a.txt
--- a/src/a.txt
+++ b/src/a.txt
@@ -2,3 +2,3 @@
 two
-three
+THREE
 four
"""
CHANGE += "-- \n2.39.5\n"  # git signs so
NEW_FILE = """\
diff --git a/src/new.txt b/src/new.txt
new file mode 100644
--- /dev/null
+++ b/src/new.txt
@@ -0,0 +1,2 @@
+hello
+there
"""
RENAME = "diff --git a/src/a.txt b/src/b.txt\nrename from src/a.txt\nrename to src/b.txt\n"


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[ModuleType, ModuleType]]:
    with pytest.MonkeyPatch.context() as context:
        context.syspath_prepend(ROOT / "cmake")
        yield importlib.import_module("apply_patch"), importlib.import_module("prepare_llama_cpp")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree" / "src").mkdir(parents=True)
    (tmp_path / "tree" / "src" / "a.txt").write_text(FILE)
    return tmp_path / "tree"


def apply(scripts: tuple[ModuleType, ModuleType], tree: Path, text: str) -> None:
    patch = tree.parent / "0001-a.patch"
    patch.write_text(text)
    scripts[0].apply(patch, tree)


def test_change_add_and_delete(scripts: tuple[ModuleType, ModuleType], tree: Path) -> None:
    (tree / "src" / "old.txt").write_text("x\ny\n")
    delete = (
        "diff --git a/src/old.txt b/src/old.txt\n"
        "deleted file mode 100644\n@@ -1,2 +0,0 @@\n-x\n-y\n"
    )
    apply(scripts, tree, delete + NEW_FILE + "\\ No newline at end of file\n" + CHANGE)
    assert {p.name: p.read_bytes() for p in (tree / "src").iterdir()} == {
        "a.txt": FILE.replace("three", "THREE").encode(),
        "new.txt": b"hello\nthere",
    }


def test_insertion_without_context(scripts: tuple[ModuleType, ModuleType], tree: Path) -> None:
    header = CHANGE[: CHANGE.index("@@")]
    apply(scripts, tree, header + "@@ -2,0 +3 @@\n+2.5\n@@ -5 +6,2 @@\n-five\n+5\n+6\n")
    assert (tree / "src" / "a.txt").read_text() == "one\ntwo\n2.5\nthree\nfour\n5\n6\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            CHANGE.replace(" two", " too"), r"hunk 1 does not fit at line 2", id="context"
        ),
        pytest.param(
            CHANGE.replace("@@ -2", "@@ -1"), r"hunk 1 does not fit at line 1", id="offset"
        ),
        pytest.param(CHANGE.replace("@@ -2", "@@ -4"), r"hunk 1 does not fit", id="past the end"),
        pytest.param(
            CHANGE.replace("-three", "-THREE"), r"expected: THREE\n  found:    three", id="done"
        ),
        pytest.param(CHANGE.replace(" four\n-- \n2.39.5\n", ""), r"hunk 1: .* cut short", id="cut"),
        pytest.param(CHANGE.replace("src/a", "src/b"), r"src/b\.txt does not exist", id="no file"),
        pytest.param(
            NEW_FILE.replace("src/new", "src/a"), r"src/a\.txt is new .* exists", id="exists"
        ),
        pytest.param(RENAME, r"rename from src/a\.txt.* not supported", id="rename"),
        pytest.param("Subject: nothing\n", r"holds no `diff --git`", id="empty"),
    ],
)
def test_what_does_not_fit_is_refused(
    scripts: tuple[ModuleType, ModuleType], tree: Path, text: str, message: str
) -> None:
    """No fuzz, no offset, nothing skipped or overwritten; the tree stays as it was."""
    # the second file of the patch does not fit: the first must not be changed either
    with pytest.raises(scripts[0].PatchError, match=message) as error:
        apply(scripts, tree, text if text.startswith("Subject: nothing") else NEW_FILE + text)
    assert "0001-a.patch" in str(error.value)
    assert [p.name for p in (tree / "src").iterdir()] == ["a.txt"]
    assert (tree / "src" / "a.txt").read_text() == FILE


def test_a_mirror_writes_only_what_differs(
    scripts: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    """A file that is written looks new, so it is compiled again; the others are not."""
    into = tmp_path / "mirror"

    def change(name: str, files: dict[str, str]) -> set[str]:
        """Mirror a tree of these files; the names of those that were written."""
        tree = tmp_path / name
        for path, text in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text)
            os.utime(tree / path, (1, 1))
        (tree / ".elastic-stamp").write_text("")
        scripts[1].mirror(tree, into)
        there = {p.relative_to(into).as_posix() for p in into.rglob("*.c")}
        assert there == {f for f in files if not f.startswith("docs/")}
        written = {f for f in there if (into / f).stat().st_mtime > 1}
        for f in there:
            os.utime(into / f, (1, 1))
        return written

    assert change("one", {"a.c": "1", "src/b.c": "2", "docs/c.c": "3"}) == {"a.c", "src/b.c"}
    assert change("two", {"a.c": "1", "src/b.c": "4", "src/new.c": "5"}) == {"src/b.c", "src/new.c"}
    assert change("two", {"a.c": "1", "src/b.c": "4", "src/new.c": "5"}) == set()
    assert change("one", {"a.c": "1", "src/b.c": "2"}) == {"src/b.c"}
