"""The paper's figure: a metric against the budget, one line per policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

AXES = {
    "ppl": "perplexity of the reference answer",
    "kl": "KL to the full cache (nats per token)",
    "exact": "answers right",
    "rouge": "ROUGE-L against the full cache's answer",
    "agree": "top-1 agreement with the full cache",
}
LOG = ("ppl", "kl")


def draw(lines: list[dict[str, Any]], folder: Path) -> list[Path]:
    """One figure per metric, a panel per group; PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    paths = []
    for metric, label in AXES.items():
        shown = [line for line in lines if metric in line]
        groups = list(dict.fromkeys(line["group"] for line in shown))
        if not groups:
            continue
        from matplotlib import pyplot

        figure, panels = pyplot.subplots(
            1, len(groups), figsize=(5.2 * len(groups), 4), squeeze=False, layout="constrained"
        )
        for panel, group in zip(panels[0], groups):
            _panel(panel, [line for line in shown if line["group"] == group], metric)
            panel.set_title(group)
            panel.set_xlabel("budget (share of cells kept)")
        panels[0][0].set_ylabel(label)
        panels[0][-1].legend(fontsize=8)
        for suffix in ("png", "svg"):
            path = folder / f"{metric}.{suffix}"
            figure.savefig(path, dpi=150)
            paths.append(path)
        pyplot.close(figure)
    return paths


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
            linewidth=2.5 if policy == "elastic" else 1.2,
            label=_name(policy, kv_type, many_types),
        )
    if metric in LOG:
        panel.set_yscale("log")
    panel.grid(alpha=0.3)


def _name(policy: str, kv_type: str, many_types: bool) -> str:
    return f"{policy}, {kv_type}" if many_types else policy
