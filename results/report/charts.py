"""The charts of the site as data: what quality costs, table by table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from results import text
from results.report.grid import evidence, label_parts
from results.report.pareto import AXES, Axis, Point, points
from results.tables import Table

# More points than this on one chart help nobody; those that are clearly dominated go first.
MOST_POINTS: Final = 400


def chart(table: Table, *, higher_is_better: bool, title: str) -> dict[str, Any] | None:
    """Return the chart of a table; None if no axis has two points.

    Args:
        table: As `comparison_tables` returns it.
        higher_is_better: Of its metric.
        title: Of the chart.

    Returns:
        `title`, `metric`, `higherIsBetter`, `unit` and `axes`; each axis with `name`, `label`,
        `moreIsBetter`, `margin`, `hidden` (points left out) and `points`: `label`, `method`,
        `evidence`, `x` and `y` (value, low, high), `shown` (both as text), `standing` and `rival`.
    """
    axes = [
        found
        for axis in AXES.values()
        if axis.name != "decode" or any(row["speed_of"] == "decode" for row in table.data)
        if (found := _axis(table, axis, points(table, axis, higher_is_better=higher_is_better)))
    ]
    if not axes:
        return None
    return {
        "title": text.plain(title),
        "metric": text.plain(str(table.data[0]["metric"])),
        "higherIsBetter": higher_is_better,
        "unit": table.data[0]["quality_unit"],
        "axes": axes,
    }


def _axis(table: Table, axis: Axis, placed: Sequence[Point]) -> dict[str, Any] | None:
    if len(placed) < 2:
        return None
    labels = [
        f"{method}:{settings}" if settings else method for method, settings in label_parts(table)
    ]
    order = ("front", "undecided", "dominated")
    kept = sorted(placed, key=lambda point: order.index(point.placed.standing))[:MOST_POINTS]
    return {
        "name": axis.name,
        "label": axis.label,
        "moreIsBetter": axis.is_more_better,
        "margin": text.percent(table.data[0]["margin"]) if axis.has_margin else "",
        "hidden": len(placed) - len(kept),
        "points": [
            {
                "label": labels[point.place],
                "method": text.plain(table.data[point.place]["method"]),
                "evidence": evidence(table.data[point.place]),
                "x": point.cost,
                "y": point.quality,
                "shown": [_interval(text.ratio, point.cost), _quality(table, point)],
                "standing": point.placed.standing,
                "rival": ""
                if point.placed.rival is None
                else labels[placed[point.placed.rival].place],
            }
            for point in kept
        ],
    }


def _quality(table: Table, point: Point) -> str:
    is_fraction = table.data[point.place]["quality_unit"] == "fraction"
    return _interval(lambda value: text.score(value, is_fraction=is_fraction), point.quality)


def _interval(write: Any, numbers: tuple[float, float | None, float | None]) -> str:
    value, low, high = numbers
    if low == high:  # exact, or without an interval
        return str(write(value))
    return text.interval(*(write(each) for each in numbers))
