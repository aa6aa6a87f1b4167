"""What a store already knows that planning can use: finished cells, times, and undecided pairs.

All of it comes from the index, in a few queries, so that planning a hundred thousand cells takes
seconds. Without an index, or with one that is behind, nothing is wrong: less is known.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from results.statistics import WIDE_NORMAL_QUANTILE
from results.store import Store, StoreError
from results.tables import connect, rows_of


class Place(NamedTuple):
    """Where something was measured: names of task and model, without settings."""

    task: str
    model: str


class Belief(NamedTuple):
    """What is believed of a difference: about normal around `mean`.

    Attributes:
        mean: Of the difference.
        deviation: Standard deviation of that estimate.
        margin: Differences smaller than this count as none.
    """

    mean: float
    deviation: float
    margin: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of a cell that has been measured.

    Attributes:
        items, repeats: How often.
        seconds: Of a sample in the mean; None if no clock ran.
        beliefs: Of the logarithm of the speed-up and of the difference in quality, each only while
            its verdict is INCONCLUSIVE.
    """

    items: int
    repeats: int
    seconds: float | None = None
    beliefs: tuple[Belief, ...]

    @property
    def samples(self) -> int:
        """Measurements of the cell."""
        return self.items * self.repeats


@dataclass(frozen=True)
class Known:
    """All that the index of a store says for planning.

    Attributes:
        seconds: Mean seconds of a sample, by place and method with its settings.
        overheads: Seconds of an experiment besides its samples (loading, calibration, warm-up,
            scoring), by place: the mean.
        evidence: By cell.
    """

    seconds: Mapping[Place, Mapping[str, float]] = field(default_factory=dict)
    overheads: Mapping[Place, float] = field(default_factory=dict)
    evidence: Mapping[str, Evidence] = field(default_factory=dict)

    def sample_seconds(self, place: Place, spec: str) -> float | None:
        """Return what a sample takes.

        As the same method took at the same place, with these settings or else with others; else as
        the methods there took in the mean; None where nothing was measured there.
        """
        there = self.seconds.get(place)
        if not there:
            return None
        if spec in there:
            return there[spec]
        name = spec.partition(":")[0]
        alike = [seconds for other, seconds in there.items() if other.partition(":")[0] == name]
        found = alike or list(there.values())
        return sum(found) / len(found)

    def overhead_seconds(self, place: Place) -> float | None:
        """Return what an experiment takes besides its samples; None if nothing like it was run."""
        if place in self.overheads:
            return self.overheads[place]
        same = [seconds for each, seconds in self.overheads.items() if each.model == place.model]
        return sum(same) / len(same) if same else None


_SECONDS = """
SELECT e.task, e.model, coalesce(nullif(c.spec, ''), c.method) AS spec, avg(s.seconds)
FROM samples s JOIN cells c USING (experiment_id, cell_id) JOIN experiments e USING (experiment_id)
WHERE NOT isnan(s.seconds) GROUP BY ALL
"""
_OVERHEADS = """
SELECT task, model, avg(greatest(wall - measured, 0)) FROM (
    SELECT e.task, e.model, max((c.seconds ->> 'wall')::DOUBLE) AS wall,
        sum(coalesce((c.seconds ->> 'measured')::DOUBLE, 0)) AS measured
    FROM cells c JOIN experiments e USING (experiment_id)
    WHERE c.status = 'ok' GROUP BY e.experiment_id, e.task, e.model
) WHERE wall IS NOT NULL GROUP BY ALL
"""
_PAIRS = """
SELECT cell_id, items, repeats, seconds_per_item, margin, quality_margin, speed_verdict, speedup,
    speedup_low_99, speedup_high_99, quality_verdict, quality_delta, quality_delta_low_99,
    quality_delta_high_99
FROM comparison WHERE status = 'ok' AND items IS NOT NULL
QUALIFY row_number() OVER (PARTITION BY cell_id ORDER BY created DESC, experiment_id DESC) = 1
"""


def known(store: Store) -> Known:
    """Return what the index of a store says; nothing where there is no index of this version."""
    try:
        connection = connect(store.index_path)
    except StoreError:
        return Known()
    with connection:
        seconds: dict[Place, dict[str, float]] = {}
        for task, model, spec, mean in connection.execute(_SECONDS).fetchall():
            seconds.setdefault(Place(task, model), {})[spec] = mean
        overheads = {
            Place(task, model): mean
            for task, model, mean in connection.execute(_OVERHEADS).fetchall()
        }
        rows = rows_of(connection.execute(_PAIRS))
    return Known(seconds, overheads, {row["cell_id"]: _evidence(row) for row in rows})


def finished_cells(store: Store, statuses: Collection[str]) -> dict[str, str]:
    """Return the sealed experiment of every cell that ended with one of the statuses.

    As `Store.finished_cells` says, from the index where that is up to date.
    """
    found = _indexed(store, statuses)
    if found is not None:
        return found
    sealed: dict[str, bool] = {}
    return {
        cell_id: experiment_id
        for cell_id, experiment_id in store.finished_cells(statuses).items()
        if sealed.setdefault(experiment_id, store.is_sealed(experiment_id))
    }


def _indexed(store: Store, statuses: Collection[str]) -> dict[str, str] | None:
    """Return the same from the index; None if it lacks a shard or knows another state of it."""
    try:
        connection = connect(store.index_path)
    except StoreError:
        return None
    with connection:
        contents = dict(
            connection.execute(
                "SELECT experiment_id, content_sha256 FROM experiments "
                "WHERE manifest_sha256 IS NOT NULL"
            ).fetchall()
        )
        for experiment_id in store.experiment_ids():
            if contents.get(experiment_id) != store.content_sha256(experiment_id):
                return None
        rows = connection.execute(
            "SELECT c.cell_id, c.experiment_id FROM cells c JOIN experiments e "
            "USING (experiment_id) LEFT JOIN runs r USING (run_id) "
            "WHERE c.status IN (SELECT unnest($statuses)) "
            "ORDER BY coalesce(r.started, e.created), e.created, c.experiment_id",
            {"statuses": list(statuses)},
        ).fetchall()
    return dict(rows)


def _evidence(row: Mapping[str, Any]) -> Evidence:
    beliefs = []
    ends = [row[name] for name in ("speedup", "speedup_low_99", "speedup_high_99")]
    if row["speed_verdict"] == "INCONCLUSIVE" and all(end and end > 0 for end in ends):
        value, low, high = (math.log(end) for end in ends)
        beliefs.append(
            Belief(value, (high - low) / 2 / WIDE_NORMAL_QUANTILE, math.log1p(row["margin"]))
        )
    ends = [row[f"quality_delta{end}"] for end in ("", "_low_99", "_high_99")]
    if row["quality_verdict"] == "INCONCLUSIVE" and all(end is not None for end in ends):
        value, low, high = ends
        beliefs.append(
            Belief(value, (high - low) / 2 / WIDE_NORMAL_QUANTILE, row["quality_margin"])
        )
    return Evidence(
        items=row["items"],
        repeats=row["repeats"],
        seconds=row["seconds_per_item"],
        beliefs=tuple(beliefs),
    )
