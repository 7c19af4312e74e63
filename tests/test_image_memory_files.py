"""The folder of the image memory: other processes, kills, flipped bytes, and the commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import elastic_llama as el
import numpy as np
import pytest
from elastic_llama.cli import main
from elastic_llama.cli.remember import SOME_FAILED
from elastic_llama.memory import Entry, ImageMemory, MemoryFolder
from PIL import Image

from tests.support import memory_faults

NEW_PROCESS = """
import sys
import elastic_llama as el
from llama_cpp import mtmd_cpp

def refuse(*args):
    raise AssertionError("the encoder was called")

mtmd_cpp.mtmd_encode_chunk = refuse
model, mmproj, folder, image = sys.argv[1:]
with el.ElasticLlama(
    model, mmproj_path=mmproj, memory=folder, n_ctx=512, n_threads=1, n_threads_batch=1
) as llm:
    print(repr("".join(el.Conversation(llm).ask("the sea", image, max_tokens=12))))
"""


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    Image.new("RGB", (30, 20), "red").save(path)
    return path


def test_a_new_process_answers_without_the_encoder(tiny_vlm, tmp_path, photo):
    options = {"mmproj_path": tiny_vlm[1], "n_ctx": 512, "n_threads": 1, "n_threads_batch": 1}
    folder = tmp_path / "memory"
    with el.ElasticLlama(tiny_vlm[0], memory=folder, **options) as llm:
        expected = "".join(el.Conversation(llm).ask("the sea", photo, max_tokens=12))
    arguments = [*map(str, tiny_vlm), str(folder), str(photo)]
    done = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == repr(expected)


@pytest.mark.slow
def test_many_processes_use_one_folder(tmp_path):
    memory_faults.many_processes(tmp_path, 6, 15)


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_a_whole_folder(tmp_path):
    memory_faults.kills(tmp_path, 10)


def test_flipped_bytes_are_noticed(tmp_path):
    memory_faults.flips(tmp_path, 50)


def test_parts_of_files_are_swept(tmp_path):
    folder = MemoryFolder(tmp_path)
    old, new = tmp_path / ".0-a.tmp", tmp_path / ".0-b.tmp"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    assert list(folder.verify()) == []
    assert not old.exists()
    assert new.exists()


def test_what_is_read_from_ram_counts_as_used_in_the_folder(tmp_path):
    """Else the images that are asked about all the time would be the first to be pruned."""
    memory = ImageMemory(tmp_path)
    keys = ["0" * 64, "1" * 64]
    for key in keys:
        memory.put(Entry.of_state(key, np.arange(3), os.urandom(1000), {}))
    for i, path in enumerate(memory.folder.files()):
        os.utime(path, (i, i))
    assert memory.get(keys[0]) is not None
    assert [path.stem for path in memory.folder.files()] == keys[::-1]
    memory.folder.prune(1500)
    assert [path.stem for path in memory.folder.files()] == [keys[0]]
    # another process deleted it, and here it is in RAM
    assert memory.get(keys[1]) is not None
    assert memory.has(keys[1])
    assert ImageMemory(tmp_path).get(keys[1]) is not None
    assert not memory.has("2" * 64)


def test_commands(tiny_vlm, tmp_path, photo, capsys):
    model, mmproj = map(str, tiny_vlm)
    folder = tmp_path / "memory"
    (tmp_path / "bad.png").write_text("no image")
    remember = ["remember", "-m", model, "--mmproj", mmproj, "-t", "1", "--memory", str(folder)]
    assert main([*remember, str(photo)]) == 0
    assert main([*remember, str(tmp_path)]) == SOME_FAILED
    out = capsys.readouterr()
    assert "1 images remembered, 0 known before, 0 failed" in out.out
    assert "0 images remembered, 1 known before, 1 failed" in out.out
    assert "bad.png" in out.err
    memory = ["memory", "--memory", str(folder)]
    assert main([*memory, "list"]) == 0
    assert "1 images" in capsys.readouterr().out
    (file,) = MemoryFolder(folder).files()
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert main([*memory, "verify"]) == 3
    assert file.name in capsys.readouterr().err
    assert main([*memory, "verify"]) == 0
    assert main([*remember, str(photo)]) == 0
    assert main([*memory, "prune", "--size", "0"]) == 0
    assert "2 files deleted" in capsys.readouterr().out
    assert main([*memory, "verify"]) == 0
    assert main([*remember, str(tmp_path / "none")]) == 1
    assert main(["memory", "--memory", str(tmp_path / "none"), "list"]) == 1
    assert not (tmp_path / "none").exists()
