"""A floor under the quality: the policies stay in the order in which they were measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from elastic_llama.evaluation.items import Item, read_items, scene_items
from elastic_llama.evaluation.runner import Case, Plan, Runner

TEXTS = Path(__file__).resolve().parent.parent / "benchmarks" / "text_set" / "text.json"
POLICIES = ("elastic", "elastic-evict", "h2o", "random")  # the best first


def mean_kl(items: list[Item], model: Path, mmproj: Path) -> dict[str, float]:
    """KL of the forced answers to the full cache's, by policy, at a fifth of the cells."""
    cases = [Case(policy, 0.2) for policy in POLICIES]
    plan = Plan(cases, str(model), str(mmproj), metrics=("forced",), parallel=4)
    runner = Runner(plan)
    try:
        rows = [row for group in runner.run(items, lambda n: None) for row in group]
    finally:
        runner.close()
    return {c.policy: float(np.mean([r["cases"][c.name]["kl"] for r in rows])) for c in cases}


def check(figures: dict[str, float], ratios: tuple[float, ...]) -> None:
    """Each policy is better than the next by a factor that the measured one leaves room for."""
    found = [figures[policy] for policy in POLICIES]
    for better, worse, ratio in zip(found, found[1:], ratios):
        assert better * ratio < worse, figures


@pytest.mark.slow
@pytest.mark.model
def test_scenes(embedded_model: Path, embedded_mmproj: Path) -> None:
    """Measured: 0.0013, 0.12, 0.46, 1.10."""
    items = [item for item in scene_items("dev", 6) if item.group == "captions"]
    check(mean_kl(items, embedded_model, embedded_mmproj), (20, 2, 1.5))


@pytest.mark.slow
@pytest.mark.model
def test_texts(embedded_model: Path, embedded_mmproj: Path) -> None:
    """Measured: 0.10, 0.26, 0.55, 0.78. Of `raw` texts `elastic-evict` and `h2o` are level."""
    items = [item for item in read_items(TEXTS, "dev") if item.id.startswith("document")][:4]
    check(mean_kl(items, embedded_model, embedded_mmproj), (1.8, 1.5, 1.2))
