from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from results import plots, tables
from results.ingest import ingest
from results.store import Store, StoreError
from tests.results.factory import (
    make_cell,
    make_experiment,
    make_run,
    make_samples,
    make_scores,
    make_store,
    write_shard,
)

SPEEDS = {"plain": 1.0, "fast-2": 2.0, "fast-4": 4.0, "other": 1.5}
SVG = "{http://www.w3.org/2000/svg}"


def curves(tmp_path: Path, name: str = "fast") -> Path:
    """An index of one baseline, one method at two settings, and another one."""
    store = Store(tmp_path)
    experiment = make_experiment(tuple(SPEEDS), 24)
    cells = [make_cell(experiment, each) for each in SPEEDS]
    cells[1] = dataclasses.replace(cells[1], method=name, params={"k": 2})
    cells[2] = dataclasses.replace(cells[2], method=name, params={"k": 4})
    write_shard(
        store,
        experiment,
        cells,
        make_samples(experiment, SPEEDS, noise=0.01),
        [
            score
            for share, each in zip((24, 20, 12, 18), SPEEDS, strict=True)
            for score in make_scores(experiment, each, [1.0] * share + [0.0] * (24 - share))
        ],
    )
    store.write_run(make_run([experiment]))
    return ingest(tmp_path)


def test_a_method_at_two_settings_is_one_line_with_the_cheaper_point_first(tmp_path: Path) -> None:
    (table,) = tables.comparison_tables(curves(tmp_path))
    lines = plots.points(table, plots.COSTS["forwards of the target a token"])
    assert {name: len(line) for name, line in lines.items()} == {"plain": 1, "fast": 2, "other": 1}
    assert lines["plain"][0].cost == 1.0
    four, two = lines["fast"]
    assert four.cost == pytest.approx(1 / 4, rel=0.1)
    assert two.cost == pytest.approx(1 / 2, rel=0.1)
    assert (four.quality, two.quality) == (12 / 24, 20 / 24)
    assert four.quality_interval[0] < 0.5 < four.quality_interval[1]


def test_time_is_the_inverse_of_the_speed_up_and_its_interval(tmp_path: Path) -> None:
    (table,) = tables.comparison_tables(curves(tmp_path))
    rows = {row["cell_id"]: row for row in table.data}
    four = plots.points(table, plots.COSTS["time"])["fast"][0]
    row = rows["cell-fast-4"]
    assert four.cost == 1 / row["speedup"]
    assert four.cost_interval == (1 / row["speedup_high"], 1 / row["speedup_low"])
    work = plots.points(table, plots.COSTS["work (counted operations)"])
    assert work["fast"][0].cost == pytest.approx(2.0)
    assert work["plain"][0].cost == 1.0


def test_visual_tokens_are_those_of_the_baseline_as_1(tmp_path: Path) -> None:
    store = Store(tmp_path)
    experiment = make_experiment(("plain", "fast", "other"))
    tokens = {"plain": {"mean_visual_tokens": 144.0}, "fast": {"mean_visual_tokens": 36.0}}
    write_shard(
        store,
        experiment,
        [
            make_cell(experiment, name, notes=tokens.get(name, {}))
            for name in ("plain", "fast", "other")
        ],
        make_samples(experiment, {"plain": 1, "fast": 2, "other": 2}),
        [
            score
            for name in ("plain", "fast", "other")
            for score in make_scores(experiment, name, [1.0] * 8)
        ],
    )
    store.write_run(make_run([experiment]))
    (table,) = tables.comparison_tables(ingest(tmp_path))
    found = plots.points(table, plots.COSTS["visual tokens, mean over layers"])
    assert {name: [point.cost for point in line] for name, line in found.items()} == {
        "plain": [1.0],
        "fast": [0.25],
    }


def test_a_cell_that_failed_is_not_drawn(tmp_path: Path) -> None:
    index = curves(tmp_path)
    (table,) = tables.comparison_tables(index)
    data = tuple(
        row | {"status": "failed"} if row["cell_id"] == "cell-other" else row for row in table.data
    )
    failed = dataclasses.replace(table, data=data)
    assert "other" not in plots.points(failed, plots.COSTS["time"])


def test_the_picture_names_every_method_and_is_the_same_each_time(tmp_path: Path) -> None:
    index = curves(tmp_path / "store", name="f$a_b$ <fast>")
    for name in ("one.svg", "two.svg"):
        assert plots.draw(index, tmp_path / "new" / name) == 1
    first = (tmp_path / "new" / "one.svg").read_bytes()
    assert first == (tmp_path / "new" / "two.svg").read_bytes()
    root = ElementTree.fromstring(first)  # our own file
    # Text is drawn as shapes; the text itself stands in comments, which the parser leaves out.
    assert root.tag == f"{SVG}svg"
    drawn = first.decode()
    # Tables of one task differ in its settings.
    assert "toy · tiny · cpu-test · latency · prompt=raw" in drawn
    for name in ("plain", "f$a_b$ &lt;fast&gt;", "other", "time, baseline = 1"):
        assert f"<!-- {name} -->" in drawn


@pytest.mark.parametrize("suffix", plots.SUFFIXES)
def test_each_format_is_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"curve{suffix}"
    plots.draw(curves(tmp_path / "store"), path)
    begins = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}
    assert path.read_bytes().startswith(begins[suffix])


def test_another_suffix_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.svg, \.png, \.pdf, got 'curve\.jpg'"):
        plots.draw(tmp_path / "index", tmp_path / "curve.jpg")


def test_cells_of_equal_cost_are_nothing_to_draw(tmp_path: Path) -> None:
    make_store(tmp_path, {"plain": 1.0})
    with pytest.raises(StoreError, match="nothing to draw"):
        plots.draw(ingest(tmp_path), tmp_path / "curve.svg")


def test_without_the_library_it_is_said_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = curves(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(plots.PlotUnavailable, match=r"pip install -e .\.\[plot\]"):
        plots.draw(index, tmp_path / "curve.svg")
