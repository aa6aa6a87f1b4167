"""Comparison tables: one query, one way to write a number, many formats.

A table holds the cells that share task, model, hardware and scenario, with the settings that must
agree for their numbers to be comparable. A baseline stands above the cells it was measured with.
"""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from results import schema, text
from results.store import StoreError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group, RenderResult

Row = dict[str, Any]

FORMATS = ("md", "csv", "latex", "json", "html")

_ROLES = ("baseline", "method", "control", "peer")
# Cells that differ in one of these do not belong into one table.
_SAME = (
    "task",
    "task_params",
    "task_version",
    "model",
    "model_params",
    "hardware",
    "scenario",
    "scale",
    "seed",
    "metric",
)

_QUERY = """
WITH chosen AS (
    SELECT experiment_id, cell_id, min(place) AS place
    FROM run_cells WHERE run_id = $run GROUP BY ALL
    UNION ALL
    -- Without a run: every cell, once, as it was last measured.
    SELECT arg_max(c.experiment_id, (e.created, e.experiment_id)), c.cell_id, 0
    FROM cells c JOIN experiments e USING (experiment_id)
    WHERE $run IS NULL GROUP BY c.cell_id
)
SELECT comparison.*, environments.environment, chosen.place
FROM comparison JOIN chosen USING (experiment_id, cell_id)
LEFT JOIN environments USING (environment_id)
ORDER BY task, model, hardware, scenario, created, experiment_id, place, method, cell_id
"""


@dataclass(frozen=True)
class Table:
    """One comparison table, as text, ready for any format.

    Attributes:
        title: What was compared, for people.
        columns: Headings.
        rows: Cells of each row as text; the first one names the method.
        notes: Lines that belong below the table.
        data: The rows of the view, with full precision.
        below: Tables that explain this one: what became of gains in stacks.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    data: tuple[Row, ...]
    below: tuple[Table, ...] = ()


def comparison_tables(
    index_path: Path, run: str | None = "latest", tasks: Sequence[str] = ()
) -> list[Table]:
    """Return the comparison tables of a run.

    Args:
        index_path: As `ingest` returns it.
        run: A run's id; `latest`; or None for every cell, as it was last measured.
        tasks: Names of tasks to keep; all if empty.

    Raises:
        StoreError: There is no index, no such run, or no such task in it.
    """
    with connect(index_path) as connection:
        run_id = run_id_of(connection, run)
        rows = rows_of(connection.execute(_QUERY, {"run": run_id}))
        general = _run_notes(connection, run_id)
        interactions = interactions_of(connection)
    known = sorted({row["task"] for row in rows})
    for task in tasks:
        if task not in known:
            near = get_close_matches(task, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise StoreError(
                f"no task named {task!r} in these results.{hint} They have: "
                f"{', '.join(known) or 'none'}."
            )
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if not tasks or row["task"] in tasks:
            groups.setdefault(tuple(row[name] for name in _SAME), []).append(row)
    tables = [_table(group, interactions) for group in groups.values()]
    if general and tables:
        tables[-1] = _with_notes(tables[-1], general)
    return tables


def render(
    index_path: Path,
    run: str | None = "latest",
    tasks: Sequence[str] = (),
    format: str = "md",
) -> str:
    """Return the comparison tables of a run as text; arguments as in `comparison_tables`.

    Raises:
        ValueError: `format` is none of `FORMATS`.
        StoreError: As in `comparison_tables`.
    """
    return formatted(comparison_tables(index_path, run, tasks), format)


def formatted(tables: Sequence[Table], format: str) -> str:
    """Return comparison tables as text.

    Raises:
        ValueError: `format` is none of `FORMATS`.
    """
    writers: dict[str, Callable[[Sequence[Table]], str]] = {
        "md": _markdown,
        "csv": _csv,
        "latex": _latex,
        "json": _json,
        "html": _html,
    }
    if format not in writers:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    return writers[format](tables)


def terminal(index_path: Path, run: str | None = "latest", tasks: Sequence[str] = ()) -> Group:
    """Return the comparison tables of a run for `rich`; arguments as in `comparison_tables`.

    Text is shown as it is: square brackets in an error message style nothing. A table that is wider
    than the terminal goes on below, with the methods named again; no number is cut.
    """
    from rich.console import Group
    from rich.text import Text

    found = _with_below(comparison_tables(index_path, run, tasks))
    shown: list[Any] = [_InBlocks(table) for table in found]
    return Group(*(shown or [Text(_NOTHING)]))


@dataclass(frozen=True)
class _InBlocks:
    """A table as `rich` draws it, in as many blocks of columns as the width asks for."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table as RichTable
        from rich.text import Text

        yield Text(text.plain(self.table.title), style="bold")
        for block in self.blocks(options.max_width):
            shown = RichTable()
            for place in block:
                shown.add_column(
                    Text(self.table.columns[place]),
                    justify="left" if place == 0 else "right",
                    no_wrap=place > 0,
                    overflow="fold",
                )
            for row in self.table.rows:
                shown.add_row(*(Text(text.plain(row[place])) for place in block))
            yield shown
        yield from (Text(text.plain(note)) for note in self.table.notes)
        yield Text("")

    def blocks(self, width: int) -> list[list[int]]:
        """Return the places of the columns of each block, the methods' in front."""
        from rich.cells import cell_len

        columns = zip(self.table.columns, *self.table.rows, strict=True)
        # Two for the space around a cell, one for the line.
        widths = [3 + max(cell_len(text.plain(cell)) for cell in column) for column in columns]
        blocks: list[list[int]] = []
        used = width
        for place in range(1, len(widths)):
            if used + widths[place] > width:
                blocks.append([0])
                used = 1 + widths[0]
            blocks[-1].append(place)
            used += widths[place]
        return blocks


