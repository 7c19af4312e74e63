"""Markdown tables of one folder of results, as docs/results.md shows them.

python benchmarks/report.py benchmarks/results/images [benchmarks/results/images-layers]
                            [--figures DIR]

With a second folder of the same items its policies replace the first one's, which measured them
with `--layers even` and are shown as that. `--figures` draws what the tables say, too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from elastic_llama.evaluation.figure import draw
from elastic_llama.evaluation.runner import read_rows
from elastic_llama.evaluation.summary import paired, summarise

PAIRED = ("images", "text")  # folders whose policies are compared item by item
FIGURES = {
    "kl": ("KL", "{:.3f} ± {:.3f}"),
    "ppl_ratio": ("perplexity / full", "{:.3f} ± {:.3f}"),
    "exact": ("answers right", "{:.3f} ± {:.3f}"),
}


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def figures(lines: list[dict[str, Any]], group: str, key: str) -> str:
    """One row per policy and KV type, one column per budget."""
    own = [x for x in lines if x["group"] == group and key in x]
    budgets = sorted({x["budget"] for x in own}, reverse=True)
    out = []
    for policy, kv_type in dict.fromkeys((x["policy"], x["kv_type"]) for x in own):
        cells = []
        for budget in budgets:
            found = [
                x
                for x in own
                if (x["policy"], x["kv_type"], x["budget"]) == (policy, kv_type, budget)
            ]
            shown = [FIGURES[key][1].format(x[key], x[key + "_se"]) for x in found]
            cells.append(shown[0] if shown else "")
        out.append([f"`{policy}`", kv_type, *cells])
    return table(["policy", "KV", *(f"{b:g}" for b in budgets)], out)


def pairs(rows: list[dict[str, Any]], lines: list[dict[str, Any]], group: str) -> str:
    """KL of the other policy less KL of `elastic`, item by item."""
    cases = [x for x in lines if x["group"] == group and x["policy"] not in ("full", "elastic")]
    policies = list(dict.fromkeys(x["policy"] for x in cases))
    budgets = sorted({x["budget"] for x in cases}, reverse=True)
    out = []
    for policy in policies:
        cells = []
        for budget in budgets:
            a, b = (f"{name}@{budget:g}/f16" for name in ("elastic", policy))
            cells.append("{:.3f} ± {:.3f}".format(*paired(rows, group, a, b)))
        out.append([f"`{policy}`", *cells])
    return table(["policy", *(f"{b:g}" for b in budgets)], out)


def replaced(rows: list[dict[str, Any]], later: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` with the cases of the same items in `later`; the full cache's stays."""
    found = {row["id"]: row["cases"] for row in later}
    out = []
    for row in rows:
        new = {case: own for case, own in found[row["id"]].items() if not case.startswith("full")}
        old = {
            case.replace("@", " --layers even@") if case in new else case: own
            for case, own in row["cases"].items()
        }
        out.append({**row, "cases": {**old, **new}})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("later", type=Path, nargs="?")
    parser.add_argument("--figures", type=Path, metavar="DIR")
    args = parser.parse_args()
    rows = read_rows(args.folder)
    if args.later:
        rows = replaced(rows, read_rows(args.later))
    lines = summarise(rows)
    if args.figures:
        args.figures.mkdir(parents=True, exist_ok=True)
        draw(lines, args.figures)
    for group in dict.fromkeys(row["group"] for row in rows):
        n = sum(row["group"] == group for row in rows)
        for key, (label, _) in FIGURES.items():
            if any(key in x and x["group"] == group for x in lines):
                print(f"{group} ({n} items), {label}\n\n{figures(lines, group, key)}")
        if args.folder.name in PAIRED:
            print(f"{group}, KL of the policy − KL of `elastic`\n\n{pairs(rows, lines, group)}")


if __name__ == "__main__":
    main()
