"""Hashes of what the elastic cache computes, compared with those that are committed.

python scripts/record.py            # compare, exit status 1 where something differs
python scripts/record.py --write    # renew tests/data/record.json

A change that is meant to move code only must leave every hash as it is. The matrix is every policy,
K/V type and flash attention setting, over prompts of text, an image, two turns, two sequences, a
cap on the cells, and layers that keep different numbers of cells. Of each case the logits of every
step, the plan, the cells, K and V, and the saved state are hashed.

Floating point differs between machines. The record therefore holds the hashes of the same prompts
with the cache off: where those differ, nothing can be said, and the exit status is 2.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import elastic_llama  # noqa: F401  (first: it decides which libraries llama_cpp loads)
import numpy as np
from elastic_llama import _core

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.engine import Engine, random_tokens  # noqa: E402
from tests.support.tiny_llama import write_tiny_llama  # noqa: E402

RECORD = ROOT / "tests" / "data" / "record.json"

N_VOCAB = 384
N_PROMPT = 150
N_IMAGE = 120
N_ANSWER = 48  # longer than what an answer may take before it is merged
TYPES = ("f16", "q8_0", "q4_0")
OFF = "off"


class Hashes:
    """One SHA-256 for each thing that is looked at, 16 hex digits of it."""

    def __init__(self) -> None:
        self._of: dict[str, Any] = {}

    def add(self, name: str, *values: Any) -> None:
        h = self._of.setdefault(name, hashlib.sha256())
        for value in values:
            data = value if isinstance(value, bytes) else np.ascontiguousarray(value).tobytes()
            h.update(data)

    def digests(self) -> dict[str, str]:
        return {name: h.hexdigest()[:16] for name, h in self._of.items()}


def answer(e: Engine, out: Hashes, pos: int, seq: int = 0, seed: int = 5) -> int:
    """Decode an answer and return the position behind it."""
    tokens = random_tokens(N_ANSWER, N_VOCAB, seed + seq)
    out.add("logits", e.forced(tokens, pos, seq))
    return pos + N_ANSWER


def plan_of(e: Engine, out: Hashes) -> None:
    """The plan of the last compression."""
    if e.session is not None:
        plan = e.session.last_plan()
        out.add("plan", *(np.asarray(plan[key]) for key in ("kept", "bucket")))


def text(e: Engine, out: Hashes) -> None:
    e.prompt(random_tokens(N_PROMPT, N_VOCAB, 1))
    answer(e, out, N_PROMPT)


def image(e: Engine, out: Hashes) -> None:
    rows = np.random.default_rng(3).standard_normal((N_IMAGE, e.n_embd), np.float32)
    e.prompt(random_tokens(12, N_VOCAB, 1), logits=False)
    e.image(rows, 12)
    e.prompt(random_tokens(18, N_VOCAB, 2), 12 + N_IMAGE)
    answer(e, out, 30 + N_IMAGE)


def turns(e: Engine, out: Hashes) -> None:
    rows = np.random.default_rng(3).standard_normal((N_IMAGE, e.n_embd), np.float32)
    e.image(rows, 0)
    e.prompt(random_tokens(18, N_VOCAB, 2), N_IMAGE)
    pos = answer(e, out, 18 + N_IMAGE)
    plan_of(e, out)
    e.prompt(random_tokens(60, N_VOCAB, 4), pos)
    end = answer(e, out, pos + 60, seed=6)
    out.add("cut", np.array([e.seq_rm(0, end - 20, -1), e.seq_rm(0, pos + 60, -1)]))
    out.add("logits", e.forced(random_tokens(4, N_VOCAB, 9), pos + 60))


def sequences(e: Engine, out: Hashes) -> None:
    for seq in (0, 1):
        e.prompt(random_tokens(N_PROMPT + 20 * seq, N_VOCAB, 1 + seq), seq=seq)
    for i in range(N_ANSWER):
        tokens = random_tokens(2, N_VOCAB, 100 + i)
        rows = [(tokens[seq], N_PROMPT + 20 * seq + i, seq, True) for seq in (0, 1)]
        assert e.decode(rows) == 0
        out.add("logits", e.logits(0), e.logits(1))


SCENARIOS: dict[str, tuple[Callable[[Engine, Hashes], None], dict[str, Any], dict[str, Any]]] = {
    "text": (text, {}, {}),
    "image": (image, {}, {}),
    "turns": (turns, {}, {}),
    "sequences": (sequences, {"n_seq_max": 2}, {}),
    "streams": (sequences, {"n_seq_max": 2, "unified": False}, {}),
    "kv_cells": (text, {"n_ubatch": 32}, {"max_cells": 80}),
    "layers": (turns, {}, {"layer_share": [0.5, 1.0, 1.5]}),
}


def names() -> list[str]:
    """Policies, and the cache off."""
    return [OFF, *(str(row["name"]) for row in _core.core.policies())]


def can(policy: str, what: str) -> bool:
    """A capability of a policy; none with the cache off."""
    return any(row["name"] == policy and row[what] for row in _core.core.policies())


def cases() -> Iterator[tuple[str, str, str, bool, str]]:
    """(key, policy, K/V type, flash attention, scenario)."""
    for policy in names():
        for kv_type in TYPES:
            for flash in (False, True):
                if not flash and (policy != OFF or kv_type != "f16"):
                    continue  # an elastic cache, and a quantized V, need V in rows
                for scenario, (_, _, elastic) in SCENARIOS.items():
                    if "layer_share" in elastic and not can(policy, "can_vary_layers"):
                        continue
                    if "max_cells" in elastic and (policy == OFF or can(policy, "keeps_all")):
                        continue
                    if policy == OFF and scenario == "turns":
                        continue  # it cuts as llama.cpp does, so it says nothing more
                    key = f"{policy}/{kv_type}/{'fa' if flash else 'no-fa'}/{scenario}"
                    yield key, policy, kv_type, flash, scenario


def run(model: Path, policy: str, kv_type: str, flash: bool, scenario: str) -> dict[str, str]:
    """The hashes of one case."""
    drive, context, elastic = SCENARIOS[scenario]
    given = None if policy == OFF else {"policy": policy, "budget": 0.3, "min_cells": 8, **elastic}
    out = Hashes()
    with Engine(
        str(model), given, flash_attn=flash, type_k=kv_type, type_v=kv_type, n_ctx=512, **context
    ) as e:
        drive(e, out)
        if policy != OFF:
            plan_of(e, out)
            for seq in range(e.n_seq_max):
                cells = e.session.cells(seq)
                out.add("cells", *(cells[key] for key in ("index", "pos", "kind")))
                for layer in range(3):
                    out.add("kv", *e.session.read_kv(seq, layer))
            out.add("state", e.save())
    return out.digests()


def measure(only: str) -> dict[str, dict[str, str]]:
    """All cases whose key contains `only`, and those of the cache off."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_llama(
            Path(folder) / "tiny.gguf", n_layer=3, n_embd=256, n_head=4, n_head_kv=2, n_ff=256
        )
        for key, *case in cases():
            if only in key or key.startswith(f"{OFF}/"):
                found[key] = run(model, *case)
    return found


def differences(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> list[str]:
    """A line for each case that is not as it was."""
    lines = []
    for key, digests in now.items():
        if key not in before:
            lines.append(f"{key}: new")
            continue
        bad = [name for name in digests if before[key].get(name) != digests[name]]
        if bad:
            lines.append(f"{key}: {', '.join(bad)}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="renew the record")
    parser.add_argument("--only", default="", help="cases whose key contains this")
    args = parser.parse_args(argv)
    now = measure(args.only)
    if args.write:
        before = json.loads(RECORD.read_text()) if args.only and RECORD.exists() else {}
        RECORD.write_text(json.dumps({**before, **now}, indent=0, sort_keys=True) + "\n")
        print(f"{len(now)} cases recorded")
        return 0
    before = json.loads(RECORD.read_text())
    lines = differences(before, now)
    if any(line.startswith(f"{OFF}/") for line in lines):
        print("this machine computes other logits with the cache off, so it cannot be compared")
        return 2
    if not args.only:
        lines += [f"{key}: gone" for key in before.keys() - now.keys()]
    print("\n".join(lines) or f"{len(now)} cases as recorded")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
