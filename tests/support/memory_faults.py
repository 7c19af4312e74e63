"""What may happen to a folder of the image memory: many writers, kills, flipped bytes.

The tests run it with small numbers. All of it: python -m tests.support.memory_faults (4 minutes)
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import elastic_llama  # noqa: F401  (first: it decides which libraries llama_cpp loads)
import numpy as np
from elastic_llama.memory import Entry, MemoryFolder

ROOT = Path(__file__).resolve().parent.parent.parent
N_KEYS = 12
N_BYTES = 200_000


def entry(number: int) -> Entry:
    """An entry whose content follows from its key."""
    state = np.random.default_rng(number).bytes(N_BYTES + number)
    return Entry.of_state(f"{number:064x}", np.arange(number), state, {"model": str(number)})


def is_whole(found: Entry) -> bool:
    expected = entry(int(found.key, 16))
    same_ids = found.ids.tolist() == expected.ids.tolist()
    return found.state() == expected.state() and same_ids and found.info == expected.info


def use(folder: MemoryFolder, n: int, seed: int) -> None:
    """Put and get entries at random."""
    rng = random.Random(seed)
    for i in itertools.count():
        if i == n:
            return
        number = rng.randrange(N_KEYS)
        found = folder.get(f"{number:064x}")
        if found is None:
            folder.put(entry(number))
        elif not is_whole(found):
            raise AssertionError(f"entry {number} is not what was written")
        if rng.random() < 0.3:
            folder.put(entry(number))


def start(path: Path, max_bytes: int, n: int, seed: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.support.memory_faults", "--work", str(path)]
    numbers = ["--max-bytes", str(max_bytes), "--uses", str(n), "--seed", str(seed)]
    return subprocess.Popen([*command, *numbers], cwd=ROOT, stdout=subprocess.PIPE)


def problems(path: Path) -> list[str]:
    return [s.problem for s in MemoryFolder(path).verify() if s.problem]


def many_processes(path: Path, n_processes: int, n_uses: int) -> None:
    """Processes that read, write and prune in one folder; each checks all that it gets."""
    max_bytes = N_BYTES * N_KEYS // 2
    running = [start(path, max_bytes, n_uses, seed) for seed in range(n_processes)]
    for process in running:
        process.communicate()
    assert [process.returncode for process in running] == [0] * n_processes
    assert problems(path) == []
    assert not (path / "damaged").exists()
    assert list(path.glob(".*.tmp")) == []
    assert sum(file.stat().st_size for file in MemoryFolder(path).files()) <= max_bytes


def kills(path: Path, n: int, seed: int = 0) -> int:
    """Kill a writer at random moments; returns how many left a part of a file."""
    rng = random.Random(seed)
    n_parts = 0
    for i in range(n):
        process = start(path, N_BYTES * N_KEYS // 2, -1, i)
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert problems(path) == []
        assert not (path / "damaged").exists()
        n_parts = max(n_parts, len(list(path.glob(".*.tmp"))))
    for file in MemoryFolder(path).files():
        found = MemoryFolder(path).get(file.stem)
        assert found is not None
        assert is_whole(found)
    return n_parts


def flips(path: Path, n: int, seed: int = 0) -> None:
    """Flip one bit at a random place of a file: it is set aside, and not given out."""
    rng = random.Random(seed)
    folder = MemoryFolder(path)
    written = entry(3)
    folder.put(written)
    (file,) = folder.files()
    good = file.read_bytes()
    for _ in range(n):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        assert folder.get(written.key) is None
        assert not file.exists()
    assert len(list((path / "damaged").iterdir())) == n
    file.write_bytes(good)
    assert folder.get(written.key) is not None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=20)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--uses", type=int, default=40)
    parser.add_argument("--work", type=Path, help="be one of the processes, in this folder")
    parser.add_argument("--max-bytes", type=int, default=1 << 30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.work:
        print("ready", flush=True)
        use(MemoryFolder(args.work, args.max_bytes), args.uses, args.seed)
        return
    logging.disable(logging.WARNING)  # of each damaged file
    with tempfile.TemporaryDirectory() as temp:
        many_processes(Path(temp) / "many", args.processes, args.uses)
        print(f"{args.processes} processes, {args.uses} uses each: every entry whole")
        n_parts = kills(Path(temp) / "kills", args.kills)
        print(f"{args.kills} kills: nothing damaged; {n_parts} parts of files left, all ignored")
        flips(Path(temp) / "flips", args.flips)
        print(f"{args.flips} flipped bits: each noticed")


if __name__ == "__main__":
    main()
