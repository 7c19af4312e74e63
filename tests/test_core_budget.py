"""A budget becomes cells: ceil(f * n), or a whole number of cells."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from elastic_llama import _core
from hypothesis import given, settings
from hypothesis import strategies as st

core = _core.core


@pytest.mark.parametrize(
    ("value", "n_tokens", "cells"),
    [
        (0.1, 10, 1),
        (0.1, 11, 2),
        (0.3, 10, 3),
        (0.7, 10, 7),
        (0.2, 640, 128),
        (0.2, 2944, 589),
        (0.5, 1, 1),
        (0.001, 1, 1),
        (1.0, 640, 640),
        (1.0, 1, 1),
        (0.5, 0, 0),
        (128, 640, 128),
        (2, 640, 2),
        (640, 128, 128),
        (1000, 1, 1),
    ],
)
def test_known_values(value, n_tokens, cells):
    assert core.budget_cells(value, n_tokens) == cells


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(1, 100_000))
def test_fraction_rounds_up_exactly(p, q, n_tokens):
    p = min(p, q)
    assert core.budget_cells(p / q, n_tokens) == math.ceil(Fraction(p, q) * n_tokens)


@settings(deadline=None, max_examples=300)
@given(
    st.floats(0.0, 1.0, exclude_min=True, allow_subnormal=True),
    st.integers(1, 200_000),
)
def test_any_fraction(f, n_tokens):
    cells = core.budget_cells(f, n_tokens)
    assert 1 <= cells <= n_tokens
    exact = Fraction(f) * n_tokens
    # a product within 1e-9 of a whole number counts as that number
    slack = Fraction(1, 10**9) * max(1, exact)
    assert exact - slack <= cells < exact + 1


@settings(deadline=None, max_examples=100)
@given(st.floats(1e-6, 1.0), st.floats(1e-6, 1.0), st.integers(1, 10_000))
def test_more_budget_never_means_fewer_cells(a, b, n_tokens):
    low, high = sorted((a, b))
    assert core.budget_cells(low, n_tokens) <= core.budget_cells(high, n_tokens)


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_cells(n_cells, n_tokens):
    assert core.budget_cells(n_cells, n_tokens) == min(n_cells, n_tokens)


@pytest.mark.parametrize(
    "value",
    [0, 0.0, -0.0, -1, -0.5, math.nan, math.inf, -math.inf, 1.5, 1.0000001, 640.25, 2**31, 1e300],
)
def test_refused(value):
    with pytest.raises(ValueError, match=r"\[budget\] got .* expected"):
        core.budget_cells(value, 100)
