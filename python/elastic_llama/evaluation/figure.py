"""The paper's figure: a metric against the budget, one line per policy; and against bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import ElasticConfig
from ..stats import MIB

AXES = {
    "ppl": "perplexity of the reference answer",
    "kl": "KL to the full cache (nats per token)",
    "exact": "answers right",
    "rouge": "ROUGE-L against the full cache's answer",
    "agree": "top-1 agreement with the full cache",
}
LOG = ("ppl", "kl")


def draw(lines: list[dict[str, Any]], folder: Path) -> list[Path]:
    """One figure per metric, a panel per group; PNG and SVG.

    Where several KV types were run, `bytes` too: KL against the memory of the prompt's cells.
    """
    import matplotlib

    matplotlib.use("Agg")
    paths = []
    for metric, label in AXES.items():
        shown = [line for line in lines if metric in line]
        if shown:
            x = "budget (share of cells kept)"
            paths += _figure(shown, metric, x, label, folder / metric, _panel)
    if len({line["kv_type"] for line in lines if "kl" in line}) > 1:
        shown = [line for line in lines if "kl" in line and "bytes" in line]
        x = "KV MiB of the prompt"
        paths += _figure(shown, "kl", x, AXES["kl"], folder / "bytes", _bytes_panel)
    return paths


def _figure(
    lines: list[dict[str, Any]],
    metric: str,
    x_label: str,
    y_label: str,
    stem: Path,
    draw_panel: Callable[[Any, list[dict[str, Any]], str], None],
) -> list[Path]:
    from matplotlib import pyplot

    groups = list(dict.fromkeys(line["group"] for line in lines))
    figure, panels = pyplot.subplots(
        1, len(groups), figsize=(5.2 * len(groups), 4), squeeze=False, layout="constrained"
    )
    for panel, group in zip(panels[0], groups):
        draw_panel(panel, [line for line in lines if line["group"] == group], metric)
        panel.set_title(group)
        panel.set_xlabel(x_label)
    panels[0][0].set_ylabel(y_label)
    if panels[0][-1].get_legend_handles_labels()[0]:
        panels[0][-1].legend(fontsize=8)
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return paths


def _bytes_panel(panel: Any, lines: list[dict[str, Any]], metric: str) -> None:
    """A line per policy and KV type; all cells kept is one line over the types."""
    series: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        full = line["policy"] == "full"
        if not (full and line["kv_type"] == "f16"):  # what all others are compared with: KL 0
            kind = "fewer bits" if full else line["kv_type"]
            series.setdefault((line["policy"], kind), []).append(line)
    for (policy, kind), own in series.items():
        own.sort(key=lambda x: x["bytes"])
        panel.errorbar(
            [x["bytes"] / MIB for x in own],
            [x[metric] for x in own],
            yerr=[x.get(metric + "_se", 0.0) for x in own],
            marker="s" if policy == "full" else "o",
            markersize=4,
            capsize=2,
            color="0.3" if policy == "full" else None,
            label=f"{policy}, {kind}",
        )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.grid(alpha=0.3)


def _panel(panel: Any, lines: list[dict[str, Any]], metric: str) -> None:
    series = dict.fromkeys((line["policy"], line["kv_type"]) for line in lines)
    many_types = len({kv_type for _, kv_type in series}) > 1
    for policy, kv_type in series:
        own = sorted(
            (x for x in lines if (x["policy"], x["kv_type"]) == (policy, kv_type)),
            key=lambda x: x["budget"],
        )
        if policy == "full":
            if metric != "kl":
                panel.axhline(
                    own[-1][metric],
                    color="0.6",
                    linestyle=":",
                    label=_name("full", kv_type, many_types),
                )
            continue
        errors = [x.get(metric + "_se", 0.0) for x in own]
        panel.errorbar(
            [x["budget"] for x in own],
            [x[metric] for x in own],
            yerr=errors,
            marker="o",
            markersize=3,
            capsize=2,
            linewidth=2.5 if policy == ElasticConfig.policy else 1.2,
            label=_name(policy, kv_type, many_types),
        )
    if metric in LOG:
        panel.set_yscale("log")
    panel.grid(alpha=0.3)


def _name(policy: str, kv_type: str, many_types: bool) -> str:
    return f"{policy}, {kv_type}" if many_types else policy
