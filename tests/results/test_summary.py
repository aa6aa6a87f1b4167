"""Numbers of cells, against the same numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from results import statistics
from results.records import MetricRecord, SampleRecord, ScoreRecord
from results.store import Store, StoreError
from results.summary import summarize
from tests.results.factory import (
    BINARY,
    make_cell,
    make_experiment,
    make_sample,
    make_scores,
    write_shard,
)


def summary_of(
    path: Path,
    samples: Sequence[SampleRecord],
    scores: Sequence[ScoreRecord] = (),
    *,
    cells: Mapping[str, Mapping[str, Any]] | None = None,
    aggregate: Any = None,
    **experiment_changes: Any,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return verdicts and headline metrics by method."""
    experiment = make_experiment(**experiment_changes)
    store = Store(path)
    cell_changes = cells or {}
    records = [
        make_cell(experiment, method, **cell_changes.get(method, {}))
        for method in ("plain", "fast")
    ]
    write_shard(store, experiment, records, samples, scores, seal=False)
    name = experiment.experiment_id
    summary = summarize(
        experiment,
        list(store.cells(name)),
        store.sample_table(name),
        store.score_table(name),
        aggregate,
    )
    return (
        {row["cell_id"].removeprefix("cell-"): row for row in summary.verdicts},
        {
            row["cell_id"].removeprefix("cell-"): row
            for row in summary.metrics
            if row["is_headline"]
        },
    )


def two_items(**fast: Any) -> list[SampleRecord]:
    """Return a baseline of 1.1 and 2.1 s for 11 and 21 tokens, and a method of half that."""
    plain = [
        make_sample(
            "cell-plain",
            item,
            seconds=tokens / 10,
            prefill_seconds=0.1,
            output_tokens=tokens,
            decode_tokens=tokens - 1,
            target_forwards=tokens - 1,
            forward_tokens=tokens - 1,
            bound_seconds=(tokens - 1) / 10,
            flops=tokens * 1e6,
        )
        for item, tokens in (("item-0", 11), ("item-1", 21))
    ]
    halved = [
        dataclasses.replace(
            sample,
            cell_id="cell-fast",
            seconds=sample.seconds / 2,
            prefill_seconds=0.1,
            target_forwards=(sample.target_forwards or 0) // 2,
            forward_tokens=2 * (sample.target_forwards or 0),
            accepted_tokens=(sample.target_forwards or 0) // 2,
            bound_seconds=(sample.bound_seconds or 0) * 0.4,
            flops=(sample.flops or 0) * 3,
            peak_bytes=1_500_000,
            **fast,
        )
        for sample in plain
    ]
    return plain + halved


def test_counts_become_the_ratios_of_the_methodology(tmp_path: Path) -> None:
    verdicts, _ = summary_of(tmp_path, two_items(), items=2)
    fast, plain = verdicts["fast"], verdicts["plain"]
    expected = {
        "items": 2,
        "repeats": 1,
        "output_tokens": 32,
        "baseline_tokens": 32,
        "seconds_per_item": 0.8,
        "tokens_per_second": 20,
        "tokens_per_forward": 30 / 15,
        "acceptance_rate": 15 / (60 - 15),
        # decode seconds 1.6 - 0.2, forwards at lat(N) 0.4 + 0.8
        "overhead": 1.4 / 1.2,
        "draft_share": 0.2 / 1.4,
        "speedup": 2,
        "speedup_geomean": 2,
        # (0.2 + 3.0) / (0.2 + 1.2), both for 32 tokens
        "speedup_bound": 3.2 / 1.4,
        "bound_ratio": 2 / (3.2 / 1.4),
        "step_cost_ratio": (1.2 / 15) / (3.0 / 30),
        "work_ratio": 3,
        "memory_ratio": 1.5,
        "harness_share": 0.01,
    }
    assert {name: fast[name] for name in expected} == pytest.approx(expected)
    assert fast["speedup_device"] is None
    assert plain["speedup"] == plain["speedup_bound"] == plain["work_ratio"] == 1
    assert "speed_verdict" not in plain
    assert "speedup_low" not in plain


