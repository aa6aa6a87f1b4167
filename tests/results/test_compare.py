"""What `compare` finds between two runs whose difference is known."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from results.compare import Comparison, Side, Threshold, compare, render, resolve, rows
from results.junit import github_annotations, junit
from results.records import CellRecord, ExperimentRecord, MetricRecord, SampleRecord
from results.statistics import ItemTotals, speed_up, speed_up_change
from results.store import Store, StoreError
from tests.results.factory import (
    make_cell,
    make_corpus,
    make_experiment,
    make_run,
    make_samples,
    make_scores,
    write_shard,
)

ITEMS = 24
MACHINE = {"machine_id": "machine-1"}


def write_run(
    store: Store,
    name: str,
    speeds: dict[str, float] | None = None,
    *,
    noise: float = 0.01,
    seed: int = 0,
    slowness: float = 1.0,
    day: int = 1,
    wrong: int = 0,
    cells: dict[str, dict[str, Any]] | None = None,
    skip: tuple[str, ...] = (),
    samples: Any = None,
    ids: str = "",
    commit: str = "",
    **changes: Any,
) -> None:
    """Write a run with one experiment.

    Args:
        slowness: Factor on all seconds.
        wrong: How many of the items that are solved otherwise `fast` fails.
        cells: Changes of cell records by method.
        skip: Methods without a record: they have not ended.
        samples: Function that changes the samples.
        ids: Suffix of the cells' ids, so that other runs hold other cells.
    """
    speeds = speeds or {"plain": 1.0, "fast": 2.0}
    changes = {"environment": MACHINE, "task_hash": "h", **changes}
    experiment = make_experiment(
        tuple(speeds),
        ITEMS,
        experiment_id=f"experiment-{name}",
        run_id=name,
        created=f"2025-01-{day:02}T00:00:00+00:00",
        **changes,
    )
    made = make_samples(experiment, speeds, noise, seed=3, same_output=True)
    draw = np.random.default_rng([seed, day])
    made = [
        dataclasses.replace(
            sample, seconds=sample.seconds * slowness * float(draw.lognormal(0, noise))
        )
        for sample in made
    ]
    made = samples(made) if samples else made
    solved = [float(place % 4 != 0) for place in range(ITEMS)]
    worse = [
        0.0 if value and place < wrong else value
        for place, value in zip(np.cumsum(solved) - 1, solved, strict=True)
    ]
    records = [
        make_cell(
            experiment,
            method,
            finished=f"2025-01-{day:02}T01:00:00+00:00",
            **(cells or {}).get(method, {}),
        )
        for method in speeds
        if method not in skip
    ]
    scores = [
        score
        for method in speeds
        for score in make_scores(experiment, method, worse if method == "fast" else solved)
    ]
    experiment, records, made, scores = suffixed(ids, experiment, records, made, scores)
    write_shard(store, experiment, records, made, scores)
    store.write_run(
        make_run(
            [experiment],
            run_id=name,
            started=f"2025-01-{day:02}T00:00:00+00:00",
            git_commit=commit,
        )
    )


def suffixed(ids: str, experiment: ExperimentRecord, *lists: list[Any]) -> tuple[Any, ...]:
    experiment = dataclasses.replace(
        experiment,
        cells=[cell + ids for cell in experiment.cells],
        baseline=experiment.baseline + ids,
    )
    return (
        experiment,
        *(
            [dataclasses.replace(each, cell_id=each.cell_id + ids) for each in records]
            for records in lists
        ),
    )


def compared(store: Store, base: str = "base", head: str = "head") -> Comparison:
    return compare(resolve(base, store), resolve(head, store))


def verdicts(comparison: Comparison, method: str = "fast") -> dict[str, str]:
    return {
        finding.check: finding.verdict
        for finding in comparison.findings
        if finding.method == method
    }


def write_corpus_run(store: Store, name: str, day: int, gain: float, items: int = ITEMS) -> None:
    """Write a run whose headline is the mean place of the items, plus a gain of `fast`."""
    metric = MetricRecord(name="spearman", unit="points", kind="corpus", higher_is_better=True)
    experiment = make_experiment(
        items=items,
        metrics=[metric],
        quality_margin=0.5,
        task_hash="h",
        experiment_id=f"experiment-{name}",
        created=f"2025-01-{day:02}T00:00:00+00:00",
    )
    speeds = {"plain": 1.0, "fast": 2.0}
    finished = f"2025-01-{day:02}T01:00:00+00:00"
    samples = [
        dataclasses.replace(sample, output_digest=f"{sample.output_digest} {name}")
        for sample in make_samples(experiment, speeds)
    ]
    write_shard(
        store,
        experiment,
        [make_cell(experiment, method, finished=finished) for method in speeds],
        samples,
        corpus=[
            make_corpus(experiment, method, lambda drawn: float(drawn.mean()))
            if method == "plain"
            else make_corpus(
                experiment,
                method,
                lambda drawn: float(drawn.mean() + gain * (drawn % 4 > 0).mean()),
            )
            for method in speeds
        ],
    )
    started = f"2025-01-{day:02}T00:00:00+00:00"
    store.write_run(make_run([experiment], run_id=name, started=started))


@pytest.mark.parametrize(
    ("gain", "expected"), [(-2.0, "REGRESSED"), (2.0, "IMPROVED"), (0.4, "SAME"), (0.7, "NO LOSS")]
)
def test_a_corpus_metric_is_compared_on_the_same_resamples(
    tmp_path: Path, gain: float, expected: str
) -> None:
    made = Store(tmp_path)
    write_corpus_run(made, "base", 1, 0.0)
    write_corpus_run(made, "head", 2, gain)
    (finding,) = [
        each for each in compared(made).findings if (each.check, each.method) == ("quality", "fast")
    ]
    assert finding.verdict == expected
    assert finding.is_regression == (gain < 0)
    # The metric itself varies by 2 either way; what is between the runs does not.
    assert finding.base == "11.50"
    assert finding.detail.startswith(f"spearman {0.75 * gain:.2f}")


def test_a_corpus_metric_of_other_items_is_not_compared(tmp_path: Path) -> None:
    made = Store(tmp_path)
    write_corpus_run(made, "base", 1, 0.0)
    write_corpus_run(made, "head", 2, -2.0, items=20)
    (finding,) = [
        each for each in compared(made).findings if (each.check, each.method) == ("quality", "fast")
    ]
    assert finding.verdict == "INCONCLUSIVE"
    assert finding.detail == ("spearman is of all items together, and the items are not the same")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Return a store with the run `base`."""
    made = Store(tmp_path / "store")
    write_run(made, "base", day=1, ids="-old")
    return made


