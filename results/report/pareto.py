"""Which methods of a comparison table are worth their price: the front, and what lies behind it.

A point is *dominated* if another one is at least as good on both axes and better on one. The values
alone say that of many points whose intervals leave it open, so there are three standings:

- `front`: no point has values that dominate it;
- `dominated`: some point dominates it wherever in their intervals the truth lies;
- `undecided`: the values say dominated, the intervals overlap.

Speed-up and the difference of quality are both relative to the baseline on the same items, so what
makes items hard or slow cancels, and a method with the baseline's outputs is exactly as good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from results.statistics import Floats
from results.tables import Row, Table

Standing = Literal["front", "undecided", "dominated"]

# Points are compared with all others, so many at once, in slices of this many.
_SLICE = 512


class Coordinate(NamedTuple):
    """A value on an axis with its interval; more is better.

    Attributes:
        value: Best estimate.
        low: Low end of the 95% interval; -inf where there is none, `value` where it is exact.
        high: High end, accordingly.
    """

    value: float
    low: float
    high: float


class Placed(NamedTuple):
    """What became of one point.

    Attributes:
        standing: See the module.
        rival: Place of a point that dominates it; None on the front.
    """

    standing: Standing
    rival: int | None


@dataclass(frozen=True)
class Axis:
    """What a method pays.

    Attributes:
        name: Short name, for files and code.
        label: What is on the axis, for people.
        columns: Value, low and high end in the view; ends are "" where the view has none.
        is_more_better: Whether a large ratio is good.
        has_margin: Whether values closer than the experiment's margin count as the same. For what
            is counted once and has no interval, but is not repeatable to the last byte.
    """

    name: str
    label: str
    columns: tuple[str, str, str]
    is_more_better: bool
    has_margin: bool = False


AXES: Mapping[str, Axis] = MappingProxyType(
    {
        axis.name: axis
        for axis in (
            Axis(
                "speed",
                "speed-up over the baseline",
                ("speedup", "speedup_low", "speedup_high"),
                True,
            ),
            Axis(
                "decode",
                "speed-up of decoding over the baseline",
                ("decode_speedup", "decode_speedup_low", "decode_speedup_high"),
                True,
            ),
            Axis(
                "memory",
                "peak memory, baseline = 1",
                ("memory_ratio", "", ""),
                False,
                has_margin=True,
            ),
        )
    }
)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One cell on a chart, in the units of the view.

    Attributes:
        place: Of the row in `Table.data`.
        cost: Value, low and high end on the axis; ends are None where there is no interval.
        quality: Difference from the baseline with its interval, in the unit of the metric.
        placed: Where it stands among the points of the chart.
    """

    place: int
    cost: tuple[float, float | None, float | None]
    quality: tuple[float, float | None, float | None]
    placed: Placed


def points(table: Table, axis: Axis, *, higher_is_better: bool) -> list[Point]:
    """Return the points of a table on an axis, in the order of its rows.

    Args:
        table: As `comparison_tables` returns it.
        axis: One of `AXES`.
        higher_is_better: Of the table's metric.

    Returns:
        One for each cell that ended well and has both numbers.
    """
    found = []
    for place, row in enumerate(table.data):
        cost, quality = _cost(row, axis), _quality(row)
        if row["status"] == "ok" and cost is not None and quality is not None:
            found.append((place, cost, quality))
    sign = 1.0 if higher_is_better else -1.0
    margins = [table.data[place]["margin"] if axis.has_margin else 0.0 for place, _, _ in found]
    standings = place_points(
        [
            (
                _oriented(cost, 1.0 if axis.is_more_better else -1.0, math.log),
                _oriented(quality, sign),
            )
            for _, cost, quality in found
        ],
        tolerance=math.log1p(max(margins, default=0.0)),
    )
    return [
        Point(place=place, cost=cost, quality=quality, placed=placed)
        for (place, cost, quality), placed in zip(found, standings, strict=True)
    ]


def place_points(
    candidates: Sequence[tuple[Coordinate, Coordinate]], tolerance: float = 0.0
) -> list[Placed]:
    """Return where each point stands among all of them.

    Args:
        candidates: Cost and quality of each point; on both more is better.
        tolerance: Difference up to which two costs are the same.
    """
    if not candidates:
        return []
    numbers = np.array(candidates, dtype=np.float64)  # (points, axes, value and ends)
    value, low, high = (numbers[:, :, end] for end in range(3))
    room = np.array([tolerance, 0.0])
    placed: list[Placed] = []
    for start in range(0, len(numbers), _SLICE):
        mine = slice(start, start + _SLICE)
        # Axes of what follows: the point, its rival, cost and quality.
        is_worse = _dominates(value, value[mine], np.zeros(2))
        is_surely = is_worse & _dominates(low, high[mine], room)
        for by_value, surely in zip(is_worse, is_surely, strict=True):
            if surely.any():
                placed.append(Placed("dominated", int(surely.argmax())))
            elif by_value.any():
                placed.append(Placed("undecided", int(by_value.argmax())))
            else:
                placed.append(Placed("front", None))
    return placed


def _dominates(rivals: Floats, mine: Floats, room: Floats) -> NDArray[np.bool_]:
    """Return whether each rival is at least as good on all axes and better on one.

    Args:
        rivals: (rivals, axes).
        mine: (points, axes).
        room: Difference on each axis up to which two values are the same, (axes,).

    Returns:
        (points, rivals)
    """
    is_as_good = np.ones((len(mine), len(rivals)), dtype=np.bool_)
    is_better = np.zeros_like(is_as_good)
    # One axis at a time: to reduce over two numbers is slow.
    for theirs, own, same in zip(rivals.T, mine.T, room, strict=True):
        is_as_good &= theirs >= own[:, None] - same
        is_better |= theirs > own[:, None] + same
    return is_as_good & is_better


def _oriented(
    numbers: tuple[float, float | None, float | None],
    sign: float,
    scale: Callable[[float], float] = float,
) -> Coordinate:
    """Return a number with its ends so that more is better."""
    value, *ends = numbers
    # Without an interval nothing is sure of the value.
    known = [sign * scale(end) for end in ends if end is not None] or [-math.inf, math.inf]
    return Coordinate(sign * scale(value), min(known), max(known))


def _cost(row: Row, axis: Axis) -> tuple[float, float | None, float | None] | None:
    value, low, high = (row[name] if name else None for name in axis.columns)
    if value is None or value <= 0:
        return None
    is_exact = row["cell_id"] == row["baseline_cell_id"] or not axis.columns[1]
    return (value, value, value) if is_exact else (value, low, high)


def _quality(row: Row) -> tuple[float, float | None, float | None] | None:
    if row["cell_id"] == row["baseline_cell_id"]:
        return None if row["quality"] is None else (0.0, 0.0, 0.0)
    if row["quality_delta"] is None:
        return None
    return row["quality_delta"], row["quality_delta_low"], row["quality_delta_high"]
