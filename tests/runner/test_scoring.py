"""`score` on stored outputs whose verdicts are known and on which scorers must differ."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import run
from results import rescored, tables
from results.ingest import ingest
from results.store import Store, StoreError
from runner.registry import Registry
from runner.request import UsageError
from runner.scoring import disputed_rows, rescore, table_rows
from tasks.humaneval import HumanEval
from tests.results.factory import (
    make_cell,
    make_experiment,
    make_run,
    make_sample,
    make_scores,
    write_shard,
)

TASK = HumanEval()
ITEMS = list(TASK.items())[:4]
RIGHT = [item.fields["reference"] for item in ITEMS]
# Equal to everything: a test in the same namespace believes it.
FORGED = (
    "\n    class Yes:\n        __eq__ = lambda self, other: True\n"
    "        __lt__ = __gt__ = __le__ = __ge__ = __eq__\n        __hash__ = None\n"
    "    return Yes()\n"
)
OUTPUTS = {
    "plain": [*RIGHT[:3], "\n    pass\n"],
    "fast": [
        FORGED,
        RIGHT[1] + "\n```\nThis function does it.\n",
        RIGHT[2] + "\n\ndef broken(:\n",
        RIGHT[3],
    ],
}
STORED = {"plain": [1.0, 1.0, 1.0, 0.0], "fast": [0.0, 0.0, 0.0, 1.0]}


def write_outputs(path: Path, **changes: object) -> Store:
    store = Store(path)
    ids = [item.id for item in ITEMS]
    experiment = make_experiment(
        task="humaneval",
        task_params=TASK.parameters(),
        task_hash=TASK.content_hash(),
        **{"items": 4, **changes},  # type: ignore[arg-type]  # fields of any type
    )
    experiment = dataclasses.replace(experiment, items=ids, groups=ids)
    samples = [
        make_sample(f"cell-{method}", item, output=text, output_digest=f"{method} {item}")
        for method, texts in OUTPUTS.items()
        for item, text in zip(ids, texts, strict=True)
    ]
    write_shard(
        store,
        experiment,
        [make_cell(experiment, method) for method in OUTPUTS],
        samples,
        [score for method in OUTPUTS for score in make_scores(experiment, method, STORED[method])],
    )
    store.write_run(make_run([experiment]))
    return store


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory):
    store = write_outputs(tmp_path_factory.mktemp("scored"))
    return store, rescore(store.path, Registry())


def test_every_scorer_judges_every_output(scored) -> None:
    _, [done] = scored
    assert list(done.record.scores) == ["tokenmark", "official", "lm-eval", "lm-eval-instruct"]
    values = {
        scorer: {(s.cell_id, s.item_id): s.value for s in scores}
        for scorer, scores in done.record.scores.items()
    }
    fast = {
        scorer: [found["cell-fast", item.id] for item in ITEMS] for scorer, found in values.items()
    }
    assert fast == {
        "tokenmark": [0.0, 0.0, 0.0, 1.0],
        "official": [1.0, 0.0, 0.0, 1.0],
        "lm-eval": [1.0, 0.0, 1.0, 1.0],
        "lm-eval-instruct": [1.0, 1.0, 0.0, 1.0],
    }
    for found in values.values():
        assert [found["cell-plain", item.id] for item in ITEMS] == [1.0, 1.0, 1.0, 0.0]
    assert done.changed == []


def test_spread_and_disputed_items_are_told(scored) -> None:
    store, done = scored
    rows = {row["method"]: row for row in table_rows(done, store.path)}
    assert rows["plain"]["spread"] == "0.000"
    assert rows["plain"]["disputed"] == "0"
    assert rows["fast"]["tokenmark"] == "0.250"
    assert rows["fast"]["official"] == "0.500"
    assert rows["fast"]["lm-eval-instruct"] == "0.750"
    assert rows["fast"]["spread"] == "0.500"
    assert rows["fast"]["disputed"] == "3"
    disputed = {row["item"]: row for row in disputed_rows(done)}
    assert set(disputed) == {item.id for item in ITEMS[:3]}
    assert disputed[ITEMS[0].id]["official"] == "passed"
    assert disputed[ITEMS[0].id]["tokenmark"] != "passed"


def test_the_index_names_the_scorers_and_tables_show_the_spread(scored) -> None:
    store, _ = scored
    index = ingest(store.path)
    (table,) = tables.comparison_tables(index)
    data = {row["method"]: row for row in table.data}
    assert data["fast"]["quality"] == 0.25  # the run's own score stays what is published
    assert data["fast"]["quality_spread"] == 0.5
    assert data["fast"]["disputed_items"] == 3
    assert data["plain"]["disputed_items"] is None
    assert "official 0.5" in data["fast"]["scorers"]
    assert any("fast by scorer" in note and "disputed items: 3" in note for note in table.notes)
    assert "official" in tables.render(index, format="csv")


def test_verify_finds_a_changed_score(scored, tmp_path: Path) -> None:
    store, _ = scored
    path = store.path / "rescored" / "experiment-1.json"
    before = path.read_bytes()
    ingest(store.path)
    try:
        content = json.loads(before)
        content["scores"]["official"][0]["value"] = 0.5
        path.write_text(json.dumps(content))
        with pytest.raises(StoreError, match="it changed since it was written"):
            rescored.read(store, "experiment-1")
        assert run.main(["verify", "--store", str(store.path)]) == 1
    finally:
        path.write_bytes(before)
    assert run.main(["verify", "--store", str(store.path)]) == 0


def test_the_command_prints_scorers_and_disputes(tmp_path, capsys, monkeypatch) -> None:
    judge_nothing(monkeypatch)
    store = write_outputs(tmp_path / "store")
    assert run.main(["score", "--store", str(store.path)]) == 1
    shown = capsys.readouterr()
    assert "HumanEval/0 of cell cell-plain: pass@1 was 1.0 in the run, is 0.5 now" in shown.err
    header = shown.out.splitlines()[0].split()
    assert header == ["task", "method", "metric", "tokenmark", "spread", "disputed"]
    assert run.main(["score", "--store", str(store.path), "--format", "json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["cells"]) == 2


def judge_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the judges by one that says a half, to test what is around them."""
    from tasks.base import Scored
    from tasks.scorers import Scorer

    def half(item, output):
        return Scored({"pass@1": 0.5}, "half")

    monkeypatch.setattr(
        "runner.scoring.scorers", lambda task: [Scorer("tokenmark", str, half, "half", task)]
    )


