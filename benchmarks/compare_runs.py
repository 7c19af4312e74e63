"""What the same items say in runs that should not differ: threads, ubatches, ways of attention.

python benchmarks/compare_runs.py FOLDER

FOLDER holds a folder of results per run, `base` among them (benchmarks/tables.sh determinism).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from elastic_llama.evaluation.runner import read_rows
from elastic_llama.evaluation.summary import mean_se
from report import table


def figures(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """By group, case and item."""
    rows = read_rows(folder)
    return {
        (row["group"], case, row["id"]): own for row in rows for case, own in row["cases"].items()
    }


def compare(base: dict, other: dict) -> list[list[str]]:
    """A line per group and case."""
    if base.keys() != other.keys():
        raise SystemExit("the runs are of different items or cases; let each come to its end")
    lines = []
    for group, case in dict.fromkeys(key[:2] for key in base):
        pairs = [(base[key], other[key]) for key in base if key[:2] == (group, case)]
        a, b = (np.array([pair[i]["kl"] for pair in pairs]) for i in (0, 1))
        exact = [(x["exact"], y["exact"]) for x, y in pairs if "exact" in x]
        mean, se = mean_se(list(b - a))
        lines.append(
            [
                group,
                f"`{case.split('/')[0]}`",
                f"{a.mean():.4f}",
                f"{b.mean():.4f}",
                f"{mean:+.4f} ± {se:.4f}",
                f"{sum(x == y for x, y in pairs)} of {len(pairs)}",
                f"{sum(x != y for x, y in exact)} of {len(exact)}" if exact else "",
            ]
        )
    return lines


def main(folder: Path) -> None:
    base = figures(folder / "base")
    head = ["run", "items", "policy", "KL base", "KL", "difference"]
    head += ["the same in every bit", "answers that change"]
    lines = []
    for run in sorted(path for path in folder.iterdir() if path.name != "base"):
        lines += [[run.name, *line] for line in compare(base, figures(run))]
    print(table(head, lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
