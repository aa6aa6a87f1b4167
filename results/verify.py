"""`verify`: compute every published number again from the shards, and say what differs."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb

from results import text
from results.claims import read_claims
from results.ingest import fill
from results.store import Store
from results.tables import connect, rows_of

# Sums may be added up in another order by another version of a library.
_RELATIVE_TOLERANCE = 1e-9
# Of one table; a wrong shard makes thousands.
_MOST_LINES = 20

# Everything that is made from shards, with what makes a row.
_KEYS = {
    "runs": ("run_id",),
    "run_cells": ("run_id", "place"),
    "experiments": ("experiment_id",),
    "cells": ("experiment_id", "cell_id"),
    "samples": ("experiment_id", "cell_id", "item_id", "repeat"),
    "scores": ("experiment_id", "cell_id", "item_id", "metric"),
    "corpus": ("experiment_id", "cell_id", "metric"),
    "metrics": ("experiment_id", "cell_id", "metric"),
    "verdicts": ("experiment_id", "cell_id"),
    "interactions": ("experiment_id", "cell_id"),
    "rescores": ("experiment_id", "cell_id", "item_id", "metric", "scorer"),
    "scorer_metrics": ("experiment_id", "cell_id", "metric", "scorer"),
    "claim_verdicts": ("method", "claim_id"),
}


def verify(store_path: Path) -> list[str]:
    """Check shards against their manifests and the index against the shards.

    Every row of the index, verdicts and table cells included, is computed again from raw samples;
    verdicts of claims from those and the claims that the index holds; corpus metrics from the
    resamples that the shards hold (`runner.corpus.problems` computes those again from outputs).

    Args:
        store_path: The store.

    Returns:
        A sentence for everything that is wrong; empty if all is well.

    Raises:
        StoreError: There is no index.
    """
    store = Store(store_path)
    with connect(store.index_path) as published:  # says what is wrong with the index, if anything
        claims = read_claims(published)  # the shards do not hold them
    problems = [
        problem
        for experiment_id in store.experiment_ids()
        if store.is_sealed(experiment_id)
        for problem in store.damage(experiment_id)
    ]
    with TemporaryDirectory() as folder, duckdb.connect() as connection:
        again = Path(folder) / "again.duckdb"
        left_out = fill(again, store, claims)
        problems += [line for line in left_out if not line.startswith(tuple(problems))]
        for name, path in (("published", store.index_path), ("again", again)):
            connection.execute(f"ATTACH {text.sql(str(path))} AS {name} (READ_ONLY)")
        for table, key in _KEYS.items():
            problems += _differences(connection, store.index_path, table, key)
    return problems


def _differences(
    connection: duckdb.DuckDBPyConnection, index: Path, table: str, key: tuple[str, ...]
) -> list[str]:
    """Return a sentence for each row of a table that is not what the shards say."""
    sides = []
    for one, other in (("published", "again"), ("again", "published")):
        rows = rows_of(
            connection.execute(
                f"SELECT * FROM {one}.{table} EXCEPT ALL SELECT * FROM {other}.{table}"
            )
        )
        sides.append({tuple(row[name] for name in key): row for row in rows})
    published, again = sides
    problems = []
    for identity in sorted(published.keys() | again.keys()):
        row = f"{index}: {table}: {', '.join(map(str, identity))}"
        if identity not in again:
            problems.append(f"{row}: is not in the shards.")
        elif identity not in published:
            problems.append(f"{row}: is missing; `python run.py ingest` brings it in.")
        else:
            problems += [
                f"{row}: {name} is {published[identity][name]!r}, recomputed {value!r}."
                for name, value in again[identity].items()
                if not _agree(published[identity][name], value)
            ]
    if len(problems) > _MOST_LINES:
        rest = len(problems) - _MOST_LINES
        problems = [*problems[:_MOST_LINES], f"{index}: {table}: and {rest} more differences."]
    return problems


def _agree(published: Any, again: Any) -> bool:
    if isinstance(published, float) and isinstance(again, float):
        both_nan = math.isnan(published) and math.isnan(again)
        return both_nan or math.isclose(published, again, rel_tol=_RELATIVE_TOLERANCE)
    return bool(published == again)
