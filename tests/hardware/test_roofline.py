"""The roofline, by arithmetic on paper."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware import catalog
from hardware.profile import Ceilings, Profile
from hardware.roofline import (
    Limits,
    Work,
    free_width,
    limits,
    project,
    seconds_bound,
    step_seconds,
)

# SmolLM2-135M in float32 on a CPU: 538 MB, 10.8 GB/s, 100 GFLOP/s.
SMALL = Work(weight_bytes=538e6, parameters=134.5e6)
CPU = Limits(10.8e9, 100e9)
SEVEN_BILLION = Work(weight_bytes=14e9, parameters=7e9)


def test_the_longer_of_traffic_and_arithmetic_bounds() -> None:
    assert seconds_bound(20.0, 10.0, Limits(10.0, 10.0)) == 2.0
    assert seconds_bound(10.0, 30.0, Limits(10.0, 10.0)) == 3.0


@pytest.mark.parametrize(("name", "expected"), [("h100-sxm", 295), ("a100-80gb", 153)])
def test_free_widths_are_those_of_the_data_sheets(name: str, expected: int) -> None:
    limit = limits(catalog.profile(name), "float16")
    assert round(free_width(SEVEN_BILLION, limit)) == expected


def test_a_cpu_reads_weights_for_about_eighteen_tokens() -> None:
    assert free_width(SMALL, CPU) == pytest.approx(18.5, abs=0.1)
    assert step_seconds(1, 0, SMALL, CPU) == pytest.approx(0.0498, abs=1e-4)
    # 80 tokens: 2 * 134.5e6 * 80 / 100e9.
    assert step_seconds(80, 0, SMALL, CPU) == pytest.approx(0.2152)


@given(width=st.integers(1, 500))
def test_time_is_flat_up_to_the_free_width_and_proportional_beyond(width: int) -> None:
    free = free_width(SMALL, CPU)
    plain = step_seconds(1, 0, SMALL, CPU)
    assert step_seconds(width, 0, SMALL, CPU) == pytest.approx(plain * max(1.0, width / free))


def test_cache_and_attention_are_counted() -> None:
    work = Work(weight_bytes=100, parameters=10, kv_token_bytes=3, attention_flops=7)
    assert work.bytes_read(2, 5) == 100 + 3 * 7
    # Pairs: 2 tokens x 5 cached, then 1 + 2 among themselves.
    assert work.flops(2, 5) == 2 * 10 * 2 + 7 * 13


@pytest.mark.parametrize("field", ["weight_bytes", "parameters", "kv_token_bytes"])
def test_impossible_work_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        replace(SMALL, **{field: -1})


def test_measured_ceilings_come_before_the_data_sheet_and_never_mix() -> None:
    profile = replace(
        catalog.profile("l4"),
        ceilings=Ceilings(read_bandwidth=2e11, copy_bandwidth=2e11, matmul_flops={"float16": 9e13}),
    )
    assert limits(profile, "float16") == (2e11, 9e13, "measured")
    assert limits(profile, "int8") == (300e9, 242.5e12, "data sheet")


def test_a_missing_limit_is_named_with_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"'l4' has no peak for 'float64'; known: .*float16"):
        limits(catalog.profile("l4"), "float64")
    with pytest.raises(ValueError, match="none, measure its ceilings first"):
        limits(catalog.profile("cpu"), "float32")
    peak_only = Profile(name="odd", kind="cpu", label="odd", peak_flops={"float32": 1e9})
    with pytest.raises(ValueError, match="no memory bandwidth"):
        limits(peak_only, "float32")


def test_a_projection_is_the_roofline_of_the_other_machine() -> None:
    projection = project(
        catalog.profile("a100-80gb"), "float16", SEVEN_BILLION, (1, 64, 306), (0, 1000)
    )
    assert projection.hardware == "a100-80gb"
    assert projection.basis == "data sheet"
    plain = 14e9 / 2039e9
    assert projection.step_cost.at(1, 0) == pytest.approx(plain)
    assert projection.step_cost.at(64, 1000) == pytest.approx(plain)
    assert projection.step_cost.at(306, 0) == pytest.approx(2 * 7e9 * 306 / 312e12)
