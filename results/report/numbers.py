"""The numbers of a row: what they are called, how they are written, and the SQL that gives them.

A number has two statements. The first reads it, with its interval and verdict, from the view
`comparison`, where all tables have it from. The second makes its value anew from the raw samples;
intervals come from resampling, which no SQL does, and `verify` computes them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from results import text
from results.tables import Row, shown


@dataclass(frozen=True)
class Quantity:
    """One number of a row.

    Attributes:
        column: In the view.
        heading: For people.
        meaning: In a sentence.
        low, high: Columns of its interval; "" if it has none.
        verdict: Column of its verdict; "" if it has none.
        table: Where it is read: the view, or the table `interactions`.
    """

    column: str
    heading: str
    meaning: str
    low: str = ""
    high: str = ""
    verdict: str = ""
    table: str = "comparison"

    @property
    def key(self) -> str:
        """What it is called among all numbers of a cell."""
        return self.column if self.table == "comparison" else f"{self.table}_{self.column}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the view that belong to it."""
        return tuple(name for name in (self.column, self.low, self.high, self.verdict) if name)

    def value(self, row: Row) -> str:
        """Return the value as every table writes it; "" where there is none."""
        return shown(row, self.column)

    def ends(self, row: Row) -> str:
        """Return the interval, `[0.96, 1.16]`; "" where there is none."""
        if not self.low or row[self.low] is None or row[self.high] is None:
            return ""
        return f"[{shown(row, self.low)}, {shown(row, self.high)}]"

    def judged(self, row: Row) -> str:
        """Return the verdict; "" where there is none."""
        return str(row[self.verdict] or "") if self.verdict else ""

    def sql(self, row: Row) -> str:
        """Return the statement that reads it."""
        return (
            f"SELECT {', '.join(self.columns)} FROM {self.table} "
            f"WHERE experiment_id = {text.sql(row['experiment_id'])} "
            f"AND cell_id = {text.sql(row['cell_id'])}"
        )


QUANTITIES: Final = (
    Quantity(
        "quality",
        "quality",
        "The task's headline metric over all items of the cell.",
        "quality_low",
        "quality_high",
    ),
    Quantity(
        "quality_delta",
        "vs baseline",
        "Difference from the baseline's quality on the items that both answered.",
        "quality_delta_low",
        "quality_delta_high",
        "quality_verdict",
    ),
    Quantity(
        "speedup",
        "speed-up",
        "The baseline's time for a unit of output over the method's, on the same items.",
        "speedup_low",
        "speedup_high",
        "speed_verdict",
    ),
    Quantity(
        "speedup_bound",
        "bound",
        "The largest speed-up that the method's own counts allow here.",
    ),
    Quantity(
        "decode_speedup",
        "decode speed-up",
        "The same for the time after the prefill alone.",
        "decode_speedup_low",
        "decode_speedup_high",
        "decode_verdict",
    ),
    Quantity("decode_bound", "decode bound", "The largest speed-up of decoding, likewise."),
    Quantity(
        "tokens_per_forward",
        "tokens/forward",
        "Tokens after the prefill over the target's forwards; plain decoding has 1.",
    ),
    Quantity("tokens_per_second", "tokens/s", "Tokens of output over seconds, prefill included."),
    Quantity("seconds_per_item", "s/item", "Mean seconds of a call."),
    Quantity("work_ratio", "work", "Operations of a unit of output over the baseline's."),
    Quantity("memory_ratio", "memory", "Highest peak of any sample over the baseline's."),
    Quantity("items", "items", "Items measured."),
)


def _interaction(column: str, of: str, meaning: str) -> Quantity:
    low, high, verdict = (f"{column}_{end}" for end in ("low", "high", "verdict"))
    return Quantity(column, f"interaction of {of}", meaning, low, high, verdict, "interactions")


# Of a stack whose parts were measured beside it.
INTERACTIONS: Final = (
    _interaction(
        "speed",
        "speed-up",
        "The speed-up of both parts over the product of each alone; 1 where gains multiply.",
    ),
    _interaction("decode", "decode speed-up", "The same for the time after the prefill alone."),
    _interaction(
        "tokens_per_forward",
        "tokens/forward",
        "The same for tokens a forward: are fewer drafts accepted than without the first part?",
    ),
    _interaction(
        "quality",
        "quality",
        "What both change beyond the sum of what each changes alone; 0 where changes add up.",
    ),
)


