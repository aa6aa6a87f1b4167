"""Corpus metrics: the task's numbers of all outputs of a cell together, and their resamples.

The worker computes them when it scores, `score` again for every scorer, and `verify` once more
wherever the task is at hand; results/ only ever reads what was stored.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.base import Unsupported
from results import statistics
from results.records import CorpusRecord, ExperimentRecord
from results.store import Store, StoreError
from runner.registry import Registry
from runner.request import UsageError
from tasks.base import Task

# A library of another version may add up in another order.
RELATIVE_TOLERANCE = 1e-9
ABSOLUTE_TOLERANCE = 1e-12


class Recomputed(NamedTuple):
    """What came of computing corpus metrics again.

    Attributes:
        problems: A sentence for each stored metric that its outputs do not give.
        left_out: A sentence for each experiment whose task is not at hand.
    """

    problems: list[str]
    left_out: list[str]


def corpus_metrics(task: Task[Any]) -> list[str]:
    """Return the names of a task's metrics of kind `corpus`."""
    return [metric.name for metric in task.metrics if metric.kind == "corpus"]


def corpus_records(
    task: Task[Any],
    items: Sequence[str],
    outputs: Mapping[str, Mapping[str, str]],
    known: Collection[tuple[str, str]] = (),
) -> Iterator[CorpusRecord]:
    """Yield every corpus metric of every cell that has an output for all items.

    Cells with equal outputs, as a lossless method and its baseline, are computed once.

    Args:
        task: Whose metrics.
        items: Ids in the experiment's order.
        outputs: By cell and item.
        known: (cell, metric) that are not wanted.

    Raises:
        ValueError: The task does not return what `Task.corpus` must.
    """
    names = corpus_metrics(task)
    whole = {
        cell: {item: texts[item] for item in items}
        for cell, texts in outputs.items()
        if all(item in texts for item in items)
    }
    if not names or not items:
        return
    draws = statistics.corpus_draws(len(items))
    draws.flags.writeable = False  # every cell sees the same
    done: dict[tuple[str, ...], Mapping[str, NDArray[np.float64]]] = {}
    for cell, texts in whole.items():
        wanted = [name for name in names if (cell, name) not in known]
        if not wanted:
            continue
        key = tuple(texts.values())
        if key not in done:
            done[key] = _checked(task, task.corpus(texts, draws), len(draws))
        for name in wanted:
            value, *resampled = (float(number) for number in done[key][name])
            yield CorpusRecord(
                cell_id=cell,
                metric=name,
                value=value if math.isfinite(value) else None,
                resampled=resampled,
            )


def outputs_of(store: Store, experiment_id: str) -> dict[str, dict[str, str]]:
    """Return the outputs of an experiment's first repeats, by cell and item."""
    outputs: dict[str, dict[str, str]] = {}
    for sample in store.samples(experiment_id):
        if sample.repeat == 0:
            outputs.setdefault(sample.cell_id, {})[sample.item_id] = sample.output
    return outputs


def recompute(
    store_path: Path, registry: Registry, experiment_ids: Sequence[str] | None = None
) -> Recomputed:
    """Compute the corpus metrics of a store again from its outputs, and compare.

    Args:
        store_path: The store.
        registry: Where tasks come from. An experiment whose task is gone, has changed, or lacks
            something on this machine is left out.
        experiment_ids: Only these; all if None.
    """
    store = Store(store_path)
    problems: list[str] = []
    left_out: list[str] = []
    for experiment_id in store.experiment_ids() if experiment_ids is None else experiment_ids:
        try:
            experiment = store.experiment(experiment_id)
            stored = {(each.cell_id, each.metric): each for each in store.corpus(experiment_id)}
            outputs = outputs_of(store, experiment_id) if stored else {}
        except StoreError:
            continue  # `verify` names the damage
        if not stored:
            continue
        try:
            task = task_of(registry, experiment)
        except UsageError as error:
            left_out.append(f"corpus metrics of {experiment_id} were not computed again: {error}")
            continue
        again = {
            (each.cell_id, each.metric): each
            for each in corpus_records(task, experiment.items, outputs)
        }
        problems += [
            f"{store.shard(experiment_id)}: {metric} of cell {cell}: {difference}"
            for (cell, metric), record in stored.items()
            if (difference := _difference(record, again.get((cell, metric))))
        ]
    return Recomputed(problems, left_out)


def same_number(first: float | None, second: float | None) -> bool:
    """Return whether two values of a metric are the same but for rounding; None is no number."""
    if first is None or second is None:
        return first is second
    return math.isclose(first, second, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE) or (
        math.isnan(first) and math.isnan(second)
    )


def task_of(registry: Registry, experiment: ExperimentRecord) -> Task[Any]:
    """Return the task as it was run.

    Raises:
        UsageError: It is gone, has other settings now, or other items.
    """
    cls = registry.load_task(experiment.task)
    settings = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in experiment.task_params.items()
    }
    advice = "Its outputs cannot be judged by today's items; measure it again."
    try:
        task: Task[Any] = cls(**settings)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"task {experiment.task!r} no longer takes the settings of experiment "
            f"{experiment.experiment_id!r}: {error}. {advice}"
        ) from error
    try:
        digest = task.content_hash()
    except Unsupported as error:
        raise UsageError(str(error)) from error
    if digest != experiment.task_hash:
        raise UsageError(
            f"task {experiment.task!r} is no longer what experiment "
            f"{experiment.experiment_id!r} ran (content {experiment.task_hash[:12]}, now "
            f"{digest[:12]}). {advice}"
        )
    return task


def _checked(
    task: Task[Any], found: Mapping[str, NDArray[np.float64]], rows: int
) -> Mapping[str, NDArray[np.float64]]:
    """Return what a task computed, if it is what `Task.corpus` must return."""
    for name in corpus_metrics(task):
        if name not in found:
            raise ValueError(
                f"{type(task).__name__}.corpus returned nothing for {name!r}, which is a metric of "
                f"kind 'corpus'; it returned {', '.join(found) or 'nothing at all'}."
            )
        if (shape := np.shape(found[name])) != (rows,):
            raise ValueError(
                f"{type(task).__name__}.corpus must return one number a row of draws for {name!r}, "
                f"{(rows,)}, got {shape}."
            )
    return found


def _difference(stored: CorpusRecord, again: CorpusRecord | None) -> str:
    """Return what differs between a stored metric and the same computed again, "" if nothing."""
    if again is None:
        return "it is stored, but not every item has an output."
    if not same_number(stored.value, again.value):
        return f"{stored.value!r} is stored, its outputs give {again.value!r}."
    if len(stored.resampled) != len(again.resampled):
        return f"{len(stored.resampled)} resamples are stored, {len(again.resampled)} belong there."
    differing = [
        (row, pair)
        for row, pair in enumerate(zip(stored.resampled, again.resampled, strict=True), 1)
        if not same_number(*pair)
    ]
    if not differing:
        return ""
    row, (old, new) = differing[0]
    return f"resample {row} is stored as {old!r}, its outputs give {new!r}."
