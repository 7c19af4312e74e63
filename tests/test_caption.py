"""A folder of images: each caption is that of the image alone; nothing is lost or said twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import elastic_llama as el
import numpy as np
import pytest
from elastic_llama import caption_workers
from elastic_llama.caption import captions
from elastic_llama.caption_workers import captions_by, default_workers
from elastic_llama.cli import main
from elastic_llama.cli.caption import SOME_FAILED
from elastic_llama.sequences import SequenceGroup
from PIL import Image

N_GOOD, N_BAD = 9, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of random pixels, one in a folder below, and broken files among them."""
    out = tmp_path_factory.mktemp("images")
    (out / "below").mkdir()
    rng = np.random.default_rng(0)
    for i in range(N_GOOD):
        pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(out / ("below" if i == 3 else "") / f"{i:02d}.png")
    (out / "01-broken.png").write_text("no image")
    (out / "05-cut.png").write_bytes((out / "04.png").read_bytes()[:200])
    (out / "notes.txt").write_text("no image either")
    return out


def load(tiny_vlm, n_seq_max: int, **kwargs) -> el.ElasticLlama:
    options = {"n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1, "mmproj_path": tiny_vlm[1]}
    elastic = el.ElasticConfig(budget=0.3, min_cells=4)
    return el.ElasticLlama(
        tiny_vlm[0], **{"elastic": elastic, **options, "n_seq_max": n_seq_max, **kwargs}
    )


@pytest.fixture(scope="module")
def alone(tiny_vlm, folder) -> dict[str, str]:
    """What a conversation says of each image."""
    with load(tiny_vlm, 1) as llm:
        chat = el.Conversation(llm)
        out = {}
        for path in sorted(folder.rglob("0?.png")):
            chat.clear()
            out[str(path)] = "".join(chat.ask("the sea", path, max_tokens=20))
        return out


@pytest.mark.parametrize(
    ("n_seq_max", "options"),
    [(1, {}), (2, {}), (5, {}), (5, {"n_ctx": 256}), (5, {"memory": True, "memory_budget": 1})],
    ids=str,
)
def test_captions_are_those_of_images_alone(tiny_vlm, folder, alone, n_seq_max, options):
    names = [*sorted(map(str, folder.rglob("*.png"))), "none.png"]
    with load(tiny_vlm, n_seq_max, **options) as llm:
        for _ in range(2):
            found = list(captions(el.Conversation(llm), names, "the sea", 20))
            assert sorted(c.name for c in found) == sorted(names)
            bad = [c for c in found if c.error]
            assert len(bad) == N_BAD + 1
            assert all("got" in c.error and not c.text for c in bad)
            if "memory" not in options:  # compressed twice there
                assert {c.name: c.text for c in found if not c.error} == alone
            assert llm.session is not None
            assert [llm.session.n_cells(i) for i in range(1, n_seq_max)] == [0] * (n_seq_max - 1)


def test_an_image_that_does_not_fit_is_an_error_of_its_own(tiny_vlm, folder):
    names = sorted(map(str, folder.glob("0?.png")))[:2]
    with load(tiny_vlm, 3, n_ctx=256) as llm:
        long = list(captions(el.Conversation(llm), names, "the water " * 300, 20))
        assert ["context is too small" in c.error for c in long] == [True, True]
        assert not any(c.error for c in captions(el.Conversation(llm), names, "the sea", 20))


@pytest.mark.parametrize("other", ["captions", "ask", "load_state", "close"])
def test_captions_that_another_call_ended(tiny_vlm, folder, alone, other):
    """The later call has the right answers; the earlier one does not go on with its cells."""
    names = sorted(map(str, folder.glob("0?.png")))
    names = [name for name in names if "broken" not in name and "cut" not in name]
    with load(tiny_vlm, 3) as llm:
        chat = el.Conversation(llm)
        state = llm.save_state()
        first = captions(chat, names, "the sea", 20)
        next(first)
        if other == "captions":
            later = captions(chat, names, "the sea", 20)
            found = [next(later)]
            with pytest.raises(el.StateError, match="another call used"):
                next(first)
            first.close()
            found += later
            assert {c.name: c.text for c in found} == {name: alone[name] for name in names}
            return
        if other == "ask":
            assert len(llm.ask(names[0], ["the sea"] * 3, max_tokens=9)) == 3
        elif other == "load_state":
            llm.load_state(state)
        else:
            llm.close()
        with pytest.raises(el.StateError):
            next(first)


@pytest.mark.parametrize("options", [{}, {"elastic": None}], ids=str)
@pytest.mark.parametrize("n_seq_max", [1, 4])
def test_the_text_before_the_images_is_read_once(tiny_vlm, folder, monkeypatch, n_seq_max, options):
    names = [str(path) for path in sorted(folder.glob("0?.png"))]
    system, read = "the heat on the earth " * 9, []
    decode = el.ElasticLlama._decode

    def counted(self, tokens, *args, **kwargs):
        read.append(tuple(tokens))
        return decode(self, tokens, *args, **kwargs)

    monkeypatch.setattr(el.ElasticLlama, "_decode", counted)
    with load(tiny_vlm, n_seq_max, **options) as llm:
        chat = el.Conversation(llm, system=system)
        expected = {}
        for name in names:
            chat.clear()
            llm.reset()
            expected[name] = "".join(chat.ask("the sea", name, max_tokens=20))
        before = read[0]
        assert len(before) > 40
        assert read.count(before) == len(names)
        for _ in range(2):
            read.clear()
            llm.reset()
            found = {c.name: c.text for c in captions(chat, names, "the sea", 20)}
            assert found == expected
            assert read.count(before) == 1


def test_captions_by_two_models(tiny_vlm, folder, alone, monkeypatch):
    """Each image once, whoever read it, and as alone."""
    names = [*sorted(map(str, folder.rglob("*.png"))), "none.png"]
    with load(tiny_vlm, 3) as one, load(tiny_vlm, 2) as two:
        chats = [el.Conversation(one), el.Conversation(two)]
        for few in (names, names[:1], []):
            found = list(captions_by(chats, few, "the sea", 20))
            assert sorted(c.name for c in found) == sorted(few)
            said = {c.name: c.text for c in found if not c.error}
            assert said == {name: alone[name] for name in few if name in alone}
        # at the same time: neither reads its first image before the other one does
        meet, prefill, begun = threading.Barrier(2, timeout=60), el.ElasticLlama.prefill, set()

        def after_the_other(self, pieces):
            if self not in begun:
                begun.add(self)
                meet.wait()
            return prefill(self, pieces)

        monkeypatch.setattr(el.ElasticLlama, "prefill", after_the_other)
        assert len(list(captions_by(chats, names, "the sea", 20))) == len(names)
        assert len(begun) == 2


def test_what_stops_captions_by_two_models(tiny_vlm, folder, alone):
    """An exception of a model, or of the images, is the caller's; nothing goes on behind it."""
    names = sorted(alone)
    with load(tiny_vlm, 3) as one, load(tiny_vlm, 3) as two:
        chats = [el.Conversation(one), el.Conversation(two)]
        n_before = threading.active_count()

        def broken():
            yield names[0]
            raise OSError("the disk is gone")

        with pytest.raises(OSError, match="the disk is gone"):
            list(captions_by(chats, broken(), "the sea", 20))
        assert threading.active_count() == n_before
        found = captions_by(chats, names, "the sea", 20)
        next(found)
        found.close()
        assert threading.active_count() == n_before
        two.close()
        with pytest.raises(el.StateError, match="closed"):
            list(captions_by(chats, names, "the sea", 20))
        assert threading.active_count() == n_before


def test_an_interrupt_waits_for_the_models(tiny_vlm, folder, alone, monkeypatch):
    """The caller frees them then. They give up at the next token, and are as before afterwards."""
    names, join, step, n_steps = sorted(alone), threading.Thread.join, SequenceGroup.step, []
    begun = threading.Event()

    def counted(self):
        n_steps.append(1)
        begun.wait(60)  # until the caller has stopped
        return step(self)

    def interrupted(self, *args):
        if not begun.is_set():
            begun.set()
            raise KeyboardInterrupt
        return join(self, *args)

    with load(tiny_vlm, 3) as one, load(tiny_vlm, 3) as two:
        chats = [el.Conversation(one), el.Conversation(two)]
        n_before = threading.active_count()
        with monkeypatch.context() as patch:
            patch.setattr(SequenceGroup, "step", counted)
            patch.setattr(threading.Thread, "join", interrupted)
            found = captions_by(chats, ["none.png", *names], "the sea", 20)
            assert next(found).error
            with pytest.raises(KeyboardInterrupt):
                found.close()
        assert threading.active_count() == n_before
        assert len(n_steps) <= 2
        said = {c.name: c.text for c in captions_by(chats, names, "the sea", 20)}
        assert said == {name: alone[name] for name in names}


def test_models_as_cores_and_memory_allow(tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(1000))
    for n_cores, free, expected in ((4, 10**9, 4), (64, 10**9, 8), (4, 4000, 2), (4, 100, 1)):
        monkeypatch.setattr(caption_workers, "n_cores", lambda n=n_cores: n)
        monkeypatch.setattr(caption_workers, "free_memory", lambda n=free: n)
        assert default_workers([file, tmp_path / "none.gguf"]) == expected
    monkeypatch.undo()
    assert 1 <= caption_workers.n_cores() <= (os.cpu_count() or 1)
    assert caption_workers.free_memory() > 1 << 20


def arguments(tiny_vlm, folder: Path, out: Path) -> list[str]:
    model, mmproj = map(str, tiny_vlm)
    options = ["-m", model, "--mmproj", mmproj, "-t", "1", "-n", "20", "-p", "the sea", "-np", "3"]
    return ["caption", str(folder), "-o", str(out), "--workers", "2", *options]


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_the_command(tiny_vlm, folder, tmp_path, capsys):
    out = tmp_path / "captions.jsonl"
    command = arguments(tiny_vlm, folder, out)
    assert main(command) == SOME_FAILED
    said = {line["file"]: line for line in lines(out)}
    assert len(said) == len(lines(out)) == N_GOOD + N_BAD
    assert {name for name in said if "error" in said[name]} == {"01-broken.png", "05-cut.png"}
    assert said["below/03.png"]["tokens"] > 0
    before = out.read_bytes()
    assert main(command) == SOME_FAILED, "what failed before has still failed"
    assert out.read_bytes() == before
    capsys.readouterr()
    # a line that was cut short is written again
    out.write_bytes(before[:-10])
    assert main(command) == SOME_FAILED
    assert sorted(map(str, lines(out))) == sorted(map(str, said.values()))
    assert main([*command, "-np", "0"]) == 1
    assert main([*command, "--workers", "0"]) == 1
    out.write_text("no caption\n")
    assert main(command) == 1
    assert "no caption" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["caption", "remember"])
