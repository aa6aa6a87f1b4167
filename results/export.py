"""`export`: the rows behind the tables as Parquet, and the tables themselves as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import duckdb

from results import schema, tables, text
from results.store import StoreError

# What is raw or follows from it; papers' claims belong to the project, not to a measurement.
_RAW = (
    *("runs", "run_cells", "environments", "experiments", "cells", "samples", "scores"),
    *("corpus", "metrics", "verdicts", "rescores", "scorer_metrics"),
)
TABLE_ENDINGS = {"csv": "csv", "latex": "tex", "md": "md", "json": "json", "html": "html"}


class Written(NamedTuple):
    """A file that was written.

    Attributes:
        path: Where.
        rows: How many rows, or tables, it holds.
    """

    path: Path
    rows: int


def write_parquet(index_path: Path, folder: Path, run: str | None = None) -> list[Written]:
    """Write the index as Parquet: one file a table of raw rows, and `comparison.parquet`.

    Args:
        index_path: As `ingest` returns it.
        folder: Where; made if missing.
        run: Only what answers this run; everything if None.

    Raises:
        StoreError: There is no index or no such run, or a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with tables.connect(index_path) as connection:
        run_id = tables.run_id_of(connection, run)
        for table in (*_RAW, "comparison"):
            path = folder / f"{table}.parquet"
            query = f"SELECT * FROM {table}{_condition(table, run_id)}"
            try:
                connection.execute(
                    f"COPY ({query}) TO {text.sql(str(path))} (FORMAT parquet, COMPRESSION zstd)"
                )
            except duckdb.Error as error:
                raise StoreError(f"{path}: cannot be written: {error}.") from error
            [count] = connection.execute(f"SELECT count(*) FROM ({query})").fetchone() or (0,)
            written.append(Written(path, count))
    return written


def write_tables(
    index_path: Path, folder: Path, format: str, run: str | None, tasks: Sequence[str] = ()
) -> Written:
    """Write the comparison tables into a file, `tables.tex` and so on.

    Args:
        index_path: As `ingest` returns it.
        folder: Where; made if missing.
        format: One of `TABLE_ENDINGS`.
        run: A run's id; None for every cell, as it was last measured.
        tasks: Names of tasks to keep; all if empty.

    Raises:
        StoreError: As `tables.comparison_tables`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"tables.{TABLE_ENDINGS[format]}"
    found = tables.comparison_tables(index_path, run, tasks)
    path.write_text(tables.formatted(found, format), encoding="utf-8")
    return Written(path, len(found))


def _condition(table: str, run_id: str | None) -> str:
    """Return the SQL that keeps what answers a run."""
    if run_id is None:
        return ""
    is_of_run = f"WHERE run_id = {text.sql(run_id)}"
    if table in ("runs", "run_cells"):
        return f" {is_of_run}"
    chosen = f"FROM run_cells {is_of_run}"
    columns = ("cell_id",) if table == "comparison" else tuple(schema.TABLES[table])
    if "cell_id" in columns:
        return f" WHERE (experiment_id, cell_id) IN (SELECT (experiment_id, cell_id) {chosen})"
    experiments = f"experiment_id IN (SELECT experiment_id {chosen})"
    if "experiment_id" in columns:
        return f" WHERE {experiments}"
    return f" WHERE environment_id IN (SELECT environment_id FROM experiments WHERE {experiments})"
