"""The step-cost curve between and beyond its points."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware.profile import StepCost

CURVE = StepCost((1, 4, 16), (100, 300), ((1.0, 4.0, 10.0), (2.0, 5.0, 17.0)))


def test_measured_points_come_back_unchanged() -> None:
    for context, row in zip(CURVE.contexts, CURVE.seconds, strict=True):
        for width, seconds in zip(CURVE.widths, row, strict=True):
            assert CURVE.at(width, context) == seconds


def test_the_curve_is_linear_between_points_in_both_directions() -> None:
    assert CURVE.at(2, 100) == pytest.approx(2.0)
    assert CURVE.at(1, 200) == pytest.approx(1.5)
    assert CURVE.at(10, 200) == pytest.approx((7.0 + 11.0) / 2)


def test_the_curve_goes_on_past_its_last_point_and_stays_flat_before_its_first() -> None:
    assert CURVE.at(28, 100) == pytest.approx(16.0)
    assert CURVE.at(1, 500) == pytest.approx(3.0)
    assert CURVE.at(1, 0) == 1.0


@given(st.integers(1, 16), st.integers(100, 300))
def test_inside_the_grid_no_value_leaves_the_measured_range(width: int, context: int) -> None:
    assert 1.0 <= CURVE.at(width, context) <= 17.0