def test_two_measurements_of_the_same_have_no_regression(store: Store) -> None:
    write_run(store, "head", day=2)
    found = compared(store)
    assert found.regressions == ()
    assert verdicts(found) == {
        "losslessness": "SAME",
        "output": "SAME",
        "work": "SAME",
        "quality": "SAME",
        "speed": "SAME",
        "seconds": "SAME",
    }
    # A baseline has no speed-up over itself.
    assert "speed" not in verdicts(found, "plain")


@pytest.mark.parametrize(("speed", "verdict"), [(1.6, "REGRESSED"), (2.5, "IMPROVED")])
def test_a_changed_speed_up_is_called(store: Store, speed: float, verdict: str) -> None:
    write_run(store, "head", {"plain": 1.0, "fast": speed}, day=2)
    found = compared(store)
    assert verdicts(found)["speed"] == verdict
    assert bool(found.regressions) == (verdict == "REGRESSED")
    told = next(finding for finding in found.findings if finding.check == "speed")
    # Prefill is part of both sides, so the ratio of speed-ups is nearer to 1 than speed / 2.
    before, after = float(told.base), float(told.head)
    assert after / before == pytest.approx(float(told.detail[1:].split()[0]), rel=0.02)


def test_a_machine_that_is_slower_as_a_whole_changes_seconds_and_no_speed_up(store: Store) -> None:
    write_run(store, "head", day=2, slowness=1.5)
    found = compared(store)
    assert verdicts(found)["speed"] == "SAME"
    assert verdicts(found)["seconds"] == "REGRESSED"
    assert verdicts(found, "plain")["seconds"] == "REGRESSED"