def raw_sql(row: Row, column: str, *, metric_kind: str, output_unit: str) -> str:
    """Return the statement that makes a number anew from the samples; "" where SQL cannot.

    Args:
        row: Of the view.
        column: Of a `Quantity`.
        metric_kind: `kind` of the headline metric.
        output_unit: `token`, or what of each call yields one.
    """
    own = (
        f"experiment_id = {text.sql(row['experiment_id'])} AND cell_id = {text.sql(row['cell_id'])}"
    )
    if column == "items":
        return f"SELECT count(DISTINCT item_id) FROM samples WHERE {own}"
    if column == "seconds_per_item":
        return f"SELECT avg(seconds) FROM samples WHERE {own}"
    if column == "tokens_per_second":
        return f"SELECT sum(output_tokens) / sum(seconds) FROM samples WHERE {own}"
    if column == "tokens_per_forward":
        return f"SELECT sum(decode_tokens) / sum(target_forwards) FROM samples WHERE {own}"
    metric = f"metric = {text.sql(str(row['metric']))}"
    if column == "quality" and metric_kind in ("binary", "mean"):
        return f"SELECT avg(value) FROM scores WHERE {own} AND {metric}"
    both = _both(row)
    if column == "quality_delta" and metric_kind in ("binary", "mean"):
        return (
            f"WITH {both} SELECT avg(own.value - plain.value) "
            "FROM scores own JOIN both_ran USING (item_id) JOIN scores plain "
            "USING (experiment_id, item_id, metric) "
            f"WHERE own.experiment_id = {text.sql(row['experiment_id'])} "
            f"AND own.cell_id = {text.sql(row['cell_id'])} AND own.{metric} "
            f"AND plain.cell_id = {text.sql(row['baseline_cell_id'])}"
        )
    unit = "output_tokens" if output_unit == "token" else "1"
    if column == "speedup":
        return (
            f"WITH {both}, {_totals(row, 'seconds', unit, 'both_ran')} "
            f"SELECT {_ratio(row, 'sum(cost)', 'sum(units)', is_own_first=False)} FROM totals"
        )
    if column in ("work_ratio", "memory_ratio"):
        ratio = (
            _ratio(row, "sum(flops)", f"sum({unit})", is_own_first=True)
            if column == "work_ratio"
            else _ratio(row, "max(peak_bytes)", "", is_own_first=True)
        )
        return (
            f"WITH {both} SELECT {ratio} FROM samples JOIN both_ran USING (item_id) "
            f"WHERE experiment_id = {text.sql(row['experiment_id'])}"
        )
    return ""


def raw_interaction_sql(row: Row, column: str, *, metric_kind: str, output_unit: str) -> str:
    """Return the statement that makes an interaction anew from the samples; "" where SQL cannot.

    Args:
        row: Of the table `interactions`, with `baseline_cell_id` and `metric` of the view.
        column: Of one of `INTERACTIONS`.
        metric_kind, output_unit: As in `raw_sql`.
    """
    four = ("baseline_cell_id", "first_cell", "second_cell", "cell_id")
    neither, first, second, both = (text.sql(row[name]) for name in four)
    experiment = f"experiment_id = {text.sql(row['experiment_id'])}"
    if column == "quality":
        if metric_kind not in ("binary", "mean"):
            return ""
        sides = [f"max(value) FILTER (cell_id = {cell})" for cell in (both, first, second, neither)]
        change = f"{sides[0]} - {sides[1]} - {sides[2]} + {sides[3]}"
        return (
            f"SELECT avg(change) FROM (SELECT {change} AS change FROM scores "
            f"WHERE {experiment} AND metric = {text.sql(str(row['metric']))} GROUP BY item_id)"
        )
    cost, unit = {
        "speed": ("seconds", "output_tokens" if output_unit == "token" else "1"),
        "decode": ("seconds - prefill_seconds", "decode_tokens"),
        "tokens_per_forward": ("target_forwards", "decode_tokens"),
    }[column]
    costs = {
        cell: f"sum(cost) FILTER (cell_id = {cell}) / sum(units) FILTER (cell_id = {cell})"
        for cell in (neither, first, second, both)
    }
    return (
        f"WITH all_ran AS (SELECT item_id FROM samples WHERE {experiment} AND cell_id IN "
        f"({', '.join(costs)}) GROUP BY item_id HAVING count(DISTINCT cell_id) = 4), "
        f"{_totals(row, cost, unit, 'all_ran')} SELECT ({costs[first]}) * ({costs[second]}) "
        f"/ (({costs[both]}) * ({costs[neither]})) FROM totals"
    )


def samples_sql(row: Row) -> str:
    """Return the statement that lists the samples of a cell and of its baseline."""
    cells = dict.fromkeys((row["cell_id"], row["baseline_cell_id"]))
    return (
        f"SELECT * FROM samples WHERE experiment_id = {text.sql(row['experiment_id'])} "
        f"AND cell_id IN ({', '.join(map(text.sql, cells))}) ORDER BY item_id, repeat, position"
    )


def _both(row: Row) -> str:
    """Return the items that the cell and its baseline both ran, as a common table."""
    cells = [text.sql(row["cell_id"]), text.sql(row["baseline_cell_id"])]
    chosen = f"FROM samples WHERE experiment_id = {text.sql(row['experiment_id'])} AND cell_id ="
    return (
        f"both_ran AS (SELECT DISTINCT item_id {chosen} {cells[0]} "
        f"INTERSECT SELECT DISTINCT item_id {chosen} {cells[1]})"
    )


def _totals(row: Row, cost: str, unit: str, shared: str) -> str:
    """Return cost and units of output of each item of each cell, as a common table.

    Repeats of equal length are combined by their median, others by their mean.
    """
    return (
        f"totals AS (SELECT cell_id, avg({unit}) AS units, "
        f"CASE WHEN min({unit}) = max({unit}) THEN median({cost}) ELSE avg({cost}) END AS cost "
        f"FROM samples JOIN {shared} USING (item_id) "
        f"WHERE experiment_id = {text.sql(row['experiment_id'])} GROUP BY cell_id, item_id)"
    )


def _ratio(row: Row, above: str, below: str, *, is_own_first: bool) -> str:
    """Return a ratio of the two cells, each a total over a total."""
    sides = [
        " / ".join(
            f"{total} FILTER (cell_id = {text.sql(row[cell])})" for total in (above, below) if total
        )
        for cell in ("cell_id", "baseline_cell_id")
    ]
    if not is_own_first:
        sides.reverse()
    return f"({sides[0]}) / ({sides[1]})"


def number_text(value: object) -> str:
    """Return a value of any column with full precision, for the page of an experiment."""
    if value is None:
        return ""
    return text.plain(repr(value) if isinstance(value, float) else str(value))
