"""What the site is made of: the index, read once, and what the registry says, handed in.

`results` knows no method and no task, so the descriptions of both come from outside as plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from results.claim_report import PaperReport
from results.tables import Row, Table, comparison_tables, connect, interactions_of, rows_of

_PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
# Names of devices, which Windows takes for themselves whatever their suffix.
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


class Part(Protocol):
    """Rows of text under a title, as `runner.describe` makes them."""

    @property
    def title(self) -> str:
        """Heading; may be empty."""

    @property
    def rows(self) -> Sequence[Mapping[str, str]]:
        """One mapping a row, all with the same keys; `key` and `value` for a list of facts."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """What the registry says of a method or task.

    Attributes:
        what: A line.
        family: Of a method.
        status: Of a method: `ready` or `planned`.
        parts: Facts, parameters, paper, …
    """

    what: str = ""
    family: str = ""
    status: str = ""
    parts: Sequence[Part] = ()


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What does not come from the index.

    Attributes:
        methods, tasks: Descriptions by name.
        papers: Claims with their verdicts, by method.
        why: Returns the why-report of a cell, by experiment and cell; empty where there is none.
    """

    methods: Mapping[str, Described] = field(default_factory=dict)
    tasks: Mapping[str, Described] = field(default_factory=dict)
    papers: Mapping[str, PaperReport] = field(default_factory=dict)
    why: Callable[[str, str], Sequence[Part]] = lambda experiment_id, cell_id: ()


@dataclass(frozen=True, kw_only=True)
class Content:
    """An index, read.

    Attributes:
        tables: Every cell once, as it was last measured: the leaderboards.
        experiments: Rows of `experiments` with their environment, by id, the oldest first.
        cells: Rows of the view with what the table `cells` has beside it, by experiment and cell.
        metrics: Rows of the table `metrics`, by experiment and cell.
        scorers: Rows of `scorer_metrics`, likewise.
        interactions: Of stacks whose parts were measured beside them, by experiment and cell.
        runs: Rows of `runs`, the newest first.
        run_cells: Experiment and cell of each run, in the order of its plan.
    """

    tables: Sequence[Table] = ()
    experiments: Mapping[str, Row] = field(default_factory=dict)
    cells: Mapping[tuple[str, str], Row] = field(default_factory=dict)
    metrics: Mapping[tuple[str, str], Sequence[Row]] = field(default_factory=dict)
    scorers: Mapping[tuple[str, str], Sequence[Row]] = field(default_factory=dict)
    interactions: Mapping[tuple[str, str], Row] = field(default_factory=dict)
    runs: Sequence[Row] = ()
    run_cells: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)

    def headline(self, row: Row) -> Row:
        """Return the row of the table `metrics` that the quality of a cell comes from."""
        found = self.metrics.get((row["experiment_id"], row["cell_id"]), ())
        return next((each for each in found if each["is_headline"]), {})


def read(index_path: Path) -> Content:
    """Read an index.

    Raises:
        StoreError: It is missing, is no index, or was made by another version.
    """
    with connect(index_path) as connection:

        def rows(query: str) -> list[Row]:
            return rows_of(connection.execute(query))

        experiments = rows(
            "SELECT e.*, n.environment FROM experiments e "
            "LEFT JOIN environments n USING (environment_id) ORDER BY created, experiment_id"
        )
        cells = rows(
            "SELECT comparison.*, c.divergences, c.notes, c.log_tail, c.finished, "
            "c.seconds AS cell_seconds, c.audit AS audit_record "
            "FROM comparison JOIN cells c USING (experiment_id, cell_id) "
            "ORDER BY experiment_id, method, cell_id"
        )
        metrics = rows("SELECT * FROM metrics ORDER BY is_headline DESC, metric")
        scorers = rows("SELECT * FROM scorer_metrics ORDER BY metric, scorer")
        interactions = interactions_of(connection)
        runs = rows("SELECT * FROM runs ORDER BY started DESC, run_id DESC")
        planned = connection.execute(
            "SELECT run_id, experiment_id, cell_id FROM run_cells ORDER BY run_id, place"
        ).fetchall()
    run_cells: dict[str, list[tuple[str, str]]] = {}
    for run_id, experiment_id, cell_id in planned:
        run_cells.setdefault(run_id, []).append((experiment_id, cell_id))
    return Content(
        tables=comparison_tables(index_path, None),
        experiments={row["experiment_id"]: row for row in experiments},
        cells={(row["experiment_id"], row["cell_id"]): row for row in cells},
        metrics=_by_cell(metrics),
        scorers=_by_cell(scorers),
        interactions=interactions,
        runs=runs,
        run_cells=run_cells,
    )


def slug(name: str) -> str:
    """Return a file name for a name, the same on all systems and different for different names.

    Names of lower-case letters, digits and `._-` stay; others keep what they can, with a digest.
    """
    is_plain = _PLAIN_NAME.fullmatch(name) and not name.endswith(".")
    # Two hyphens are for names that had to change.
    if is_plain and "--" not in name and not _DEVICES.fullmatch(name):
        return name
    kept = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]
    return f"{kept or 'x'}--{sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:10]}"


def loaded(value: str | None) -> Any:
    """Return what a JSON column holds; None where it is empty."""
    return json.loads(value) if value else None


def _by_cell(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["experiment_id"], row["cell_id"]), []).append(row)
    return found
