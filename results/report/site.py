"""Writes the site: pages, raw rows, style, and the library that draws."""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import duckdb
import jinja2
from markupsafe import Markup

from results import tables, text
from results.claim_report import PaperReport, summary
from results.claims import Verdict, counts
from results.report import charts
from results.report.content import Content, Described, Part, Sources, loaded, read, slug
from results.report.grid import PAGE_ROWS, anchor, differing, evidence, grid
from results.report.numbers import (
    INTERACTIONS,
    QUANTITIES,
    Quantity,
    number_text,
    raw_interaction_sql,
    raw_sql,
    samples_sql,
)
from results.statistics import NOT_WORSE
from results.tables import Row, Table

File = Path | Callable[[], str]

MANIFEST: Final = "report.json"
_FOLDER = Path(__file__).parent
_MADE_BY = "tokenmark report"
# Nothing may be asked of anywhere: all that a page needs lies beside it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'"
)
# A method page explains and draws the settings measured last, a longer list would be a heap.
_EXPLAINED = 6
_DRAWN = 12
# Of an experiment's outputs the page shows some, and the start of each; all are in the raw rows.
_OUTPUT_ITEMS = 2
_OUTPUT_CHARACTERS = 600
_DIVERGENCES = 20
_OUTPUTS = """
SELECT item_id, cell_id, output, score FROM samples
WHERE experiment_id = ? AND repeat = 0 AND item_id IN (
    SELECT DISTINCT item_id FROM samples WHERE experiment_id = ? ORDER BY item_id LIMIT ?)
ORDER BY item_id, cell_id
"""
# Text that somebody else wrote goes into raw rows as JSON: a spreadsheet then runs no formula.
_RAW: Mapping[str, str] = {
    "samples": "SELECT * EXCLUDE (output), to_json(output) AS output_json FROM samples "
    "WHERE experiment_id = ? ORDER BY cell_id, item_id, repeat",
    "scores": "SELECT * EXCLUDE (unscored, detail), to_json(unscored) AS unscored_json, "
    "to_json(detail) AS detail_json FROM scores "
    "WHERE experiment_id = ? ORDER BY cell_id, metric, item_id",
}
_VERSIONS = ("version", "python", "git_commit", "git_dirty", "kernel", "os")
_CEILINGS = ("bandwidth", "flops")


class ReportError(Exception):
    """The site cannot be written; says why and what to do."""


@dataclass(frozen=True)
class Facts:
    """A list of facts, or rows of a table; a `Part` of our own."""

    title: str
    rows: Sequence[Mapping[str, str]]


class Written(NamedTuple):
    """What was written: the page to open, how many there are, cells on the leaderboards."""

    page: Path
    num_pages: int
    num_cells: int


def write(folder: Path, index_path: Path | None, sources: Sources) -> Written:
    """Write the site.

    The same results give the same bytes. What an earlier report wrote there and this one does not
    is removed; files of anybody else stay.

    Args:
        folder: Where to; made if missing.
        index_path: As `ingest` returns it; None if nothing was measured yet.
        sources: What does not come from the index.

    Raises:
        ReportError: The folder cannot be written, holds files of somebody else under the same
            names, or the library that draws is not installed.
        StoreError: The index cannot be read.
    """
    site = Site(read(index_path) if index_path else Content(), sources)
    with ExitStack() as stack:
        connection = stack.enter_context(tables.connect(index_path)) if index_path else None
        files = dict(_files(site, index_path, connection))
        before = _earlier(folder)
        for path in files:
            if path not in before and (folder / path).exists():
                raise ReportError(
                    f"{folder / path} exists and is not of an earlier report: name a new or an "
                    "empty folder."
                )
        try:
            # Also what is yet to come: a report that was interrupted can be written again.
            _sign(folder, before | files.keys())
            for path, content in files.items():
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Path):
                    shutil.copyfile(content, target)
                else:
                    target.write_text(content(), encoding="utf-8", newline="\n")
            for path in before - files.keys():
                (folder / path).unlink(missing_ok=True)
            _sign(folder, files)
        except OSError as error:
            raise ReportError(f"{folder} cannot be written: {error.strerror}.") from error
    return Written(
        page=folder / "index.html",
        num_pages=sum(path.endswith(".html") for path in files),
        num_cells=sum(len(table.data) for table in site.tables),
    )


