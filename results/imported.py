"""Results of other programs as experiments of ours: what is common to all of them.

An imported experiment holds one cell, which is its own baseline: nothing in it was measured beside
anything else, so no speed-up comes of it. Its ids are hashes of its content; the same file twice is
the same experiment.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from results.records import (
    CellRecord,
    CorpusRecord,
    ExperimentRecord,
    MetricRecord,
    RunRecord,
    SampleRecord,
    ScoreRecord,
)
from results.statistics import (
    CORPUS_RESAMPLES,
    FEWEST_ITEMS_TO_RESAMPLE,
    QUALITY_MARGIN,
    SPEED_MARGIN,
)
from results.store import Store


class ForeignError(Exception):
    """A file is no result that can be imported; says what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One measured thing of an imported cell.

    Attributes:
        item: Its name.
        seconds: How long it took; NaN if that is not known.
        output: What came of it.
        scores: By metric; None where there is none.
    """

    item: str
    seconds: float = math.nan
    output: str = ""
    scores: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Imported:
    """An experiment of one cell.

    Attributes:
        task, task_params, task_version, task_hash: What was asked.
        model, model_params, model_hash: Who answered.
        method, params, spec, family, role, declared_output: By which method.
        hardware, scenario, seed, environment, facts: Under which conditions.
        metrics: Headline first.
        samples: In standard order, each item once.
        corpus: Numbers of all items together, by metric.
        key: What else tells this cell from others: hashes of sources, versions.
    """

    task: str
    task_params: dict[str, Any]
    task_version: str
    task_hash: str
    model: str
    model_params: dict[str, Any]
    model_hash: str
    method: str
    params: dict[str, Any]
    spec: str
    family: str
    role: str
    declared_output: str = "identical"
    hardware: str
    scenario: str
    seed: int
    environment: dict[str, Any]
    facts: dict[str, Any]
    metrics: Sequence[MetricRecord]
    samples: Sequence[Sample]
    corpus: Mapping[str, float | None]
    key: Any = None

    @property
    def cell_id(self) -> str:
        """Hash of all that can change the answers; the same one twice is a repetition."""
        conditions: list[Any] = [self.task, self.task_params, self.task_hash]
        conditions += [self.model, self.model_params]
        conditions += [self.model_hash, self.method, self.params, self.scenario, self.seed]
        return _digest([*conditions, [sample.item for sample in self.samples], self.key])[:24]


def write_run(
    store: Store, imported: Sequence[Imported], *, when: datetime, source: str, program: str
) -> list[str]:
    """Write experiments and the run that they make up into a store.

    Args:
        store: Where.
        imported: What.
        when: When it was measured.
        source: Name of the file, for the record.
        program: Name and version of what measured, `lm-eval 0.4.13`.

    Returns:
        Ids of the experiments that were not there before.
    """
    stamp = when.astimezone(UTC).isoformat(timespec="milliseconds")
    identity = _digest([stamp, program, [each.cell_id for each in imported]])
    run_id = f"{when.astimezone(UTC):%Y%m%d-%H%M%S}-{identity[:6]}"
    came, pairs = [], []
    for each in imported:
        content = [[vars(sample) for sample in each.samples], dict(each.corpus), stamp, program]
        experiment_id = f"{_digest([each.cell_id, content])[:16]}-1"
        pairs.append([experiment_id, each.cell_id])
        if store.is_sealed(experiment_id):
            continue
        _write(store, each, experiment_id, run_id, stamp, source, program)
        came.append(experiment_id)
    record = RunRecord(
        run_id=run_id,
        command=f"ingest {source}",
        started=stamp,
        finished=stamp,
        status="finished",
        cells=pairs,
    )
    if run_id not in store.run_ids():
        store.write_run(record)
    return came


def _write(
    store: Store,
    each: Imported,
    experiment_id: str,
    run_id: str,
    stamp: str,
    source: str,
    program: str,
) -> None:
    if store.shard(experiment_id).exists():
        store.discard(experiment_id)  # a kill in the middle of an earlier import
    items = [sample.item for sample in each.samples]
    experiment = ExperimentRecord(
        experiment_id=experiment_id,
        run_id=run_id,
        task=each.task,
        task_params=each.task_params,
        task_version=each.task_version,
        task_hash=each.task_hash,
        model=each.model,
        model_params=each.model_params,
        model_hash=each.model_hash,
        hardware=each.hardware,
        scenario=each.scenario,
        seed=each.seed,
        scale="embedded",
        margin=SPEED_MARGIN["cpu"],
        quality_margin=QUALITY_MARGIN,
        items=items,
        groups=items,
        repeats=1,
        baseline=each.cell_id,
        cells=[each.cell_id],
        metrics=list(each.metrics),
        step_cost=None,
        environment=each.environment,
        facts={**each.facts, "output_unit": "item", "imported_from": program},
        created=stamp,
    )
    store.write_experiment(experiment)
    with store.samples_journal(experiment_id) as journal:
        for sample in each.samples:
            journal.append(_sample(each.cell_id, sample))
    with store.scores_journal(experiment_id) as journal:
        for sample in each.samples:
            for metric, value in sample.scores.items():
                unscored = "" if value is not None else f"{program} gave no number"
                journal.append(
                    ScoreRecord(
                        cell_id=each.cell_id,
                        item_id=sample.item,
                        metric=metric,
                        value=value,
                        unscored=unscored,
                    )
                )
    # The number stands without an interval: nobody resampled it.
    draws = CORPUS_RESAMPLES if len(items) >= FEWEST_ITEMS_TO_RESAMPLE else 0
    unknown = [math.nan] * draws
    with store.corpus_journal(experiment_id) as journal:
        for metric, value in each.corpus.items():
            journal.append(
                CorpusRecord(cell_id=each.cell_id, metric=metric, value=value, resampled=unknown)
            )
    store.write_cell(
        CellRecord(
            cell_id=each.cell_id,
            experiment_id=experiment_id,
            method=each.method,
            params=each.params,
            family=each.family,
            role=each.role,
            declared_output=each.declared_output,
            status="ok",
            notes={"source": source},
            finished=stamp,
            spec=each.spec,
        )
    )
    store.seal(experiment_id)


def _sample(cell_id: str, sample: Sample) -> SampleRecord:
    return SampleRecord(
        cell_id=cell_id,
        item_id=sample.item,
        repeat=0,
        position=0,
        seconds=sample.seconds,
        device_seconds=None,
        cpu_seconds=math.nan,
        prefill_seconds=None,
        output_tokens=0,
        decode_tokens=0,
        target_forwards=None,
        forward_tokens=None,
        draft_forwards=None,
        accepted_tokens=None,
        flops=None,
        kv_bytes=None,
        peak_bytes=None,
        energy_j=None,
        bound_seconds=None,
        output_digest=hashlib.sha256(json.dumps([[], sample.output]).encode()).hexdigest(),
        output=sample.output,
        output_ids=[],
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return what a file holds.

    Raises:
        ForeignError: It is no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ForeignError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ForeignError(f"{path} holds no JSON object.")
    return data


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
