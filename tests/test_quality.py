"""A floor under the quality: the policies stay in the order in which they were measured."""

from __future__ import annotations

import json
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
    plan = Plan(cases, str(model), str(mmproj), metrics=("forced",), parallel=4, flash_attn=True)
    runner = Runner(plan)
    try:
        rows = [row for group in runner.run(items, lambda n: None) for row in group]
    finally:
        runner.close()
    print(json.dumps(rows))
    return {c.policy: float(np.mean([r["cases"][c.name]["kl"] for r in rows])) for c in cases}


@pytest.mark.slow
@pytest.mark.model
def test_policies_keep_their_order(embedded_model: Path, embedded_mmproj: Path) -> None:
    import time

    texts = [i for i in read_items(TEXTS, "dev") if i.id.startswith("raw")][:4]
    scenes = [i for i in scene_items("dev", 6) if i.group == "captions"]
    for items in (scenes, texts):
        t = time.time()
        print(mean_kl(items, embedded_model, embedded_mmproj))
        print(time.time() - t)