def connect(index_path: Path) -> duckdb.DuckDBPyConnection:
    """Open an index for reading only.

    Raises:
        StoreError: It is missing, is no index, or was made by another version.
    """
    if not index_path.exists():
        raise StoreError(
            f"{index_path}: is missing. Run a suite first, or `python run.py rebuild` if there "
            "are shards."
        )
    remedy = "`python run.py rebuild` makes it anew from the shards."
    try:
        connection = duckdb.connect(str(index_path), read_only=True)
    except duckdb.Error as error:
        raise StoreError(f"{index_path}: cannot be read: {error}. {remedy}") from error
    try:
        version = connection.execute("SELECT version FROM index_info").fetchone()
    except duckdb.Error:
        version = None
    if version != (schema.INDEX_VERSION,):
        connection.close()
        raise StoreError(f"{index_path}: is no index of this version. {remedy}")
    return connection


def rows_of(cursor: duckdb.DuckDBPyConnection) -> list[Row]:
    """Return all that a statement found, each row by the names of its columns."""
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, values, strict=True)) for values in cursor.fetchall()]


def interactions_of(connection: duckdb.DuckDBPyConnection) -> dict[tuple[str, str], Row]:
    """Return what became of the gains of stacks' parts, by experiment and cell of the stack.

    Rows are those of the table `interactions`, with the view's `baseline_cell_id` and
    `quality_unit`.
    """
    rows = rows_of(
        connection.execute(
            "SELECT i.*, c.baseline_cell_id, c.quality_unit "
            "FROM interactions i JOIN comparison c USING (experiment_id, cell_id)"
        )
    )
    return {(row["experiment_id"], row["cell_id"]): row for row in rows}


_NOTHING = "No results."


