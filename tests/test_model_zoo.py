"""Every architecture of llama.cpp, as docs/models.md says of it: works, or refused with a reason.

What is tried of each is in `tests/support/zoo_trial.py`, and each in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.model_table import PAGE, expected, found
from tests.support import zoo
from tests.support.zoo_trial import Result

ROOT = Path(__file__).resolve().parent.parent
SAID = expected(PAGE.read_text(encoding="utf-8"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    """Of all architectures: about a minute."""
    command = [sys.executable, "-m", "tests.support.zoo_trial"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    tried = [Result(**json.loads(line)) for line in done.stdout.splitlines()]
    return {result.name: result for result in tried}


def test_nothing_is_left_out(results: dict[str, Result]) -> None:
    names = {path.stem.rpartition("-")[0] for path in zoo.models()} | set(zoo.LEFT_OUT)
    assert names - zoo.VARIANTS == zoo.architectures()
    assert set(SAID) == set(results) | set(zoo.LEFT_OUT)


@pytest.mark.parametrize("name", sorted(set(SAID) - set(zoo.LEFT_OUT)))
def test_architecture(results: dict[str, Result], name: str) -> None:
    assert found(results[name]) == SAID[name]
