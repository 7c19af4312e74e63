"""Rows of results as a table like llama-bench's, and as ratios."""

from __future__ import annotations

from typing import Any

from ..stats import MIB
from .measure import median

COLUMNS = (
    "scenario",
    "KV",
    "fa",
    "cache",
    "budget",
    "cells",
    "prompt s",
    "t/s",
    "x stock, fa off",
    "x stock, fa on",
    "x ideal",
    "score+plan+merge",
    "probe",
    "KV MiB",
    "RSS freed MiB",
)


def spread(values: list[float], digits: int) -> str:
    """Median and range."""
    if not values:
        return ""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def ratios(rows: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """For each row, by its place: decode speed against stock and ideal, and the cost in prefill.

    An elastic row is compared with stock without flash attention ("stock off") and with it ("stock
    on"), and with ideal. Parts of the generation are compared with the same part of the other, and
    the median is taken. `cost` is what elastic took longer than stock for the prompt, plan and
    merge included, as a share of stock's, of the one with flash attention if there are two;
    `probe` what the probes took, likewise.
    """
    out: dict[int, dict[str, float]] = {}
    for i, row in enumerate(rows):
        own = out[i] = {}
        if row["kind"] != "elastic":
            continue
        others = {
            "stock off": _partner(rows, row, "stock", False),
            "stock on": _partner(rows, row, "stock", True),
            "ideal": _partner(rows, row, "ideal", row["setting"]["flash_attn"]),
        }
        for name, other in others.items():
            if other is not None:
                pairs = zip(row["decode_tps"], other["decode_tps"])
                own[name] = median([a / b for a, b in pairs])
        stock = others["stock on"] or others["stock off"]
        if stock is not None:
            compress = row["plan_s"] + row["merge_s"]
            pairs = zip(row["prefill_s"], stock["prefill_s"])
            own["cost"] = median([(a + compress) / b - 1 for a, b in pairs])
            own["probe"] = row["probe_s"] / median(stock["prefill_s"])
    return out


def _partner(
    rows: list[dict[str, Any]], row: dict[str, Any], kind: str, flash_attn: bool
) -> dict[str, Any] | None:
    setting = {**row["setting"], "flash_attn": flash_attn}
    for other in rows:
        same = other["scenario"] == row["scenario"] and other["setting"] == setting
        if same and other["kind"] == kind and (kind == "stock" or other["budget"] == row["budget"]):
            return other
    return None


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Cells of the table, one list per row, in the order of `COLUMNS`."""
    out = []
    for row, own in zip(rows, ratios(rows).values()):
        rss = row["rss"]
        freed = (rss["prompt"] - rss["compressed"]) / MIB if "compressed" in rss else None
        out.append(
            [
                row["scenario"]["name"],
                row["setting"]["kv_type"],
                "on" if row["setting"]["flash_attn"] else "off",
                row["kind"],
                "" if row["budget"] is None else f"{row['budget']:g}",
                f"{row['cells_prompt']} -> {row['cells_kept']}"
                if row["cells_prompt"] != row["cells_kept"]
                else str(row["cells_kept"]),
                spread(row["prefill_s"], 2),
                spread(row["decode_tps"], 2),
                f"{own['stock off']:.3f}" if "stock off" in own else "",
                f"{own['stock on']:.3f}" if "stock on" in own else "",
                f"{own['ideal']:.3f}" if "ideal" in own else "",
                f"{100 * own['cost']:+.1f} %" if "cost" in own else "",
                f"{100 * own['probe']:+.1f} %" if own.get("probe") else "",
                _kv_mib(row),
                "" if freed is None else f"{freed:.1f} of {row['bytes_freed'] / MIB:.1f}",
            ]
        )
    return out


def _kv_mib(row: dict[str, Any]) -> str:
    """Of the whole memory, and what of it is not compressed."""
    other = row.get("other_bytes", 0)  # rows of earlier versions have none
    fixed = f" ({other / MIB:.1f} fixed)" if other else ""
    return f"{row['kv_bytes'] / MIB:.1f}{fixed}"


def markdown(rows: list[dict[str, Any]]) -> str:
    encoded = [row for row in rows if row["kind"] == "encode"]
    rows = [row for row in rows if row["kind"] != "encode"]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells) + " |" for cells in table(rows)]
    if any(row.get("other_bytes") for row in rows):
        lines.append("\nfixed: windows and recurrent states, which are not compressed")
    for row in encoded:
        seconds = spread(row["encode_s"], 3)
        lines.append(f"\nencoding an image into {row['cells']} cells: {seconds} s")
    return "\n".join(lines)