def test_the_bound_takes_the_median_prefill_and_the_first_repeat(tmp_path: Path) -> None:
    samples = [
        make_sample(
            f"cell-{method}",
            "item-0",
            repeat=repeat,
            prefill_seconds=prefill,
            bound_seconds=bound,
            output_tokens=10,
        )
        for method, bounds, prefills in (
            ("plain", (4.0, 9.0, 9.0), (1.0, 5.0, 2.0)),
            ("fast", (1.0, 9.0, 9.0), (7.0, 7.0, 7.0)),
        )
        for repeat, (bound, prefill) in enumerate(zip(bounds, prefills, strict=True))
    ]
    verdicts, _ = summary_of(tmp_path, samples, items=1, repeats=3)
    assert verdicts["fast"]["speedup_bound"] == pytest.approx((2 + 4) / (2 + 1))


@pytest.mark.parametrize(
    ("absent", "numbers"),
    [
        ("target_forwards", ("tokens_per_forward", "acceptance_rate", "step_cost_ratio")),
        ("bound_seconds", ("speedup_bound", "bound_ratio", "overhead", "step_cost_ratio")),
        ("flops", ("work_ratio",)),
        ("peak_bytes", ("memory_ratio",)),
        ("energy_j", ("joules_per_token",)),
    ],
)
def test_what_a_method_does_not_tell_is_null(
    tmp_path: Path, absent: str, numbers: tuple[str, ...]
) -> None:
    samples = [
        dataclasses.replace(sample, **{absent: None}) if sample.cell_id == "cell-fast" else sample
        for sample in two_items()
    ]
    verdicts, _ = summary_of(tmp_path, samples, items=2)
    assert [verdicts["fast"].get(name) for name in numbers] == [None] * len(numbers)
    assert verdicts["fast"]["speedup"] == pytest.approx(2)


def test_the_device_clock_gives_its_own_ratio(tmp_path: Path) -> None:
    samples = [
        dataclasses.replace(sample, device_seconds=3.0 if sample.cell_id == "cell-plain" else 1.0)
        for sample in two_items()
    ]
    verdicts, _ = summary_of(tmp_path, samples, items=2)
    assert verdicts["fast"]["speedup_device"] == pytest.approx(3)


def test_speed_counts_samples_where_output_is_not_made_of_tokens(tmp_path: Path) -> None:
    samples = [dataclasses.replace(sample, output_tokens=0) for sample in two_items()]
    verdicts, _ = summary_of(tmp_path, samples, items=2, facts={"output_unit": "image"})
    assert verdicts["fast"]["speedup"] == pytest.approx(2)
    assert verdicts["fast"]["speedup_bound"] == pytest.approx(3.2 / 1.4)
    assert verdicts["fast"]["tokens_per_second"] == 0


@pytest.mark.parametrize("broken", ["plain", "fast"])
def test_a_cell_that_failed_has_no_numbers_and_lends_none(tmp_path: Path, broken: str) -> None:
    scores = [
        *make_scores(make_experiment(items=2), "plain", [1.0, 1.0]),
        *make_scores(make_experiment(items=2), "fast", [1.0, 1.0]),
    ]
    verdicts, metrics = summary_of(
        tmp_path, two_items(), scores, items=2, cells={broken: {"status": "oom-host"}}
    )
    assert verdicts[broken].keys() == {"experiment_id", "cell_id"}
    assert metrics[broken].get("value") is None
    assert metrics[broken]["metric"] == "pass@1"
    other = {"plain": "fast", "fast": "plain"}[broken]
    assert verdicts[other]["tokens_per_second"] > 0
    assert metrics[other]["value"] == 1
    if broken == "plain":
        assert "speedup" not in verdicts["fast"]
        assert metrics["fast"].get("difference") is None