def test_seconds_are_not_compared_between_machines(store: Store) -> None:
    write_run(store, "head", day=2, slowness=1.5, environment={"machine_id": "machine-2"})
    found = compared(store)
    assert "seconds" not in verdicts(found)
    assert verdicts(found)["speed"] == "SAME"
    assert found.regressions == ()


def test_repeated_measurements_raise_the_threshold(store: Store) -> None:
    head = {"plain": 1.0, "fast": 1.7}
    write_run(store, "head", head, day=20)
    assert verdicts(compared(store))["speed"] == "REGRESSED"
    # The same cells, measured on other days, came out as far apart as that.
    for day, speed in enumerate([2.0, 1.6, 2.1, 1.5, 1.9, 2.2], start=2):
        write_run(store, f"again-{day}", {"plain": 1.0, "fast": speed}, day=day, ids="-again")
    found = compared(store)
    assert verdicts(found)["speed"] in ("SAME", "INCONCLUSIVE")
    [told] = [finding for finding in found.findings if finding.check == "speed"]
    assert "5 repeated measurements" in told.detail


def test_what_is_judged_is_no_measure_of_noise(store: Store) -> None:
    for day in (2, 3, 4, 5):
        write_run(store, f"again-{day}", day=day, ids="-old")
    write_run(store, "head", {"plain": 1.0, "fast": 1.0}, day=9, ids="-old")
    found = compared(store)
    assert verdicts(found)["speed"] == "REGRESSED"
    [told] = [finding for finding in found.findings if finding.check == "speed"]
    assert "(4 repeated measurements)" in told.detail


def test_twins_of_the_baseline_are_repetitions(store: Store) -> None:
    twins = {"plain": 1.0, "twin-1": 1.0, "twin-2": 1.0, "twin-3": 1.0}
    write_run(store, "twins", twins, day=3, noise=0.2, ids="-twins")
    write_run(store, "head", {"plain": 1.0, "fast": 1.8}, day=4)
    [told] = [finding for finding in compared(store).findings if finding.check == "speed"]
    assert "(3 repeated measurements)" in told.detail


def test_a_threshold_is_a_prediction_interval_and_never_below_the_margin() -> None:
    assert Threshold.of([], 0.05).value == pytest.approx(0.05)
    assert Threshold.of([0.5, 0.5], 0.05).value == pytest.approx(0.05)
    assert Threshold.of([0.001] * 9, 0.05).value == pytest.approx(0.05)
    # t(4, 99% two-sided) = 4.604, from a printed table.
    assert Threshold.of([0.1, -0.1, 0.1, -0.1], 0.05).value == pytest.approx(
        math.expm1(4.604 * 0.1), rel=1e-3
    )


def test_chance_alone_seldom_passes_the_threshold() -> None:
    draw = np.random.default_rng(5)
    beyond = 0
    for _ in range(2000):
        changes = draw.normal(0, 0.2, 9)
        beyond += abs(changes[8]) > math.log1p(Threshold.of(list(changes[:8]), 0.0).value)
    assert 0.002 < beyond / 2000 < 0.02


def test_fewer_solved_items_are_a_regression_of_quality(store: Store) -> None:
    write_run(store, "head", day=2, wrong=12)
    found = compared(store)
    assert verdicts(found)["quality"] == "INCONCLUSIVE" or found.regressions
    # The outputs are equal here, so the scores of one side must be paired, not pooled.
    [told] = [
        finding
        for finding in found.findings
        if finding.check == "quality" and finding.method == "fast"
    ]
    assert (told.base, told.head) == ("0.750", "0.250")
    assert told.verdict == "REGRESSED"


def more_forwards(samples: list[SampleRecord]) -> list[SampleRecord]:
    return [
        dataclasses.replace(sample, target_forwards=(sample.target_forwards or 0) + 1)
        if sample.cell_id == "cell-fast" and sample.item_id == "item-7"
        else sample
        for sample in samples
    ]


