"""What a run of mmbench-mini says: intervals, paired tests, agreement, and who disputes what."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import duckdb
import pytest

from results.ingest import ingest
from results.records import CorpusRecord, MetricRecord, ScoreRecord
from results.statistics import mcnemar, tango, wilson
from results.store import Store
from runner.corpus import corpus_records
from runner.registry import Registry
from runner.scoring import disputed_rows, rescore, table_rows
from tasks.base import Item, Unscored
from tasks.mmbench_mini import MMBenchMini
from tests.results.factory import make_cell, make_experiment, make_run, make_sample, write_shard

TASK = MMBenchMini()
LIMIT = 8
# By method and question: how it answers the four rotations. `r` right, `w` wrong, `?` nothing,
# `*` right between stars, which one public rule reads and the other does not.
OUTPUTS = {
    "full": ["rrrr", "rrrr", "rrrr", "rrrr", "rrrr", "wrrr", "rrrr", "rrr?"],
    "down": ["rrrr", "wwww", "rwrr", "rrrr", "rrrr", "rrrr", "rrrr", "rrrr"],
    "fast": ["rrrr", "rrrr", "rrrw", "rrrr", "rrw?", "rrrr", "*rrr", "?rrr"],
}
LOYALTY = """
SELECT c.method, avg((own.detail = base.detail)::INT) AS loyalty
FROM cells c
JOIN experiments e USING (experiment_id)
JOIN scores own ON own.cell_id = c.cell_id AND own.metric = 'circular'
JOIN scores base ON base.cell_id = e.baseline AND base.item_id = own.item_id
    AND base.metric = 'circular'
