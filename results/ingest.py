"""The index: a DuckDB file made from the shards, brought up to date or rebuilt at will.

A writer works on a copy and renames it over the index when it is done. So readers never wait and
never see half of an update, and a killed writer leaves the index as it was.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from results import claims as claim_verdicts
from results import rescored, schema
from results.records import RunRecord
from results.store import Store, StoreError, publish, temporary_path
from results.summary import summarize
from results.tables import connect
from results.text import json_text

_ARROW_TYPES: dict[str, pa.DataType] = {
    "VARCHAR": pa.string(),
    "JSON": pa.string(),
    "BIGINT": pa.int64(),
    "DOUBLE": pa.float64(),
    "BOOLEAN": pa.bool_(),
    "DOUBLE[]": pa.list_(pa.float64()),
}
# What DuckDB makes of a disk that is full or cannot be written.
_DISK_ERRORS = (duckdb.IOException, duckdb.TransactionException, duckdb.FatalException)
_CLAIM_NAMES = {"id": "claim_id", "where": "stated_in"}  # `where` is a word of SQL


def ingest(
    store_path: Path,
    claims: Sequence[Mapping[str, Any]] | None = None,
    *,
    wait_seconds: float = 30.0,
) -> Path:
    """Bring the index of a store up to date and return its path.

    Sealed shards that are in already are left alone; shards that still grow are read again. An
    index of another version, or one that cannot be read, is made anew.

    Args:
        store_path: The store; one without anything in it gets an empty index.
        claims: Rows for the table `claims`, which they replace; None leaves it alone.
        wait_seconds: How long to wait for another writer.

    Raises:
        StoreError: Another writer holds the index; or shards or runs are damaged, which are then
            left out, named in the message, and everything else is in the index.
    """
    return _update(Store(store_path), claims, wait_seconds, is_rebuild=False)


def rebuild(
    store_path: Path,
    claims: Sequence[Mapping[str, Any]] | None = None,
    *,
    wait_seconds: float = 30.0,
) -> Path:
    """Make the index anew from the shards and return its path; otherwise like `ingest`.

    Without `claims`, the table `claims` is empty: it is not in the shards.
    """
    return _update(Store(store_path), claims, wait_seconds, is_rebuild=True)


@contextmanager
def exclusive(lock_path: Path, wait_seconds: float) -> Iterator[None]:
    """Hold a lock file, which names its holder, for the length of the block.

    The operating system frees the lock when its holder ends, however it ends; a file left by a
    dead process does not block anybody.

    Raises:
        StoreError: Somebody else still held it after `wait_seconds`.
    """
    descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise StoreError(
                        f"{lock_path}: {_holder(lock_path)} is writing the index. Try again when "
                        "it is done; the measurements are safe in the shards."
                    ) from None
                time.sleep(0.05)
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _holder(lock_path: Path) -> str:
    try:
        holder = json.loads(lock_path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _update(
    store: Store,
    claims: Sequence[Mapping[str, Any]] | None,
    wait_seconds: float,
    *,
    is_rebuild: bool,
) -> Path:
    index = store.index_path
    try:
        store.path.mkdir(parents=True, exist_ok=True)
        with exclusive(index.with_name(f"{index.name}.lock"), wait_seconds):
            building = temporary_path(index)
            for leftover in (building, building.with_name(f"{building.name}.wal")):
                leftover.unlink(missing_ok=True)
            if not is_rebuild and _is_current(index):
                shutil.copyfile(index, building)
            problems = fill(building, store, claims)
            publish(building, index)
    except (OSError, *_DISK_ERRORS) as error:
        why = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        _discard(temporary_path(index))  # half an index would keep a full disk full
        raise StoreError(
            f"{index}: cannot be written: {why}. The measurements are safe in the "
            "shards; make room or fix the permissions, and ingest again."
        ) from error
    if problems:
        raise StoreError(
            "\n".join([*problems, f"These were left out; everything else is in {index}."])
        )
    return index


def _discard(building: Path) -> None:
    """Remove a half-built index and its log, as far as that is possible."""
    for leftover in (building, building.with_name(f"{building.name}.wal")):
        with suppress(OSError):
            leftover.unlink(missing_ok=True)


def _is_current(index: Path) -> bool:
    """Return whether there is an index that this version can go on from."""
    try:
        connect(index).close()
    except StoreError:
        return False
    return True


def fill(path: Path, store: Store, claims: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """Bring the index file at `path` up to date in place; create it if it is missing.

    Returns:
        A sentence for every shard or run that had to be left out.
    """
    with duckdb.connect(str(path)) as connection:
        if not connection.execute("SELECT 1 FROM duckdb_tables()").fetchone():
            for statement in schema.statements():
                connection.execute(statement)
        problems = _fill(connection, store, claims)
        connection.execute("CHECKPOINT")
    return problems


def _fill(
    connection: duckdb.DuckDBPyConnection,
    store: Store,
    claims: Sequence[Mapping[str, Any]] | None,
) -> list[str]:
    problems = []
    known: dict[str, str | None] = dict(
        connection.execute("SELECT experiment_id, content_sha256 FROM experiments").fetchall()
    )
    present = store.experiment_ids()
    for experiment_id in sorted(known.keys() - set(present)):
        _forget(connection, experiment_id)
    rows: dict[str, list[dict[str, Any]]] = {table: [] for table in schema.TABLES}
    for experiment_id in present:
        # Taken before reading: what a runner appends meanwhile makes the next ingest read again.
        content = store.content_sha256(experiment_id)
        if known.get(experiment_id) == content:
            continue
        if experiment_id in known:
            _forget(connection, experiment_id)
        try:
            _read_shard(connection, store, experiment_id, content, rows)
        except StoreError as error:
            problems.append(str(error))
    for run in _readable_runs(store, problems):
        rows["runs"].append(
            {
                name: getattr(run, name)
                for name in ("run_id", "command", "started", "finished", "status", "git_commit")
            }
            | {"skipped": json_text(run.skipped)}
        )
        rows["run_cells"] += [
            {"run_id": run.run_id, "place": place, "experiment_id": pair[0], "cell_id": pair[1]}
            for place, pair in enumerate(run.cells)
        ]
    connection.execute("DELETE FROM runs")
    connection.execute("DELETE FROM run_cells")
    if claims is not None:
        connection.execute("DELETE FROM claims")
        rows["claims"] = [_claim_row(claim) for claim in claims]
    for table in ("rescores", "scorer_metrics"):
        connection.execute(f"DELETE FROM {table}")
    for experiment_id in present:
        try:
            _read_rescores(store, experiment_id, rows)
        except StoreError as error:
            problems.append(str(error))
    for table, table_rows in rows.items():
        _insert(connection, table, table_rows)
    connection.execute(
        "DELETE FROM environments WHERE environment_id NOT IN "
        "(SELECT environment_id FROM experiments)"
    )
    connection.execute("DELETE FROM claim_verdicts")
    settled = claim_verdicts.settle(claim_verdicts.read_claims(connection), connection)
    _insert(connection, "claim_verdicts", claim_verdicts.rows(settled))
    return problems


def _read_shard(
    connection: duckdb.DuckDBPyConnection,
    store: Store,
    experiment_id: str,
    content_sha256: str,
    rows: dict[str, list[dict[str, Any]]],
) -> None:
    """Add an experiment: big tables at once, rows of small ones to `rows`."""
    is_sealed = store.is_sealed(experiment_id)
    if is_sealed and (damage := store.damage(experiment_id)):
        raise StoreError(f"{damage[0]} Restore the shard from a copy, or discard it.")
    experiment = store.experiment(experiment_id)
    cells = list(store.cells(experiment_id))
    samples, scores = store.sample_table(experiment_id), store.score_table(experiment_id)
    corpus = store.corpus_table(experiment_id)
    summary = summarize(experiment, cells, samples, scores, corpus)
    environment = json_text(experiment.environment)
    environment_id = hashlib.sha256(environment.encode()).hexdigest()[:16]
    if not any(row["environment_id"] == environment_id for row in rows["environments"]):
        connection.execute("DELETE FROM environments WHERE environment_id = ?", [environment_id])
        rows["environments"].append({"environment_id": environment_id, "environment": environment})
    rows["experiments"].append(
        _public_row("experiments", experiment)
        | {
            "items": len(experiment.items),
            "environment_id": environment_id,
            "manifest_sha256": content_sha256 if is_sealed else None,
            "content_sha256": content_sha256,
        }
    )
    rows["cells"] += [_public_row("cells", cell) for cell in cells]
    rows["verdicts"] += summary.verdicts
    rows["metrics"] += summary.metrics
    rows["interactions"] += summary.interactions
    rows["corpus"] += [{"experiment_id": experiment_id, **row} for row in corpus.to_pylist()]
    headline = experiment.metrics[0].name if experiment.metrics else ""
    connection.register("incoming_samples", samples.drop_columns(["output_ids"]))
    connection.register("incoming_scores", scores)
    connection.execute(
        "INSERT INTO samples BY NAME SELECT incoming_samples.*, value AS score, "
        "$experiment AS experiment_id FROM incoming_samples "
        "LEFT JOIN (SELECT * FROM incoming_scores WHERE metric = $headline) "
        "USING (cell_id, item_id)",
        {"experiment": experiment_id, "headline": headline},
    )
    connection.execute(
        "INSERT INTO scores BY NAME SELECT *, $experiment AS experiment_id FROM incoming_scores",
        {"experiment": experiment_id},
    )
    connection.unregister("incoming_samples")
    connection.unregister("incoming_scores")


def _read_rescores(
    store: Store,
    experiment_id: str,
    rows: dict[str, list[dict[str, Any]]],
) -> None:
    """Add what was scored later, if anything was."""
    record = rescored.read(store, experiment_id)
    if record is None:
        return
    experiment, cells = store.experiment(experiment_id), list(store.cells(experiment_id))
    metrics = rescored.metric_rows(record, experiment, cells, store.sample_table(experiment_id))
    rows["scorer_metrics"] += list(metrics)
    rows["rescores"] += list(rescored.score_rows(record))


def _public_row(table: str, record: Any) -> dict[str, Any]:
    """Return the fields of a record that the table has a column for."""
    columns = schema.TABLES[table]
    return {
        field.name: json_text(value) if columns[field.name] == "JSON" else value
        for field in dataclasses.fields(record)
        if field.name in columns
        for value in [getattr(record, field.name)]
    }


def _readable_runs(store: Store, problems: list[str]) -> Iterator[RunRecord]:
    """Yield the runs; a damaged one is noted in `problems`."""
    for run_id in store.run_ids():
        try:
            run = store.run(run_id)
        except StoreError as error:
            problems.append(str(error))
        else:
            yield run


def _forget(connection: duckdb.DuckDBPyConnection, experiment_id: str) -> None:
    """Remove all rows of an experiment; its runs are written anew anyway."""
    for table, columns in schema.TABLES.items():
        if "experiment_id" in columns:
            connection.execute(f"DELETE FROM {table} WHERE experiment_id = ?", [experiment_id])


def _insert(
    connection: duckdb.DuckDBPyConnection, table: str, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Insert rows whose keys are columns of the table; columns without a key get NULL."""
    if not rows:
        return
    columns = schema.TABLES[table]
    content = pa.table(
        {
            name: pa.array([row.get(name) for row in rows], type=_ARROW_TYPES[kind])
            for name, kind in columns.items()
        }
    )
    connection.register("incoming", content)
    connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM incoming")
    connection.unregister("incoming")


def _claim_row(claim: Mapping[str, Any]) -> dict[str, Any]:
    columns = schema.TABLES["claims"]
    named = {_CLAIM_NAMES.get(key, key): value for key, value in claim.items()}
    row = {key: value for key, value in named.items() if key in columns and key != "extra"}
    extra = {key: value for key, value in named.items() if key not in row}
    return row | {"extra": json_text(extra)}