def test_one_more_forward_is_a_regression_of_work(store: Store) -> None:
    write_run(store, "head", day=2, samples=more_forwards)
    found = compared(store)
    [told] = found.regressions
    assert (told.method, told.check) == ("fast", "work")
    assert "target_forwards" in told.detail


def test_less_work_is_an_improvement(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write_run(store, "base", day=1, samples=more_forwards)
    write_run(store, "head", day=2)
    assert verdicts(compared(store))["work"] == "IMPROVED"


def test_work_is_compared_on_equal_outputs_only(store: Store) -> None:
    def another_output(samples: list[SampleRecord]) -> list[SampleRecord]:
        return [
            dataclasses.replace(sample, output_digest="other")
            if sample.item_id == "item-7"
            else sample
            for sample in more_forwards(samples)
        ]

    write_run(store, "head", day=2, samples=another_output)
    found = compared(store)
    assert verdicts(found)["output"] == "CHANGED"
    assert verdicts(found)["work"] == "SAME"
    assert found.regressions == ()
    [told] = [f for f in found.findings if f.check == "output" and f.method == "fast"]
    assert "1 of 24 items have another output: item-7" in told.detail


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"status": "failed", "error": "it broke", "output_check": None}, "status"),
        ({"status": "timeout", "error": "too slow", "output_check": None}, "status"),
        ({"status": "failed", "error": "differs", "output_check": "violation"}, "losslessness"),
        ({"declared_output": "approximate", "output_check": "approximate"}, "losslessness"),
        (
            {
                "status": "failed",
                "error": "audit: too short",
                "audit": {"result": "failed", "checks": []},
            },
            "audit",
        ),
    ],
)
def test_a_cell_that_ends_worse_is_one_regression(
    store: Store, change: dict[str, Any], check: str
) -> None:
    write_run(store, "head", day=2, cells={"fast": change})
    found = compared(store)
    assert [(each.method, each.check) for each in found.regressions] == [("fast", check)]