def run_id_of(connection: duckdb.DuckDBPyConnection, run: str | None) -> str | None:
    """Return the id of a run that is named by it or as `latest`; None for None.

    Raises:
        StoreError: There is no such run.
    """
    if run is None:
        return None
    known = [
        row[0]
        for row in connection.execute("SELECT run_id FROM runs ORDER BY started, run_id").fetchall()
    ]
    if not known:
        raise StoreError("there is no run in this store yet. `python run.py` makes one.")
    if run == "latest":
        return str(known[-1])
    if run not in known:
        near = get_close_matches(run, known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise StoreError(f"no run {run!r}.{hint} The last ones are {', '.join(known[-5:])}.")
    return run


def _run_notes(connection: duckdb.DuckDBPyConnection, run_id: str | None) -> list[str]:
    """Return what a run should have measured and did not."""
    found = connection.execute(
        "SELECT status, skipped, (SELECT count(*) FROM run_cells r WHERE r.run_id = runs.run_id "
        "AND NOT EXISTS (SELECT 1 FROM cells c WHERE c.experiment_id = r.experiment_id "
        "AND c.cell_id = r.cell_id)) FROM runs WHERE run_id = ?",
        [run_id],
    ).fetchone()
    if found is None:
        return []
    status, skipped, missing = found
    notes = [f"Run {run_id}: {status}."] if status != "finished" else []
    if missing:
        notes.append(f"{missing} of the run's cells have not ended yet.")
    return notes + [
        f"Skipped: {entry.get('method', '')} on {entry.get('task', '')} with "
        f"{entry.get('model', '')}: {entry.get('reason', '')}"
        for entry in json.loads(skipped)
    ]


def _with_below(tables: Sequence[Table]) -> list[Table]:
    """Return tables with those below them, in the order in which they are read."""
    return [each for table in tables for each in (table, *table.below)]


def _table(group: list[Row], interactions: Mapping[tuple[str, str], Row]) -> Table:
    """Make the table of comparable cells.

    Args:
        group: The cells.
        interactions: Of stacks, by experiment and cell.
    """
    experiments = list(dict.fromkeys(row["experiment_id"] for row in group))
    rows = sorted(
        group,
        key=lambda row: (
            experiments.index(row["experiment_id"]),
            _ROLES.index(row["role"]) if row["role"] in _ROLES else len(_ROLES),
            row["cell_id"] != row["baseline_cell_id"],
            row["place"],
        ),
    )
    labels = _labels(rows)
    first = rows[0]
    columns: dict[str, Callable[[Row], str]] = {
        "speed-up": lambda row: _with_interval(row, "speedup", "speed_verdict"),
        "bound": lambda row: shown(row, "speedup_bound"),
    }
    if any(row["speed_of"] == "decode" for row in rows):
        columns |= {
            "decode speed-up": lambda row: _with_interval(row, "decode_speedup", "decode_verdict"),
            "decode bound": lambda row: shown(row, "decode_bound"),
        }
    columns |= {
        "tokens/forward": lambda row: shown(row, "tokens_per_forward"),
        "tokens/s": lambda row: shown(row, "tokens_per_second"),
        "s/item": lambda row: shown(row, "seconds_per_item"),
        **({"items": lambda row: str(row["items"] or "")} if _fewer(rows) else {}),
        str(first["metric"] or "quality"): lambda row: _with_interval(row, "quality"),
        "output": lambda row: row["output_check"] or "",
        "vs baseline": lambda row: _with_interval(row, "quality_delta", "quality_verdict"),
        "work": lambda row: shown(row, "work_ratio"),
        "memory": lambda row: shown(row, "memory_ratio"),
        "status": lambda row: row["status"],
    }
    if any(row["audit"] for row in rows):
        columns["audit"] = lambda row: row["audit"] or "not audited"
    return Table(
        title=f"{first['task']} · {first['model']} · {first['hardware']} · {first['scenario']}",
        columns=("method", *columns),
        rows=_written(columns, labels, rows),
        notes=(*_notes(rows, labels), *_unexplained(rows, labels, interactions)),
        data=tuple(rows),
        below=tuple(_below(rows, labels, interactions)),
    )


def _written(
    columns: Mapping[str, Callable[[Row], str]], labels: Sequence[str], rows: Sequence[Row]
) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (label, *(write(row) for write in columns.values()))
        for label, row in zip(labels, rows, strict=True)
    )


