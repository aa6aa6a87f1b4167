"""A speed-up taken apart, and predicted, on constructed samples and on recorded ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hardware.profile import StepCost
from results.ingest import ingest
from results.records import SampleRecord
from results.store import Store
from results.why import Explanation, explain
from tests.results.factory import make_cell, make_experiment, make_run, make_sample, write_shard

RECORDED = json.loads(
    (Path(__file__).parent / "fixtures" / "recorded_run.json").read_text(encoding="utf-8")
)
CURVE = StepCost((1, 8, 64), (32, 256), ((0.010, 0.014, 0.050), (0.012, 0.017, 0.060)))
KV_TOKEN_BYTES = 100
FACTS = {
    "kv_bytes_per_token": KV_TOKEN_BYTES,
    "weight_bytes": 4_000_000,
    "matrix_parameters": 1_000_000,
    "dtype": "float32",
}


def decoded(
    cell: str,
    item: str,
    prompt: int,
    forwards: list[tuple[int, int]],
    overhead: float,
    latency: Callable[[int, int], float] = CURVE.at,
) -> SampleRecord:
    """Return the sample of a text: (width, tokens emitted) of each forward after the prefill."""
    context, bound, read = prompt, 0.0, prompt
    for width, emitted in forwards:
        bound += latency(width, context)
        read += context + width
        context += emitted
    tokens = sum(emitted for _, emitted in forwards)
    return make_sample(
        cell,
        item,
        seconds=0.05 + overhead * bound,
        prefill_seconds=0.05,
        output_tokens=1 + tokens,
        decode_tokens=tokens,
        target_forwards=len(forwards),
        forward_tokens=sum(width for width, _ in forwards),
        accepted_tokens=tokens - len(forwards),
        kv_bytes=read * KV_TOKEN_BYTES,
        bound_seconds=bound,
    )


def explained(
    path: Path,
    overhead: float = 1.0,
    own_overhead: float = 1.1,
    width: int = 8,
    emitted: int = 2,
    **changes: Any,
) -> Explanation:
    """Return the explanation of a method that emits `emitted` tokens a forward of `width`."""
    experiment = make_experiment(
        items=6, step_cost=dataclasses.asdict(CURVE), **{"facts": FACTS, **changes}
    )
    samples = []
    for place, item in enumerate(experiment.items):
        prompt, steps = 20 + 7 * place, 30 + place
        plain = [(1, 1)] * (steps * emitted)
        samples.append(decoded("cell-plain", item, prompt, plain, overhead))
        samples.append(decoded("cell-fast", item, prompt, [(width, emitted)] * steps, own_overhead))
    return read_back(path, experiment, samples)


def read_back(path: Path, experiment: Any, samples: list[SampleRecord]) -> Explanation:
    store = Store(path)
    cells = [make_cell(experiment, name) for name in ("plain", "fast")]
    write_shard(store, experiment, cells, samples)
    store.write_run(make_run([experiment]))
    with duckdb.connect(str(ingest(path)), read_only=True) as connection:
        found = explain(connection, experiment.experiment_id, "cell-fast")
    assert found is not None
    return found


# Each example writes a store, so there are few of them and none to make a failure smaller.
@settings(max_examples=6, deadline=None, phases=[Phase.generate])
@given(
    overhead=st.floats(0.5, 3),
    own_overhead=st.floats(0.5, 3),
    width=st.integers(1, 64),
    emitted=st.integers(1, 4),
)
def test_the_parts_multiply_to_the_speed_up(
    tmp_path_factory: pytest.TempPathFactory,
    overhead: float,
    own_overhead: float,
    width: int,
    emitted: int,
):
    found = explained(tmp_path_factory.mktemp("store"), overhead, own_overhead, width, emitted)
    decoding = found.tokens_per_forward / found.step_cost_ratio / found.overhead_ratio
    assert decoding == pytest.approx(found.decode_speedup)
    assert decoding * found.rest == pytest.approx(found.speedup)
    assert found.tokens_per_forward == pytest.approx(emitted)
    assert found.overhead_ratio == pytest.approx(own_overhead / overhead)
    assert found.draft_share == pytest.approx(1 - overhead / own_overhead)


def test_a_curve_that_was_measured_too_slow_on_both_sides_cancels(tmp_path: Path):
    fast, slow = explained(tmp_path / "a"), explained(tmp_path / "b", 0.7, 0.77)
    for name in ("tokens_per_forward", "step_cost_ratio", "overhead_ratio"):
        assert getattr(slow, name) == pytest.approx(getattr(fast, name))


def test_the_prompts_length_follows_from_the_cache_that_plain_decoding_reads(tmp_path: Path):
    prompts = explained(tmp_path).prompt_tokens()
    assert prompts is not None
    assert prompts.tolist() == [20 + 7 * place for place in range(6)]


def test_counts_and_the_curve_predict_the_measured_speed_up(tmp_path: Path):
    found = explained(tmp_path, 1.0, 1.1)
    predicted = found.predict(lambda width, context: CURVE.at(round(width), round(context)))
    assert predicted == pytest.approx(found.bound, rel=0.01)
    assert predicted == pytest.approx(found.speedup, rel=0.15)
    assert predicted > found.speedup  # drafting is not free


def test_a_prediction_follows_the_curve(tmp_path: Path):
    found = explained(tmp_path, emitted=2)
    flat = found.predict(lambda width, context: 1.0, prefill=lambda width, context: 0.0)
    steep = found.predict(lambda width, context: width, prefill=lambda width, context: 0.0)
    tokens = found.own.output_tokens.sum()
    assert flat == pytest.approx(found.baseline.forwards.sum() / found.own.forwards.sum())
    assert steep == pytest.approx((tokens - 6) / (8 * (tokens - 6) / 2))
    steps = found.step_seconds(lambda width, context: width)
    assert steps == pytest.approx((1, 8))


def test_the_prefill_holds_a_speed_up_back(tmp_path: Path):
    found = explained(tmp_path)
    assert found.rest < 1
    assert found.speedup < found.decode_speedup


def recorded(path: Path, task: str, method: str) -> Explanation:
    """Return the explanation of a recorded cell, through a store and its index."""
    (run,) = [each for each in RECORDED["experiments"] if each["task"] == task]
    cells = {"plain": run["cells"]["autoregressive"], "fast": run["cells"][method]}
    experiment = make_experiment(
        items=len(cells["plain"]["seconds"]), step_cost=run["step_cost"], facts=run["facts"]
    )
    samples = [
        make_sample(f"cell-{name}", item, **{key: column[place] for key, column in cell.items()})
        for name, cell in cells.items()
        for place, item in enumerate(experiment.items)
    ]
    return read_back(path, experiment, samples)


@pytest.mark.parametrize("method", ["prompt-lookup", "random-drafts", "token-recycling"])
@pytest.mark.parametrize("task", ["humaneval", "humaneval-mini"])
def test_recorded_speed_ups_are_predicted_within_15_percent(tmp_path: Path, task: str, method: str):
    found = recorded(tmp_path, task, method)
    assert found.step_cost is not None
    curve = StepCost(
        tuple(found.step_cost["widths"]),
        tuple(found.step_cost["contexts"]),
        tuple(map(tuple, found.step_cost["seconds"])),
    )

    def latency(width: float, context: float) -> float:
        low, high = (curve.at(int(width) + more, round(context)) for more in (0, 1))
        return low + (high - low) * (width - int(width))

    assert found.predict(latency) == pytest.approx(found.speedup, rel=0.15)


def test_the_plain_step_alone_would_not_predict_them(tmp_path: Path):
    found = recorded(tmp_path, "humaneval", "random-drafts")
    free = found.predict(lambda width, context: 0.05)
    assert free is not None
    assert free > 1.08 * found.speedup


def test_there_is_nothing_to_explain_about_the_baseline_or_a_failure(tmp_path: Path):
    experiment = make_experiment(step_cost=dataclasses.asdict(CURVE), facts=FACTS)
    cells = [
        make_cell(experiment, "plain"),
        make_cell(experiment, "fast", status="failed", error="it broke"),
    ]
    samples = [decoded("cell-plain", item, 20, [(1, 1)] * 9, 1.0) for item in experiment.items]
    write_shard(Store(tmp_path), experiment, cells, samples)
    with duckdb.connect(str(ingest(tmp_path)), read_only=True) as connection:
        for cell in ("cell-plain", "cell-fast", "no-such-cell"):
            assert explain(connection, experiment.experiment_id, cell) is None


@pytest.mark.parametrize("missing", ["target_forwards", "bound_seconds", "prefill_seconds"])
def test_without_counts_nothing_is_explained(tmp_path: Path, missing: str):
    experiment = make_experiment(items=2, facts=FACTS)
    samples = [
        dataclasses.replace(decoded(cell, item, 20, [(1, 1)] * 9, 1.0), **{missing: None})
        if cell == "cell-fast"
        else decoded(cell, item, 20, [(1, 1)] * 9, 1.0)
        for cell in ("cell-plain", "cell-fast")
        for item in experiment.items
    ]
    write_shard(
        Store(tmp_path), experiment, [make_cell(experiment, n) for n in ("plain", "fast")], samples
    )
    with duckdb.connect(str(ingest(tmp_path)), read_only=True) as connection:
        assert explain(connection, experiment.experiment_id, "cell-fast") is None


def test_without_cache_bytes_there_are_parts_and_no_prediction(tmp_path: Path):
    experiment = make_experiment(items=2, facts=FACTS)
    samples = [
        dataclasses.replace(decoded(cell, item, 20, [(1, 1)] * 9, 1.0), kv_bytes=None)
        for cell in ("cell-plain", "cell-fast")
        for item in experiment.items
    ]
    found = read_back(tmp_path, experiment, samples)
    assert found.speedup == pytest.approx(1.0)
    assert found.prompt_tokens() is None
    assert found.predict(lambda width, context: 1.0) is None
    assert found.step_seconds(lambda width, context: 1.0) is None
    assert np.isnan(found.own.kv_bytes).all()