def test_a_cell_that_ends_well_again_is_an_improvement(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write_run(store, "base", day=1, cells={"fast": {"status": "failed", "error": "x"}})
    write_run(store, "head", day=2)
    found = compared(store)
    assert found.regressions == ()
    assert verdicts(found)["status"] == "IMPROVED"


def test_a_tie_is_a_change_and_no_regression(store: Store) -> None:
    write_run(store, "head", day=2, cells={"fast": {"output_check": "tie"}})
    found = compared(store)
    assert verdicts(found)["losslessness"] == "CHANGED"
    assert found.regressions == ()


@pytest.mark.parametrize("how", ["not asked for", "not ended"])
def test_a_missing_cell_is_red(store: Store, how: str) -> None:
    if how == "not asked for":
        write_run(store, "head", {"plain": 1.0}, day=2)
    else:
        write_run(store, "head", day=2, skip=("fast",))
    found = compared(store)
    assert [(each.method, each.verdict) for each in found.regressions] == [("fast", "MISSING")]


def test_a_cell_from_the_cache_is_stale(store: Store) -> None:
    cached = make_run([store.experiment("experiment-base")], run_id="head")
    store.write_run(dataclasses.replace(cached, started="2025-01-05T00:00:00+00:00"))
    found = compared(store)
    assert [each.verdict for each in found.regressions] == ["STALE", "STALE"]
    assert "--fresh" in found.regressions[0].detail


def test_a_new_cell_is_told_and_is_no_regression(store: Store) -> None:
    write_run(store, "head", {"plain": 1.0, "fast": 2.0, "newer": 3.0}, day=2)
    found = compared(store)
    assert verdicts(found, "newer") == {"cell": "NEW"}
    assert found.regressions == ()


@pytest.mark.parametrize("name", ["task_hash", "model_hash"])
def test_another_task_or_model_of_the_same_name_is_not_compared(store: Store, name: str) -> None:
    write_run(store, "head", day=2, **{name: "other"})
    found = compared(store)
    assert {each.check for each in found.findings} == {"conditions"}
    assert len(found.regressions) == 2
    assert f"another {name.removesuffix('_hash')}" in found.regressions[0].detail


def test_a_new_parameter_does_not_hide_a_cell(store: Store) -> None:
    write_run(store, "head", day=2, cells={"fast": {"params": {"added": 3}}})
    assert verdicts(compared(store))["work"] == "SAME"


def test_settings_that_differ_are_different_cells(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write_run(store, "base", day=1, cells={"fast": {"params": {"size": 3}}})
    write_run(store, "head", day=2, cells={"fast": {"params": {"size": 4}}})
    found = {(each.verdict, each.check) for each in compared(store).findings}
    assert ("MISSING", "cell") in found
    assert ("NEW", "cell") in found


def test_items_are_paired_where_they_match(store: Store) -> None:
    def first_ten(samples: list[SampleRecord]) -> list[SampleRecord]:
        kept = {f"item-{number}" for number in range(10)}
        return [sample for sample in samples if sample.item_id in kept]

    write_run(store, "head", day=2, samples=first_ten)
    [told] = [f for f in compared(store).findings if f.check == "quality" and f.method == "fast"]
    assert "over 10 items" in told.detail


def test_nothing_in_common_is_red(store: Store) -> None:
    def renamed(samples: list[SampleRecord]) -> list[SampleRecord]:
        return []

    write_run(store, "head", day=2, samples=renamed)
    assert {each.check for each in compared(store).regressions} == {"conditions"}


# References


def test_a_run_is_named_in_many_ways(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    write_run(store, "20250101-aa", day=1, commit="abcd1234" + "0" * 32)
    write_run(store, "20250102-bb", day=2, commit="abcd1234" + "0" * 32)
    write_run(store, "20250103-cc", day=3, commit="ffff" + "0" * 36)

    def run_id(reference: str) -> str:
        side = resolve(reference, store)
        assert side.run is not None
        return side.run.run_id

    assert run_id("latest") == "20250103-cc"
    assert run_id("20250101") == "20250101-aa"
    assert run_id("abcd") == "20250102-bb"
    assert run_id(f"{store.path}") == "20250103-cc"
    assert run_id(f"{store.path}@20250102") == "20250102-bb"
    assert run_id(f"{store.path}@") == "20250103-cc"
    for path in (store.path / "runs").glob("*.json"):
        path.unlink()
    side = resolve(str(store.path), store)
    assert side.run is None
    assert side.label == str(store.path)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("2025010", "2 runs begin with '2025010'"),
        ("20250101-ab", "Did you mean '20250101-aa'?"),
        ("0123abcd", "no run, commit or folder '0123abcd'"),
        ("", "no run, commit or folder ''"),
        ("no/where", "no/where: there is no such folder"),
        ("EMPTY", "holds no shards"),
        ("EMPTY@latest", "holds no shards"),
        ("STORE@nothing", "no run, commit or folder 'nothing'"),
    ],
)
def test_a_wrong_reference_says_what_there_is(tmp_path: Path, reference: str, message: str) -> None:
    store = Store(tmp_path / "store")
    (tmp_path / "empty").mkdir()
    write_run(store, "20250101-aa", day=1)
    write_run(store, "20250102-bb", day=2)
    reference = reference.replace("EMPTY", str(tmp_path / "empty"))
    with pytest.raises(StoreError, match=re.escape(message)):
        resolve(reference.replace("STORE", str(store.path)), store)


def test_a_run_is_not_compared_with_itself(store: Store) -> None:
    with pytest.raises(StoreError, match="name two different runs"):
        compared(store, "base", "latest")


def test_stores_without_runs_are_compared_by_their_newest_cells(tmp_path: Path) -> None:
    stores = [Store(tmp_path / name) for name in ("one", "two")]
    for store, speed in zip(stores, (2.0, 1.2), strict=True):
        write_run(store, "run", {"plain": 1.0, "fast": speed})
        (store.path / "runs" / "run.json").unlink()
    found = compare(*(resolve(str(store.path), store) for store in stores))
    assert verdicts(found)["speed"] == "REGRESSED"


def test_lost_shards_of_the_base_are_told(store: Store) -> None:
    write_run(store, "head", day=2)
    store.discard("experiment-base")
    found = compared(store)
    assert any("2 cells of base have no shard any more" in note for note in found.notes)
    assert any("nothing could get worse" in note for note in found.notes)


# Formats

EVIL = 'x"<&>\x1b[2J\x00\n::error::forged%0A\ufffe\ud800'


@pytest.fixture
def evil(store: Store) -> Comparison:
    """Return a comparison in which a method wrote what it should not."""
    write_run(store, "head", day=2, cells={"fast": {"status": "failed", "error": EVIL[:-1]}})
    found = compared(store)
    broken = dataclasses.replace(found.findings[0], detail=EVIL, verdict="REGRESSED")
    return dataclasses.replace(found, findings=(broken, *found.findings))


def test_junit_is_valid_and_counts_what_failed(evil: Comparison) -> None:
    root = ElementTree.fromstring(junit(evil))
    assert root.tag == "testsuites"
    cases = root.findall("testsuite/testcase")
    failures = root.findall("testsuite/testcase/failure")
    assert len(cases) == len(evil.findings) == int(root.get("tests") or 0)
    assert len(failures) == len(evil.regressions) == int(root.get("failures") or 0) > 0
    assert "\\x1b[2J\\x00" in (failures[0].text or "")
    suite = root.find("testsuite")
    assert suite is not None
    assert suite.get("failures") == str(len(failures))
    assert {
        each.get("name"): each.get("value") for each in suite.findall("properties/property")
    } == {
        "base": "base",
        "head": "head",
    }


def test_annotations_are_one_line_each_and_cannot_be_forged(evil: Comparison) -> None:
    lines = github_annotations(evil)
    errors = [line for line in lines if line.startswith("::error ")]
    assert len(errors) == len(evil.regressions)
    for line in lines:
        assert line.isprintable()
        assert line.count("%0A") == 0
    # What a method wrote as an escape is shown, not obeyed.
    assert "forged%250A" in errors[0]


def test_many_regressions_are_counted_not_listed(evil: Comparison) -> None:
    many = dataclasses.replace(evil, findings=evil.findings[:1] * 25)
    lines = github_annotations(many)
    assert len(lines) == 11
    assert "and 15 more" in lines[-1]


def test_markdown_and_json_hold_the_regressions_first(evil: Comparison) -> None:
    shown = render(evil, "md")
    assert shown.startswith("### 2 regressions from base to head")
    table = [line for line in shown.splitlines() if line.startswith("| ")]
    assert table[1].startswith("| REGRESSED")
    assert "<&" not in shown
    content = json.loads(render(evil, "json"))
    assert content["regressions"] == 2
    assert content["findings"][0]["verdict"] == "REGRESSED"
    assert len(content["findings"]) == len(rows(evil))
    with pytest.raises(ValueError, match="format must be one of md, json"):
        render(evil, "xml")


def test_a_side_names_run_and_commit(store: Store) -> None:
    write_run(store, "head", day=2, commit="c" * 40)
    assert resolve("head", store).label == "head at commit cccccccccccc"
    assert Side(store, None).label == str(store.path)


def test_records_without_an_audit_are_read(store: Store) -> None:
    path = store.path / "shards" / "experiment-base" / "cells" / "cell-fast-old.json"
    data = json.loads(path.read_text())
    assert data.pop("audit") is None
    path.write_text(json.dumps(data))
    found: list[CellRecord] = list(store.cells("experiment-base"))
    assert all(cell.audit is None for cell in found)


def test_a_change_is_the_ratio_of_two_speed_ups_and_exchanging_them_inverts_it() -> None:
    draw = np.random.default_rng(2)
    sides = [ItemTotals(draw.lognormal(0, 0.3, 12), draw.integers(5, 90, 12)) for _ in range(4)]
    base, head = (sides[0], sides[1]), (sides[2], sides[3])
    change, back = speed_up_change(base, head), speed_up_change(head, base)
    assert change.value == pytest.approx(speed_up(*head).value / speed_up(*base).value)
    assert change.low is not None
    assert back.high is not None
    assert back.high == pytest.approx(1 / change.low)
    same = speed_up_change(base, base)
    assert (same.low, same.high) == pytest.approx((1.0, 1.0))
