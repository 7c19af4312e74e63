"""Markdown tables of what `benchmarks/turns.py` wrote.

python benchmarks/turns_report.py FILE... [--kinds] [--common]

± is the standard error over conversations. Sums of the text turns count in their own column only.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from report import table

Row = dict[str, Any]
Counts = list[tuple[float, float]]  # of each conversation: what is right, and how much there is
Key = tuple[str, str, float]  # tag, policy, budget


def read(paths: Iterable[Path]) -> dict[Key, dict[str, Row]]:
    """Lines by setting and conversation; half a line counts as none."""
    out: dict[Key, dict[str, Row]] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                row = json.loads(line)
                key = (row["tag"], row["policy"], row["budget"])
                out.setdefault(key, {})[row["id"]] = row
    order = list(dict.fromkeys((tag, policy) for tag, policy, _ in out))
    return dict(sorted(out.items(), key=lambda x: (order.index(x[0][:2]), -x[0][2])))


def common(settings: dict[Key, dict[str, Row]]) -> dict[Key, dict[str, Row]]:
    """Only the conversations that every setting has."""
    ids = set.intersection(*(set(rows) for rows in settings.values()))
    return {
        key: {name: row for name, row in rows.items() if name in ids}
        for key, rows in settings.items()
    }


def ratio(counts: Counts) -> tuple[float, float]:
    """Sum of what is right over sum of what there is, and its standard error over conversations."""
    n, total = len(counts), sum(whole for _, whole in counts)
    share = sum(part for part, _ in counts) / total
    spread = sum((part - share * whole) ** 2 for part, whole in counts)
    return share, math.sqrt(spread * n / (n - 1)) / total if n > 1 else 0.0


def percent(counts: Counts, show_n: bool = True, sign: str = "") -> str:
    """ "87.5 ± 3.1 (40)", the last being how much there is; "" where there is nothing."""
    counts = [x for x in counts if x[1]]
    if not counts:
        return ""
    share, se = ratio(counts)
    n = f" ({sum(whole for _, whole in counts):g})" if show_n else ""
    return f"{100 * share:{sign}.1f} ± {100 * se:.1f}{n}"


def rights(rows: Iterable[Row], wanted: Callable[[int, Row], bool]) -> Counts:
    """Right answers among the turns for which `wanted(number, turn)`, turn 1 being number 1."""
    out: Counts = []
    for row in rows:
        found = [t["right"] for i, t in enumerate(row["turns"], 1) if wanted(i, t)]
        out.append((sum(found), len(found)))
    return out


def objects(rows: Iterable[Row], later: bool) -> Counts:
    """Objects right in the captions of turn 1, or in those of later turns."""
    out: Counts = []
    for row in rows:
        turns = row["turns"][1:] if later else row["turns"][:1]
        found = [t["objects"] for t in turns if "objects" in t]
        out.append((sum(right for right, _ in found), sum(n for _, n in found)))
    return out


def first(number: int, turn: Row) -> bool:
    return number == 1


def later(number: int, turn: Row) -> bool:
    return number > 1 and turn["kind"] != "text"


def difference(own: dict[str, Row], full: dict[str, Row], wanted: Callable[..., bool]) -> Counts:
    """Right answers less the full cache's, of the conversations that both have."""
    ids = [name for name in own if name in full]
    a, b = (rights([rows[name] for name in ids], wanted) for rows in (own, full))
    return [(right - other, n) for (right, n), (other, _) in zip(a, b)]


def cells(rows: Sequence[Row]) -> str:
    """Mean of the cells held after a turn, all turns of a conversation counting alike."""
    held = [turn["cells"] for row in rows for turn in row["turns"]]
    return f"{sum(held) / len(held):.0f}"


def label(key: Key) -> list[str]:
    tag, policy, budget = key
    return [f"`{policy}` {tag}".strip(), f"{budget:g}"]


def summary(settings: dict[Key, dict[str, Row]]) -> str:
    """A line per setting, all scenarios together."""
    lines = []
    full = {key[0]: rows for key, rows in settings.items() if key[1] == "full"}
    for key, rows in settings.items():
        own = list(rows.values())
        other = full.get(key[0]) or full.get("") or {}
        gain = [
            "" if key[1] == "full" else percent(difference(rows, other, wanted), False, "+")
            for wanted in (first, later)
        ]
        lines.append([*label(key), str(len(own)), percent(rights(own, first)), gain[0]])
        lines[-1] += [percent(rights(own, later)), gain[1]]
        lines[-1] += [percent(objects(own, flag)) for flag in (False, True)]
        lines[-1].append(cells(own))
    head = ["policy", "kept", "conversations", "turn 1", "− full", "turns 2–5", "− full"]
    head += ["caption's objects, turn 1", "later", "cells"]
    return table(head, lines)


def by(
    settings: dict[Key, dict[str, Row]], columns: dict[str, Callable[[Row, int, Row], bool]]
) -> str:
    """A line per setting; a column is the turns for which `wanted(row, number, turn)`."""
    lines = []
    for key, rows in settings.items():
        shown = []
        for wanted in columns.values():
            found: Counts = []
            for row in rows.values():
                found += rights([row], lambda i, t, row=row, wanted=wanted: wanted(row, i, t))
            shown.append(percent(found))
        lines.append([*label(key), *shown])
    return table(["policy", "kept", *columns], lines)


def by_scenario(settings: dict[Key, dict[str, Row]]) -> str:
    names = dict.fromkeys(row["scenario"] for rows in settings.values() for row in rows.values())
    columns = {
        name: lambda row, i, t, name=name: row["scenario"] == name and later(i, t) for name in names
    }
    return by(settings, {**columns, "sums": lambda row, i, t: t["kind"] == "text"})


def by_turn(settings: dict[Key, dict[str, Row]]) -> str:
    columns = {
        f"turn {n}": lambda row, i, t, n=n: i == n and t["kind"] != "text" for n in range(1, 6)
    }
    return by(settings, columns)


def by_kind(settings: dict[Key, dict[str, Row]]) -> str:
    turns = [t for rows in settings.values() for row in rows.values() for t in row["turns"]]
    kinds = dict.fromkeys(t["kind"] for t in turns if t["kind"] != "text")
    return by(
        settings,
        {kind: lambda row, i, t, kind=kind: later(i, t) and t["kind"] == kind for kind in kinds},
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--kinds", action="store_true", help="turns 2–5 by kind of question, too")
    parser.add_argument("--common", action="store_true", help="only what every setting has")
    args = parser.parse_args(argv)
    settings = read(args.files)
    if args.common:
        settings = common(settings)
    print(f"Answers right, percent (n)\n\n{summary(settings)}")
    print(f"Turns 2–5 by scenario\n\n{by_scenario(settings)}")
    print(f"By turn\n\n{by_turn(settings)}")
    if args.kinds:
        print(f"Turns 2–5 by kind of question\n\n{by_kind(settings)}")


if __name__ == "__main__":
    main()