def test_equal_texts_of_an_item_are_judged_once(tmp_path, monkeypatch) -> None:
    from tasks.base import Scored
    from tasks.scorers import Scorer

    seen: list[tuple[str, str]] = []

    def judge(item, output):
        seen.append((item.id, output))
        return Scored({"pass@1": 1.0}, "")

    monkeypatch.setattr(
        "runner.scoring.scorers",
        lambda task: [Scorer(name, str, judge, "same", task) for name in ("tokenmark", "other")],
    )
    rescore(write_outputs(tmp_path).path, Registry())
    # HumanEval/3 has two outputs, and so have the others.
    assert len(seen) == len(set(seen)) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_hash": "0" * 64}, "is no longer what experiment"),
        ({"task_params": {"prompt": "oblique"}}, "no longer takes the settings"),
        ({"task_params": {"shape": 3}}, "no longer takes the settings"),
        ({"task": "humanevl"}, "Did you mean 'humaneval'?"),
    ],
)
def test_outputs_of_another_task_are_not_judged(tmp_path, changes, message) -> None:
    store = write_outputs(tmp_path)
    path = store.path / "shards" / "experiment-1" / "experiment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        rescore(store.path, Registry())


def test_a_task_that_the_run_does_not_have_is_refused(tmp_path) -> None:
    store = write_outputs(tmp_path)
    with pytest.raises(UsageError, match="Did you mean 'humaneval'"):
        rescore(store.path, Registry(), tasks=["humanevl"])
    with pytest.raises(UsageError, match="no run, commit or folder 'run-9'"):
        rescore(store.path, Registry(), run="run-9")
    with pytest.raises(UsageError, match="holds no results"):
        rescore(tmp_path / "nowhere", Registry())
