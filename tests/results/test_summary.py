"""Numbers of cells, against the same numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from results import statistics
from results.records import CorpusRecord, MetricRecord, SampleRecord, ScoreRecord
from results.store import Store, StoreError
from results.summary import summarize
from tests.results.factory import (
    BINARY,
    make_cell,
    make_corpus,
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
    corpus: Sequence[CorpusRecord] = (),
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
    write_shard(store, experiment, records, samples, scores, corpus=corpus, seal=False)
    name = experiment.experiment_id
    summary = summarize(
        experiment,
        list(store.cells(name)),
        store.sample_table(name),
        store.score_table(name),
        store.corpus_table(name),
    )
    return (
        {row["cell_id"].removeprefix("cell-"): row for row in summary.verdicts},
        {
            row["cell_id"].removeprefix("cell-"): row
            for row in summary.metrics
            if row["is_headline"]
        },
    )


def test_prefill_and_decoding_are_compared_apart(tmp_path: Path) -> None:
    samples = [
        dataclasses.replace(sample, prefill_seconds=0.04)
        if sample.cell_id == "cell-fast"
        else sample
        for sample in two_items()
    ]
    verdicts, _ = summary_of(tmp_path, samples, items=2)
    fast, plain = verdicts["fast"], verdicts["plain"]
    assert fast["prefill_ratio"] == pytest.approx(0.08 / 0.2)
    # 3.2 s less 0.2 s, and 1.6 s less 0.08 s, both for 30 tokens after the prefill.
    assert fast["decode_speedup"] == pytest.approx(3.0 / 1.52)
    assert fast["decode_speedup_low"] < 3.0 / 1.52 < fast["decode_speedup_high"]
    assert fast["decode_speedup_low_99"] < fast["decode_speedup_low"]
    assert fast["prefill_ratio_low"] == pytest.approx(0.4)
    assert fast["decode_verdict"] == "FASTER"
    assert fast["decode_bound"] == pytest.approx(3.0 / 1.2)
    names = ("prefill_ratio", "decode_speedup", "decode_bound")
    assert [plain[name] for name in names] == pytest.approx([1, 1, 1])
    assert "decode_verdict" not in plain


def test_tokens_of_the_prefill_are_no_tokens_of_decoding(tmp_path: Path) -> None:
    samples = [
        dataclasses.replace(sample, decode_tokens=sample.decode_tokens - 5)
        if sample.cell_id == "cell-fast"
        else sample
        for sample in two_items()
    ]
    verdicts, _ = summary_of(tmp_path, samples, items=2)
    assert verdicts["fast"]["decode_speedup"] == pytest.approx((3.0 / 30) / (1.4 / 20))


@pytest.mark.parametrize("silent", ["plain", "fast"])
def test_a_side_that_does_not_tell_its_prefill_has_no_decode_speed_up(
    tmp_path: Path, silent: str
) -> None:
    samples = [
        dataclasses.replace(sample, prefill_seconds=None)
        if (sample.cell_id, sample.item_id) == (f"cell-{silent}", "item-1")
        else sample
        for sample in two_items()
    ]
    verdicts, _ = summary_of(tmp_path, samples, items=2)
    names = ("prefill_ratio", "decode_speedup", "decode_speedup_low", "decode_verdict")
    assert [verdicts["fast"].get(name) for name in names] == [None] * 4
    assert verdicts["fast"]["speedup"] == pytest.approx(2)


def test_texts_of_one_token_have_a_prefill_and_no_decoding(tmp_path: Path) -> None:
    samples = [
        dataclasses.replace(sample, output_tokens=1, decode_tokens=0) for sample in two_items()
    ]
    verdicts, _ = summary_of(tmp_path, samples, items=2)
    assert verdicts["fast"]["prefill_ratio"] == pytest.approx(1)
    assert verdicts["fast"]["decode_speedup"] is None
    assert verdicts["fast"].get("decode_verdict") is None
    assert verdicts["fast"]["decode_bound"] is None


def test_bytes_are_charged_at_the_pace_that_the_baseline_read_them(tmp_path: Path) -> None:
    # The baseline decodes 30 tokens in 3.0 s, of which its bytes at full bandwidth take 0.6 s; the
    # method reads a third of them.
    samples = [
        dataclasses.replace(
            sample,
            bound_seconds={"item-0": 0.2, "item-1": 0.4}[sample.item_id]
            / (1 if sample.cell_id == "cell-plain" else 3),
        )
        for sample in two_items()
    ]
    verdicts, _ = summary_of(tmp_path / "a", samples, items=2, facts={"bound_by": "bytes"})
    assert verdicts["fast"]["decode_bound"] == pytest.approx(3)
    # Of 0.2 s of prefill and 3.0 s of decoding a third of the latter is left, no less.
    assert verdicts["fast"]["speedup_bound"] == pytest.approx(3.2 / (0.2 + 1.0))
    verdicts, _ = summary_of(tmp_path / "b", samples, items=2)
    assert verdicts["fast"]["speedup_bound"] == pytest.approx((0.2 + 0.6) / (0.2 + 0.2))
    assert verdicts["fast"]["decode_bound"] == pytest.approx(3)


def test_a_prefill_of_other_operations_is_charged_its_own_time_where_bytes_are(
    tmp_path: Path,
) -> None:
    # The method computes a half of one prompt, all of the other.
    done = {"cell-plain": (4e9, 5e9), "cell-fast": (2e9, 5e9)}
    samples = [
        dataclasses.replace(
            sample,
            bound_seconds=0.1,
            prefill_flops=done[sample.cell_id][int(sample.item_id.removeprefix("item-"))],
            prefill_seconds=0.03 if sample.cell_id == "cell-fast" else 0.1,
        )
        for sample in two_items()
    ]
    facts = {"bound_by": "bytes"}
    plain = 0.1 + 0.1 + 3.0
    verdicts, _ = summary_of(tmp_path / "a", samples, items=2, facts=facts)
    assert verdicts["fast"]["speedup_bound"] == pytest.approx(plain / (0.03 + 0.1 + 3.0))
    assert verdicts["plain"]["speedup_bound"] == 1
    untold = [dataclasses.replace(each, prefill_flops=None) for each in samples]
    verdicts, _ = summary_of(tmp_path / "b", untold, items=2, facts=facts)
    assert verdicts["fast"]["speedup_bound"] == pytest.approx(1)
    silent = [
        dataclasses.replace(each, prefill_seconds=None) if each.cell_id == "cell-fast" else each
        for each in samples
    ]
    verdicts, _ = summary_of(tmp_path / "d", silent, items=2, facts=facts)
    assert verdicts["fast"]["speedup_bound"] is None  # nobody knows what its first prompt took
    # At lat(N) both sides pay the baseline's prefill: drafting changes none.
    verdicts, _ = summary_of(tmp_path / "c", samples, items=2)
    assert verdicts["fast"]["speedup_bound"] == pytest.approx(1)


def test_a_call_bound_by_its_operations_is_bounded_by_all_that_it_counts(tmp_path: Path) -> None:
    # Nothing is known about forwards and the prefill, and nothing is needed.
    silent = {"prefill_seconds": None, "bound_seconds": None}
    samples = [
        dataclasses.replace(sample, **silent, flops={"cell-plain": 6e9, "cell-fast": 4e9}[cell])
        for sample in two_items()
        for cell in [sample.cell_id]
    ]
    samples[0] = dataclasses.replace(samples[0], flops=12e9)
    facts = {"bound_by": "operations", "output_unit": "answer"}
    verdicts, _ = summary_of(tmp_path / "a", samples, items=2, facts=facts)
    assert verdicts["fast"]["speedup_bound"] == pytest.approx(18e9 / 8e9)
    assert verdicts["fast"]["speedup_bound"] == pytest.approx(1 / verdicts["fast"]["work_ratio"])
    assert verdicts["fast"]["bound_ratio"] == pytest.approx(2 / (18 / 8))
    assert verdicts["plain"]["speedup_bound"] == 1
    uncounted = [dataclasses.replace(samples[0], flops=None), *samples[1:]]
    verdicts, _ = summary_of(tmp_path / "b", uncounted, items=2, facts=facts)
    assert verdicts["fast"]["speedup_bound"] is None


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
    assert verdicts["fast"]["tokens_per_second"] is None


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


SPREAD = MetricRecord(name="spread", unit="points", kind="corpus", higher_is_better=True)


def spread_of(values: Sequence[float]) -> Callable[[np.ndarray], float]:
    """Return the largest less the smallest of drawn values, an item at a time."""
    return lambda drawn: max(values[item] for item in drawn) - min(values[item] for item in drawn)


def test_a_corpus_metric_comes_from_its_stored_resamples(tmp_path: Path) -> None:
    experiment = make_experiment(items=10, metrics=[SPREAD])
    plain, fast = [float(number**2) for number in range(10)], [2.0 * item for item in range(10)]
    corpus = [
        make_corpus(experiment, "plain", spread_of(plain)),
        make_corpus(experiment, "fast", spread_of(fast)),
    ]
    changes: dict[str, Any] = {"items": 10, "metrics": [SPREAD]}
    _, metrics = summary_of(tmp_path, samples_of(10), corpus=corpus, **changes)
    found = metrics["fast"]
    assert (metrics["plain"]["value"], found["value"], found["baseline_value"]) == (81, 18, 81)
    assert (found["scored"], found["unscored"]) == (10, 0)
    # Worked out once more from the draws: both sides see the same ones.
    draws = statistics.corpus_draws(10)
    own = np.array([spread_of(fast)(draw) for draw in draws])
    other = np.array([spread_of(plain)(draw) for draw in draws])
    expected = statistics.corpus_metric(own - other, 10)
    names = ("", "_low", "_high", "", "_low_99", "_high_99")
    for place, name in enumerate(names):
        if place != 3:
            assert found[f"difference{name}"] == expected[place]
    assert found["low"] == statistics.corpus_metric(own, 10).low
    assert found["verdict"] == "WORSE"
    unpaired = statistics.corpus_metric(own, 10).low - statistics.corpus_metric(other, 10).high  # type: ignore[operator]  # there are intervals
    assert found["difference_low"] > unpaired


def test_a_corpus_metric_without_resamples_or_without_a_number_is_null(tmp_path: Path) -> None:
    experiment = make_experiment(items=10, metrics=[SPREAD])
    changes: dict[str, Any] = {"items": 10, "metrics": [SPREAD]}
    _, metrics = summary_of(tmp_path / "none", samples_of(10), **changes)
    assert metrics["fast"].get("value") is None
    assert metrics["fast"].get("difference") is None
    assert metrics["fast"]["scored"] == 0
    corpus = [
        make_corpus(experiment, "plain", spread_of([float(item) for item in range(10)])),
        make_corpus(experiment, "fast", lambda drawn: math.nan),
    ]
    _, metrics = summary_of(tmp_path / "nan", samples_of(10), corpus=corpus, **changes)
    assert metrics["plain"]["value"] == 9
    assert metrics["fast"].get("value") is None
    assert metrics["fast"]["baseline_value"] == 9
    assert metrics["fast"].get("verdict") is None


def test_answers_that_only_the_method_lost_withhold_the_verdict_of_a_corpus_metric(
    tmp_path: Path,
) -> None:
    experiment = make_experiment(items=10, metrics=[SPREAD])
    corpus = [
        make_corpus(experiment, method, spread_of([float(item) + shift for item in range(10)]))
        for method, shift in (("plain", 0), ("fast", 0))
    ]
    corpus[1] = dataclasses.replace(
        corpus[1], resampled=[value + 0.001 for value in corpus[1].resampled[::-1]]
    )
    changes: dict[str, Any] = {"items": 10, "metrics": [SPREAD], "quality_margin": 9.0}
    _, metrics = summary_of(tmp_path / "all", samples_of(10), corpus=corpus, **changes)
    assert metrics["fast"]["verdict"] == "SAME"
    lost = make_scores(experiment, "fast", [None, *[1.0] * 9])
    _, metrics = summary_of(tmp_path / "lost", samples_of(10), lost, corpus=corpus, **changes)
    assert metrics["fast"]["unscored"] == 1
    assert metrics["fast"]["verdict"] == "INCONCLUSIVE"


def test_resamples_of_another_number_of_items_are_refused(tmp_path: Path) -> None:
    few = CorpusRecord(cell_id="cell-fast", metric="spread", value=1.0, resampled=[1.0, 2.0])
    with pytest.raises(StoreError, match=r"spread of cell 'cell-fast' .* 999 times, got 2"):
        summary_of(tmp_path, samples_of(10), corpus=[few], items=10, metrics=[SPREAD])


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


def test_a_method_of_fewer_items_is_compared_over_those_it_shares(tmp_path: Path):
    samples = []
    for place in range(4):
        # What only the baseline ran is ten times as long and as much work a token.
        factor = 1 if place < 2 else 10
        samples.append(
            make_sample(
                "cell-plain",
                f"item-{place}",
                seconds=2.0 * factor,
                flops=1e9 * factor,
                peak_bytes=1000 * factor,
                bound_seconds=0.9 * factor,
            )
        )
    samples += [
        make_sample("cell-fast", f"item-{place}", flops=2e9, peak_bytes=1500) for place in range(2)
    ]
    experiment = make_experiment(items=4, metrics=[BINARY])
    verdicts, metrics = summary_of(
        tmp_path,
        samples,
        [
            *make_scores(experiment, "plain", [1.0, 0.0, 1.0, 1.0]),
            *make_scores(experiment, "fast", [1.0, 0.0, None, None])[:2],
        ],
        items=4,
        metrics=[BINARY],
    )
    row = verdicts["fast"]
    assert row["speedup"] == pytest.approx(2.0)
    assert row["work_ratio"] == pytest.approx(2.0)
    assert row["memory_ratio"] == pytest.approx(1.5)
    assert row["step_cost_ratio"] == pytest.approx(1.0)
    assert row["baseline_tokens"] == row["output_tokens"] == 20
    quality = metrics["fast"]
    assert (quality["value"], quality["baseline_value"], quality["difference"]) == (0.5, 0.5, 0.0)
    assert quality["verdict"] == "SAME"  # and no answer is lost: it was never asked for