def _below(
    rows: Sequence[Row], labels: Sequence[str], interactions: Mapping[tuple[str, str], Row]
) -> Iterator[Table]:
    """Yield the table of what became of the gains of stacks' parts, if there is any stack."""
    by_cell = {(row["experiment_id"], row["cell_id"]): row for row in rows}
    found, named = [], []
    for label, row in zip(labels, rows, strict=True):
        own = interactions.get((row["experiment_id"], row["cell_id"]))
        if own is not None and own["items"]:
            found.append(own)
            named.append(label)
    if not found:
        return
    kinds = {"speed": "speedup"}
    if any(row["speed_of"] == "decode" for row in rows):
        kinds["decode"] = "decode_speedup"
    columns: dict[str, Callable[[Row], str]] = {}
    for kind, speed in kinds.items():
        word = "speed-up" if kind == "speed" else "decode speed-up"
        columns |= {
            word: partial(_of_both, by_cell, speed),
            f"{word} if gains multiplied": partial(_multiplied, by_cell, speed),
            f"{kind} interaction": partial(_interaction, kind),
        }
    columns |= {
        "tokens/forward interaction": partial(_interaction, "tokens_per_forward"),
        f"{rows[0]['metric'] or 'quality'} interaction": partial(_interaction, "quality"),
        "texts as first part": lambda row: f"{row['as_first']} of {row['items']}",
    }
    yield Table(
        title=f"Interactions · {rows[0]['task']} · {rows[0]['model']}",
        columns=("stack", *columns),
        rows=_written(columns, named, found),
        notes=(*_INTERACTION_NOTES, *_smallest_interaction(found)),
        data=tuple(found),
    )


def _unexplained(
    rows: Sequence[Row], labels: Sequence[str], interactions: Mapping[tuple[str, str], Row]
) -> Iterator[str]:
    """Say of which stacks it cannot be told what became of the gains of their parts."""
    for label, row in zip(labels, rows, strict=True):
        is_stack = row["status"] == "ok" and json.loads(row["parts"] or "[]")
        if is_stack and (row["experiment_id"], row["cell_id"]) not in interactions:
            yield f"{label}: no interaction: not both of its parts were measured beside it."


_INTERACTION_NOTES = (
    "Interaction: what both bring together over the product of what each brings alone; 1 where "
    "gains multiply. MULTIPLY: within the margin of speed; LESS and MORE: beyond it, at 99%.",
    "Of quality: what both change beyond the sum of what each changes alone; 0 where changes add "
    "up. SAME: within the margin of quality.",
)


def _of_both(cells: Mapping[tuple[str, str], Row], column: str, row: Row) -> str:
    return shown(cells[row["experiment_id"], row["cell_id"]], column)


def _multiplied(cells: Mapping[tuple[str, str], Row], column: str, row: Row) -> str:
    """Return the product of the parts' ratios; "" where one is not there."""
    parts = [cells.get((row["experiment_id"], row[f"{part}_cell"])) for part in ("first", "second")]
    ratios = [part[column] for part in parts if part is not None and part[column] is not None]
    return text.ratio(ratios[0] * ratios[1]) if len(ratios) == 2 else ""


def _interaction(kind: str, row: Row) -> str:
    return _with_interval(row, kind, f"{kind}_verdict")


def _smallest_interaction(rows: Sequence[Row]) -> Iterator[str]:
    """Say which interactions would have been seen, by the coarsest of the rows."""
    known = [row["speed_smallest"] for row in rows if row["speed_smallest"] is not None]
    if known:
        yield (
            "Smallest interaction of speed that would have been seen (80% power): "
            f"{text.percent(max(known))}."
        )


