"""The why-report as a user sees it: parts, prediction, projections marked as such."""

from __future__ import annotations

from pathlib import Path

import pytest

import run
from hardware import catalog
from hardware.profile import Profile
from runner import why
from runner.describe import describe_cell
from runner.request import UsageError
from tests.results.factory import make_experiment, make_store
from tests.results.test_why import CURVE, FACTS, explained


def test_the_measured_curve_is_read_between_whole_widths(tmp_path: Path):
    latency = why.measured_latency(explained(tmp_path))
    assert latency is not None
    assert latency(8, 32) == CURVE.at(8, 32)
    assert latency(8.25, 32) == pytest.approx(0.75 * CURVE.at(8, 32) + 0.25 * CURVE.at(9, 32))


def test_a_projection_is_the_roofline_of_the_other_machine(tmp_path: Path):
    explanation = explained(tmp_path, width=8, emitted=2)
    # Reading the weights takes all the time, whatever the width: only forwards count.
    wide = Profile(
        name="wide", kind="cuda", label="Wide", bandwidth=1e9, peak_flops={"float32": 1e18}
    )
    # Operations take all the time: eight times the width is eight times the cost.
    narrow = Profile(
        name="narrow", kind="cuda", label="Narrow", bandwidth=1e18, peak_flops={"float32": 1e6}
    )
    free, dear = why.project(explanation, [wide, narrow])
    assert free.plain_seconds == pytest.approx(FACTS["weight_bytes"] / 1e9, rel=0.01)
    assert free.method_seconds == pytest.approx(free.plain_seconds, rel=0.01)
    assert 1.8 < free.speedup < 2
    assert dear.method_seconds == pytest.approx(8 * dear.plain_seconds)
    assert dear.speedup < 0.5
    assert {each.basis for each in (free, dear)} == {"data sheet"}


def test_profiles_without_limits_are_left_out_and_all_others_are_there(tmp_path: Path):
    entries = [entry.profile for entry in catalog.entries()]
    projected = why.project(explained(tmp_path), entries)
    expected = [each.name for each in entries if each.bandwidth and "float32" in each.peak_flops]
    assert [each.hardware.name for each in projected] == expected
    assert len(expected) > 10


def test_a_cell_is_shown_with_its_parts_and_projections_named_as_such(tmp_path: Path, capsys):
    explained(tmp_path)
    assert run.main(["show", "cell", "fast@toy", "--store", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "tokens per forward" in shown
    assert "from counts and lat(N) alone" in shown
    projection = shown.index("Projection, measured by nobody")
    assert shown.index("h100-sxm") > projection
    assert run.main(["show", "cell", "cell-fast", "--store", str(tmp_path)]) == 0
    assert capsys.readouterr().out == shown


def test_a_cell_without_explanation_is_shown_without(tmp_path: Path):
    explained(tmp_path)
    titles = [
        section.title for section in describe_cell(tmp_path / "tokenmark.duckdb", "cell-plain")
    ]
    assert "Why" not in titles


@pytest.mark.parametrize("name", ["fast@other", "slow@toy", "@", "fast@toy@toy"])
def test_a_method_and_task_that_nobody_measured_are_named(tmp_path: Path, name: str):
    make_store(tmp_path)
    assert run.main(["rebuild", "--store", str(tmp_path)]) == 0
    with pytest.raises(UsageError, match="no cell of"):
        describe_cell(tmp_path / "tokenmark.duckdb", name)


def test_of_two_runs_the_last_is_shown_and_of_two_settings_the_ids(tmp_path: Path):
    make_store(tmp_path, created="2025-01-01T00:00:00+00:00")
    assert make_experiment().experiment_id == "experiment-1"
    from results.store import Store
    from tests.results.factory import make_cell, make_samples, write_shard

    later = make_experiment(
        ("plain", "fast", "fast2"), experiment_id="later", created="2025-02-01T00:00:00+00:00"
    )
    cells = [
        make_cell(later, name, cell_id=f"cell-{name}", method=name.rstrip("2"))
        for name in ("plain", "fast", "fast2")
    ]
    speeds = {"plain": 1.0, "fast": 2.0, "fast2": 2.0}
    write_shard(Store(tmp_path), later, cells, make_samples(later, speeds))
    assert run.main(["rebuild", "--store", str(tmp_path)]) == 0
    index = tmp_path / "tokenmark.duckdb"
    with pytest.raises(UsageError, match=r"2 cells of 'fast' on 'toy': cell-fast.*cell-fast2"):
        describe_cell(index, "fast@toy")
    facts = {row["key"]: row["value"] for row in describe_cell(index, "plain@toy")[0].rows}
    assert facts["experiment id"] == "later"
