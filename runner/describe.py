"""Everything there is to say about one method, task, model, hardware profile or suite."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runner.registry import Entry, Kind, Registry
from runner.request import UsageError
from runner.settings import parameters, parse_method
from runner.stacking import make_method
from runner.suites import load_suite


@dataclass(frozen=True)
class Section:
    """A part of a description: rows of text under a title.

    Attributes:
        title: Heading; empty for the first part.
        rows: One mapping a row, all with the same keys.
    """

    title: str
    rows: Sequence[Mapping[str, str]]


def describe(registry: Registry, kind: Kind, name: str, *, imports: bool = True) -> list[Section]:
    """Return what the files say, and for a method or task what its class says.

    Args:
        registry: Where the files are.
        kind: Of which kind the thing is.
        name: Its name.
        imports: Of a method: whether to import it. Without, what only its class says is left out.

    Raises:
        UsageError: There is no such thing, or it cannot be read or imported.
    """
    if kind == "method":
        return _method(registry, name, imports)
    if kind == "task":
        return _task(registry, name)
    if kind == "suite":
        return _suite(registry, name)
    entry = registry.find(kind, name)
    return _tables({"name": entry.name, **entry.data(), "file": _place(entry, registry)})


def describe_cell(index_path: Path, cell_id: str) -> list[Section]:
    """Return what was measured of one cell, why it is so fast, and where its output differs.

    Args:
        index_path: The DuckDB index.
        cell_id: Its id, or enough of the start of it; or `method@task`, the one measured last.

    Raises:
        UsageError: No cell begins so, or several do.
        StoreError: There is no index.
    """
    from results.tables import connect, interactions_of, rows_of
    from runner import why

    if "@" in cell_id:
        cell_id = _last_measured(index_path, *cell_id.split("@", maxsplit=1))

    with connect(index_path) as connection:
        rows = rows_of(
            connection.execute(
                "SELECT comparison.*, divergences, notes, log_tail, cells.seconds, finished, "
                "cells.audit AS audit_record "
                "FROM comparison JOIN cells USING (experiment_id, cell_id) "
                "WHERE starts_with(cell_id, $id) ORDER BY created DESC, experiment_id",
                {"id": cell_id},
            )
        )
        evidence = rows_of(
            connection.execute(
                "SELECT * EXCLUDE (experiment_id, cell_id, method, spec) FROM dropped_evidence "
                "WHERE starts_with(cell_id, $id) AND experiment_id = $experiment "
                "ORDER BY item_id, repeat",
                {"id": cell_id, "experiment": rows[0]["experiment_id"] if rows else ""},
            )
        )
        interactions = interactions_of(connection)
    cells = {row["cell_id"]: row["method"] for row in reversed(rows)}
    if len(cells) != 1:
        listed = ", ".join(f"{each[:12]} ({method})" for each, method in list(cells.items())[:5])
        raise UsageError(
            f"{len(cells)} cells begin with {cell_id!r}: {listed}. Give more of the id."
            if cells
            else f"no cell begins with {cell_id!r}. All of them: python run.py sql "
            '"SELECT cell_id, method, task FROM comparison"'
        )
    cell = rows[0]  # measured more than once, the newest counts
    parts = {name: json.loads(cell.pop(name) or "null") for name in ("notes", "seconds")}
    divergences = json.loads(cell.pop("divergences") or "[]")
    audit = json.loads(cell.pop("audit_record") or "null")
    log = cell.pop("log_tail")
    sections = [_facts("", cell)]
    sections += why.sections(index_path, cell["experiment_id"], cell["cell_id"])
    if both := interactions.get((cell["experiment_id"], cell["cell_id"])):
        sections.append(Section("Beside its parts alone", _interactions(both)))
    sections += [_facts(title, facts) for title, facts in parts.items() if facts]
    if divergences:
        sections.append(Section("Divergences", [_row(each) for each in divergences]))
    if evidence:
        title = "Evidence that the oracle kept and this did not"
        sections.append(Section(title, [_row(each) for each in evidence]))
    if audit:
        sections.append(Section("Audit", [_row(each) for each in audit["checks"]]))
    if log:
        sections.append(Section("Log", [{"line": line} for line in str(log).splitlines()]))
    return sections


def _interactions(row: dict[str, Any]) -> list[dict[str, str]]:
    """Return what became of the gains of a stack's parts, a row for each kind of gain."""
    from results.report.numbers import INTERACTIONS

    return [
        {
            "number": each.heading,
            "value": each.value(row),
            "interval": each.ends(row),
            "verdict": each.judged(row),
            "items": str(row["items"]),
        }
        for each in INTERACTIONS
        if row[each.column] is not None
    ]