def binary_scores(items: int, **values: Sequence[float | None]) -> list[ScoreRecord]:
    experiment = make_experiment(items=items)
    return [
        score for method, row in values.items() for score in make_scores(experiment, method, row)
    ]


def samples_of(items: int, *, same_output: bool = False) -> list[SampleRecord]:
    return [
        make_sample(
            f"cell-{method}",
            f"item-{item}",
            output_digest=f"{item}" if same_output else f"{item} {method}",
        )
        for method in ("plain", "fast")
        for item in range(items)
    ]


def test_binary_quality_has_wilson_s_interval_and_a_paired_difference(tmp_path: Path) -> None:
    scores = binary_scores(4, plain=[1.0, 1.0, 0.0, 0.0], fast=[1.0, 0.0, 1.0, 1.0])
    _, metrics = summary_of(tmp_path, samples_of(4), scores, items=4)
    fast = metrics["fast"]
    own, difference = statistics.wilson(3, 4), statistics.tango(2, 1, 4)
    assert (fast["value"], fast["low"], fast["high"]) == own[:3]
    assert fast["baseline_value"] == 0.5
    found = [fast[name] for name in ("difference", "difference_low", "difference_high")]
    assert found == list(difference[:3])
    assert fast["mcnemar_p"] == statistics.mcnemar(2, 1)
    assert fast["verdict"] == "INCONCLUSIVE"
    assert "difference" not in metrics["plain"]


def test_the_same_outputs_have_the_same_quality_for_certain(tmp_path: Path) -> None:
    scores = binary_scores(4, plain=[1.0, 1.0, 0.0, 0.0], fast=[1.0, 1.0, 0.0, 0.0])
    _, metrics = summary_of(tmp_path / "same", samples_of(4, same_output=True), scores, items=4)
    assert metrics["fast"]["verdict"] == "SAME"
    assert (metrics["fast"]["difference_low"], metrics["fast"]["difference_high"]) == (0, 0)
    # What four items could have shown does not depend on what they did show.
    assert metrics["fast"]["smallest_difference"] > 0.5
    _, metrics = summary_of(tmp_path / "other", samples_of(4), scores, items=4)
    assert metrics["fast"]["verdict"] == "INCONCLUSIVE"


def test_an_output_without_a_score_is_counted_and_withholds_no_loss(tmp_path: Path) -> None:
    ones = [1.0] * 80
    # Eighty items settle "no loss" at a margin of 5%, one lost answer unsettles it.
    for name, fast, verdict in (
        ("whole", ones, "SAME"),
        ("lost", [None, *ones[1:]], "INCONCLUSIVE"),
    ):
        scores = binary_scores(80, plain=ones, fast=fast)
        _, metrics = summary_of(
            tmp_path / name, samples_of(80), scores, items=80, quality_margin=0.05
        )
        assert metrics["fast"]["verdict"] == verdict
        assert metrics["fast"]["value"] == 1
    assert (metrics["fast"]["scored"], metrics["fast"]["unscored"]) == (79, 1)
    assert (metrics["plain"]["scored"], metrics["plain"]["unscored"]) == (80, 0)


def test_lower_is_better_turns_the_verdict(tmp_path: Path) -> None:
    loss = MetricRecord(name="loss", unit="nats", kind="mean", higher_is_better=False)
    experiment = make_experiment(items=12, metrics=[loss])
    scores = [
        *make_scores(experiment, "plain", [1 + number / 10 for number in range(12)]),
        *make_scores(experiment, "fast", [2 + number / 9 for number in range(12)]),
    ]
    _, metrics = summary_of(tmp_path, samples_of(12), scores, items=12, metrics=[loss])
    assert metrics["fast"]["verdict"] == "WORSE"
    assert metrics["fast"]["difference"] == pytest.approx(1 + 66 / 12 * (1 / 9 - 1 / 10))
    assert metrics["fast"].get("mcnemar_p") is None


