from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from results.ingest import ingest
from results.query import QueryError, run_sql
from results.statistics import wilson
from results.store import Store, StoreError
from tests.results.factory import (
    make_cell,
    make_experiment,
    make_samples,
    make_scores,
    make_store,
    write_shard,
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store")
    make_store(path)
    return ingest(path)


def test_a_query_answers_in_every_format(index: Path) -> None:
    sql = "SELECT method, items FROM comparison ORDER BY method"
    assert json.loads(run_sql(index, sql, "json")) == [
        {"method": "fast", "items": 8},
        {"method": "plain", "items": 8},
    ]
    assert list(csv.reader(io.StringIO(run_sql(index, sql, "csv")))) == [
        ["method", "items"],
        ["fast", "8"],
        ["plain", "8"],
    ]
    assert run_sql(index, sql) == "method  items\n------  -----\nfast        8\nplain       8\n"
    with pytest.raises(ValueError, match="one of table, json, csv, got 'xml'"):
        run_sql(index, sql, "xml")


@pytest.mark.parametrize(
    "sql",
    [
        "WITH a AS (SELECT 1 AS x) SELECT x FROM a",
        "FROM cells SELECT method",
        "DESCRIBE comparison",
        "SUMMARIZE verdicts",
        "SHOW TABLES",
        "EXPLAIN SELECT * FROM cells",
        "VALUES (1)",
        "SELECT params ->> 'x' FROM cells",
        "SELECT 1; -- and a remark",
    ],
)
def test_statements_that_read_are_allowed(index: Path, sql: str) -> None:
    assert run_sql(index, sql)


@pytest.mark.parametrize(
    "sql",
    [
        "COPY (SELECT 1) TO '{folder}/out.csv'",
        "COPY cells FROM '/etc/passwd'",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{folder}/out.csv'",
        "EXPORT DATABASE '{folder}/out'",
        "ATTACH '{folder}/out.duckdb'",
        "ATTACH '{index}' AS again",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM read_blob('/etc/passwd')",
        "SELECT * FROM sniff_csv('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM '{folder}/secret.csv'",
        "SELECT * FROM glob('/*')",
        "SELECT * FROM query('SELECT * FROM read_text(''/etc/passwd'')')",
        "SELECT * FROM read_csv('http://127.0.0.1:9/x.csv')",
        "SELECT * FROM parquet_scan('s3://bucket/x')",
        "SELECT getenv('HOME')",
        "INSTALL httpfs",
        "LOAD httpfs",
        "PRAGMA database_list",
        "CALL pragma_version()",
        "SET enable_external_access = true",
        "RESET lock_configuration",
        "SELECT 1; SELECT 2",
        "SELECT 1; COPY (SELECT 1) TO '{folder}/out.csv'",
        "",
        "-- nothing",
        "SELECT",
        "DELETE FROM cells",
        "WITH gone AS (DELETE FROM cells RETURNING *) SELECT * FROM gone",
        "UPDATE cells SET method = 'x'",
        "CREATE TABLE mine (x INT)",
        "CREATE TEMP TABLE mine AS SELECT 1",
        "DROP VIEW comparison",
        "PREPARE p AS SELECT 1",
        "CHECKPOINT",
    ],
)
def test_nothing_can_be_written_reached_or_set(index: Path, tmp_path: Path, sql: str) -> None:
    (tmp_path / "secret.csv").write_text("password\nxyzzy\n")
    before = index.read_bytes()
    with pytest.raises(QueryError):
        run_sql(index, sql.format(folder=tmp_path, index=index))
    assert index.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["secret.csv"]


def test_a_refusal_says_what_is_allowed(index: Path) -> None:
    with pytest.raises(QueryError, match=r"COPY is not allowed.*SELECT, WITH"):
        run_sql(index, "COPY cells TO 'x'")
    with pytest.raises(QueryError, match="one statement, got 2"):
        run_sql(index, "SELECT 1; SELECT 2")
    with pytest.raises(QueryError, match="metod"):
        run_sql(index, "SELECT metod FROM cells")
    with pytest.raises(StoreError, match="is missing"):
        run_sql(index.with_name("none"), "SELECT 1")


def test_time_memory_and_rows_have_limits(index: Path) -> None:
    start = time.monotonic()
    with pytest.raises(QueryError, match=r"longer than 0\.2 s"):
        run_sql(
            index,
            "SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b",
            timeout_seconds=0.2,
        )
    assert time.monotonic() - start < 10
    with pytest.raises(QueryError, match=r"(?i)memory"):
        run_sql(
            index,
            "SELECT list(range ORDER BY hash(range)) FROM range(20000000)",
            memory_limit="50MB",
        )
    with pytest.raises(QueryError, match="more than 10 rows"):
        run_sql(index, "SELECT * FROM range(1000000000000)", max_rows=10)


def test_odd_values_are_shown_safely(index: Path) -> None:
    sql = "SELECT 'nan'::DOUBLE AS a, chr(27) || '[2J' AS b, NULL AS c, DATE '2025-01-02' AS d"
    assert json.loads(run_sql(index, sql, "json")) == [
        {"a": "nan", "b": "\x1b[2J", "c": None, "d": "2025-01-02"}
    ]
    assert "\x1b" not in run_sql(index, sql)
    assert r"\x1b[2J" in run_sql(index, sql)
    assert run_sql(index, "SELECT method FROM cells WHERE false") == "method\n------\n"


def test_items_that_a_reference_gets_wrong_are_counted_across_experiments(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def measure(number: int, right: dict[str, str], **changes: Any) -> None:
        """Write an experiment; `right` has a 1, a 0 or a - (not scored) for each item."""
        experiment = make_experiment(
            [*right],
            items=len(right["plain"]),
            experiment_id=f"e{number}",
            created=f"2025-01-0{number}T00:00:00+00:00",
            **changes,
        )
        values = {name: [{"1": 1.0, "0": 0.0}.get(mark) for mark in right[name]] for name in right}
        write_shard(
            store,
            experiment,
            [make_cell(experiment, name, spec=name) for name in right],
            make_samples(experiment, dict.fromkeys(right, 1.0)),
            [each for name in right for each in make_scores(experiment, name, values[name])],
        )

    # Item 3 the baseline cannot answer; an output that cannot be scored is no answer.
    measure(1, {"plain": "11101111", "small": "0000-011", "fast": "11111100"})
    # The other method was measured later, and item 0 of the reference again, now right.
    measure(2, {"plain": "11101111", "small": "1000-011", "other": "-1011000"})
    # Other items of the same name, and another model, have nothing to do with them.
    measure(3, {"plain": "11", "small": "00", "other": "11"}, task_hash="another")
    measure(4, {"plain": "11", "small": "00", "other": "11"}, model_hash="another")
    query = (
        "SELECT spec, items, solved, share, low, high FROM where_wrong "
        "WHERE reference = 'small' AND items > 2 ORDER BY spec"
    )
    found = json.loads(run_sql(ingest(tmp_path), query, "json"))
    assert [(row["spec"], row["items"], row["solved"]) for row in found] == [
        ("fast", 4, 4),
        ("other", 4, 2),
    ]
    for row in found:
        expected = wilson(row["solved"], row["items"])
        assert (row["share"], row["low"], row["high"]) == pytest.approx(expected[:3])
    run = run_sql(ingest(tmp_path), "SELECT DISTINCT reference FROM where_wrong", "json")
    assert {row["reference"] for row in json.loads(run)} == {"small", "fast", "other"}
