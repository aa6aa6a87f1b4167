"""`score`: judges stored outputs again, by every scorer of their task, without running a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from models.base import Unsupported
from results import rescored
from results.compare import resolve
from results.records import ExperimentRecord, SampleRecord, ScoreRecord
from results.rescored import RescoreRecord
from results.store import Store, StoreError
from runner.corpus import corpus_records, outputs_of, same_number, task_of
from runner.registry import Registry
from runner.request import UsageError
from runner.settings import unknown
from tasks.base import Item, Scored, Unscored
from tasks.scorers import OURS, Scorer, scorers

# Programs under test; the sandbox limits the processor time of each.
_WORKERS = 2


@dataclass(frozen=True)
class Rescored:
    """What came of one experiment.

    Attributes:
        experiment: Whose outputs were judged.
        record: All scores, by scorer.
        labels: Method of each cell.
        changed: Scores of our own scorer that are not those the run stored: (cell, item, metric,
            stored, now); the item of a metric of all outputs together is `all items`.
    """

    experiment: ExperimentRecord
    record: RescoreRecord
    labels: dict[str, str]
    changed: list[tuple[str, str, str, float | None, float | None]]


def rescore(
    store_path: Path,
    registry: Registry,
    *,
    run: str = "latest",
    tasks: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> list[Rescored]:
    """Judge the outputs of a run again and keep the scores beside their shards.

    Args:
        store_path: The store.
        registry: Where tasks come from.
        run: Run, commit or `latest`; see `results.compare.resolve`.
        tasks: Names of tasks to score; all if empty.
        tell: Hears what is done, a line an experiment.

    Raises:
        UsageError: There is no such run or task, or the task is no longer what was run.
        StoreError: A shard cannot be read, or scores cannot be written.
    """
    store = Store(store_path)
    if not store.experiment_ids():
        raise UsageError(f"{store_path} holds no results: `python run.py` measures some.")
    try:
        side = resolve(run, store)
    except StoreError as error:
        raise UsageError(str(error)) from error
    wanted = dict.fromkeys(pair[0] for pair in side.run.cells) if side.run else {}
    present = set(side.store.experiment_ids())
    experiments = [side.store.experiment(each) for each in wanted if each in present]
    known = sorted({experiment.task for experiment in experiments})
    for name in tasks:
        if name not in known:
            raise unknown("task in this run", name, known)
    done = []
    for experiment in experiments:
        if tasks and experiment.task not in tasks:
            continue
        tell(f"{experiment.task} with {experiment.model}")
        done.append(_rescore(side.store, registry, experiment))
    return done


def _rescore(store: Store, registry: Registry, experiment: ExperimentRecord) -> Rescored:
    task = task_of(registry, experiment)
    items = {item.id: item for item in task.items()}
    samples = [sample for sample in store.samples(experiment.experiment_id) if sample.repeat == 0]
    try:
        conditions = task.conditions()
        judged: dict[tuple[str, str, str], Scored] = {}
        found = {scorer.name: _scores(scorer, items, samples, judged) for scorer in scorers(task)}
        outputs = outputs_of(store, experiment.experiment_id)
        corpus = {
            scorer.name: list(
                corpus_records(
                    scorer.task,
                    experiment.items,
                    {
                        cell: {item: scorer.cut(text) for item, text in texts.items()}
                        for cell, texts in outputs.items()
                    },
                )
            )
            for scorer in scorers(task)
        }
    except Unsupported as error:
        raise UsageError(str(error)) from error
    record = RescoreRecord(
        experiment_id=experiment.experiment_id,
        created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        conditions=conditions,
        scores=found,
        corpus=corpus,
    )
    rescored.write(store, record)
    stored = {
        (score.cell_id, score.item_id, score.metric): score.value
        for score in store.scores(experiment.experiment_id)
    }
    changed = [
        (score.cell_id, score.item_id, score.metric, stored[key], score.value)
        for score in found[OURS]
        if (key := (score.cell_id, score.item_id, score.metric)) in stored
        and stored[key] != score.value
    ]
    whole = {
        (each.cell_id, each.metric): each.value for each in store.corpus(experiment.experiment_id)
    }
    changed += [
        (each.cell_id, "all items", each.metric, whole[pair], each.value)
        for each in corpus[OURS]
        if (pair := (each.cell_id, each.metric)) in whole
        and not same_number(whole[pair], each.value)
    ]
    labels = {cell.cell_id: cell.method for cell in store.cells(experiment.experiment_id)}
    return Rescored(experiment, record, labels, changed)


def _scores(
    scorer: Scorer,
    items: dict[str, Item],
    samples: Sequence[SampleRecord],
    judged: dict[tuple[str, str, str], Scored],
) -> list[ScoreRecord]:
    """Return a scorer's scores; equal texts of an item are judged once.

    Args:
        scorer: Who judges.
        items: By id.
        samples: One of each cell and item.
        judged: What was judged already, by judge, item and text; is added to.
    """
    texts = [(sample, scorer.cut(sample.output)) for sample in samples]
    keys = dict.fromkeys((sample.item_id, text) for sample, text in texts)
    judge = scorer.judged_by
    new = [key for key in keys if (judge, *key) not in judged]
    with ThreadPoolExecutor(max_workers=_WORKERS) as pool:
        verdicts = pool.map(lambda key: scorer.judge(items[key[0]], key[1]), new)
        for key, verdict in zip(new, verdicts, strict=True):
            judged[judge, *key] = verdict
    records = []
    for sample, text in texts:
        scored = judged[judge, sample.item_id, text]
        for metric, value in scored.scores.items():
            records.append(
                ScoreRecord(
                    cell_id=sample.cell_id,
                    item_id=sample.item_id,
                    metric=metric,
                    value=None if isinstance(value, Unscored) else float(value),
                    unscored=value.reason if isinstance(value, Unscored) else "",
                    detail=scored.detail,
                )
            )
    return records


def table_rows(done: Sequence[Rescored], store_path: Path) -> list[dict[str, str]]:
    """Return a row a cell: its value by each scorer, the spread, and how many items are disputed.

    Args:
        done: As `rescore` returns it.
        store_path: Whose samples are looked at once more.
    """
    store, rows = Store(store_path), []
    for each in done:
        cells = list(store.cells(each.experiment.experiment_id))
        samples = store.sample_table(each.experiment.experiment_id)
        values: dict[tuple[str, str], dict[str, float | None]] = {}
        for row in rescored.metric_rows(each.record, each.experiment, cells, samples):
            values.setdefault((row["cell_id"], row["metric"]), {})[row["scorer"]] = row["value"]
        fought = rescored.disputed(each.record)
        for (cell_id, metric), by_scorer in values.items():
            known = [value for value in by_scorer.values() if value is not None]
            if not known:
                continue  # it did not end well
            rows.append(
                {
                    "task": each.experiment.task,
                    "method": each.labels[cell_id],
                    "metric": metric,
                    **{
                        name: "" if value is None else f"{value:.3f}"
                        for name, value in by_scorer.items()
                    },
                    "spread": f"{max(known) - min(known):.3f}",
                    "disputed": str(sum(key[0] == cell_id and key[2] == metric for key in fought)),
                }
            )
    return rows


def disputed_rows(done: Sequence[Rescored]) -> list[dict[str, str]]:
    """Return a row for each output on which scorers differ, with what each of them said."""
    rows = []
    for each in done:
        details = {
            (scorer, score.cell_id, score.item_id, score.metric): score.detail
            for scorer, scores in each.record.scores.items()
            for score in scores
        }
        for (cell_id, item_id, metric), by_scorer in rescored.disputed(each.record).items():
            said = {
                scorer: details[scorer, cell_id, item_id, metric] or str(value)
                for scorer, value in by_scorer.items()
            }
            rows.append({"item": item_id, "method": each.labels[cell_id], "metric": metric, **said})
    return rows
