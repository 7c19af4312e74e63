"""Results put together: one line per group and case."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np

FIGURES = ("kl", "agree", "exact", "rouge", "cells", "bytes", "other_bytes")


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means and standard errors over items.

    Returns
    -------
    list of dict
        group, policy, budget, kv_type, n, and for every figure its mean and `_se`. `ppl` is the
        perplexity of all reference tokens of the group, `ppl_ratio` that over the full cache's
        (f16), both with standard errors over items.
    """
    lines = []
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        for case in own[0]["cases"]:
            figures = [row["cases"][case] for row in own]
            policy, rest = case.split("@")
            budget, kv_type = rest.split("/")
            line: dict[str, Any] = {
                "group": group,
                "policy": policy,
                "budget": float(budget),
                "kv_type": kv_type,
                "n": len(own),
            }
            for key in FIGURES:
                values = [_first(f[key]) for f in figures if key in f]
                if values:
                    line[key], line[key + "_se"] = mean_se(values)
            if "nll" in figures[0]:
                line.update(_perplexity(own, case))
            lines.append(line)
    return lines


def _first(value: Any) -> float:
    return float(value[0] if isinstance(value, (list, tuple)) else value)


def mean_se(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    x = np.asarray(values, dtype=np.float64)
    se = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else 0.0
    return float(x.mean()), se


def _perplexity(rows: list[dict[str, Any]], case: str) -> dict[str, float]:
    weight = np.array([row["cases"][case]["n"] for row in rows], dtype=np.float64)
    nll = np.array([row["cases"][case]["nll"] for row in rows])
    out = {"ppl": math.exp(float((weight * nll).sum() / weight.sum()))}
    full = [row["cases"].get("full@1/f16") for row in rows]
    if all(full):
        excess = nll - np.array([f["nll"] for f in full])
        mean = float((weight * excess).sum() / weight.sum())
        out["ppl_ratio"] = math.exp(mean)
        spread = weight * (excess - mean)
        out["ppl_ratio_se"] = out["ppl_ratio"] * float(np.sqrt((spread**2).sum()) / weight.sum())
    return out


def paired(rows: list[dict[str, Any]], group: str, a: str, b: str) -> tuple[float, float]:
    """Mean of KL(b) - KL(a) over the group's items and its standard error; above 0: a is better."""
    own = [row["cases"] for row in rows if row["group"] == group]
    return mean_se([c[b]["kl"] - c[a]["kl"] for c in own if "kl" in c[a] and "kl" in c[b]])


def write_csv(lines: list[dict[str, Any]], path: Path) -> None:
    fields = list(dict.fromkeys(key for line in lines for key in line))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(lines)