def test_a_model_without_a_tower_fails_as_a_whole(tiny_vlm, folder, tmp_path, capsys, command):
    """No image is noted as failed, since a later run would leave it out."""
    out = tmp_path / "captions.jsonl"
    given = ["-o", str(out)] if command == "caption" else ["--memory", str(tmp_path / "memory")]
    assert main([command, str(folder), *given, "-m", str(tiny_vlm[0]), "-t", "1"]) == 1
    said = capsys.readouterr()
    assert "no vision tower" in said.err
    assert said.out == ""
    assert command == "remember" or lines(out) == []


@pytest.mark.slow
def test_killed_in_the_middle(tiny_vlm, folder, tmp_path):
    out = tmp_path / "captions.jsonl"
    command = [sys.executable, "-m", "elastic_llama", *arguments(tiny_vlm, folder, out)]
    n_killed = 0
    for n in (3,):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= n):
            time.sleep(0.001)
        n_killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == SOME_FAILED
    names = [line["file"] for line in lines(out)]
    assert len(names) == len(set(names)) == N_GOOD + N_BAD
    assert n_killed > 0


@pytest.mark.slow
@pytest.mark.parametrize("n_interrupts", [1, 2])
def test_ctrl_c(tiny_vlm, folder, tmp_path, n_interrupts):
    """Nothing is lost, no traceback; a second one ends the process at once, but not by a fault."""
    images, out = tmp_path / "images", tmp_path / "captions.jsonl"
    images.mkdir()
    for i in range(60):
        (images / f"{i}.png").write_bytes((folder / "00.png").read_bytes())
    command = [sys.executable, "-m", "elastic_llama", *arguments(tiny_vlm, images, out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= 3):
        time.sleep(0.001)
    for _ in range(n_interrupts):
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)[:n_interrupts]
    assert b"Traceback" not in err
    assert 3 <= len(lines(out)) < 60
    before = out.read_bytes()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert out.read_bytes().startswith(before)
    assert len({line["file"] for line in lines(out)}) == len(lines(out)) == 60


def test_one_process_at_a_time(tiny_vlm, folder, tmp_path, capsys):
    from elastic_llama.cli.caption import CaptionFile

    out = tmp_path / "captions.jsonl"
    with CaptionFile(out):
        assert main(arguments(tiny_vlm, folder, out)) == 1
    assert "another process" in capsys.readouterr().err