def _labels(rows: Sequence[Row]) -> list[str]:
    """Name each method with the settings that were asked for.

    Old shards do not say those: there, the settings in which it differs from others of its name.
    """
    settings = [json.loads(row["params"]) for row in rows]
    labels = []
    for row, own in zip(rows, settings, strict=True):
        if row["spec"]:
            labels.append(row["spec"])
            continue
        others = [
            other
            for rival, other in zip(rows, settings, strict=True)
            if rival["method"] == row["method"]
        ]
        keys = dict.fromkeys(key for other in others for key in other)
        differing = [key for key in keys if any(other.get(key) != own.get(key) for other in others)]
        shown = ",".join(f"{key}={_setting(own.get(key))}" for key in differing)
        labels.append(f"{row['method']}:{shown}" if shown else row["method"])
    return labels


def settings_text(params: str) -> str:
    """Return settings as they are written behind a name; "" for none.

    Args:
        params: As the view has them, a JSON object.
    """
    return ", ".join(f"{key}={_setting(value)}" for key, value in json.loads(params).items())


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _with_interval(row: Row, column: str, verdict: str = "") -> str:
    """Return a column of the view with its interval and, where there is one, its verdict."""
    value = text.interval(*(shown(row, f"{column}{end}") for end in ("", "_low", "_high")))
    return f"{value} {row[verdict] or ''}".strip() if verdict else value


def _score(row: Row, name: str) -> str:
    return text.score(row[name], is_fraction=row["quality_unit"] == "fraction")


def _fewer(rows: Sequence[Row]) -> str:
    """Say how methods with fewer items than others are compared; "" where all have the same."""
    if len({row["items"] for row in rows if row["status"] == "ok"}) < 2:
        return ""
    return " (ratios and differences over those shared with the baseline)"


def _notes(rows: Sequence[Row], labels: Sequence[str]) -> list[str]:
    """Return what a reader must know to judge the numbers, and why cells failed."""
    first = rows[0]
    measured = [row for row in rows if row["status"] == "ok"]
    items = _spread(row["items"] for row in measured)
    repeats = _spread(row["repeats"] for row in measured)
    margins = _spread(text.percent(row["margin"]) for row in rows)
    quality_margins = _spread(_score(row, "quality_margin") for row in rows)
    notes = [
        f"{items or 'no'} items{_fewer(rows)}, {repeats or 'no'} repeats, seed {first['seed']}; "
        f"scale {first['scale']}; margin {margins} of speed, {quality_margins} of quality.",
        f"Smallest difference that would have been seen (80% power): {_smallest(measured)}.",
        "Intervals are 95%; FASTER, SLOWER, BETTER and WORSE hold at 99%. Bound: the largest "
        "speed-up that the method's own counts allow here.",
        f"Machine: {_machine(first)}.",
    ]
    baselines = {row["experiment_id"] for row in rows if row["cell_id"] == row["baseline_cell_id"]}
    if len({row["experiment_id"] for row in rows}) > len(baselines):
        notes.append(
            "Some methods were measured at another time: their ratios are to the baseline that ran "
            "beside them, which is not the one shown."
        )
    if any(row["quality_verdict"] == "NO LOSS" for row in rows):
        notes.append(
            "SAME: the difference lies within the margin of quality; NO LOSS: a loss beyond it is "
            "excluded, a gain is not."
        )
    if any(row["speed_of"] == "decode" for row in rows):
        notes.append(
            "Decode: seconds of a token after the prefill; its bound: "
            + (
                "bytes of weights, keys and values that its forwards read."
                if any(row["bound_by"] == "bytes" for row in rows)
                else "its forwards at their measured cost."
            )
        )
    for name in ("task", "model"):
        if shown := settings_text(first[f"{name}_params"]):
            notes.append(f"{name.capitalize()} settings: {shown}.")
    sandboxes = _spread(row["sandbox"] for row in rows if row["sandbox"])
    if sandboxes:
        notes.append(f"Sandbox: {sandboxes}.")
    if scorer := _spread(row["scorer"] for row in rows):
        notes.append(f"Scored by {scorer}.")
    for label, row in zip(labels, rows, strict=True):
        if row["status"] != "ok":
            notes.append(f"{label}: {row['status']}: {row['error'] or 'no reason given'}")
        if row["unscored"]:
            notes.append(f"{label}: {row['unscored']} outputs could not be scored.")
        if row["scorers"]:
            notes.append(f"{label} by scorer: {row['scorers']}; {_disputed(row)}.")
        bound, low = row["speedup_bound"], row["speedup_low"]
        if bound is not None and low is not None and low > bound:
            notes.append(f"{label}: the measured speed-up lies above its bound; do not trust it.")
        bound, low = row["decode_bound"], row["decode_speedup_low"]
        if row["speed_of"] == "decode" and bound is not None and low is not None and low > bound:
            notes.append(
                f"{label}: the measured speed-up of decoding lies above its bound; do not trust it."
            )
    return notes


