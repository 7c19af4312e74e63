"""Off is off, and a budget of 1.0 is off: the same logits as a stock build of the same source."""

from __future__ import annotations

from pathlib import Path

import pytest
from elastic_llama import lib_dir

from scripts.compare_stock import RUNS, compare
from tests.support.stock import stock_lib_dir

pytestmark = pytest.mark.slow  # and needs another build


def check(model: Path, mmproj: Path | None = None) -> None:
    tower = None if mmproj is None else str(mmproj)
    rows = compare(str(model), stock_lib_dir(), lib_dir(), tower)
    n_elastic = sum(fa for fa, _, _ in RUNS)  # an elastic cache has flash attention
    assert len(rows) == len(RUNS) + n_elastic + 2 * (mmproj is not None)
    assert [row for row in rows if not row[2]] == []


def test_off_is_bit_identical(tiny_gqa: Path) -> None:
    check(tiny_gqa)


@pytest.mark.model
def test_off_is_bit_identical_on_an_image(embedded_model: Path, embedded_mmproj: Path) -> None:
    """The embedded tower has no class token: the LLaVA fixes leave it as it is."""
    check(embedded_model, embedded_mmproj)
