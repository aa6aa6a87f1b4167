"""`sql`: one read-only query over the index, which can reach neither files nor the network."""

from __future__ import annotations

import csv
import io
import threading
from pathlib import Path
from typing import Any

import duckdb

from results import text
from results.tables import connect

FORMATS = ("table", "json", "csv")

_READING = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)


class QueryError(Exception):
    """The query is wrong, or asks for what `sql` does not give; says what and what is allowed."""


def run_sql(
    index_path: Path,
    sql: str,
    format: str = "table",
    *,
    timeout_seconds: float = 30.0,
    memory_limit: str = "2GB",
    max_rows: int = 100_000,
) -> str:
    """Return the answer of one statement that only reads: SELECT, WITH, FROM, DESCRIBE, SHOW, ….

    Args:
        index_path: As `ingest` returns it.
        sql: One statement.
        format: One of `FORMATS`.
        timeout_seconds: The query is interrupted after this time, between two batches of rows.
        memory_limit: As DuckDB writes it; nothing is spilled to the disk.
        max_rows: Largest answer.

    Raises:
        ValueError: `format` is none of `FORMATS`.
        QueryError: The statement is wrong, is not one that reads, or goes over a limit.
        StoreError: There is no index.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    with connect(index_path) as connection:
        # The order matters: the last setting forbids all further ones.
        connection.execute("SET enable_external_access = false")
        connection.execute("SET autoinstall_known_extensions = false")
        connection.execute("SET autoload_known_extensions = false")
        connection.execute("SET allow_community_extensions = false")
        connection.execute(f"SET memory_limit = '{memory_limit}'")
        connection.execute("SET max_temp_directory_size = '0B'")
        connection.execute("SET lock_configuration = true")
        columns, rows = _fetch(connection, sql, timeout_seconds, max_rows)
    if format == "json":
        content = [dict(zip(columns, row, strict=True)) for row in rows]
        return text.json_text(content, indent=1) + "\n"
    if format == "csv":
        written = io.StringIO()
        writer = csv.writer(written, lineterminator="\n")
        writer.writerows([columns, *rows])
        return written.getvalue()
    return _aligned(columns, rows)


def _fetch(
    connection: duckdb.DuckDBPyConnection, sql: str, timeout_seconds: float, max_rows: int
) -> tuple[list[str], list[tuple[Any, ...]]]:
    is_late = threading.Event()

    def interrupt() -> None:
        is_late.set()
        connection.interrupt()

    timer = threading.Timer(timeout_seconds, interrupt)
    timer.daemon = True
    try:
        statements = connection.extract_statements(sql)
        if len(statements) != 1:
            raise QueryError(f"expected one statement, got {len(statements)}.")
        if statements[0].type not in _READING:
            raise QueryError(
                f"{statements[0].type.name} is not allowed: `sql` only reads. It takes one "
                "SELECT, WITH, FROM, DESCRIBE, SUMMARIZE, SHOW or EXPLAIN."
            )
        timer.start()
        cursor = connection.execute(statements[0])
        columns = [column[0] for column in cursor.description]
        rows = cursor.fetchmany(max_rows + 1)
    except duckdb.Error as error:
        if is_late.is_set():
            raise QueryError(f"the query took longer than {timeout_seconds:g} s.") from None
        raise QueryError(str(error)) from error
    finally:
        timer.cancel()
    if len(rows) > max_rows:
        raise QueryError(f"the answer has more than {max_rows} rows; add a LIMIT.")
    return columns, rows


def _aligned(columns: list[str], rows: list[tuple[Any, ...]]) -> str:
    """Return the rows in columns of equal width, numbers to the right; NULL stays empty."""
    cells = [[text.plain("" if value is None else str(value)) for value in row] for row in rows]
    headings = [text.plain(column) for column in columns]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    is_number = [
        any(isinstance(row[place], int | float) for row in rows) for place in range(len(columns))
    ]

    def line(values: list[str]) -> str:
        return "  ".join(
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, is_number, strict=True)
        ).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(headings), rule, *map(line, cells)]) + "\n"
