"""Verdicts of claims, from arithmetic and from samples with known numbers in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from methods.base import Check
from results.claims import ROUNDING, VERDICTS, Measurements, Settled, counts, read_claims, settle
from results.ingest import ingest, rebuild
from results.records import CellRecord, ExperimentRecord, MetricRecord
from results.store import Store
from results.verify import verify
from tests.results.factory import (
    make_cell,
    make_corpus,
    make_experiment,
    make_run,
    make_samples,
    make_scores,
    make_store,
    write_shard,
)


def make_claim(check: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    claim = {
        "method": "fast",
        "implementation": "ready",
        "card": "methods/toy/fast.toml",
        "id": "F-1",
        "metric": "speed-up",
        "value": "2x",
        "number": 2.0,
        "bound": "exact",
        "unit": "x",
        "baseline": "autoregressive",
        "model": "Vicuna-7B",
        "task": "Spec-Bench",
        "hardware": "A100",
        "where": "abstract",
    }
    if check is not None:
        claim["check"] = {"measure": "speedup", "task": "toy", "model": "tiny", **check}
    return {**claim, **changes}


def verdict_in(path: Path, claim: Mapping[str, Any]) -> Settled:
    """Settle a claim by the index of a store that is made for it."""
    with duckdb.connect(str(ingest(path)), read_only=True) as connection:
        (settled,) = settle([claim], connection)
    return settled


def verdict(claim: Mapping[str, Any]) -> Settled:
    (settled,) = settle([claim])
    return settled


# --- arithmetic ----------------------------------------------------------------------------------


def test_a_ratio_above_its_own_counts_exceeds_the_bound():
    settled = verdict(make_claim(number=9.42, ceiling=9.10, ceiling_from="tokens per step"))
    assert settled.verdict == "exceeds-bound"
    assert (settled.scale, settled.expected) == ("arithmetic", 9.10)
    assert "9.42x is claimed" in settled.detail
    assert "9.1x: tokens per step." in settled.detail


@pytest.mark.parametrize(
    ("number", "bound"), [(9.10, "exact"), (9.15, "up-to"), (9.0, "about"), (20.0, "at-most")]
)
def test_a_ratio_at_its_counts_or_a_limit_from_above_does_not(number: float, bound: str):
    claim = make_claim(number=number, bound=bound, ceiling=9.10, ceiling_from="tokens per step")
    assert verdict(claim).verdict == "not-testable-here"


@given(ceiling=st.floats(0.1, 1e6), share=st.floats(0.01, 1e3))
def test_the_bound_is_exceeded_exactly_beyond_rounding(ceiling: float, share: float):
    claim = make_claim(number=ceiling * share, ceiling=ceiling, ceiling_from="counts")
    exceeds = verdict(claim).verdict == "exceeds-bound"
    if abs(share - (1 + ROUNDING)) > 1e-9:
        assert exceeds == (share > 1 + ROUNDING)


def test_arithmetic_is_stronger_than_a_measurement(tmp_path: Path):
    make_store(tmp_path, {"plain": 1.0, "fast": 2.0})
    claim = make_claim({}, number=3.0, ceiling=2.5, ceiling_from="counts")
    assert verdict_in(tmp_path, claim).verdict == "exceeds-bound"


# --- nothing measured ----------------------------------------------------------------------------


def test_a_planned_method_says_all_that_is_missing():
    settled = verdict(make_claim(implementation="planned", baseline="Medusa"))
    assert settled.verdict == "not-testable-here"
    assert settled.missing == [
        "implementation: the method is planned, methods/toy/fast.toml",
        "weights: Vicuna-7B",
        "data: Spec-Bench",
        "rival: Medusa",
        "hardware: A100",
    ]
    assert all(each in settled.detail for each in settled.missing)
    assert settled.command == "python run.py reproduce fast"


def test_what_the_card_says_is_missing_replaces_the_guess():
    claim = make_claim(hardware="", baseline="Medusa", missing=("rival: trained heads",))
    assert verdict(claim).missing == [
        "rival: trained heads",
        "weights: Vicuna-7B",
        "data: Spec-Bench",
        "hardware: a GPU, the claim names none",
    ]


def test_a_claim_that_nothing_of_ours_measures_says_so_and_names_no_command():
    settled = verdict(make_claim(baseline=""))
    assert settled.missing[-1] == "task: none of ours measures it"
    assert settled.command == ""
    named = verdict(make_claim(baseline="", missing=("task: POPE",)))
    assert "task: none of ours measures it" not in named.missing
    planned = verdict(make_claim(baseline="", implementation="planned"))
    assert not any(each.startswith("task") for each in planned.missing)


def test_a_claim_without_conditions_says_so():
    bare = make_claim(model="", task="", hardware="", baseline="")
    assert verdict(bare).missing == [
        "conditions: the claim states neither model nor task nor hardware"
    ]


def test_a_check_without_measurement_names_the_command_that_measures():
    settled = verdict(make_claim({"paper_model": "hf:a/b"}))
    assert (settled.verdict, settled.command) == (
        "not-testable-here",
        "python run.py reproduce fast",
    )
    assert settled.detail == "not measured yet."


def test_a_planned_method_names_the_model_to_test_it_with():
    settled = verdict(make_claim({"paper_model": "hf:a/b"}, implementation="planned"))
    assert settled.command == "python run.py reproduce fast --model hf:a/b"


# --- embedded ------------------------------------------------------------------------------------


def test_a_small_model_supports_the_direction_and_never_the_number(tmp_path: Path):
    make_store(tmp_path, {"plain": 1.0, "fast": 2.0}, noise=0.01)
    settled = verdict_in(tmp_path, make_claim({"paper_model": "hf:a/b"}))
    assert settled.verdict == "direction"
    assert settled.scale == "embedded"
    assert settled.measured_low is not None
    assert 1 < settled.measured_low < (settled.measured or 0) < (settled.measured_high or 0)
    assert (settled.evidence_experiment, settled.evidence_cell) == ("experiment-1", "cell-fast")
    assert settled.rival_cell == "cell-plain"
    assert settled.command == "python run.py reproduce fast --model hf:a/b"


def test_the_measured_ratio_is_that_of_the_comparison(tmp_path: Path):
    # Of twelve items the ids' order is not the items': resamples must fall on the same ones.
    make_store(tmp_path, {"plain": 1.0, "fast": 2.0}, items=12, repeats=3, noise=0.5)
    index = ingest(tmp_path)
    with duckdb.connect(str(index), read_only=True) as connection:
        (settled,) = settle([make_claim({})], connection)
        published = connection.execute(
            "SELECT speedup, speedup_low, speedup_high FROM comparison WHERE method = 'fast'"
        ).fetchall()
    found = (settled.measured, settled.measured_low, settled.measured_high)
    assert found == pytest.approx(published[0])


def test_the_other_side_is_a_mechanism_that_was_not_reproduced(tmp_path: Path):
    make_store(tmp_path, {"plain": 1.0, "fast": 0.8}, noise=0.01)
    settled = verdict_in(tmp_path, make_claim({}))
    assert settled.verdict == "not-reproduced (mechanism)"
    assert "forwards that were counted allow 0.8" in settled.detail
    below = verdict_in(tmp_path, make_claim({"direction": "below"}))
    assert below.verdict == "direction"


def test_an_interval_around_1_is_undecided_and_says_how_many_items_would_decide(tmp_path: Path):
    make_store(tmp_path, {"plain": 1.0, "fast": 1.02}, noise=0.2, items=16)
    settled = verdict_in(tmp_path, make_claim({}))
    assert settled.verdict == "not-testable-here"
    assert settled.detail.startswith("undecided: speed-up ")
    assert "the interval contains 1.00" in settled.detail
    assert settled.measured_low is not None
    assert settled.measured_low < 1 < (settled.measured_high or 0)
    assert settled.missing[0].startswith("about ")
    assert settled.command == "python run.py reproduce fast --limit 64"


def test_the_number_of_items_grows_with_the_square_of_the_width():
    from results.claims import Cell, _undecided
    from results.statistics import Estimate

    cell = Cell("e", "c", "r", "toy", "tiny", "cpu", "embedded", 16, 0.05, 0.02, None, None)
    check = {"measure": "speedup", "direction": "above"}
    # Half the width is twice the distance on the log scale: four times the items, 48 more.
    estimate = Estimate(1.1, 1.1 ** (1 - 2), 1.1 ** (1 + 2))
    assert _undecided(check, cell, estimate)[1] == "about 48 more items"


def test_a_rival_in_the_same_experiment_is_compared_with(tmp_path: Path):
    make_store(tmp_path, {"plain": 1.0, "fast": 2.0, "other": 1.5}, noise=0.01)
    settled = verdict_in(tmp_path, make_claim({"rival": "other"}))
    assert settled.verdict == "direction"
    assert settled.measured == pytest.approx(2 / 1.5, rel=0.05)
    assert settled.rival_cell == "cell-other"
    assert "against other" in settled.detail


def test_a_rival_of_another_experiment_is_no_rival(tmp_path: Path):
    make_store(tmp_path, {"plain": 1.0, "fast": 2.0}, noise=0.01)
    store, other = Store(tmp_path), make_experiment(("plain", "other"), experiment_id="second")
    write(store, other, {"plain": 1.0, "other": 1.5})
    claim = make_claim({"rival": "other"})
    assert verdict_in(tmp_path, claim).detail == "not measured yet."
    with duckdb.connect(str(ingest(tmp_path)), read_only=True) as connection:
        check = {**vars(Check(measure="speedup", task="", model="")), **claim["check"]}
        assert Measurements(connection).find("fast", check, "embedded") is None


def write(
    store: Store,
    experiment: ExperimentRecord,
    speeds: Mapping[str, float],
    cells: Mapping[str, CellRecord] | None = None,
    scores: Mapping[str, list[float | None]] | None = None,
    noise: float = 0.01,
) -> None:
    write_shard(
        store,
        experiment,
        [(cells or {}).get(name, make_cell(experiment, name)) for name in speeds],
        make_samples(experiment, speeds, noise),
        [
            score
            for name, values in (scores or {}).items()
            for score in make_scores(experiment, name, values)
        ],
    )
    store.write_run(make_run([experiment], run_id=f"run-of-{experiment.experiment_id}"))


def test_settings_that_the_check_names_must_be_those_of_the_cell(tmp_path: Path):
    experiment = make_experiment()
    params = {"nodes": 1, "state": "cold"}
    cell = make_cell(experiment, "fast", params=params)
    write(Store(tmp_path), experiment, {"plain": 1.0, "fast": 2.0}, {"fast": cell})
    assert verdict_in(tmp_path, make_claim({"params": {"state": "cold"}})).verdict == "direction"
    for wrong in ({"state": "session"}, {"nodes": True}, {"missing": 1}):
        assert verdict_in(tmp_path, make_claim({"params": wrong})).detail == "not measured yet."


def test_the_newest_cell_counts_unless_it_is_a_trial_of_few_items(tmp_path: Path):
    store = Store(tmp_path)
    for name, day, items, speed in (("old", 1, 8, 0.5), ("new", 2, 8, 2.0), ("trial", 3, 4, 0.5)):
        experiment = make_experiment(
            items=items, experiment_id=name, created=f"2025-01-0{day}T00:00:00+00:00"
        )
        write(store, experiment, {"plain": 1.0, "fast": speed})
    settled = verdict_in(tmp_path, make_claim({}))
    assert (settled.evidence_experiment, settled.verdict) == ("new", "direction")


def test_a_failed_cell_is_no_evidence(tmp_path: Path):
    experiment = make_experiment()
    cell = make_cell(experiment, "fast", status="failed", error="it broke")
    write(Store(tmp_path), experiment, {"plain": 1.0, "fast": 2.0}, {"fast": cell})
    assert verdict_in(tmp_path, make_claim({})).detail == "not measured yet."


# --- other measures ------------------------------------------------------------------------------


def test_tokens_per_forward_is_that_of_the_comparison(tmp_path: Path):
    make_store(tmp_path, {"plain": 1.0, "fast": 2.0})
    settled = verdict_in(tmp_path, make_claim({"measure": "tokens_per_forward"}, unit="tokens"))
    assert settled.verdict == "direction"
    assert settled.measured == pytest.approx(2.0, rel=0.05)


def test_more_work_is_on_the_wrong_side_of_a_claim_of_less(tmp_path: Path):
    make_store(tmp_path, {"plain": 1.0, "fast": 2.0})  # its samples count twice the operations
    less = verdict_in(tmp_path, make_claim({"measure": "work", "direction": "below"}))
    assert (less.verdict, less.measured) == ("not-reproduced (mechanism)", pytest.approx(2.0))
    more = verdict_in(tmp_path, make_claim({"measure": "work"}))
    assert more.verdict == "direction"


def test_acceptance_rates_are_compared_by_drafts(tmp_path: Path):
    make_store(tmp_path, {"plain": 1.0, "fast": 2.0, "other": 1.5})
    claim = make_claim({"measure": "acceptance_rate", "rival": "other"})
    with duckdb.connect(str(ingest(tmp_path)), read_only=True) as connection:
        rates = dict(
            connection.execute("SELECT method, acceptance_rate FROM comparison").fetchall()
        )
    settled = verdict_in(tmp_path, claim)
    assert settled.verdict == "direction"
    assert settled.measured == pytest.approx(rates["fast"] / rates["other"])


def test_nothing_accepted_is_nothing_to_divide_by(tmp_path: Path):
    make_store(tmp_path, {"plain": 1.0, "fast": 2.0})
    claim = make_claim({"measure": "acceptance_rate", "rival": "plain"})
    assert verdict_in(tmp_path, claim).detail == "not measured yet."


@pytest.mark.parametrize(
    ("fast", "direction", "expected"),
    [
        ([1.0] * 30 + [0.0] * 10, "above", "direction"),
        ([0.0] * 40, "above", "not-reproduced (mechanism)"),
        ([1.0] * 30 + [0.0] * 10, "no-loss", "direction"),
        ([0.0] * 40, "no-loss", "not-reproduced (mechanism)"),
        ([1.0] * 11 + [0.0] * 29, "no-loss", "not-testable-here"),
    ],
)
@pytest.mark.parametrize("rival", ["", "plain"])
def test_quality_is_a_difference_with_a_margin_for_no_loss(
    tmp_path: Path, fast: list[float], direction: str, expected: str, rival: str
):
    experiment = make_experiment(items=40)
    scores = {"plain": [1.0] * 12 + [0.0] * 28, "fast": fast}
    write(Store(tmp_path), experiment, {"plain": 1.0, "fast": 1.0}, scores=scores)
    claim = make_claim({"measure": "quality", "direction": direction, "rival": rival})
    settled = verdict_in(tmp_path, claim)
    assert settled.verdict == expected, settled.detail
    assert settled.measured == pytest.approx((sum(fast) - 12) / 40)


@pytest.mark.parametrize("rival", ["", "other"])
@pytest.mark.parametrize(
    ("metric", "measured", "expected"),
    [
        ("", 0.5, "direction"),
        ("accuracy", 0.5, "direction"),
        # Fewer errors are better: more of them count as a loss.
        ("errors", -0.25, "not-reproduced (mechanism)"),
        ("precision", None, "not-testable-here"),
    ],
)
def test_a_check_may_name_another_metric_than_the_headline(
    tmp_path: Path, rival: str, metric: str, measured: float | None, expected: str
):
    methods = ("plain", "fast", "other")
    metrics = [
        MetricRecord(name=name, unit="fraction", kind="mean", higher_is_better=name == "accuracy")
        for name in ("accuracy", "errors")
    ]
    experiment = make_experiment(methods, items=40, metrics=metrics)
    solved = {"plain": 10, "fast": 30, "other": 10}
    failed = {"plain": 5, "fast": 15, "other": 5}
    scores = [
        replace(score, metric=name)
        for name, counts in (("accuracy", solved), ("errors", failed))
        for method, count in counts.items()
        for score in make_scores(experiment, method, [1.0] * count + [0.0] * (40 - count))
    ]
    write_shard(
        Store(tmp_path),
        experiment,
        [make_cell(experiment, method) for method in methods],
        make_samples(experiment, dict.fromkeys(methods, 1.0)),
        scores,
    )
    check = {"measure": "quality", "metric": metric, "rival": rival}
    settled = verdict_in(tmp_path, make_claim(check))
    assert settled.verdict == expected, settled.detail
    assert settled.measured == (None if measured is None else pytest.approx(measured))
    if measured is not None and metric:
        assert settled.detail.startswith(metric)
    # Beside a claim about another metric of the same cell it gets the same answer.
    beside = make_claim({**check, "metric": "errors" if metric == "accuracy" else "accuracy"})
    with duckdb.connect(str(ingest(tmp_path)), read_only=True) as connection:
        assert settle([beside, make_claim(check)], connection)[1].measured == settled.measured


@pytest.mark.parametrize(
    ("solved", "word"),
    [(40, "BETTER"), (19, "NO LOSS"), (12, "SAME"), (9, "INCONCLUSIVE"), (0, "WORSE")],
)
def test_no_loss_is_what_the_quality_verdict_calls_so(tmp_path: Path, solved: int, word: str):
    experiment = make_experiment(items=40, quality_margin=0.1)
    scores = {
        name: [1.0] * count + [0.0] * (40 - count)
        for name, count in (("plain", 12), ("fast", solved))
    }
    write(Store(tmp_path), experiment, {"plain": 1.0, "fast": 1.0}, scores=scores)
    claim = make_claim({"measure": "quality", "direction": "no-loss"})
    is_met = verdict_in(tmp_path, claim).verdict == "direction"
    with duckdb.connect(str(ingest(tmp_path)), read_only=True) as connection:
        found = connection.execute(
            "SELECT quality_verdict FROM comparison WHERE method = 'fast'"
        ).fetchone()
    assert found == (word,)
    assert is_met == (word in ("BETTER", "NO LOSS", "SAME"))


@pytest.mark.parametrize(("is_better", "expected"), [(True, "direction"), (False, "not-repr")])
def test_a_corpus_metric_is_compared_with_a_rival_on_the_same_resamples(
    tmp_path: Path, is_better: bool, expected: str
):
    metric = MetricRecord(name="spearman", unit="points", kind="corpus", higher_is_better=is_better)
    methods = ("plain", "fast", "other")
    experiment = make_experiment(methods, items=20, metrics=[metric])
    gains = {"plain": 0.0, "fast": 3.0, "other": 2.0}
    write_shard(
        Store(tmp_path),
        experiment,
        [make_cell(experiment, method) for method in methods],
        make_samples(experiment, dict.fromkeys(methods, 1.0)),
        corpus=[
            # A mean with a spread of its own, far wider than what is between fast and other.
            make_corpus(
                experiment,
                method,
                lambda drawn, gain=gain: float(drawn.mean() + gain * (drawn < 15).mean()),  # type: ignore[misc]  # bound early
            )
            for method, gain in gains.items()
        ],
    )
    settled = verdict_in(tmp_path, make_claim({"measure": "quality", "rival": "other"}))
    assert settled.verdict.startswith(expected)
    assert settled.measured == pytest.approx(0.75 if is_better else -0.75)
    assert settled.measured_low is not None
    assert settled.measured_high is not None
    assert settled.measured_high - settled.measured_low < 0.6
    missing = verdict_in(tmp_path, make_claim({"measure": "quality", "rival": "absent"}))
    assert missing.detail == "not measured yet."


def test_decoding_is_compared_without_the_prefill(tmp_path: Path):
    make_store(tmp_path, {"plain": 1.0, "fast": 2.0, "other": 1.5}, noise=0.0)
    for rival, expected in (("", 2.0), ("other", 2 / 1.5)):
        claim = make_claim({"measure": "decode_speedup", "rival": rival})
        settled = verdict_in(tmp_path, claim)
        assert settled.verdict == "direction"
        assert settled.measured == pytest.approx(expected)


def test_a_check_may_ask_for_settings_of_the_task(tmp_path: Path):
    for number, (task, speed) in enumerate([("lee", 1.5), ("wordsim", 3.0)]):
        experiment = make_experiment(
            items=16,
            experiment_id=f"e{number}",
            task_params={"task": task, "temperature": 0.6},
            created=f"2025-01-0{number + 1}T00:00:00+00:00",
        )
        write(Store(tmp_path), experiment, {"plain": 1.0, "fast": speed}, noise=0.0)
    found = {
        str(params): verdict_in(tmp_path, make_claim({"task_params": params})).evidence_experiment
        for params in (
            {},
            {"task": "lee"},
            {"task": "wordsim", "temperature": 0.6},
            {"task": "lee", "temperature": 0.7},
            {"dtype": "float32"},
        )
    }
    assert list(found.values()) == ["e1", "e0", "e1", "", ""]


def test_settings_of_the_paper_s_task_are_its_own(tmp_path: Path):
    for number, subset in enumerate(("small", "large")):
        at_paper_scale(
            tmp_path,
            2.0,
            experiment_id=f"e{number}",
            task_params={"subset": subset},
            created=f"2025-01-0{number + 1}T00:00:00+00:00",
        )

    def evidence(**check: Any) -> str:
        return verdict_in(tmp_path, make_claim({**PAPER, **check})).evidence_experiment

    assert evidence() == "e1"
    assert evidence(paper_task_params={"subset": "small"}) == "e0"
    # The same task asks for the same settings; another one for none of ours.
    assert evidence(task_params={"subset": "small"}) == "e0"
    assert evidence(task="toy-mini", task_params={"subset": "small"}) == "e1"


def test_identical_outputs_have_no_loss_to_sample(tmp_path: Path):
    make_store(tmp_path, {"plain": 1.0, "fast": 2.0, "other": 1.5}, same_output=True)
    for rival in ("", "other"):
        claim = make_claim({"measure": "quality", "direction": "no-loss", "rival": rival})
        settled = verdict_in(tmp_path, claim)
        assert (settled.verdict, settled.measured_low) == ("direction", 0.0)


@pytest.mark.parametrize(
    ("checks", "expected"), [(10.0, "direction"), (200.0, "not-testable-here")]
)
def test_a_note_of_one_text_decides_tenfold_differences_only(
    tmp_path: Path, checks: float, expected: str
):
    experiment = make_experiment(("plain", "fast", "other"))
    cells = {
        name: make_cell(experiment, name, notes={"checks": value})
        for name, value in (("fast", checks), ("other", 1000.0))
    }
    write(Store(tmp_path), experiment, {"plain": 1.0, "fast": 1.0, "other": 1.0}, cells)
    claim = make_claim(
        {"measure": "note", "quantity": "checks", "rival": "other", "direction": "below"}
    )
    assert verdict_in(tmp_path, claim).verdict == expected


# --- computed ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state_bytes", "expected"),
    [
        (49152 * 64, "reproduced"),
        (49152 * 16, "reproduced"),  # a limit, not a number to come close to
        (49152 * 66, "not-reproduced"),
    ],
)
def test_what_does_not_depend_on_scale_can_be_reproduced(
    tmp_path: Path, state_bytes: int, expected: str
):
    experiment = make_experiment()
    cell = make_cell(experiment, "fast", notes={"state_bytes": state_bytes})
    write(Store(tmp_path), experiment, {"plain": 1.0, "fast": 2.0}, {"fast": cell})
    check = {"measure": "computed", "quantity": "state_bytes", "times": 32000 / 49152 / 2**20}
    claim = make_claim(check, value="< 2 MB", number=2.0, bound="at-most", unit="MB")
    settled = verdict_in(tmp_path, claim)
    assert settled.verdict == expected
    assert settled.measured == pytest.approx(state_bytes / 49152 * 32000 / 2**20)
    assert "does not depend on scale" in settled.detail


def test_sums_of_samples_can_be_computed_with_and_unknown_quantities_cannot(tmp_path: Path):
    make_store(tmp_path, {"plain": 1.0, "fast": 2.0})
    none = make_claim({"measure": "computed", "quantity": "draft_forwards", "expected": 0.0})
    assert verdict_in(tmp_path, none).verdict == "reproduced"
    check = {"measure": "computed", "quantity": "flops", "per": "output_tokens", "expected": 2e6}
    meant = verdict_in(tmp_path, make_claim(check, value="-90%", number=-90.0, unit="%"))
    assert meant.verdict == "reproduced"
    # The quantity is not in the number's unit.
    assert "gives 2000000; claimed -90%, which means 2000000. This" in meant.detail
    unknown = make_claim({"measure": "computed", "quantity": "no-such-thing"})
    assert verdict_in(tmp_path, unknown).detail == "not measured yet."


# --- the paper's scale ---------------------------------------------------------------------------

PAPER = {"paper_model": "hf:a/b", "paper_task": "toy", "paper_hardware": ("a100-40gb",)}


def at_paper_scale(path: Path, speed: float, noise: float = 0.01, **changes: Any) -> None:
    options = {"model": "hf:a/b", "hardware": "a100-40gb", "scale": "paper", **changes}
    experiment = make_experiment(items=16, **options)
    write(Store(path), experiment, {"plain": 1.0, "fast": speed}, noise=noise)


@pytest.mark.parametrize(
    ("speed", "bound", "expected"),
    [
        (2.0, "exact", "reproduced"),
        (1.85, "exact", "reproduced"),
        (3.0, "exact", "reproduced"),
        (1.5, "exact", "direction"),
        (1.75, "about", "reproduced"),
        (1.75, "exact", "direction"),
        (1.95, "at-least", "direction"),
        (0.7, "exact", "not-reproduced"),
    ],
)
def test_at_the_papers_scale_the_number_itself_is_judged(
    tmp_path: Path, speed: float, bound: str, expected: str
):
    at_paper_scale(tmp_path, speed)
    settled = verdict_in(tmp_path, make_claim(PAPER, bound=bound))
    assert settled.verdict == expected, settled.detail
    assert settled.scale == "paper"
    assert settled.command == ""


def test_an_interval_that_excludes_the_number_refutes_it_though_it_contains_1(tmp_path: Path):
    at_paper_scale(tmp_path, 1.0, noise=0.05)
    assert verdict_in(tmp_path, make_claim(PAPER)).verdict == "not-reproduced"


def test_an_interval_that_holds_both_1_and_the_number_is_undecided(tmp_path: Path):
    at_paper_scale(tmp_path, 1.5, noise=1.5)
    settled = verdict_in(tmp_path, make_claim(PAPER))
    assert (settled.measured_low or 9) < 1 < 1.8 < (settled.measured_high or 0)
    assert settled.verdict == "not-testable-here"
    assert settled.detail.startswith("undecided")


def test_a_claim_without_number_is_judged_by_its_sign(tmp_path: Path):
    at_paper_scale(tmp_path, 1.5)
    assert verdict_in(tmp_path, make_claim(PAPER, number=None)).verdict == "reproduced"
    wrong = make_claim({**PAPER, "direction": "below"}, number=None)
    assert verdict_in(tmp_path, wrong).verdict == "not-reproduced"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "other"}, "our task is other, the claim's Spec-Bench"),
        ({"hardware": "h100-sxm"}, "our hardware is h100-sxm, the claim's A100"),
    ],
)
def test_another_task_or_machine_is_another_protocol(
    tmp_path: Path, changes: dict[str, Any], words: str
):
    at_paper_scale(tmp_path, 2.0, **changes)
    settled = verdict_in(tmp_path, make_claim(PAPER))
    assert settled.verdict == "protocol-differs"
    assert words in settled.detail
    assert "Measured there: speed-up 1.9" in settled.detail


def test_the_papers_scale_comes_before_ours_and_has_settings_of_its_own(tmp_path: Path):
    make_store(tmp_path, {"plain": 1.0, "fast": 0.5}, noise=0.01)
    at_paper_scale(tmp_path, 2.0, experiment_id="paper")
    assert verdict_in(tmp_path, make_claim(PAPER)).verdict == "reproduced"
    other = make_claim({**PAPER, "paper_params": {"nodes": 64}})
    assert verdict_in(tmp_path, other).verdict == "not-reproduced (mechanism)"


def test_expected_says_what_a_percentage_means_as_a_ratio(tmp_path: Path):
    at_paper_scale(tmp_path, 1.3)
    claim = make_claim({**PAPER, "expected": 1.3}, number=30.0, unit="%")
    assert verdict_in(tmp_path, claim).verdict == "reproduced"


def test_a_protocol_that_differs_is_said_beside_what_was_measured(tmp_path: Path):
    make_store(tmp_path, {"plain": 1.0, "fast": 2.0}, noise=0.01)
    settled = verdict_in(tmp_path, make_claim({}, differs="they time the prefill alone"))
    assert settled.verdict == "protocol-differs"
    assert settled.detail.startswith("they time the prefill alone. Measured: speed-up 1.9")
    assert settled.evidence_cell == "cell-fast"
    assert verdict(make_claim(differs="so it is")).detail == "so it is."


# --- in the index --------------------------------------------------------------------------------


def rows(index: Path) -> list[tuple[Any, ...]]:
    with duckdb.connect(str(index), read_only=True) as connection:
        return connection.execute("SELECT * FROM claim_verdicts ORDER BY ALL").fetchall()


def test_verdicts_are_in_the_index_and_come_back_when_it_is_rebuilt(tmp_path: Path):
    make_store(tmp_path, {"plain": 1.0, "fast": 2.0}, noise=0.01)
    claims = [make_claim({}), make_claim(id="F-2", implementation="planned")]
    index = ingest(tmp_path, claims)
    before = rows(index)
    assert [row[2] for row in before] == ["direction", "not-testable-here"]
    index.unlink()
    assert rows(rebuild(tmp_path, claims)) == before


def test_claims_read_from_the_index_are_those_handed_in(tmp_path: Path):
    claims = [make_claim({"params": {"state": "cold"}}, ceiling=None), make_claim(id="F-2")]
    with duckdb.connect(str(ingest(tmp_path, claims)), read_only=True) as connection:
        found = read_claims(connection)
    assert [each["id"] for each in found] == ["F-1", "F-2"]
    for claim, again in zip(claims, found, strict=True):
        assert {name: again[name] for name in claim} == claim


def test_verify_finds_a_verdict_that_does_not_follow(tmp_path: Path):
    make_store(tmp_path, {"plain": 1.0, "fast": 2.0}, noise=0.01)
    index = ingest(tmp_path, [make_claim({})])
    assert verify(tmp_path) == []
    with duckdb.connect(str(index)) as connection:
        connection.execute("UPDATE claim_verdicts SET verdict = 'reproduced'")
    (problem,) = verify(tmp_path)
    assert "claim_verdicts: fast, F-1: verdict is 'reproduced', recomputed 'direction'" in problem


def test_counts_name_what_was_given_in_the_order_of_the_verdicts():
    settled = settle([make_claim(), make_claim(number=9.0, ceiling=2.0, ceiling_from="counts")])
    assert counts(settled) == {"exceeds-bound": 1, "not-testable-here": 1}
    assert list(counts(settled)) == [each for each in VERDICTS if each in counts(settled)]
