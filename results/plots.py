"""Curves of quality against cost, drawn from the comparison tables of a run.

A method at several settings is a line, and what matters is the line: a point alone can be had by
stopping earlier. Every point has the interval of its quality, and of its time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from results import text
from results.store import StoreError
from results.tables import Row, Table, comparison_tables, settings_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png", ".pdf")

# No date, so that equal results give equal files.
_UNDATED = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "tokenmark",
    # Names of methods and settings are text, whatever they hold.
    "text.parse_math": False,
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# Colour alone does not tell lines apart.
_MARKERS = "osD^vP*X<>ph8d"


class PlotUnavailable(Exception):
    """The library that draws is not installed."""


@dataclass(frozen=True)
class Point:
    """One cell in a plot.

    Attributes:
        cost: Relative to the baseline's.
        cost_interval: Low and high of it; equal to `cost` where it is counted.
        quality: Mean of the metric.
        quality_interval: Low and high of it.
    """

    cost: float
    cost_interval: tuple[float, float]
    quality: float
    quality_interval: tuple[float, float]


Cost = Callable[[Row, Row], tuple[float, float, float] | None]


def _forwards(row: Row, baseline: Row) -> tuple[float, float, float] | None:
    mine, theirs = row["tokens_per_forward"], baseline["tokens_per_forward"]
    return (theirs / mine,) * 3 if mine and theirs else None


def _work(row: Row, baseline: Row) -> tuple[float, float, float] | None:
    share = 1.0 if row is baseline else row["work_ratio"]
    return (share,) * 3 if share else None


def _visual_tokens(row: Row, baseline: Row) -> tuple[float, float, float] | None:
    mine, all_of_them = row["visual_tokens"], baseline["visual_tokens"]
    return (mine / all_of_them,) * 3 if mine and all_of_them else None


def _time(row: Row, baseline: Row) -> tuple[float, float, float] | None:
    if row is baseline:
        return (1.0, 1.0, 1.0)
    values = row["speedup"], row["speedup_high"], row["speedup_low"]
    if not all(values):
        return None
    value, low, high = (1 / each for each in values)
    return value, low, high


# What is on the horizontal axis: each relative to the baseline, 1 is as much.
COSTS: Mapping[str, Cost] = MappingProxyType(
    {
        "forwards of the target a token": _forwards,
        "visual tokens, mean over layers": _visual_tokens,
        "work (counted operations)": _work,
        "time": _time,
    }
)


def points(table: Table, cost: Cost) -> dict[str, list[Point]]:
    """Return the points of each method of a table, cheapest first, under the method's name.

    Args:
        table: As `comparison_tables` returns it.
        cost: One of `COSTS`.

    Returns:
        Methods in the order of the table. Cells without quality, and those whose cost is not known,
        are left out.
    """
    baselines = {row["cell_id"]: row for row in table.data}
    found: dict[str, list[Point]] = {}
    for row in table.data:
        baseline = baselines.get(row["baseline_cell_id"])
        if baseline is None or row["quality"] is None or row["status"] != "ok":
            continue
        costs = cost(row, baseline)
        if costs is None:
            continue
        low = row["quality"] if row["quality_low"] is None else row["quality_low"]
        high = row["quality"] if row["quality_high"] is None else row["quality_high"]
        point = Point(costs[0], (costs[1], costs[2]), row["quality"], (low, high))
        found.setdefault(row["method"], []).append(point)
    return {name: sorted(some, key=lambda each: each.cost) for name, some in found.items()}


def draw(
    index_path: Path, path: Path, run: str | None = "latest", tasks: Sequence[str] = ()
) -> int:
    """Draw a run's tables, one below the other, quality against each cost.

    Args:
        index_path: As `ingest` returns it.
        path: File to write; its suffix, one of `SUFFIXES`, says the format.
        run, tasks: As in `comparison_tables`.

    Returns:
        How many tables were drawn.

    Raises:
        ValueError: The suffix is none of `SUFFIXES`.
        PlotUnavailable: matplotlib is not installed.
        StoreError: As in `comparison_tables`; or no table has a quality and a cost.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"the file must end in {', '.join(SUFFIXES)}, got {path.name!r}.")
    drawn = []
    for table in comparison_tables(index_path, run, tasks):
        panels = {name: points(table, cost) for name, cost in COSTS.items()}
        # A cost that is the same for all shows nothing.
        panels = {
            name: lines
            for name, lines in panels.items()
            if len({round(point.cost, 6) for line in lines.values() for point in line}) > 1
        }
        if panels:
            drawn.append((table, panels))
    if not drawn:
        raise StoreError("there is nothing to draw: no table has cells of different cost.")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotUnavailable(
            "drawing needs matplotlib, which is not installed; it comes with "
            "`pip install -e '.[plot]' -c constraints.txt`."
        ) from error
    with mpl.rc_context(_STYLE):
        columns = max(len(panels) for _, panels in drawn)
        figure = Figure(figsize=(4.2 * columns, 3.6 * len(drawn)), layout="constrained")
        grid = figure.subplots(len(drawn), columns, squeeze=False)
        for row, (table, panels) in zip(grid, drawn, strict=True):
            names = list(dict.fromkeys(row["method"] for row in table.data))
            for axes, (name, lines) in zip(row, panels.items(), strict=False):
                _panel(axes, name, lines, names)
                axes.set_ylabel(str(table.data[0]["metric"] or "quality"))
            shown = settings_text(table.data[0]["task_params"])
            title = f"{table.title} · {shown}" if shown else table.title
            row[0].set_title(text.plain(title), loc="left", fontweight="bold")
            row[0].legend(fontsize=6, frameon=False)
            for axes in row[len(panels) :]:
                axes.set_axis_off()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata=_UNDATED[path.suffix], dpi=150)
    return len(drawn)


def _panel(axes: Axes, name: str, lines: Mapping[str, list[Point]], names: Sequence[str]) -> None:
    """Draw one cost; a method has the same colour and marker in all panels."""
    from matplotlib.ticker import NullFormatter

    for method, line in lines.items():
        number = names.index(method)
        costs = [point.cost for point in line]
        qualities = [point.quality for point in line]
        axes.errorbar(
            costs,
            qualities,
            yerr=_reach(qualities, [point.quality_interval for point in line]),
            xerr=_reach(costs, [point.cost_interval for point in line]),
            color=f"C{number % 10}",
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4,
            linewidth=1,
            elinewidth=0.5,
            label=text.plain(method),
        )
    axes.axvline(1.0, color="0.8", linewidth=0.8, zorder=0)
    # Ratios: half as much is as far from the baseline as twice as much.
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"{name}, baseline = 1")


def _reach(
    values: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> tuple[list[float], list[float]]:
    """Return how far intervals reach below and above their values, never less than not at all."""
    pairs = list(zip(values, intervals, strict=True))
    below = [max(0.0, value - low) for value, (low, _) in pairs]
    above = [max(0.0, high - value) for value, (_, high) in pairs]
    return below, above
