"""Unpacking and patching the pinned tree, with a tiny archive in its place."""

from __future__ import annotations

import importlib.util
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILE = "one\ntwo\nthree\nfour\nfive\nsix\nseven\n"

CHANGE = """\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
Subject: [PATCH] a change

---
 src/a.txt | 2 +-

diff --git a/src/a.txt b/src/a.txt
--- a/src/a.txt
+++ b/src/a.txt
@@ -2,5 +2,5 @@
 two
 three
-four
+FOUR
 five
 six
"""
NEW_FILE = """\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
Subject: [PATCH] a file

---
diff --git a/src/new.txt b/src/new.txt
new file mode 100644
index 0000000..0000001
--- /dev/null
+++ b/src/new.txt
@@ -0,0 +1,2 @@
+hello
+there
"""


@pytest.fixture(scope="module")
def prepare() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "cmake")  # as for the script: its helper lies beside it
        yield importlib.import_module("prepare_llama_cpp")


class Project:
    """A pin, patches, an archive and an empty cache."""

    def __init__(self, prepare: ModuleType, folder: Path) -> None:
        self.prepare = prepare
        self.cache = folder / "cache"
        self.patches = folder / "patches"
        self.archive = folder / "fake-1.0.tar.gz"
        tree = folder / "fake-1.0" / "vendor" / "llama.cpp"
        (tree / "src").mkdir(parents=True)
        self.patches.mkdir()
        (tree / "src" / "a.txt").write_text(FILE)
        (tree / ".git").write_text("gitdir: nowhere\n")
        (folder / "fake-1.0" / "other.txt").write_text("not part of the tree\n")
        with tarfile.open(self.archive, "w:gz") as tar:
            tar.add(folder / "fake-1.0", "fake-1.0")
        self.write_pin(prepare.sha256(self.archive))

    def write_pin(self, sha256: str) -> None:
        lines = ["# a comment", "archive = fake-1.0.tar.gz", "requirement = fake==1.0"]
        lines += [f"sha256 = {sha256}", "tree = fake-1.0/vendor/llama.cpp", "commit = abcdef123"]
        (self.patches / "llama-cpp.pin").write_text("\n".join(lines) + "\n")

    def add(self, name: str, text: str) -> None:
        (self.patches / name).write_text(text)

    def run(self, *options: str) -> int:
        arguments = ["--archive", str(self.archive), "--patches", str(self.patches)]
        return int(self.prepare.main([*arguments, *options]))

    def trees(self) -> list[Path]:
        """Everything in the folder of trees, leftovers too."""
        return sorted((self.cache / "src").glob("*"))


@pytest.fixture
def project(prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    project = Project(prepare, tmp_path)
    monkeypatch.setenv("ELASTIC_LLAMA_CACHE", str(project.cache))
    return project


def test_patches_are_applied_in_order(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.add("0002-again.patch", CHANGE.replace("-four", "-FOUR").replace("+FOUR", "+4"))
    project.add("0001-change.patch", CHANGE)
    assert project.run() == 0
    out = dict(line.split("=", 1) for line in capsys.readouterr().out.splitlines())
    tree = Path(out["tree"])
    assert project.trees() == [tree]
    assert (tree / "src" / "a.txt").read_text() == FILE.replace("four", "4")
    assert not (tree / ".git").exists()
    assert not (tree / "other.txt").exists()
    assert out["commit"] == "abcdef123"
    assert out["patches"] == "0001-change,0002-again"
    assert tree.name == f"abcdef123-{out['series']}"


def test_a_patch_adds_a_file(project: Project) -> None:
    project.add("0001-file.patch", NEW_FILE)
    assert project.run() == 0
    (tree,) = project.trees()
    assert (tree / "src" / "new.txt").read_text() == "hello\nthere\n"


def test_stock_has_no_patches(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.add("0001-change.patch", CHANGE)
    assert project.run("--stock") == 0
    (tree,) = project.trees()
    assert tree.name == "abcdef123-stock"
    assert (tree / "src" / "a.txt").read_text() == FILE
    assert "patches=\n" in capsys.readouterr().out


def test_running_again_does_nothing(project: Project) -> None:
    project.add("0001-change.patch", CHANGE)
    assert project.run() == 0
    (tree,) = project.trees()
    (tree / "mine.txt").write_text("a rebuilt tree would not have it")
    project.archive.unlink()
    assert project.run() == 0
    assert (tree / "mine.txt").is_file()


def test_a_changed_series_is_another_tree(project: Project) -> None:
    project.add("0001-change.patch", CHANGE)
    assert project.run() == 0
    project.add("0001-change.patch", CHANGE.replace("+FOUR", "+Four"))
    assert project.run() == 0
    texts = {(tree / "src" / "a.txt").read_text() for tree in project.trees()}
    assert texts == {FILE.replace("four", "FOUR"), FILE.replace("four", "Four")}


def test_another_archive_is_refused(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.write_pin("0" * 64)
    assert project.run() == 1
    message = capsys.readouterr().err
    assert "sha256" in message
    assert "0" * 64 in message
    assert project.archive.name in message
    assert project.trees() == []


def test_a_damaged_download_is_refused(project: Project, prepare: ModuleType) -> None:
    """An archive in the cache is checked again before every use."""
    pin = prepare.read_pin(project.patches / "llama-cpp.pin")
    kept = project.cache / "archives" / pin["archive"]
    kept.parent.mkdir(parents=True)
    kept.write_bytes(project.archive.read_bytes()[:-1])
    with pytest.raises(prepare.PrepareError, match="sha256"):
        prepare.prepare(pin, [], None, project.cache)
    assert project.trees() == []


def test_a_conflict_names_patch_and_file(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.add("0001-file.patch", NEW_FILE)
    project.add("0002-conflict.patch", CHANGE.replace("-four", "-vier"))
    assert project.run() == 1
    message = capsys.readouterr().err
    assert "0002-conflict.patch" in message
    assert "src/a.txt" in message
    assert project.trees() == []


def test_a_patch_is_not_applied_with_fuzz(project: Project) -> None:
    project.add("0001-fuzz.patch", CHANGE.replace(" two\n", " too\n"))
    assert project.run() == 1
    assert project.trees() == []


def test_an_interrupted_unpack_leaves_nothing(
    project: Project, prepare: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.add("0001-change.patch", CHANGE)

    def interrupt(patch: Path, tree: Path) -> None:
        assert (tree / "src" / "a.txt").is_file()
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(prepare, "apply", interrupt)
        with pytest.raises(KeyboardInterrupt):
            project.run()
    assert project.trees() == []
    assert project.run() == 0


def test_a_tree_without_its_stamp_is_made_again(project: Project) -> None:
    """Killed for good while a tree was replaced: what is left does not count."""
    project.add("0001-change.patch", CHANGE)
    assert project.run() == 0
    (tree,) = project.trees()
    (tree / ".elastic-stamp").unlink()
    (tree / "src" / "a.txt").write_text("half")
    assert project.run() == 0
    assert (tree / "src" / "a.txt").read_text() == FILE.replace("four", "FOUR")
