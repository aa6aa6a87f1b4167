"""Synthetic records: what a runner would have written, with known numbers in it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from results import statistics
from results.records import (
    CellRecord,
    CorpusRecord,
    ExperimentRecord,
    MetricRecord,
    RunRecord,
    SampleRecord,
    ScoreRecord,
)
from results.store import Store

BINARY = MetricRecord(name="pass@1", unit="fraction", kind="binary", higher_is_better=True)


def make_experiment(
    methods: Sequence[str] = ("plain", "fast"), items: int = 8, **changes: Any
) -> ExperimentRecord:
    """Return an experiment whose first method is the baseline."""
    record = ExperimentRecord(
        experiment_id="experiment-1",
        run_id="run-1",
        task="toy",
        task_params={"prompt": "raw"},
        task_version="1.0",
        task_hash="task-hash",
        model="tiny",
        model_params={},
        model_hash="model-hash",
        hardware="cpu-test",
        scenario="latency",
        seed=0,
        scale="embedded",
        margin=0.05,
        quality_margin=0.02,
        items=[f"item-{number}" for number in range(items)],
        groups=[f"item-{number}" for number in range(items)],
        repeats=1,
        baseline=f"cell-{methods[0]}",
        cells=[f"cell-{method}" for method in methods],
        metrics=[BINARY],
        step_cost={"widths": [1, 8], "contexts": [16], "seconds": [[0.01, 0.02]]},
        environment={"cpu_model": "Test CPU", "cpu_available_cores": 2, "torch_version": "2"},
        created="2025-01-01T00:00:00+00:00",
    )
    return dataclasses.replace(record, **changes)


def make_cell(experiment: ExperimentRecord, name: str, **changes: Any) -> CellRecord:
    is_baseline = f"cell-{name}" == experiment.baseline
    record = CellRecord(
        cell_id=f"cell-{name}",
        experiment_id=experiment.experiment_id,
        method=name,
        params={},
        family="toy",
        role="baseline" if is_baseline else "method",
        declared_output="identical",
        status="ok",
        output_check="identical",
        seconds={"measured": 4.0, "harness": 0.1, "wall": 10.0},
    )
    return dataclasses.replace(record, **changes)


def make_sample(
    cell_id: str = "cell-plain", item_id: str = "item-0", **changes: Any
) -> SampleRecord:
    record = SampleRecord(
        cell_id=cell_id,
        item_id=item_id,
        repeat=0,
        position=0,
        seconds=1.0,
        device_seconds=None,
        cpu_seconds=2.0,
        prefill_seconds=0.1,
        output_tokens=10,
        decode_tokens=9,
        target_forwards=9,
        forward_tokens=9,
        draft_forwards=0,
        accepted_tokens=0,
        flops=1e9,
        kv_bytes=1000,
        peak_bytes=1_000_000,
        energy_j=None,
        bound_seconds=0.9,
        output_digest="digest",
        output="text",
        output_ids=[1, 2, 3],
    )
    return dataclasses.replace(record, **changes)


def make_samples(
    experiment: ExperimentRecord,
    speeds: Mapping[str, float],
    noise: float = 0.05,
    seed: int = 0,
    same_output: bool = False,
) -> list[SampleRecord]:
    """Return a sample of every method, item and repeat; `speeds` are relative to the first."""
    random = np.random.default_rng(seed)
    samples = []
    for item in experiment.items:
        tokens = int(random.integers(10, 100))
        for repeat in range(experiment.repeats):
            for position, (method, speed) in enumerate(speeds.items()):
                forwards = max(1, round((tokens - 1) / speed))
                decode = 0.01 * (tokens - 1) / speed
                text = item if same_output else f"{item} {method}"
                samples.append(
                    make_sample(
                        f"cell-{method}",
                        item,
                        repeat=repeat,
                        position=position,
                        seconds=float((0.02 + decode) * random.lognormal(0, noise)),
                        prefill_seconds=0.02,
                        output_tokens=tokens,
                        decode_tokens=tokens - 1,
                        target_forwards=forwards,
                        forward_tokens=2 * forwards,
                        accepted_tokens=tokens - 1 - forwards,
                        flops=1e6 * tokens * (1 if speed == 1 else 2),
                        bound_seconds=decode,
                        output_digest=hashlib.sha256(text.encode()).hexdigest(),
                        output=text,
                    )
                )
    return samples


def make_scores(
    experiment: ExperimentRecord, method: str, values: Sequence[float | None]
) -> list[ScoreRecord]:
    return [
        ScoreRecord(
            cell_id=f"cell-{method}",
            item_id=item,
            metric=experiment.metrics[0].name,
            value=value,
            unscored="" if value is not None else "no answer found",
        )
        for item, value in zip(experiment.items, values, strict=True)
    ]


def make_corpus(
    experiment: ExperimentRecord, method: str, metric: Callable[[np.ndarray], float]
) -> CorpusRecord:
    """Return the headline metric of a method, as a function of the places of drawn items."""
    value, *resampled = (
        float(metric(drawn)) for drawn in statistics.corpus_draws(len(experiment.items))
    )
    return CorpusRecord(
        cell_id=f"cell-{method}",
        metric=experiment.metrics[0].name,
        value=None if np.isnan(value) else value,
        resampled=resampled,
    )


def write_shard(
    store: Store,
    experiment: ExperimentRecord,
    cells: Sequence[CellRecord],
    samples: Sequence[SampleRecord],
    scores: Sequence[ScoreRecord] = (),
    *,
    corpus: Sequence[CorpusRecord] = (),
    seal: bool = True,
) -> None:
    store.write_experiment(experiment)
    with store.samples_journal(experiment.experiment_id) as journal:
        for sample in samples:
            journal.append(sample)
    with store.scores_journal(experiment.experiment_id) as journal:
        for score in scores:
            journal.append(score)
    if corpus:
        with store.corpus_journal(experiment.experiment_id) as journal:
            for record in corpus:
                journal.append(record)
    for cell in cells:
        store.write_cell(cell)
    if seal:
        store.seal(experiment.experiment_id)


def make_run(experiments: Sequence[ExperimentRecord], **changes: Any) -> RunRecord:
    record = RunRecord(
        run_id="run-1",
        command="run",
        started="2025-01-01T00:00:00+00:00",
        finished="2025-01-01T00:01:00+00:00",
        status="finished",
        cells=[
            [experiment.experiment_id, cell]
            for experiment in experiments
            for cell in experiment.cells
        ],
    )
    return dataclasses.replace(record, **changes)


def make_store(
    path: Path,
    speeds: Mapping[str, float] | None = None,
    *,
    items: int = 8,
    repeats: int = 1,
    noise: float = 0.05,
    seed: int = 0,
    seal: bool = True,
    same_output: bool = False,
    **changes: Any,
) -> Store:
    """Return a store with one experiment and the run that asked for it."""
    store = Store(path)
    speeds = speeds or {"plain": 1.0, "fast": 2.0}
    experiment = make_experiment(tuple(speeds), items, repeats=repeats, **changes)
    random = np.random.default_rng(seed + 1)
    solved = [float(value) for value in random.random(items) < 0.5]
    write_shard(
        store,
        experiment,
        [make_cell(experiment, method) for method in speeds],
        make_samples(experiment, speeds, noise, seed, same_output),
        [score for method in speeds for score in make_scores(experiment, method, solved)],
        seal=seal,
    )
    store.write_run(make_run([experiment]))
    return store
