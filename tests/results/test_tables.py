from __future__ import annotations

import csv
import io
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from results import tables
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

EVIL = "[bold red]x[/] \x1b[2J <script>alert(1)</script> | a_b & $5 \u202e"


class Cells(HTMLParser):
    """Collects the text of table cells, captions and notes, and every tag."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.texts and not data.isspace():
            self.texts[-1] += data


def shown(index: Path, run: str | None = "latest", width: int = 250) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(tables.terminal(index, run))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_ratio_stands_with_its_interval_and_its_verdict(tmp_path: Path) -> None:
    make_store(tmp_path, {"plain": 1.0, "fast": 2.0, "slow": 0.5, "twin": 1.0}, items=24)
    (table,) = tables.comparison_tables(ingest(tmp_path))
    column = table.columns.index("speed-up")
    found = {row[0]: row[column] for row in table.rows}
    assert found["plain"] == "1.00"
    for method, verdict in (("fast", "FASTER"), ("slow", "SLOWER"), ("twin", "SAME")):
        assert re.fullmatch(rf"\d\.\d\d \[\d\.\d\d, \d\.\d\d\] {verdict}", found[method])
    data = {row["method"]: row for row in table.data}
    fast = data["fast"]
    assert found["fast"] == (
        f"{fast['speedup']:.2f} [{fast['speedup_low']:.2f}, {fast['speedup_high']:.2f}] FASTER"
    )


def test_all_formats_show_the_same_cells(tmp_path: Path) -> None:
    make_store(tmp_path, items=12)
    index = ingest(tmp_path)
    (table,) = tables.comparison_tables(index)
    (from_json,) = json.loads(tables.render(index, format="json"))
    assert [tuple(row) for row in from_json["rows"]] == list(table.rows)
    assert from_json["data"][1]["speedup"] == table.data[1]["speedup"]
    parser = Cells()
    parser.feed(tables.render(index, format="html"))
    as_html, as_latex = set(parser.texts), tables.render(index, format="latex")
    markdown, terminal = tables.render(index), shown(index)
    for row in table.rows:
        assert "| " + " | ".join(row) + " |" in markdown
        assert " & ".join(row) + r" \\" in as_latex
        assert set(row) - {""} <= as_html
        line = next(line for line in terminal.splitlines() if f"│ {row[0]} " in line)
        assert [cell.strip() for cell in line.strip("│").split("│")] == list(row)
    for note in table.notes:
        assert note in as_html
        assert note in terminal
    rows = list(csv.DictReader(io.StringIO(tables.render(index, format="csv"))))
    fast = next(row for row in rows if row["method"] == "fast")
    column = table.rows[1][table.columns.index("speed-up")]
    assert column == (
        f"{fast['speedup']} [{fast['speedup_low']}, {fast['speedup_high']}] {fast['speed_verdict']}"
    )


def test_the_baseline_stands_first_then_methods_controls_and_peers(tmp_path: Path) -> None:
    store = Store(tmp_path)
    order = {"peer": "peer", "control": "control", "plain": "baseline", "fast": "method"}
    experiment = make_experiment(("plain", "peer", "control", "fast"))
    cells = [make_cell(experiment, method, role=role) for method, role in order.items()]
    write_shard(store, experiment, cells, make_samples(experiment, dict.fromkeys(order, 1.0)))
    store.write_run(make_run([experiment]))
    (table,) = tables.comparison_tables(ingest(tmp_path))
    assert [row[0] for row in table.rows] == ["plain", "fast", "control", "peer"]


def test_methods_of_one_name_are_told_apart_by_the_settings_that_differ(tmp_path: Path) -> None:
    store = Store(tmp_path)
    experiment = make_experiment(("plain", "a", "b"))
    cells = [
        make_cell(experiment, "plain"),
        make_cell(experiment, "a", method="tree", params={"nodes": 8, "keep": 0.5, "by": "x"}),
        make_cell(experiment, "b", method="tree", params={"nodes": 16, "keep": 0.5, "by": "y"}),
    ]
    write_shard(store, experiment, cells, make_samples(experiment, {"plain": 1, "a": 2, "b": 3}))
    store.write_run(make_run([experiment]))
    (table,) = tables.comparison_tables(ingest(tmp_path))
    assert [row[0] for row in table.rows] == ["plain", "tree:by=x,nodes=8", "tree:by=y,nodes=16"]


def test_latest_shows_the_cells_that_the_last_run_lists_cached_ones_included(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path)
    later = make_experiment(
        ("plain", "new"), experiment_id="later", run_id="run-2", created="2025-06-01"
    )
    cells = [make_cell(later, "plain"), make_cell(later, "new")]
    write_shard(store, later, cells, make_samples(later, {"plain": 1.0, "new": 3.0}))
    store.write_run(
        make_run(
            [],
            run_id="run-2",
            started="2025-06-01T00:00:00+00:00",
            cells=[
                ["experiment-1", "cell-plain"],
                ["experiment-1", "cell-fast"],
                ["later", "cell-new"],
                ["later", "cell-missing"],
            ],
            skipped=[{"method": "other", "task": "toy", "model": "tiny", "reason": "no vision"}],
        )
    )
    index = ingest(tmp_path)
    (table,) = tables.comparison_tables(index)
    assert [row[0] for row in table.rows] == ["plain", "fast", "new"]
    assert "1 of the run's cells have not ended yet." in table.notes
    assert "Skipped: other on toy with tiny: no vision" in table.notes
    (first,) = tables.comparison_tables(index, "run-1")
    assert [row[0] for row in first.rows] == ["plain", "fast"]
    (everything,) = tables.comparison_tables(index, None)
    found = [(row["method"], row["experiment_id"]) for row in everything.data]
    assert found == [("fast", "experiment-1"), ("plain", "later"), ("new", "later")]


def test_tables_are_split_where_numbers_cannot_be_compared(tmp_path: Path) -> None:
    store = Store(tmp_path)
    experiments = [
        make_experiment(experiment_id=f"experiment-{number}", **changes)
        for number, changes in enumerate(
            (
                {},
                {"task": "another"},
                {"task_params": {"prompt": "stripped"}},
                {"model": "large"},
                {"scenario": "fixed-length"},
                {"seed": 1},
                {"scale": "paper"},
            )
        )
    ]
    for experiment in experiments:
        cells = [make_cell(experiment, method) for method in ("plain", "fast")]
        write_shard(store, experiment, cells, make_samples(experiment, {"plain": 1, "fast": 2}))
    store.write_run(make_run(experiments))
    index = ingest(tmp_path)
    assert len(tables.comparison_tables(index)) == len(experiments)
    (table,) = tables.comparison_tables(index, tasks=["another"])
    assert table.title == "another · tiny · cpu-test · latency"
    with pytest.raises(StoreError, match=r"no task named 'anothr'.* Did you mean 'another'"):
        tables.render(index, tasks=["anothr"])


def test_a_decode_column_pair_is_shown_where_the_task_asks_for_it(tmp_path: Path) -> None:
    facts = {"speed_of": "decode", "bound_by": "bytes"}
    make_store(tmp_path / "decode", {"plain": 1.0, "fast": 2.0}, noise=0.0, facts=facts)
    (table,) = tables.comparison_tables(ingest(tmp_path / "decode"))
    shown = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert table.columns[1:5] == ("speed-up", "bound", "decode speed-up", "decode bound")
    assert shown["fast"]["decode speed-up"] == "2.00 [2.00, 2.00] FASTER"
    assert shown["fast"]["decode bound"] == shown["fast"]["decode speed-up"][:4]
    assert shown["plain"]["decode speed-up"] == "1.00"
    assert any("bytes of weights, keys and values" in note for note in table.notes)
    assert not any("lies above its bound" in note for note in table.notes)
    make_store(tmp_path / "call", {"plain": 1.0, "fast": 2.0})
    (table,) = tables.comparison_tables(ingest(tmp_path / "call"))
    assert table.columns[1:4] == ("speed-up", "bound", "tokens/forward")
    assert not any("Decode" in note for note in table.notes)
    assert table.data[1]["decode_verdict"] == "FASTER"  # measured all the same


def test_decoding_faster_than_its_bytes_allow_is_not_trusted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    facts = {"speed_of": "decode", "bound_by": "bytes"}
    experiment = make_experiment(items=8, facts=facts)
    samples = [
        type(sample)(**{**vars(sample), "bound_seconds": 0.001 * sample.decode_tokens})
        for sample in make_samples(experiment, {"plain": 1, "fast": 2}, noise=0.01)
    ]
    write_shard(
        store, experiment, [make_cell(experiment, name) for name in ("plain", "fast")], samples
    )
    store.write_run(make_run([experiment]))
    (table,) = tables.comparison_tables(ingest(tmp_path))
    assert "fast: the measured speed-up of decoding lies above its bound" in "\n".join(table.notes)


def test_a_possible_gain_is_called_no_loss_and_explained(tmp_path: Path) -> None:
    store = Store(tmp_path)
    experiment = make_experiment(items=12)
    scores = [
        *make_scores(experiment, "plain", [0.0] * 10 + [1.0] * 2),
        *make_scores(experiment, "fast", [0.0] * 5 + [1.0] * 7),
    ]
    write_shard(
        store,
        experiment,
        [make_cell(experiment, name) for name in ("plain", "fast")],
        make_samples(experiment, {"plain": 1, "fast": 2}),
        scores,
    )
    store.write_run(make_run([experiment]))
    (table,) = tables.comparison_tables(ingest(tmp_path))
    assert "NO LOSS" in table.rows[1][table.columns.index("vs baseline")]
    assert any("NO LOSS: a loss beyond it is excluded" in note for note in table.notes)


def test_notes_say_what_the_table_could_have_seen_and_why_cells_failed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    experiment = make_experiment(("plain", "fast", "bad", "magic"), items=12, repeats=2)
    samples = make_samples(experiment, {"plain": 1, "fast": 2, "magic": 4}, noise=0.01)
    samples = [
        # A method whose own counts allow no speed-up at all.
        type(sample)(**{**vars(sample), "bound_seconds": 1.0})
        if sample.cell_id == "cell-magic"
        else sample
        for sample in samples
    ]
    cells = [
        make_cell(experiment, "plain", notes={"sandbox": "bubblewrap"}),
        make_cell(experiment, "fast"),
        make_cell(experiment, "magic"),
        make_cell(experiment, "bad", status="oom-host", error="needed 9 GiB"),
    ]
    scores = [
        *make_scores(experiment, "plain", [1.0] * 12),
        *make_scores(experiment, "fast", [None, *[1.0] * 11]),
    ]
    write_shard(store, experiment, cells, samples, scores)
    store.write_run(make_run([experiment], status="interrupted"))
    (table,) = tables.comparison_tables(ingest(tmp_path))
    notes = "\n".join(table.notes)
    assert "12 items, 2 repeats, seed 0; scale embedded; margin 5% of speed, 0.020 of" in notes
    assert re.search(r"80% power\): speed \d\.\d+%, quality 0\.\d\d\d\.", notes)
    assert "Machine: cpu-test, Test CPU, 2.0 cores, torch 2." in notes
    assert "Task settings: prompt=raw." in notes
    assert "Sandbox: bubblewrap." in notes
    assert "bad: oom-host: needed 9 GiB" in notes
    assert "fast: 1 outputs could not be scored." in notes
    assert "magic: the measured speed-up lies above its bound; do not trust it." in notes
    assert "fast: the measured" not in notes
    assert "Run run-1: interrupted." in notes
    row = next(row for row in table.rows if row[0] == "bad")
    assert row[-1] == "oom-host"
    assert set(row[1:-1]) <= {"", "identical"}


def make_evil(path: Path) -> Path:
    store = Store(path)
    experiment = make_experiment(("plain", "evil"), model=EVIL, task_params={"p": EVIL})
    cells = [
        make_cell(experiment, "plain"),
        make_cell(experiment, "evil", method=EVIL, status="failed", error=EVIL),
    ]
    write_shard(store, experiment, cells, make_samples(experiment, {"plain": 1.0}))
    store.write_run(make_run([experiment]))
    return ingest(path)


def test_foreign_text_forms_no_markup_in_any_format(tmp_path: Path) -> None:
    index = make_evil(tmp_path)
    for format in tables.FORMATS:
        content = tables.render(index, format=format)
        assert "\x1b" not in content
        assert "\u202e" not in content
    as_html = tables.render(index, format="html")
    assert "<script" not in as_html
    assert "&lt;script&gt;" in as_html
    markdown = tables.render(index)
    assert "<script" not in markdown
    widths = {
        len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line[:1] == "|"
    }
    assert len(widths) == 1
    as_latex = tables.render(index, format="latex")
    body = re.search(r"\\midrule\n(.*)\\bottomrule", as_latex, re.DOTALL)
    assert body is not None
    for line in body[1].strip().splitlines():
        assert len(re.findall(r"(?<!\\)&", line)) == 11
    assert not re.search(r"(?<!\\)\$(?!\\)5", as_latex)


def test_the_terminal_shows_square_brackets_and_obeys_no_escape_codes(tmp_path: Path) -> None:
    output = shown(make_evil(tmp_path), width=900)
    assert r"[bold red]x[/] \x1b[2J <script>" in output
    assert "\x1b" not in output
    assert "\u202e" not in output


@pytest.mark.parametrize("width", [60, 80, 100, 250])
def test_a_narrow_terminal_cuts_no_number(tmp_path: Path, width: int) -> None:
    make_store(tmp_path, {"plain": 1.0, "token-recycling": 2.0})
    index = ingest(tmp_path)
    (table,) = tables.comparison_tables(index)
    output = shown(index, width=width)
    assert max(map(len, output.splitlines())) <= width
    assert "…" not in output
    found = [cell.strip() for line in output.splitlines() for cell in re.split("[│┃]", line)]
    assert set(found) >= {*table.columns, *(cell for row in table.rows for cell in row)}
    heads = [line for line in output.splitlines() if line.startswith("┃ method")]
    assert len(heads) == {60: 5, 80: 4, 100: 3, 250: 1}[width]


def test_the_page_can_be_read_aloud(tmp_path: Path) -> None:
    make_store(tmp_path)
    page = tables.render(ingest(tmp_path), format="html")
    parser = Cells()
    parser.feed(page)
    tags = [tag for tag, _ in parser.tags]
    assert page.startswith("<!DOCTYPE html>")
    assert parser.tags[0] == ("html", {"lang": "en"})
    assert {"title", "main", "h1", "caption", "thead", "tbody"} <= set(tags)
    scopes = [attributes.get("scope") for tag, attributes in parser.tags if tag == "th"]
    assert scopes == ["col"] * 12 + ["row"] * 2
    assert "http" not in page  # nothing is loaded from elsewhere


def test_unknown_runs_and_formats_are_refused_with_the_nearest_name(tmp_path: Path) -> None:
    make_store(tmp_path)
    index = ingest(tmp_path)
    with pytest.raises(StoreError, match=r"no run 'run-11'\. Did you mean 'run-1'"):
        tables.render(index, "run-11")
    with pytest.raises(ValueError, match="one of md, csv, latex, json, html, got 'pdf'"):
        tables.render(index, format="pdf")
    with pytest.raises(StoreError, match="no run in this store yet"):
        tables.render(ingest(tmp_path / "empty"))
    with pytest.raises(StoreError, match="is missing"):
        tables.render(tmp_path / "none" / "tokenmark.duckdb")
    index.write_bytes(b"no database")
    with pytest.raises(StoreError, match="cannot be read"):
        tables.render(index)


def test_an_empty_store_gives_empty_tables(tmp_path: Path) -> None:
    index = ingest(tmp_path)
    assert tables.render(index, None) == "No results.\n"
    assert json.loads(tables.render(index, None, format="json")) == []
    assert "No results." in tables.render(index, None, format="html")
    assert "No results." in shown(index, None)


def test_tables_of_many_cells_are_quick(tmp_path: Path) -> None:
    store = Store(tmp_path)
    methods = [f"m{number}" for number in range(40)]
    experiments = []
    for number in range(5):
        experiment = make_experiment(
            methods, items=4, experiment_id=f"e{number}", task=f"t{number}"
        )
        cells = [make_cell(experiment, method) for method in methods]
        write_shard(store, experiment, cells, [], seal=True)
        experiments.append(experiment)
    store.write_run(make_run(experiments))
    index = ingest(tmp_path)
    start = time.process_time()
    tables.render(index)
    assert time.process_time() - start < 1