def _disputed(row: Row) -> str:
    if not row["disputed_items"]:
        return "no item is disputed"
    spread = _score(row, "quality_spread")
    return f"spread {spread}, disputed items: {row['disputed_items']}"


def _smallest(rows: Sequence[Row]) -> str:
    """Return the coarsest resolution among the rows, for speed and for quality."""
    speeds = [row["smallest_speed_difference"] for row in rows]
    qualities = [row["smallest_quality_difference"] for row in rows]
    speed = max((value for value in speeds if value is not None), default=None)
    quality = max((value for value in qualities if value is not None), default=None)
    return (
        f"speed {text.percent(speed) or 'unknown'}, "
        f"quality {_score({**rows[0], 'x': quality}, 'x') if quality is not None else 'unknown'}"
    )


def _machine(row: Row) -> str:
    """Return the profile's name, and what the environment says of the machine."""
    facts = json.loads(row["environment"] or "{}")
    known = [facts.get("gpu_name") or facts.get("cpu_model")]
    if facts.get("cpu_available_cores"):
        known.append(f"{text.number(facts['cpu_available_cores'], 2)} cores")
    if facts.get("memory_bytes"):
        known.append(f"{facts['memory_bytes'] / 2**30:.0f} GiB")
    if facts.get("torch_version"):
        known.append(f"torch {facts['torch_version']}")
    return ", ".join([row["hardware"], *(fact for fact in known if fact)])


def _spread(values: Any) -> str:
    """Return the distinct values, joined: one in the usual case."""
    return "/".join(str(value) for value in dict.fromkeys(values) if value not in (None, ""))


def _with_notes(table: Table, notes: Sequence[str]) -> Table:
    return replace(table, notes=(*table.notes, *notes))


def _markdown(tables: Sequence[Table]) -> str:
    parts = []
    for table in _with_below(tables):
        lines = [f"### {text.markdown(table.title)}", ""]
        lines.append(_markdown_row(table.columns))
        lines.append("|" + "---|" + "---:|" * (len(table.columns) - 1))
        lines += [_markdown_row(row) for row in table.rows]
        lines += ["", *(f"- {text.markdown(note)}" for note in table.notes)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts or [_NOTHING]) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(text.markdown(cell) for cell in cells) + " |"


