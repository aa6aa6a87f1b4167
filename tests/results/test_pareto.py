from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from results.ingest import ingest
from results.report.pareto import AXES, Coordinate, Placed, place_points, points
from results.store import Store
from results.tables import Table, comparison_tables
from tests.results.factory import (
    BINARY,
    make_cell,
    make_experiment,
    make_run,
    make_samples,
    make_scores,
    write_shard,
)


def exact(value: float) -> Coordinate:
    return Coordinate(value, value, value)


def test_a_case_that_can_be_checked_by_hand() -> None:
    # Cost and quality, more is better:
    #   2 |  best . . . . .
    #   1 |  plain  sure  wide
    candidates = {
        "best": (Coordinate(3.0, 2.8, 3.2), Coordinate(0.2, 0.1, 0.3)),
        # Slower than `best` beyond both intervals, and worse beyond both.
        "sure": (Coordinate(2.0, 1.9, 2.1), Coordinate(0.0, -0.05, 0.05)),
        # Slower for certain, but its quality may be as good.
        "wide": (Coordinate(2.0, 1.9, 2.1), Coordinate(0.0, -0.3, 0.3)),
        # Its speed overlaps, its quality does not.
        "close": (Coordinate(2.9, 2.7, 3.1), Coordinate(0.0, 0.0, 0.0)),
        # Better than all in quality.
        "slow": (Coordinate(0.5, 0.4, 0.6), Coordinate(0.3, -0.9, 0.9)),
    }
    placed = dict(zip(candidates, place_points(list(candidates.values())), strict=True))
    assert placed == {
        "best": Placed("front", None),
        "sure": Placed("dominated", 0),
        "wide": Placed("undecided", 0),
        "close": Placed("undecided", 0),
        "slow": Placed("front", None),
    }


def test_equal_outputs_leave_the_decision_to_the_speed() -> None:
    lossless = exact(0.0)
    candidates = [(Coordinate(2.0, 1.9, 2.1), lossless), (Coordinate(1.5, 1.4, 1.6), lossless)]
    assert [each.standing for each in place_points(candidates)] == ["front", "dominated"]
    twins = [candidates[0], candidates[0]]
    assert [each.standing for each in place_points(twins)] == ["front", "front"]


def test_a_value_without_an_interval_decides_nothing() -> None:
    unknown = Coordinate(0.0, -math.inf, math.inf)
    candidates = [(exact(2.0), exact(0.1)), (exact(1.0), unknown)]
    assert place_points(candidates)[1] == Placed("undecided", 0)


def test_costs_within_the_tolerance_are_the_same() -> None:
    # The second is a little cheaper on the paper, and much worse.
    candidates = [(exact(1.00), exact(0.5)), (exact(1.01), exact(0.0)), (exact(0.99), exact(0.0))]
    assert [each.standing for each in place_points(candidates, tolerance=0.05)] == [
        "front",
        "front",
        "dominated",
    ]
    # A little dearer and as good: the values say dominated, the difference says nothing.
    level = [(exact(1.00), exact(0.5)), (exact(0.99), exact(0.5))]
    assert place_points(level, tolerance=0.05)[1].standing == "undecided"
    assert place_points(level)[1].standing == "dominated"


COORDINATES = st.tuples(st.integers(-3, 3), st.integers(0, 2), st.integers(0, 2)).map(
    lambda each: Coordinate(each[0], each[0] - each[1], each[0] + each[2])
)


@settings(deadline=None)
@given(st.lists(st.tuples(COORDINATES, COORDINATES), max_size=8), st.sampled_from([0.0, 1.0]))
def test_standings_are_those_of_the_definition(candidates, tolerance) -> None:
    for mine, placed in zip(candidates, place_points(candidates, tolerance), strict=True):
        dominating = [
            all(theirs.value >= own.value for theirs, own in zip(rival, mine, strict=True))
            and any(theirs.value > own.value for theirs, own in zip(rival, mine, strict=True))
            for rival in candidates
        ]
        sure = [
            is_dominating
            and all(
                theirs.low >= own.high - room
                for theirs, own, room in zip(rival, mine, (tolerance, 0), strict=True)
            )
            and any(
                theirs.low > own.high + room
                for theirs, own, room in zip(rival, mine, (tolerance, 0), strict=True)
            )
            for rival, is_dominating in zip(candidates, dominating, strict=True)
        ]
        if any(sure):
            assert placed == Placed("dominated", sure.index(True))
        elif any(dominating):
            assert placed == Placed("undecided", dominating.index(True))
        else:
            assert placed == Placed("front", None)


