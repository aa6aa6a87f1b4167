"""The why-report as a user sees it: parts, prediction, projections marked as such."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import run
from hardware import catalog
from hardware.profile import Profile
from results.store import Store
from runner import why
from runner.describe import describe_cell
from runner.request import UsageError
from tests.results.factory import (
    make_cell,
    make_experiment,
    make_samples,
    make_scores,
    make_store,
    write_shard,
)
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


def test_a_needle_that_the_oracle_kept_and_a_method_dropped_is_shown_by_item(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = make_experiment(("plain", "sparse", "small", "large"), repeats=1)
    kept = {"plain": None, "sparse": 0.5, "small": 0.4, "large": 0.9}
    samples = [
        replace(sample, evidence_kept=kept[sample.cell_id.removeprefix("cell-")])
        for sample in make_samples(experiment, dict.fromkeys(kept, 1.0))
    ]
    oracle: dict[str, Any] = {"method": "oracle-top-k", "role": "control"}
    cells = [
        make_cell(experiment, "plain"),
        make_cell(experiment, "sparse", declared_output="approximate"),
        make_cell(experiment, "small", params={"budget": 64}, **oracle),
        make_cell(experiment, "large", params={"budget": 256}, **oracle),
    ]
    # The sparse method misses items 0 to 2. The large oracle has the first two of them; the small
    # one, which keeps less than the method, has all.
    right = {"plain": 4, "sparse": 0, "small": 4, "large": 2}
    scores = []
    for name, count in right.items():
        values = [1.0 if place < count else 0.0 for place in range(len(experiment.items))]
        if name == "sparse":
            values[3:] = [1.0] * len(values[3:])
        scores += make_scores(experiment, name, values)
    write_shard(Store(tmp_path), experiment, cells, samples, scores)
    assert run.main(["rebuild", "--store", str(tmp_path)]) == 0
    titles = {
        section.title: section.rows
        for section in describe_cell(tmp_path / "tokenmark.duckdb", "cell-sparse")
    }
    rows = titles["Evidence that the oracle kept and this did not"]
    assert [row["item_id"] for row in rows] == list(experiment.items[:2])
    assert {row["oracle_budget"] for row in rows} == {"256"}
    assert {(row["evidence_kept"], row["oracle_evidence_kept"]) for row in rows} == {("0.5", "0.9")}
    assert run.main(["show", "cell", "cell-sparse", "--store", str(tmp_path)]) == 0
    assert "oracle kept and this did not" in capsys.readouterr().out
    query = "SELECT item_id, spec FROM dropped_evidence ORDER BY item_id"
    assert run.main(["sql", query, "--store", str(tmp_path), "--format", "csv"]) == 0
    assert capsys.readouterr().out.count(experiment.items[0]) == 1
    for name in ("cell-plain", "cell-large"):
        found = describe_cell(tmp_path / "tokenmark.duckdb", name)
        assert not any("oracle" in section.title for section in found)


@pytest.mark.parametrize("name", ["fast@other", "slow@toy", "@", "fast@toy@toy"])
def test_a_method_and_task_that_nobody_measured_are_named(tmp_path: Path, name: str):
    make_store(tmp_path)
    assert run.main(["rebuild", "--store", str(tmp_path)]) == 0
    with pytest.raises(UsageError, match="no cell of"):
        describe_cell(tmp_path / "tokenmark.duckdb", name)


def test_of_two_runs_the_last_is_shown_and_of_two_settings_the_ids(tmp_path: Path):
    make_store(tmp_path, created="2025-01-01T00:00:00+00:00")
    assert make_experiment().experiment_id == "experiment-1"
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


@pytest.mark.parametrize(
    ("bound_by", "step", "bound"),
    [
        ("forwards", "at the measured lat(N)", "with drafting and bookkeeping free"),
        ("bytes", "the bytes that its forwards read", "the same bytes at the baseline's pace"),
    ],
)
def test_the_parts_say_what_forwards_are_charged_for(
    tmp_path: Path, bound_by: str, step: str, bound: str
):
    explained(tmp_path, facts={**FACTS, "bound_by": bound_by})
    experiment_id = make_experiment(items=6).experiment_id
    report = why.sections(tmp_path / "tokenmark.duckdb", experiment_id, "cell-fast")
    meanings = {row["part"]: row["meaning"] for row in report[0].rows}
    assert step in meanings["/ step cost ratio"]
    assert bound in meanings["bound"]
    assert ("lat(N)" in meanings["/ step cost ratio"]) == (bound_by == "forwards")