def _latex(tables: Sequence[Table]) -> str:
    parts = ["% needs \\usepackage{booktabs}"]
    for table in _with_below(tables):
        body = [_latex_row(table.columns), "\\midrule", *map(_latex_row, table.rows)]
        notes = " ".join(text.latex(note) for note in table.notes)
        parts.append(
            "\n".join(
                [
                    "\\begin{table}",
                    f"\\caption{{{text.latex(table.title)}}}",
                    f"\\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
                    "\\toprule",
                    *body,
                    "\\bottomrule",
                    "\\end{tabular}",
                    f"\\par\\footnotesize {notes}",
                    "\\end{table}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(text.latex(cell) for cell in cells) + " \\\\"


_WRITERS: Mapping[str, Callable[[Row, str], str]] = {
    **dict.fromkeys(
        (
            "speedup",
            "speedup_low",
            "speedup_high",
            "speedup_bound",
            "speedup_geomean",
            "bound_ratio",
            "tokens_per_forward",
            "work_ratio",
            "memory_ratio",
            "prefill_ratio",
            "decode_speedup",
            "decode_speedup_low",
            "decode_speedup_high",
            "decode_bound",
            # Of `interactions`.
            *("speed", "speed_low", "speed_high", "decode", "decode_low", "decode_high"),
            *("tokens_per_forward_low", "tokens_per_forward_high"),
        ),
        lambda row, name: text.ratio(row[name]),
    ),
    **dict.fromkeys(
        (
            "quality",
            "quality_low",
            "quality_high",
            "baseline_quality",
            "quality_spread",
            "quality_delta",
            "quality_delta_low",
            "quality_delta_high",
        ),
        _score,
    ),
    **dict.fromkeys(
        ("seconds_per_item", "tokens_per_second"), lambda row, name: text.number(row[name])
    ),
}


def shown(row: Row, column: str) -> str:
    """Return a column of the view as every table writes it; "" where there is nothing."""
    if column in _WRITERS:
        return _WRITERS[column](row, column)
    return "" if row[column] is None else text.plain(str(row[column]))


_CSV_COLUMNS = (
    *("run_id", "task", "model", "hardware", "scenario", "seed", "scale"),
    *("method", "params", "family", "role", "status", "error"),
    *("metric", "quality", "quality_low", "quality_high", "baseline_quality"),
    *("quality_delta", "quality_delta_low", "quality_delta_high", "quality_verdict"),
    *("speedup", "speedup_low", "speedup_high", "speed_verdict", "speedup_bound"),
    *("speedup_geomean", "bound_ratio", "seconds_per_item", "tokens_per_second"),
    *("tokens_per_forward", "work_ratio", "memory_ratio", "output_check", "items", "repeats"),
    *("audit", "scorer", "scorers", "quality_spread", "disputed_items"),
    *("prefill_ratio", "decode_speedup", "decode_speedup_low", "decode_speedup_high"),
    *("decode_verdict", "decode_bound"),
)


def _csv(tables: Sequence[Table]) -> str:
    """Write one flat table: the parts of an interval in columns of their own."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for table in tables:
        for row in table.data:
            writer.writerow(shown(row, name) for name in _CSV_COLUMNS)
    return written.getvalue()


def _json(tables: Sequence[Table]) -> str:
    """Write the tables as shown, and beside each row its numbers with full precision."""
    return text.json_text([_content(table) for table in tables], indent=1) + "\n"


def _content(table: Table) -> Row:
    own = {name: getattr(table, name) for name in ("title", "columns", "rows", "notes", "data")}
    return {**own, "below": [_content(each) for each in table.below]}


_STYLE = (
    "body{font-family:system-ui,sans-serif;margin:2rem;color:#1b1b1b;background:#fff}"
    "table{border-collapse:collapse;margin-bottom:.5rem}"
    "caption{text-align:left;font-weight:600;padding:.5rem 0}"
    "th,td{padding:.3rem .7rem;border-bottom:1px solid #bbb;text-align:right;white-space:nowrap}"
    "th:first-child{text-align:left}thead th{border-bottom:2px solid #1b1b1b}"
    "ul{margin:0 0 2rem;padding-left:1.2rem}div{overflow-x:auto}"
)


def _html(tables: Sequence[Table]) -> str:
    parts = []
    for table in _with_below(tables):
        head = "".join(f'<th scope="col">{_escape(column)}</th>' for column in table.columns)
        body = "\n".join(
            f'<tr><th scope="row">{_escape(row[0])}</th>'
            + "".join(f"<td>{_escape(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in table.rows
        )
        notes = "\n".join(f"<li>{_escape(note)}</li>" for note in table.notes)
        parts.append(
            f"<div><table>\n<caption>{_escape(table.title)}</caption>\n"
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n"
            f"<ul>\n{notes}\n</ul>"
        )
    content = "\n".join(parts or [f"<p>{_NOTHING}</p>"])
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>tokenmark: comparison</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<main>\n<h1>Comparison</h1>\n{content}\n</main>\n</body>\n</html>\n"
    )


def _escape(cell: str) -> str:
    return html.escape(text.plain(cell))