def test_pass_at_k_is_estimated_over_problems(tmp_path: Path) -> None:
    metric = MetricRecord(name="pass@2", unit="fraction", kind="pass@k", higher_is_better=True, k=2)
    changes: dict[str, Any] = {
        "items": 6,
        "metrics": [metric],
        "groups": ["a", "a", "a", "b", "b", "b"],
    }
    experiment = make_experiment(**changes)
    scores = [
        *make_scores(experiment, "plain", [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
        *make_scores(experiment, "fast", [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]),
    ]
    _, metrics = summary_of(tmp_path, samples_of(6), scores, **changes)
    assert metrics["plain"]["value"] == pytest.approx((2 / 3 + 0) / 2)
    assert metrics["fast"]["value"] == pytest.approx((1 + 2 / 3) / 2)
    assert metrics["fast"]["difference"] == pytest.approx((1 / 3 + 2 / 3) / 2)


def test_a_corpus_metric_needs_the_task_s_aggregate(tmp_path: Path) -> None:
    spread = MetricRecord(name="spread", unit="points", kind="corpus", higher_is_better=True)
    experiment = make_experiment(items=10, metrics=[spread])
    scores = [
        *make_scores(experiment, "plain", [float(number) for number in range(10)]),
        *make_scores(experiment, "fast", [2.0 * number for number in range(10)]),
    ]

    def aggregate(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        assert len(rows) == 10  # an item drawn twice still counts twice
        values = [row["spread"] for row in rows.values()]
        return {"spread": max(values) - min(values)}

    changes: dict[str, Any] = {"items": 10, "metrics": [spread]}
    _, metrics = summary_of(tmp_path / "a", samples_of(10), scores, aggregate=aggregate, **changes)
    assert (metrics["plain"]["value"], metrics["fast"]["value"]) == (9, 18)
    assert metrics["fast"]["difference"] == 9
    assert metrics["fast"]["difference_low"] < 9
    _, metrics = summary_of(tmp_path / "b", samples_of(10), scores, **changes)
    assert metrics["fast"].get("value") is None
    assert metrics["fast"].get("difference") is None


def test_further_metrics_have_values_but_no_verdict(tmp_path: Path) -> None:
    length = MetricRecord(name="length", unit="tokens", kind="mean", higher_is_better=False)
    experiment = make_experiment(items=4, metrics=[length])
    scores = [
        *binary_scores(4, plain=[1.0] * 4, fast=[1.0] * 4),
        *make_scores(experiment, "plain", [1.0, 2.0, 3.0, 4.0]),
        *make_scores(experiment, "fast", [2.0, 2.0, 4.0, 4.0]),
    ]
    store = Store(tmp_path)
    both = make_experiment(items=4, metrics=[BINARY, length])
    cells = [make_cell(both, "plain"), make_cell(both, "fast")]
    write_shard(store, both, cells, samples_of(4), scores, seal=False)
    rows = summarize(
        both, cells, store.sample_table("experiment-1"), store.score_table("experiment-1")
    ).metrics
    (found,) = [row for row in rows if row["metric"] == "length" and row["cell_id"] == "cell-fast"]
    assert (found["value"], found["difference"]) == (3, 0.5)
    assert found.get("verdict") is None


def test_a_nan_is_no_score(tmp_path: Path) -> None:
    scores = binary_scores(3, plain=[1.0, 1.0, 1.0], fast=[math.nan, 1.0, 0.0])
    _, metrics = summary_of(tmp_path, samples_of(3), scores, items=3)
    assert metrics["fast"]["value"] == 0.5
    assert metrics["fast"]["unscored"] == 1


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (make_sample(item_id="item-9"), "has no item 'item-9'"),
        (make_sample(item_id="item-0", repeat=1), "names repeat 1, counted from 0"),
    ],
)
def test_a_sample_from_elsewhere_is_refused(
    tmp_path: Path, sample: SampleRecord, message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        summary_of(tmp_path, [sample], items=2)
