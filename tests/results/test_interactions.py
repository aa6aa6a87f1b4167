"""What becomes of the gains of two methods in a stack of them, against numbers made by hand."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from results import tables
from results.ingest import ingest
from results.records import CellRecord, CorpusRecord, MetricRecord, SampleRecord
from results.report.content import Sources, slug
from results.report.site import write
from results.statistics import Estimate, interaction_verdict
from results.store import Store
from results.tables import connect, rows_of
from results.verify import verify
from tests.results.factory import (
    make_cell,
    make_corpus,
    make_experiment,
    make_run,
    make_samples,
    make_scores,
    write_shard,
)
from tests.results.report_world import make_site, numbers_of

FOUR = ("plain", "kv", "draft", "kv+draft")
# Gains of 2 and 3 alone; together 6 if they multiply.
MULTIPLYING = {"plain": 1.0, "kv": 2.0, "draft": 3.0, "kv+draft": 6.0}
NO_SCORES: Mapping[str, Sequence[float | None]] = {}


def cells_of(experiment: Any, **changes: Mapping[str, Any]) -> list[CellRecord]:
    return [
        make_cell(
            experiment,
            name,
            spec=name,
            **({"parts": ["kv", "draft"]} if name == "kv+draft" else {}),
            **changes.get(name, {}),
        )
        for name in FOUR
    ]


def store_of(
    path: Path,
    speeds: Mapping[str, float] = MULTIPLYING,
    *,
    noise: float = 0.01,
    scores: Mapping[str, Sequence[float | None]] = NO_SCORES,
    samples: Sequence[SampleRecord] | None = None,
    corpus: Sequence[CorpusRecord] = (),
    cells: Mapping[str, Mapping[str, Any]] | None = None,
    **changes: Any,
) -> Store:
    """Write the four cells, with an index; texts of all methods differ."""
    experiment = make_experiment(FOUR, **changes)
    store = Store(path)
    if samples is None:
        samples = make_samples(experiment, speeds, noise)
    write_shard(
        store,
        experiment,
        cells_of(experiment, **(cells or {})),
        samples,
        [each for name, own in scores.items() for each in make_scores(experiment, name, own)],
        corpus=corpus,
    )
    store.write_run(make_run([experiment]))
    ingest(path)
    return store


def interaction(store: Store) -> dict[str, Any]:
    with connect(store.index_path) as connection:
        [row] = rows_of(connection.execute("SELECT * FROM interactions"))
    return row


def comparison(store: Store) -> dict[str, dict[str, Any]]:
    with connect(store.index_path) as connection:
        rows = rows_of(connection.execute("SELECT * FROM comparison"))
    return {row["method"]: row for row in rows}


def test_the_interaction_is_the_gain_of_both_over_the_product_of_the_gains(tmp_path: Path) -> None:
    store = store_of(tmp_path, noise=0.2)
    row, found = interaction(store), comparison(store)
    assert (row["first_cell"], row["second_cell"]) == ("cell-kv", "cell-draft")
    for kind, column in (("speed", "speedup"), ("decode", "decode_speedup")):
        kv, draft, both = (found[name][column] for name in ("kv", "draft", "kv+draft"))
        assert row[kind] == pytest.approx(both / (kv * draft))
    kv, draft, both = (found[name]["tokens_per_forward"] for name in FOUR[1:])
    assert row["tokens_per_forward"] == pytest.approx(both / (kv * draft))


def test_the_report_shows_it_with_the_sql_that_gives_it(tmp_path: Path) -> None:
    scores = {
        name: [float(item % (place + 2) == 0) for item in range(8)]
        for place, name in enumerate(FOUR)
    }
    store = store_of(tmp_path / "store", noise=0.2, scores=scores)
    site = tmp_path / "site"
    write(site, store.index_path, Sources())
    [page] = (site / "experiments").glob("*.html")
    row, seen = interaction(store), {}
    with duckdb.connect(str(store.index_path), read_only=True) as connection:
        for column, exact, statements in numbers_of(page):
            if column.startswith("interactions_"):
                assert exact == row[column.removeprefix("interactions_")]
                for statement in statements:
                    [answer] = connection.execute(statement).fetchall()
                    assert answer[0] == pytest.approx(exact, rel=1e-9, abs=1e-12), statement
                seen[column] = len(statements)
    kinds = ("speed", "decode", "tokens_per_forward", "quality")
    assert seen == {f"interactions_{kind}": 2 for kind in kinds}  # from the table, from the samples
    [below] = tables.comparison_tables(store.index_path, None)[0].below
    [task] = (site / "tasks").glob("*.html")
    text = html.unescape(task.read_text(encoding="utf-8"))
    assert "Two methods at once" in text
    for cell in below.rows[0]:
        assert f">{cell}</t" in text
    assert f'href="../experiments/{page.name}#c-' in text
    assert all(note in text for note in below.notes)
    on_pages = {
        page.stem
        for page in (site / "methods").glob("*.html")
        if "Two methods at once" in page.read_text(encoding="utf-8")
    }
    assert on_pages == {"kv", "draft", slug("kv+draft")}


def test_a_report_without_stacks_says_nothing_of_them(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    assert "Two methods at once" not in (site / "tasks" / "toy.html").read_text(encoding="utf-8")


def test_a_slow_machine_is_nobodys_interaction(tmp_path: Path) -> None:
    # Whatever makes an item slow for all four cancels; so does what makes one method slow.
    samples = make_samples(make_experiment(FOUR), MULTIPLYING, noise=0.0)
    load = dict(zip(make_experiment(FOUR).items, np.linspace(1, 4, 8), strict=True))
    slow = [
        dataclasses.replace(each, seconds=each.seconds * load[each.item_id], prefill_seconds=None)
        for each in samples
    ]
    row = interaction(store_of(tmp_path, samples=slow))
    even = interaction(store_of(tmp_path / "even", samples=samples))
    assert row["speed"] == pytest.approx(even["speed"], rel=0.02)
    assert row["decode"] is None  # nobody said when a prefill ended


@pytest.mark.parametrize(
    ("speed", "verdict"), [(6.0, "MULTIPLY"), (3.0, "LESS"), (12.0, "MORE"), (6.4, "INCONCLUSIVE")]
)
def test_gains_multiply_or_add_less_or_more(tmp_path: Path, speed: float, verdict: str) -> None:
    noise = 0.2 if verdict == "INCONCLUSIVE" else 0.005
    store = store_of(tmp_path, MULTIPLYING | {"kv+draft": speed}, noise=noise)
    assert interaction(store)["decode_verdict"] == verdict


def test_the_margin_is_that_of_speed_and_a_difference_takes_the_wide_interval() -> None:
    estimate = Estimate(1.08, 1.06, 1.10, 0.01, 1.04, 1.12)
    assert interaction_verdict(estimate, 0.05) == "INCONCLUSIVE"
    assert interaction_verdict(estimate, 0.03) == "MORE"
    assert interaction_verdict(estimate, 0.15) == "MULTIPLY"
    assert interaction_verdict(Estimate(0.5), 0.05) == "INCONCLUSIVE"  # no interval


def test_the_interaction_of_quality_is_the_difference_of_differences(tmp_path: Path) -> None:
    scores = {
        "plain": [1, 1, 1, 1, 1, 1, 0, 0],
        "kv": [1, 1, 1, 1, 1, 0, 0, 0],  # loses one
        "draft": [1, 1, 1, 1, 0, 1, 0, 0],  # loses another
        "kv+draft": [0, 0, 0, 1, 0, 0, 0, None],  # loses both of these and three more
    }
    row = interaction(store_of(tmp_path, scores=scores))
    # Over the seven items that all four were judged on: both - kv - draft + plain.
    assert row["quality"] == pytest.approx(np.mean([-1, -1, -1, 0, 0, 0, 0]))
    assert row["quality_low_99"] < row["quality_low"] < row["quality"] < row["quality_high"]
    assert row["quality_verdict"] == "INCONCLUSIVE"
    assert row["metric"] == "pass@1"


def test_a_stack_that_answers_less_often_is_not_called_the_same(tmp_path: Path) -> None:
    metric = MetricRecord(name="score", unit="points", kind="mean", higher_is_better=True)
    scores: dict[str, list[float | None]] = {
        name: [5.0 + place for place in range(8)] for name in FOUR
    }
    wobble = [0.001, -0.001] * 4
    scores["kv+draft"] = [5.0 + place + wobble[place] for place in range(8)]
    row = interaction(
        store_of(tmp_path / "whole", scores=scores, metrics=[metric], quality_margin=0.5)
    )
    assert row["quality_verdict"] == "SAME"
    scores["kv+draft"][0] = None
    row = interaction(
        store_of(tmp_path / "short", scores=scores, metrics=[metric], quality_margin=0.5)
    )
    assert row["quality_verdict"] == "INCONCLUSIVE"


def test_metrics_of_a_corpus_interact_on_the_same_resamples(tmp_path: Path) -> None:
    metric = MetricRecord(name="map", unit="fraction", kind="corpus", higher_is_better=True)
    experiment = make_experiment(FOUR, metrics=[metric])
    weights = {"plain": 0.9, "kv": 0.8, "draft": 0.85, "kv+draft": 0.7}
    corpus = [
        make_corpus(experiment, name, lambda drawn, own=own: own * (1 + drawn.mean() / 100))
        for name, own in weights.items()
    ]
    row = interaction(store_of(tmp_path, metrics=[metric], corpus=corpus))
    expected = (0.7 - 0.8 - 0.85 + 0.9) * (1 + np.arange(8).mean() / 100)
    assert row["quality"] == pytest.approx(expected)
    assert row["quality_low"] < row["quality"] < row["quality_high"]


def test_texts_of_the_stack_are_held_against_those_of_its_first_part(tmp_path: Path) -> None:
    samples = make_samples(make_experiment(FOUR), MULTIPLYING)
    own = {each.item_id: each.output_digest for each in samples if each.cell_id == "cell-kv"}
    agreeing = [
        dataclasses.replace(each, output_digest=own[each.item_id])
        if each.cell_id == "cell-kv+draft" and each.item_id < "item-3"
        else each
        for each in samples
    ]
    row = interaction(store_of(tmp_path, samples=agreeing))
    assert (row["as_first"], row["items"]) == (3, 8)


@pytest.mark.parametrize("broken", FOUR)
def test_without_one_of_the_four_there_is_no_interaction(tmp_path: Path, broken: str) -> None:
    failure = {broken: {"status": "failed", "error": "no luck", "output_check": None}}
    store = store_of(tmp_path, cells=failure)
    row = interaction(store)
    assert row["items"] is row["speed"] is row["quality"] is None
    [table] = tables.comparison_tables(store.index_path)
    assert not table.below


def test_items_that_one_of_the_four_did_not_run_are_left_out(tmp_path: Path) -> None:
    samples = make_samples(make_experiment(FOUR), MULTIPLYING, noise=0.2)
    fewer = [each for each in samples if each.cell_id != "cell-draft" or each.item_id < "item-6"]
    row = interaction(store_of(tmp_path / "fewer", samples=fewer))
    shared = [each for each in samples if each.item_id < "item-6"]
    alone = interaction(store_of(tmp_path / "shared", samples=shared))
    assert row["items"] == 6
    assert row["speed"] == pytest.approx(alone["speed"])


def test_interactions_stand_below_the_comparison_in_every_format(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    [table] = tables.comparison_tables(store.index_path)
    [below] = table.below
    row = dict(zip(below.columns, below.rows[0], strict=True))
    found, numbers = comparison(store), interaction(store)
    assert row["stack"] == "kv+draft"
    product = found["kv"]["speedup"] * found["draft"]["speedup"]
    assert row["speed-up if gains multiplied"] == f"{product:.2f}"
    assert row["speed-up"] == f"{found['kv+draft']['speedup']:.2f}"
    assert row["speed interaction"].startswith(f"{numbers['speed']:.2f} [")
    for form in ("md", "latex", "html"):
        text = tables.render(store.index_path, format=form)
        assert text.index("speed-up") < text.index("Interactions")
    [content] = json.loads(tables.render(store.index_path, format="json"))
    assert content["below"][0]["data"][0]["speed"] == numbers["speed"]
    # One flat table with one kind of row.
    assert len(tables.render(store.index_path, format="csv").splitlines()) == 1 + len(FOUR)


def test_an_interaction_that_was_changed_in_the_index_is_found(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    assert verify(store.path) == []
    with duckdb.connect(str(store.index_path)) as connection:
        connection.execute("UPDATE interactions SET speed = speed * 1.1")
    [problem] = verify(store.path)
    assert "interactions: experiment-1, cell-kv+draft: speed is" in problem
