"""Scores given later: stored outputs judged again, by several scorers, without running a model.

    rescored/<experiment_id>.json    RescoreRecord, beside `shards/`; written whole, replaced whole

A shard never changes, so what `score` finds lies beside it; it names who judged, and is in the
index as the tables `rescores` and `scorer_metrics`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from results.records import CellRecord, CorpusRecord, ExperimentRecord, ScoreRecord
from results.store import CORPUS, SCORES, Store, StoreError, arrow_schema, publish, temporary_path
from results.summary import summarize

FOLDER = "rescored"


@dataclass(frozen=True, kw_only=True)
class RescoreRecord:
    """What several scorers say of the outputs of an experiment.

    Attributes:
        experiment_id: Whose outputs.
        created: ISO time, UTC.
        conditions: What of the machine the scores depend on (`sandbox`: its level).
        scores: By scorer; the task's own comes first.
        corpus: Metrics of all outputs together, by scorer; none in files from before there were.
    """

    experiment_id: str
    created: str
    conditions: dict[str, str]
    scores: dict[str, list[ScoreRecord]]
    corpus: dict[str, list[CorpusRecord]] = field(default_factory=dict)


def write(store: Store, record: RescoreRecord) -> Path:
    """Write a record, in the place of an earlier one of the same experiment.

    Raises:
        StoreError: It cannot be written.
    """
    path = _path(store, record.experiment_id)
    body = dataclasses.asdict(record)
    content = {"sha256": _digest(body), **body}
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        publish(temporary, path)
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be written: {error.strerror}. Make room or fix the permissions, and "
            "score again."
        ) from error
    return path


def read(store: Store, experiment_id: str) -> RescoreRecord | None:
    """Return what was scored later of an experiment, None if nothing was.

    Raises:
        StoreError: The file is damaged.
    """
    path = _path(store, experiment_id)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("sha256")
        if digest != _digest(content):
            raise ValueError("it changed since it was written")
        scores = {
            scorer: [ScoreRecord(**score) for score in scores]
            for scorer, scores in content.pop("scores").items()
        }
        corpus = {
            scorer: [CorpusRecord(**each) for each in found]
            for scorer, found in content.pop("corpus", {}).items()
        }
        record = RescoreRecord(**content, scores=scores, corpus=corpus)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: cannot be read: {error}. Remove it, and score again.") from error
    if record.experiment_id != experiment_id:
        raise StoreError(f"{path}: is of experiment {record.experiment_id!r}. Remove it.")
    return record


def score_rows(record: RescoreRecord) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table `rescores`."""
    for scorer, scores in record.scores.items():
        for score in scores:
            yield {
                "experiment_id": record.experiment_id,
                "scorer": scorer,
                "created": record.created,
                **dataclasses.asdict(score),
            }


def metric_rows(
    record: RescoreRecord,
    experiment: ExperimentRecord,
    cells: Sequence[CellRecord],
    samples: pa.Table,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table `scorer_metrics`: each metric of each cell by each scorer."""
    names = ("cell_id", "metric", "value", "low", "high", "scored", "unscored")
    for scorer, scores in record.scores.items():
        tables = [
            pa.Table.from_pylist([dataclasses.asdict(line) for line in lines], arrow_schema(kind))
            for kind, lines in ((SCORES, scores), (CORPUS, record.corpus.get(scorer, [])))
        ]
        for row in summarize(experiment, cells, samples, *tables).metrics:
            yield {
                "experiment_id": record.experiment_id,
                "scorer": scorer,
                "is_headline": row["is_headline"],
                **{name: row.get(name) for name in names},
            }


def disputed(record: RescoreRecord) -> dict[tuple[str, str, str], dict[str, float | None]]:
    """Return the scores on which scorers differ, by (cell, item, metric) and scorer."""
    by_output: dict[tuple[str, str, str], dict[str, float | None]] = {}
    for scorer, scores in record.scores.items():
        for score in scores:
            key = (score.cell_id, score.item_id, score.metric)
            by_output.setdefault(key, {})[scorer] = score.value
    return {key: found for key, found in by_output.items() if len(set(found.values())) > 1}


def _path(store: Store, experiment_id: str) -> Path:
    return store.path / FOLDER / f"{store.shard(experiment_id).name}.json"


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
