"""Cases of `rpc_run`, which compares a device with the host, and the process that runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

POLICIES = (
    "elastic",
    "elastic-evict",
    "elastic-paper",
    "h2o",
    "snapkv",
    "local",
    "random",
    "knorm",
)


def case(policy: str | None = "elastic", **kw: Any) -> dict[str, Any]:
    """One sequence with an image, f16, all layers on the device; `policy` None: stock."""
    elastic = None if policy is None else {"policy": policy, "budget": 0.2, "min_cells": 8}
    same = {"type": "f16", "n_seq": 1, "unified": True, "image_in": 0, "gpu_layers": 99}
    return {"elastic": elastic, **same, **kw}


def run(model: Path, endpoints: list[str], cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `rpc_run` says of each."""
    command = [sys.executable, "-m", "tests.support.rpc_run", str(model), ",".join(endpoints)]
    done = subprocess.run(
        [*command, json.dumps(cases)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
