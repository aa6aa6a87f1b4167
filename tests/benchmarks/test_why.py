"""What was measured here, predicted from counts: on the store of this machine, if it has one."""

from __future__ import annotations

import duckdb
import pytest

from results.store import StoreError
from results.tables import connect
from results.why import Explanation, explain
from runner import why
from runner.registry import ROOT


def explanations() -> list[Explanation]:
    """Return those of all methods that run on our loop; none without a store."""
    index = ROOT / "results" / "store" / "tokenmark.duckdb"
    try:
        with connect(index) as connection:
            return _explanations(connection)
    except StoreError:
        return []


def _explanations(connection: duckdb.DuckDBPyConnection) -> list[Explanation]:
    cells = connection.execute(
        "SELECT experiment_id, cell_id FROM comparison "
        "WHERE status = 'ok' AND role IN ('method', 'control') AND items >= 8"
    ).fetchall()
    found = [explain(connection, *cell) for cell in cells]
    return [each for each in found if each is not None]


@pytest.mark.slow
def test_measured_speed_ups_are_predicted_within_15_percent(benchmark) -> None:
    found = benchmark(explanations)
    if not found:
        pytest.skip("this machine has no results of this version")
    predicted = []
    for each in found:
        latency = why.measured_latency(each)
        value = each.predict(latency) if latency is not None else None
        if value is not None:
            predicted.append((each.method, each.task, value / each.speedup))
    assert predicted
    wrong = [(*cell, off) for *cell, off in predicted if not 0.85 <= off <= 1.15]
    assert not wrong, f"{len(wrong)} of {len(predicted)} are off: {wrong}"
