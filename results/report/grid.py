"""Cells of any experiments as one table, which the page sorts, filters and turns the pages of.

The page gets the rows as data and shows some of them; those it begins with are in the HTML already.
Every number is the text that the comparison tables have, beside the number it is sorted by.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from results import text
from results.report.content import slug
from results.report.numbers import QUANTITIES, Quantity
from results.tables import Row, Table, settings_text

# Rows on a page of the table at first.
PAGE_ROWS: Final = 50
# What tells apart the tables of one task; the rest of a setting always stands in full.
_DETAILS = ("task_params", "model_params")
_SORTED_BY = "speedup"


def label_parts(table: Table) -> list[tuple[str, str]]:
    """Return method and settings of each row of a table."""
    parts = []
    for (label, *_), row in zip(table.rows, table.data, strict=True):
        method = str(row["method"])
        settings = label[len(method) + 1 :] if label.startswith(f"{method}:") else ""
        parts.append((text.plain(method), text.plain(settings)))
    return parts


def differing(tables: Sequence[Table]) -> list[str]:
    """Return for each table the settings in which it differs from others of its task."""
    firsts = [table.data[0] for table in tables]
    settings = [_settings(row) for row in firsts]
    shown = []
    for row, own in zip(firsts, settings, strict=True):
        others = [
            other
            for rival, other in zip(firsts, settings, strict=True)
            if rival["task"] == row["task"]
        ]
        keys = dict.fromkeys(key for other in others for key in other)
        names = [key for key in keys if len({str(other.get(key)) for other in others}) > 1]
        shown.append(
            text.plain(settings_text(json.dumps({key: own[key] for key in names if key in own})))
        )
    return shown


def grid(
    tables: Sequence[Table],
    *,
    details: Mapping[int, str],
    methods: Iterable[str],
    with_task: bool,
    only: Iterable[tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """Return the rows of some tables for the page.

    Args:
        tables: As `comparison_tables` returns them.
        details: For each table, by its identity, what `differing` says of it.
        methods: Names that have a page of their own.
        with_task: Whether to name the task of each row.
        only: Experiment and cell of the rows to keep; all if None.

    Returns:
        `columns`, each with `key`, `label`, `kind` (`number`, `chip` or `text`) and `title`;
        `groups` with what the rows of a table share; `rows` with `group`, `method`, `settings`,
        `page`, `role`, `family`, `status`, `error`, `evidence` and `cells`, one for each column:
        `[number, text, interval]`, None, or text; `sort`, the column and direction to begin with.
    """
    kept = None if only is None else set(only)
    known = set(methods)
    rows: list[dict[str, Any]] = []
    groups: list[dict[str, str]] = []
    chosen: list[Row] = []
    for table in tables:
        parts = label_parts(table)
        places = [
            place
            for place, row in enumerate(table.data)
            if kept is None or (row["experiment_id"], row["cell_id"]) in kept
        ]
        if not places:
            continue
        groups.append(_group(table.data[0], details[id(table)]))
        for place in places:
            row, (method, settings) = table.data[place], parts[place]
            chosen.append(row)
            rows.append(
                {
                    "group": len(groups) - 1,
                    "method": method,
                    "settings": settings,
                    "page": f"methods/{slug(row['method'])}.html" if row["method"] in known else "",
                    "role": row["role"],
                    "family": text.plain(row["family"] or ""),
                    "status": row["status"],
                    "error": text.plain(row["error"] or ""),
                    "evidence": evidence(row),
                }
            )
    columns = list(_columns(chosen))
    for row, shown in zip(chosen, rows, strict=True):
        shown["cells"] = [_cell(quantity, kind, row) for quantity, kind, _ in columns]
    headings = [heading for *_, heading in columns]
    sort = next(
        (place for place, heading in enumerate(headings) if heading["key"] == _SORTED_BY), None
    )
    if sort is not None:
        # Stable: equal rows, and those without a number, stay in the order of their tables.
        rows.sort(key=lambda row: -(row["cells"][sort] or [float("-inf")])[0])
    return {
        "columns": headings,
        "groups": groups,
        "rows": rows,
        "sort": None if sort is None else [sort, "descending"],
        "withTask": with_task,
    }


def evidence(row: Row) -> str:
    """Return the place where the SQL and the raw rows of a cell are."""
    return f"experiments/{slug(row['experiment_id'])}.html#{anchor(row['cell_id'])}"


def anchor(cell_id: str, column: str = "") -> str:
    """Return the id of a cell, or of one of its numbers, on the page of its experiment."""
    return f"c-{slug(cell_id)}" + (f"-{column}" if column else "")


def _group(row: Row, details: str) -> dict[str, str]:
    return {
        "task": text.plain(row["task"]),
        "taskPage": f"tasks/{slug(row['task'])}.html",
        "model": text.plain(row["model"]),
        "hardware": text.plain(row["hardware"]),
        "scenario": text.plain(row["scenario"]),
        "scale": text.plain(row["scale"]),
        "details": details,
    }


def _settings(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for column in _DETAILS:
        found |= json.loads(row[column] or "{}")
    return {**found, "task version": row["task_version"], "order seed": row["seed"]}


def _columns(rows: Sequence[Row]) -> Iterable[tuple[Quantity | str, str, dict[str, str]]]:
    """Yield the columns that say something: whose, of which kind, and the heading."""
    metrics = {row["metric"] for row in rows if row["metric"]}
    for quantity in QUANTITIES:
        if quantity.column.startswith("decode") and not any(
            row["speed_of"] == "decode" for row in rows
        ):
            continue
        if all(row[quantity.column] is None for row in rows):
            continue
        label = quantity.heading
        if quantity.column == "quality" and len(metrics) == 1:
            label = text.plain(next(iter(metrics)))
        yield quantity, "number", _heading(quantity.column, label, "number", quantity.meaning)
        if quantity.verdict:
            name = quantity.verdict.replace("_", " ")
            yield quantity, "chip", _heading(quantity.verdict, name, "chip", "")
    yield "output_check", "text", _heading("output_check", "output", "text", "")
    if any(row["audit"] for row in rows):
        yield "audit", "chip", _heading("audit", "audit", "chip", "")


def _heading(key: str, label: str, kind: str, title: str) -> dict[str, str]:
    return {"key": key, "label": label, "kind": kind, "title": title}


def _cell(quantity: Quantity | str, kind: str, row: Row) -> Any:
    if isinstance(quantity, str):
        return text.plain(row[quantity] or "")
    if kind == "chip":
        return quantity.judged(row)
    value = row[quantity.column]
    if value is None:
        return None
    # More digits than are shown would sort rows apart that read the same, and are not needed.
    return [float(f"{value:.6g}"), quantity.value(row), quantity.ends(row)]