def test_many_points_are_compared_across_slices() -> None:
    candidates = [(exact(float(place)), exact(0.0)) for place in range(1200)]
    placed = place_points(candidates)
    assert [each.standing for each in placed[-2:]] == ["dominated", "front"]
    assert placed[0] == Placed("dominated", 1)
    assert len(placed) == 1200


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Return a table: `fast` loses nothing, `cheat` is faster and wrong, `worse` neither."""
    path = tmp_path_factory.mktemp("pareto")
    store = Store(path)
    speeds = {"plain": 1.0, "fast": 2.0, "cheat": 4.0, "worse": 1.5, "gone": 1.0}
    experiment = make_experiment(tuple(speeds), items=40)
    right = {"plain": 30, "fast": 30, "cheat": 2, "worse": 3}
    scores = [
        score
        for method, count in right.items()
        for score in make_scores(experiment, method, [1.0] * count + [0.0] * (40 - count))
    ]
    memory = {"cell-fast": 1_030_000, "cell-cheat": 2_000_000, "cell-worse": 990_000}
    samples = [
        type(sample)(
            **{
                **vars(sample),
                "peak_bytes": memory.get(sample.cell_id, 1_000_000),
                "output_digest": sample.item_id
                if sample.cell_id in ("cell-plain", "cell-fast")
                else sample.output_digest,
            }
        )
        for sample in make_samples(experiment, speeds)
    ]
    cells = [
        make_cell(experiment, name, status="failed" if name == "gone" else "ok") for name in speeds
    ]
    write_shard(store, experiment, cells, samples, scores)
    store.write_run(make_run([experiment]))
    (found,) = comparison_tables(ingest(path))
    return found


def test_points_are_the_numbers_of_the_table(table: Table) -> None:
    found = points(table, AXES["speed"], higher_is_better=True)
    assert [table.data[point.place]["method"] for point in found] == [
        "plain",
        "fast",
        "cheat",
        "worse",
    ]
    plain, fast, _, worse = found
    assert (plain.cost, plain.quality) == ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    row = table.data[fast.place]
    assert fast.cost == (row["speedup"], row["speedup_low"], row["speedup_high"])
    assert fast.quality == (0.0, 0.0, 0.0)  # the baseline's own outputs
    assert [point.placed.standing for point in found] == [
        "dominated",
        "front",
        "front",
        "dominated",
    ]
    assert plain.placed.rival == found.index(fast)
    assert worse.quality[0] == pytest.approx(-27 / 40)


def test_a_difference_whose_interval_is_not_known_dominates_nothing_for_certain(
    table: Table,
) -> None:
    rows = [
        {**row, "quality_delta_low": None, "quality_delta_high": None}
        if row["method"] == "worse"
        else row
        for row in table.data
    ]
    found = points(replace(table, data=tuple(rows)), AXES["speed"], higher_is_better=True)
    worse = found[3]
    assert worse.quality == (pytest.approx(-27 / 40), None, None)
    assert worse.placed.standing == "undecided"


def test_less_memory_is_better_and_a_little_is_the_same(table: Table) -> None:
    found = {
        table.data[point.place]["method"]: point
        for point in points(table, AXES["memory"], higher_is_better=True)
    }
    assert found["cheat"].cost == (2.0, 2.0, 2.0)
    assert {name: point.placed.standing for name, point in found.items()} == {
        "plain": "front",
        "fast": "undecided",  # 3% more, within the margin of 5%
        "cheat": "dominated",
        "worse": "front",  # 1% less: by its value nothing beats it
    }


def test_where_less_is_better_the_worst_is_on_the_front(table: Table) -> None:
    found = points(table, AXES["speed"], higher_is_better=False)
    standings = {table.data[point.place]["method"]: point.placed.standing for point in found}
    assert standings["cheat"] == "front"
    assert standings["fast"] == "dominated"
    assert BINARY.higher_is_better