def _last_measured(index_path: Path, method: str, task: str) -> str:
    """Return the id of a method's cell on a task, in the experiment that was measured last.

    Args:
        index_path: The DuckDB index.
        method: Its name, or its spec as the tables have it.
        task: Its name.

    Raises:
        UsageError: There is none, or the experiment has the method with several settings.
        StoreError: There is no index.
    """
    from results.tables import connect

    with connect(index_path) as connection:
        rows = connection.execute(
            "SELECT experiment_id, cell_id, spec FROM comparison WHERE task = $task "
            "AND (method = $method OR spec = $method) ORDER BY created DESC, experiment_id DESC",
            {"method": method, "task": task},
        ).fetchall()
    last = [(cell_id, spec) for experiment_id, cell_id, spec in rows if experiment_id == rows[0][0]]
    if len(last) != 1:
        listed = "; ".join(f"{each[:12]} ({spec})" for each, spec in last)
        raise UsageError(
            f"{len(last)} cells of {method!r} on {task!r}: {listed}. Give one of the ids."
            if last
            else f"no cell of {method!r} on {task!r} was measured. All of them: python run.py sql "
            '"SELECT cell_id, method, task FROM comparison"'
        )
    return str(last[0][0])


def _stack(registry: Registry, name: str) -> list[Section]:
    made = make_method(name, registry)
    facts = {
        "name": made.spec,
        "what": "A stack: each part is applied to what the one before it yields.",
        "family": made.family,
        "role": made.method.role,
        "output": str(made.method.output),
        "takes": made.method.capability,
    }
    parts = [make_method(part, registry) for part in made.parts]
    rows = [
        {
            "part": part.spec,
            "family": part.family,
            "output": str(part.method.output),
            "settings": _plain(part.method.parameters()),
        }
        for part in parts
    ]
    return [_facts("", facts), Section("Parts", rows)]


def _method(registry: Registry, name: str, imports: bool) -> list[Section]:
    if len(parse_method(name).parts) > 1:
        return _stack(registry, name)
    entry = registry.find("method", name)
    card = registry.card(name)
    facts = {
        "name": name,
        "what": entry.title,
        "family": entry.family,
        "status": entry.status,
        "file": _place(entry, registry),
        "card": registry.relative(entry.card) if entry.card else "",
    }
    sections = []
    if imports and entry.status == "ready":
        cls = registry.load_method(name)
        facts |= {
            "role": cls.role,
            "output": str(cls.output),
            "takes": cls.capability,
            "neutral at": _plain(cls.neutral) if cls.neutral is not None else "",
        }
        sections.append(Section("Parameters", [_row(asdict(each)) for each in parameters(cls)]))
    if card is not None:
        sections.append(_facts("Paper", asdict(card.paper)))
        sections.append(Section("Claims", [_row(asdict(claim)) for claim in card.claims]))
    return [_facts("", facts), *sections]


def _task(registry: Registry, name: str) -> list[Section]:
    entry = registry.find("task", name)
    cls = registry.load_task(name)
    facts = {
        "name": name,
        "what": entry.title,
        "about": " ".join((inspect.getdoc(cls) or "").partition("Attributes:")[0].split()),
        "file": _place(entry, registry),
        "version": cls.version,
        "scale": cls.scale,
        "takes": cls.capability,
        "needs": ", ".join(cls.needs),
    }
    metrics = [_row(asdict(metric)) for metric in cls().metrics]
    return [
        _facts("", facts),
        _facts("Data", asdict(cls.data)),
        Section("Metrics", metrics),
        Section("Parameters", [_row(asdict(each)) for each in parameters(cls)]),
    ]


def _suite(registry: Registry, name: str) -> list[Section]:
    suite = load_suite(name, registry)
    facts = {
        "name": name,
        "title": suite.title,
        "file": _place(registry.find("suite", name), registry),
        "models": ", ".join(suite.models),
        "hardware": suite.hardware,
        "scenario": suite.scenario,
        "seed": suite.seed,
        "repeats": suite.repeats,
        "timeout": f"{suite.timeout:g} s",
    }
    tasks = [
        {
            "task": task.spec,
            "items": str(task.limit or "all"),
            "methods": ", ".join(task.methods) or "the suite's",
            "models": ", ".join(task.models) or "the suite's",
        }
        for task in suite.task
    ]
    methods = [{"method": method} for method in suite.methods]
    return [_facts("", facts), Section("Tasks", tasks), Section("Methods", methods)]


def _tables(data: Mapping[str, Any]) -> list[Section]:
    """Return the plain keys of a TOML file, then a part for each of its tables."""
    plain = {key: value for key, value in data.items() if not isinstance(value, dict)}
    tables = [
        _facts(key.replace("_", " "), value) for key, value in data.items() if key not in plain
    ]
    return [_facts("", plain), *tables]


def _facts(title: str, facts: Mapping[str, Any]) -> Section:
    rows = [
        {"key": key.replace("_", " "), "value": _plain(value)}
        for key, value in facts.items()
        if value not in ("", None)
    ]
    return Section(title, rows)


def _row(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: _plain(value) for key, value in values.items()}


def _plain(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_plain(each)}" for key, each in value.items()) or "its defaults"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return str(value)


def _place(entry: Entry, registry: Registry) -> str:
    if entry.source is None:
        return "" if entry.status == "planned" else f"package {entry.origin}"
    return registry.relative(entry.source)