def _sign(folder: Path, files: Iterable[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"made_by": _MADE_BY, "files": sorted(files)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _earlier(folder: Path) -> set[str]:
    """Return the files of the report that is there already."""
    path = folder / MANIFEST
    if not path.exists():
        return set()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["made_by"] != _MADE_BY:
            raise ValueError
        files = {str(name) for name in content["files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(
            f"{path} is not of an earlier report: name a new or an empty folder."
        ) from error
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        raise ReportError(f"{path} names files outside its folder: remove it.")
    return files


def _files(
    site: Site, index_path: Path | None, connection: duckdb.DuckDBPyConnection | None
) -> Iterator[tuple[str, File]]:
    """Yield the path of each file, and what makes its content or the file to copy."""
    for name in ("report.css", "report.js"):
        yield f"assets/{name}", _FOLDER / "static" / name
    for name, path in _plotly().items():
        yield f"assets/{name}", path
    yield from site.pages(partial(_outputs, connection))
    if index_path is None or connection is None:
        return
    yield "data/comparison.csv", partial(tables.render, index_path, None, format="csv")
    for experiment_id in site.content.experiments:
        for name, query in _RAW.items():
            yield (
                f"data/{slug(experiment_id)}/{name}.csv",
                partial(_raw_rows, connection, query, experiment_id),
            )


def _outputs(
    connection: duckdb.DuckDBPyConnection | None, experiment_id: str
) -> list[tuple[Any, ...]]:
    """Return item, cell, text and score of the first outputs of an experiment."""
    if connection is None:
        return []
    values = [experiment_id, experiment_id, _OUTPUT_ITEMS]
    return connection.execute(_OUTPUTS, values).fetchall()


def _raw_rows(connection: duckdb.DuckDBPyConnection, query: str, experiment_id: str) -> str:
    cursor = connection.execute(query, [experiment_id])
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow([column[0] for column in cursor.description])
    writer.writerows(cursor.fetchall())
    return written.getvalue()


def _plotly() -> dict[str, Path]:
    """Return the library that draws, and its licence, out of the installed package, by new name.

    Raises:
        ReportError: It is not installed.
    """
    found = importlib.util.find_spec("plotly")
    library = (
        Path(found.submodule_search_locations[0], "package_data", "plotly.min.js")
        if found and found.submodule_search_locations
        else None
    )
    if library is None or not library.is_file():
        raise ReportError(
            "the charts need plotly, which is not installed: "
            "pip install -e '.[report]' -c constraints.txt"
        )
    licences = [
        Path(str(file.locate()))
        for file in importlib.metadata.files("plotly") or ()
        if file.name.startswith("LICENSE") and ".dist-info" in str(file)
    ]
    return {"plotly.min.js": library, **dict(zip(["plotly.LICENSE.txt"], licences, strict=False))}


class Site:
    """The pages of some content."""

    def __init__(self, content: Content, sources: Sources) -> None:
        self.content = content
        self.sources = sources
        self.tables = [table for table in content.tables if table.data]
        self.details = {
            id(table): words
            for table, words in zip(self.tables, differing(self.tables), strict=True)
        }
        self.cells: dict[str, list[Row]] = {}
        for row in content.cells.values():
            self.cells.setdefault(row["experiment_id"], []).append(row)
        for rows in self.cells.values():
            rows.sort(key=lambda row: row["cell_id"] != row["baseline_cell_id"])
        measured = (row["method"] for row in content.cells.values())
        self.methods = sorted({*sources.methods, *sources.papers, *measured})
        self.tasks = sorted({row["task"] for row in content.experiments.values()})
        self.environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_FOLDER / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=_shown,
        )
        self.environment.filters |= {
            "embedded": _embedded,
            "slug": slug,
            "long": _long,
            "digits": _digits,
            "evidence": evidence,
        }
        self.environment.globals |= {"policy": Markup(_POLICY), "page_rows": PAGE_ROWS}

    def pages(
        self, outputs: Callable[[str], list[tuple[Any, ...]]]
    ) -> Iterator[tuple[str, Callable[[], str]]]:
        """Yield the path of every page, and what makes its text."""
        yield "index.html", lambda: self._page("index.html", "", **self._overview())
        yield "methods.html", lambda: self._page("methods.html", "", rows=self._method_rows())
        yield "runs.html", lambda: self._page("runs.html", "", rows=self._run_rows())
        for name in self.tasks:
            yield f"tasks/{slug(name)}.html", partial(self._below, "task.html", self._task, name)
        for name in self.methods:
            path = f"methods/{slug(name)}.html"
            yield path, partial(self._below, "method.html", self._method, name)
        for run in self.content.runs:
            path = f"runs/{slug(run['run_id'])}.html"
            yield path, partial(self._below, "run.html", self._run, run)
        for name in self.content.experiments:
            path = f"experiments/{slug(name)}.html"
            filled = partial(self._experiment, outputs=outputs)
            yield path, partial(self._below, "experiment.html", filled, name)

    def _below(self, template: str, fill: Callable[[Any], dict[str, Any]], about: Any) -> str:
        """Return a page of a folder below the first."""
        return self._page(template, "../", **fill(about))

    def _page(self, template: str, root: str, **values: Any) -> str:
        return self.environment.get_template(template).render(root=root, **values)

    def _grid(
        self,
        chosen: Sequence[Table],
        *,
        with_task: bool,
        only: Sequence[tuple[str, str]] | None = None,
    ) -> dict[str, Any]:
        return grid(
            chosen, details=self.details, methods=self.methods, with_task=with_task, only=only
        )

    @cached_property
    def _by_task(self) -> dict[str, list[Table]]:
        found: dict[str, list[Table]] = {}
        for table in self.tables:
            found.setdefault(table.data[0]["task"], []).append(table)
        return found

    # --- the pages, each as what its template is filled with ---

    def _overview(self) -> dict[str, Any]:
        papers = list(self.sources.papers.values())
        return {
            "tasks": [self._task_row(name) for name in self.tasks],
            "runs": self._run_rows()[:5],
            "num_runs": len(self.content.runs),
            "num_cells": sum(len(table.data) for table in self.tables),
            "num_methods": len({row["method"] for row in self.content.cells.values()}),
            "papers": summary(papers) if papers else "",
            "claims": _claim_counts(papers),
            "latest": max(
                (row["created"] for row in self.content.experiments.values()), default=""
            ),
        }

    def _task_row(self, name: str) -> dict[str, Any]:
        rows = [row for table in self._by_task.get(name, ()) for row in table.data]
        best = max(
            (
                row
                for row in rows
                if row["status"] == "ok"
                and row["speed_verdict"] == "FASTER"
                and row["quality_verdict"] in NOT_WORSE
            ),
            key=lambda row: row["speedup"],
            default=None,
        )
        speed = next(each for each in QUANTITIES if each.column == "speedup")
        return {
            "name": name,
            "what": self.sources.tasks.get(name, Described()).what,
            "metric": ", ".join(dict.fromkeys(row["metric"] for row in rows if row["metric"])),
            "models": ", ".join(dict.fromkeys(row["model"] for row in rows)),
            "methods": len({row["method"] for row in rows}),
            "cells": len(rows),
            "faster": sum(row["speed_verdict"] == "FASTER" for row in rows),
            "best": best
            and {
                "method": best["method"],
                "value": speed.value(best),
                "ends": speed.ends(best),
                "evidence": evidence(best),
            },
        }

    def _method_rows(self) -> list[dict[str, Any]]:
        measured: dict[str, set[str]] = {}
        families: dict[str, str] = {}
        for table in self.tables:
            for row in table.data:
                measured.setdefault(row["method"], set()).add(row["task"])
                families[row["method"]] = row["family"] or ""
        return [
            {
                "name": name,
                "family": self._described(name).family or families.get(name, ""),
                "status": self._described(name).status or "measured",
                "what": self._described(name).what,
                "tasks": len(measured.get(name, ())),
                "claims": _claim_counts([self.sources.papers[name]])
                if name in self.sources.papers
                else [],
            }
            for name in self.methods
        ]

    def _described(self, name: str) -> Described:
        return self.sources.methods.get(name, Described())

    def _run_rows(self) -> list[dict[str, Any]]:
        return [
            {
                **run,
                "cells": len(self.content.run_cells.get(run["run_id"], ())),
                "ended": Counter(row["status"] for row in self._cells_of(run["run_id"])),
            }
            for run in self.content.runs
        ]

    def _cells_of(self, run_id: str) -> list[Row]:
        """Return the cells of a run that have ended, in the order of its plan."""
        pairs = dict.fromkeys(self.content.run_cells.get(run_id, ()))
        return [self.content.cells[pair] for pair in pairs if pair in self.content.cells]

    def _task(self, name: str) -> dict[str, Any]:
        chosen = self._by_task.get(name, [])
        experiments = [row for row in self.content.experiments.values() if row["task"] == name]
        metrics, scorers = self._measures(experiments)
        return {
            "name": name,
            "described": self.sources.tasks.get(name, Described()),
            "grid": self._grid(chosen, with_task=False),
            "stacks": self._stacks(chosen),
            "charts": self._charts(chosen),
            "notes": [(self._title(table), table.notes) for table in chosen],
            "versions": _versions(experiments),
            "metrics": metrics,
            "scorers": scorers,
        }

    def _title(self, table: Table) -> str:
        details = self.details[id(table)]
        return f"{table.title} · {details}" if details else table.title

    def _charts(self, chosen: Sequence[Table]) -> list[dict[str, Any]]:
        found = []
        for table in chosen:
            headlines = (self.content.headline(row) for row in table.data)
            is_better = next((each["higher_is_better"] for each in headlines if each), None)
            if is_better is not None:
                found.append(
                    charts.chart(table, higher_is_better=is_better, title=self._title(table))
                )
        return [each for each in found if each is not None]

    def _stacks(self, chosen: Sequence[Table], method: str = "") -> list[dict[str, Any]]:
        """Return the tables of what became of the gains of stacks' parts.

        Args:
            chosen: The tables above them.
            method: A stack, or a part of stacks; all stacks if empty.
        """
        found = []
        for table in chosen:
            for below in table.below:
                rows = [
                    {"texts": texts, "evidence": evidence(row)}
                    for texts, row in zip(below.rows, below.data, strict=True)
                    if not method or method in self._methods_of(row)
                ]
                if rows:
                    found.append(
                        {
                            "title": self._title(table),
                            "columns": below.columns,
                            "rows": rows,
                            "notes": below.notes,
                        }
                    )
        return found

    def _methods_of(self, row: Row) -> list[str]:
        """Return the names of a stack and of its parts."""
        cells = [row[name] for name in ("cell_id", "first_cell", "second_cell")]
        return [self.content.cells[row["experiment_id"], cell]["method"] for cell in cells]

    def _measures(self, experiments: Sequence[Row]) -> tuple[list[Row], list[Row]]:
        """Return the metrics of some experiments, and who else scored them."""
        metrics: dict[str, Row] = {}
        scorers: dict[tuple[str, str], Row] = {}
        for experiment in experiments:
            for row in self.cells.get(experiment["experiment_id"], ()):
                key = (row["experiment_id"], row["cell_id"])
                for metric in self.content.metrics.get(key, ()):
                    metrics.setdefault(metric["metric"], metric)
                for scorer in self.content.scorers.get(key, ()):
                    scorers.setdefault((scorer["metric"], scorer["scorer"]), scorer)
        return list(metrics.values()), list(scorers.values())

    def _method(self, name: str) -> dict[str, Any]:
        chosen = [
            table for table in self.tables if any(row["method"] == name for row in table.data)
        ]
        newest = sorted(chosen, key=lambda table: table.data[0]["created"], reverse=True)
        rows = [row for table in chosen for row in table.data if row["method"] == name]
        explained: list[tuple[Row, Sequence[Part]]] = []
        for row in sorted(rows, key=lambda row: row["created"], reverse=True):
            if len(explained) < _EXPLAINED and (
                parts := self.sources.why(row["experiment_id"], row["cell_id"])
            ):
                explained.append((row, parts))
        return {
            "name": name,
            "described": self._described(name),
            "report": self.sources.papers.get(name),
            "claims": self._claims(name),
            "grid": self._grid(
                chosen,
                with_task=True,
                only=[(row["experiment_id"], row["cell_id"]) for row in rows],
            ),
            "stacks": self._stacks(chosen, name),
            "charts": self._charts(newest[:_DRAWN]),
            "explained": explained,
            "not_explained": max(0, len(rows) - len(explained)),
        }

    def _claims(self, name: str) -> list[dict[str, Any]]:
        report = self.sources.papers.get(name)
        if report is None:
            return []
        found = []
        for claim, settled in zip(report.claims, report.settled, strict=True):
            cell = self.content.cells.get((settled.evidence_experiment, settled.evidence_cell))
            found.append(
                {
                    "claim": claim,
                    "settled": settled,
                    "evidence": evidence(cell) if cell else "",
                    "sql": "SELECT * FROM claim_verdicts JOIN claims USING (method, claim_id) "
                    f"WHERE method = {text.sql(name)} AND claim_id = {text.sql(settled.claim_id)}",
                }
            )
        return found

    def _run(self, run: Row) -> dict[str, Any]:
        cells = self._cells_of(run["run_id"])
        pairs = [(row["experiment_id"], row["cell_id"]) for row in cells]
        newest = {
            (row["experiment_id"], row["cell_id"]) for table in self.tables for row in table.data
        }
        audits = [
            (row, loaded(row["audit_record"])) for row in cells if loaded(row["audit_record"])
        ]
        environments = {}
        for row in cells:
            experiment = self.content.experiments[row["experiment_id"]]
            environments[experiment["environment_id"]] = loaded(experiment["environment"]) or {}
        return {
            "run": run,
            "skipped": loaded(run["skipped"]) or [],
            "grid": self._grid(self.tables, with_task=True, only=pairs),
            "older": [row for row, pair in zip(cells, pairs, strict=True) if pair not in newest],
            "num_missing": len(set(self.content.run_cells.get(run["run_id"], ()))) - len(cells),
            "failed": [row for row in cells if row["status"] not in ("ok", "unsupported")],
            "audits": audits,
            "environments": [_environment(each) for each in environments.values()],
        }

    def _experiment(
        self, name: str, outputs: Callable[[str], Sequence[tuple[Any, ...]]]
    ) -> dict[str, Any]:
        experiment = self.content.experiments[name]
        rows = self.cells.get(name, [])
        facts = loaded(experiment["facts"]) or {}
        methods = {row["cell_id"]: row["method"] for row in rows}
        shown: dict[str, list[dict[str, Any]]] = {}
        for item_id, cell_id, output, score in outputs(name):
            entry = {
                "method": methods.get(cell_id, cell_id),
                "score": number_text(score),
                "lines": (output or "")[:_OUTPUT_CHARACTERS].splitlines(),
                "is_cut": len(output or "") > _OUTPUT_CHARACTERS,
            }
            shown.setdefault(item_id, []).append(entry)
        return {
            "name": name,
            "experiment": experiment,
            "facts": [
                _list("Asked", {"task": experiment["task"], **_object(experiment["task_params"])}),
                _list(
                    "Model", {"model": experiment["model"], **_object(experiment["model_params"])}
                ),
                _list("Recorded", facts),
            ],
            "step_cost": loaded(experiment["step_cost"]),
            "cells": [self._cell(row, str(facts.get("output_unit", "token"))) for row in rows],
            "outputs": shown,
            "runs": [
                run["run_id"]
                for run in self.content.runs
                if any(pair[0] == name for pair in self.content.run_cells.get(run["run_id"], ()))
            ],
        }

    def _cell(self, row: Row, output_unit: str) -> dict[str, Any]:
        key = (row["experiment_id"], row["cell_id"])
        kind = str(self.content.headline(row).get("kind", ""))
        divergences = loaded(row["divergences"]) or []
        audit = loaded(row["audit_record"]) or {}
        return {
            "row": row,
            "anchor": anchor(row["cell_id"]),
            "spec": row["spec"] or row["method"],
            "numbers": [
                *_numbers(
                    row, QUANTITIES, partial(raw_sql, metric_kind=kind, output_unit=output_unit)
                ),
                *_numbers(
                    self.content.interactions.get(key, {}),
                    INTERACTIONS,
                    partial(raw_interaction_sql, metric_kind=kind, output_unit=output_unit),
                ),
            ],
            "samples_sql": samples_sql(row),
            "params": _list("Settings", _object(row["params"])),
            "metrics": self.content.metrics.get(key, ()),
            "scorers": self.content.scorers.get(key, ()),
            "notes": [
                part
                for part in (
                    _list("Settled at run time", loaded(row["notes"]) or {}),
                    _list("Seconds", loaded(row["cell_seconds"]) or {}),
                )
                if part.rows
            ],
            "audit": audit.get("checks", []),
            "divergences": divergences[:_DIVERGENCES],
            "num_divergences": len(divergences),
            "log": (row["log_tail"] or "").splitlines(),
        }


def _numbers(
    row: Row, quantities: Iterable[Quantity], raw: Callable[[Row, str], str]
) -> Iterator[dict[str, Any]]:
    """Yield the numbers of a row that are there, each with the SQL that gives it."""
    for quantity in quantities:
        if row.get(quantity.column) is not None:
            yield {
                "quantity": quantity,
                "anchor": anchor(row["cell_id"], quantity.key),
                "value": quantity.value(row),
                "ends": quantity.ends(row),
                "verdict": quantity.judged(row),
                "exact": number_text(row[quantity.column]),
                "sql": quantity.sql(row),
                "raw": raw(row, quantity.column),
            }


def _object(value: str | None) -> dict[str, Any]:
    return dict(loaded(value) or {})


def _list(title: str, facts: Mapping[str, Any]) -> Facts:
    return Facts(
        title,
        [
            {"key": key.replace("_", " "), "value": _words(value)}
            for key, value in facts.items()
            if value is not None
        ],
    )


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _versions(experiments: Sequence[Row]) -> list[dict[str, Any]]:
    """Return each version and content of a task that was measured, the newest last."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in experiments:
        key = tuple(str(row[name]) for name in ("task_version", "task_hash", "task_params"))
        entry = found.setdefault(
            key,
            {
                "version": row["task_version"],
                "hash": row["task_hash"],
                "settings": tables.settings_text(row["task_params"]),
                "items": 0,
                "experiments": 0,
            },
        )
        entry["items"] = max(entry["items"], row["items"])
        entry["experiments"] += 1
    return list(found.values())


def _environment(facts: Mapping[str, Any]) -> list[Facts]:
    """Return what is known of a machine: itself, its measured ceilings, its software."""
    parts: dict[str, dict[str, Any]] = {"Machine": {}, "Ceilings": {}, "Software": {}}
    for key, value in sorted(facts.items()):
        if any(word in key for word in _CEILINGS):
            parts["Ceilings"][key] = _rate(key, value)
        elif any(word in key for word in _VERSIONS):
            parts["Software"][key] = value
        elif key.endswith("_bytes") and isinstance(value, int | float):
            parts["Machine"][key.removesuffix("_bytes")] = f"{text.number(value / 2**30)} GiB"
        else:
            parts["Machine"][key] = value
    return [_list(title, values) for title, values in parts.items() if values]


def _rate(key: str, value: Any) -> Any:
    if not isinstance(value, int | float):
        return value
    if "flops" in key:
        return f"{text.number(value / 1e9)} GFLOP/s"
    return f"{text.number(value / 1e9)} GB/s"


def _claim_counts(papers: Sequence[PaperReport]) -> list[tuple[Verdict, int]]:
    """Return how often each verdict was given."""
    return list(counts(each for paper in papers for each in paper.settled).items())


def _shown(value: Any) -> Any:
    """Make text of anybody harmless to read; markup of the templates stays as it is."""
    if value is None:
        return ""
    return text.plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _embedded(value: Any) -> Markup:
    """Return JSON for a script element: it can neither end the element nor open another."""
    return jinja2.utils.htmlsafe_json_dumps(value, dumps=partial(text.json_text))


def _digits(value: float | None) -> str:
    """Return a number with four significant digits."""
    return text.number(value, 4)


def _long(value: str, length: int = 12) -> str:
    """Return the start of a digest."""
    return value[:length]