GROUP BY c.method
"""
# Questions that the full model answers and a smaller image does not (VTC-Bench's group A, of those
# that can be answered), and what each method makes of them: from this run, whatever it is.
ON_HARD_ITEMS = """
WITH hard AS (
    SELECT base.item_id
    FROM scores base JOIN scores small USING (item_id, metric)
    WHERE metric = 'circular' AND base.value = 1 AND small.value = 0
        AND base.cell_id = 'cell-full' AND small.cell_id = 'cell-down'
)
SELECT c.method, count(*) AS items, avg(s.value) AS circular
FROM hard JOIN scores s USING (item_id) JOIN cells c USING (cell_id)
WHERE s.metric = 'circular' GROUP BY c.method
"""


def output_of(item: Item, plan: str) -> str:
    answers = []
    for mark, rotation in zip(plan, item.fields["rotations"], strict=True):
        right = rotation["answer"]
        wrong = "ABCD"["ABCD".index(right) - 1]
        answers.append({"r": right, "w": wrong, "?": "", "*": f"*{right}*"}[mark])
    return json.dumps({"answers": answers, "log_probabilities": [[0.0, -1.0, -2.0, -3.0]] * 4})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    items = list(TASK.items())[:LIMIT]
    ids = [item.id for item in items]
    experiment = dataclasses.replace(
        make_experiment(tuple(OUTPUTS), items=LIMIT),
        task="mmbench-mini",
        task_params=TASK.parameters(),
        task_hash=TASK.content_hash(),
        items=ids,
        groups=ids,
        metrics=[MetricRecord(**vars(metric)) for metric in TASK.metrics],
    )
    samples, scores, outputs = [], [], {}
    for method, plans in OUTPUTS.items():
        cell = f"cell-{method}"
        outputs[cell] = {
            item.id: output_of(item, plan) for item, plan in zip(items, plans, strict=True)
        }
        for item in items:
            text = outputs[cell][item.id]
            samples.append(make_sample(cell, item.id, output=text, output_digest=text))
            scored = TASK.score_with_detail(item, text)
            scores += [
                ScoreRecord(
                    cell_id=cell,
                    item_id=item.id,
                    metric=metric,
                    value=None if isinstance(value, Unscored) else value,
                    unscored=value.reason if isinstance(value, Unscored) else "",
                    detail=scored.detail,
                )
                for metric, value in scored.scores.items()
            ]
    store = Store(tmp_path_factory.mktemp("mmbench"))
    corpus: list[CorpusRecord] = list(corpus_records(TASK, ids, outputs))
    cells = [make_cell(experiment, method) for method in OUTPUTS]
    write_shard(store, experiment, cells, samples, scores, corpus=corpus)
    store.write_run(make_run([experiment]))
    return store


def metrics_of(index: Path, metric: str) -> dict[str, dict]:
    with duckdb.connect(str(index), read_only=True) as connection:
        table = connection.execute(
            "SELECT c.method, m.* FROM metrics m JOIN cells c USING (cell_id) WHERE metric = ?",
            [metric],
        )
        names = [column[0] for column in table.description]
        return {row[0]: dict(zip(names, row, strict=True)) for row in table.fetchall()}


def test_circular_accuracy_counts_questions_and_is_compared_in_pairs(store: Store) -> None:
    found = metrics_of(ingest(store.path), "circular")
    # The full model: six right, one wrong, one open. The fast one: 0, 1, 3, 5 and 6 right (stars
    # are read), 2 and 4 wrong, 7 open.
    assert found["full"]["scored"] == found["fast"]["scored"] == 7
    assert found["full"]["unscored"] == found["fast"]["unscored"] == 1
    assert found["full"]["value"] == pytest.approx(6 / 7)
    assert found["full"]["low"] == pytest.approx(wilson(6, 7).low)
    assert found["fast"]["value"] == pytest.approx(5 / 7)
    # Paired over seven: gained 5, lost 2 and 4.
    assert found["fast"]["difference"] == pytest.approx(-1 / 7)
    assert found["fast"]["difference_low"] == pytest.approx(tango(1, 2, 7).low)
    assert found["fast"]["mcnemar_p"] == pytest.approx(mcnemar(1, 2)) == 1.0
    official = metrics_of(store.path / "tokenmark.duckdb", "circular_official")
    assert official["full"]["value"] == pytest.approx(6 / 8)
    assert official["fast"]["value"] == pytest.approx(5 / 8)
    assert official["fast"]["unscored"] == 0


def test_rotations_are_counted_with_intervals_over_questions(store: Store) -> None:
    found = metrics_of(ingest(store.path), "vanilla_all")
    assert found["full"]["value"] == pytest.approx(30 / 31)  # one wrong, one open of 32
    assert found["fast"]["value"] == pytest.approx(28 / 30)
    assert found["fast"]["low"] < 28 / 30 < found["fast"]["high"]
    answered = metrics_of(store.path / "tokenmark.duckdb", "answered")
    assert answered["full"]["value"] == pytest.approx(31 / 32)
    assert answered["fast"]["value"] == pytest.approx(30 / 32)


def test_categories_count_their_own_questions(store: Store) -> None:
    # Question 2 is the first about counting: right for the full model, wrong for the others.
    found = metrics_of(ingest(store.path), "category/count")
    assert [(found[name]["scored"], found[name]["value"]) for name in OUTPUTS] == [
        (1, 1.0),
        (1, 0.0),
        (1, 0.0),
    ]
    assert {row["unscored"] for row in found.values()} == {0}


def test_agreement_and_hard_questions_come_from_the_run_itself(store: Store) -> None:
    with duckdb.connect(str(ingest(store.path)), read_only=True) as connection:
        loyalty = dict(connection.execute(LOYALTY).fetchall())
        hard = {row[0]: row[1:] for row in connection.execute(ON_HARD_ITEMS).fetchall()}
    # Letters count, not the stars around them: the fast method differs on 2, 4, 5 and 7.
    assert loyalty == {"full": 1.0, "fast": 4 / 8, "down": 4 / 8}
    # Questions 1 and 2 are lost with the smaller image; the fast method keeps the first.
    assert hard == {"full": (2, 1.0), "down": (2, 0.0), "fast": (2, 0.5)}


def test_the_other_rule_disputes_what_it_reads_otherwise(store: Store) -> None:
    done = rescore(store.path, Registry())
    assert done[0].changed == []
    rows = {
        row["method"]: row for row in table_rows(done, store.path) if row["metric"] == "circular"
    }
    assert rows["full"]["disputed"] == rows["down"]["disputed"] == "0"
    assert rows["fast"]["disputed"] == "1"
    assert rows["fast"]["tokenmark"] == "0.714"  # 5 of 7
    assert rows["fast"]["lmms-eval"] == "0.667"  # 4 of 6: the stars are open for it
    [disputed] = [row for row in disputed_rows(done) if row["metric"] == "circular"]
    assert disputed["item"] == "mmbench-mini/0006"
    assert disputed["lmms-eval"].startswith("- ")
    assert not disputed["tokenmark"].startswith("- ")
    # Metrics of all outputs together are the rule's own, too: 27 of 29 rotations.
    all_rows = {
        row["method"]: row for row in table_rows(done, store.path) if row["metric"] == "vanilla_all"
    }
    assert all_rows["fast"]["lmms-eval"] == f"{27 / 29:.3f}"
    assert all_rows["fast"]["tokenmark"] == f"{28 / 30:.3f}"
