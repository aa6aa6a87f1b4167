"""Corpus metrics from the task's own function, through a run, the index, `score` and `verify`."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics as plain_statistics
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import numpy as np
import pytest

import run
from models.base import Forward, Trace
from results import rescored, tables
from results.ingest import ingest
from results.records import CorpusRecord
from results.statistics import CORPUS_RESAMPLES, corpus_draws
from results.store import Store
from runner.corpus import corpus_records, recompute, same_number
from runner.execute import execute
from runner.plan import make_plan
from runner.registry import Registry
from runner.request import Request
from runner.scoring import rescore
from runner.worker import _bytes_read
from tasks.base import Metric
from tests.models.tiny import tiny_model
from tests.runner.corpus_plugin import Letters
from tests.runner.forked import forked_workers
from tests.runner.world import save_model

PLUGIN = Path(__file__).with_name("corpus_plugin.py")


def registry() -> Registry:
    return Registry((PLUGIN,))


# --- computing -----------------------------------------------------------------------------------

ITEMS = ["a", "b", "c", "d"]
TEXTS = {"a": "x", "b": "xxx", "c": "", "d": "xxxxx"}


class Counting(Letters):
    """Counts how often it is asked."""

    asked: list[list[str]] = []  # noqa: RUF012  # shared on purpose, emptied by each test

    def corpus(self, outputs: Mapping[str, str], draws: Any) -> Any:
        self.asked.append(list(outputs))
        return super().corpus(outputs, draws)


@pytest.fixture
def counting() -> Counting:
    Counting.asked.clear()
    return Counting()


def test_a_metric_is_computed_on_all_items_and_on_every_draw(counting: Counting) -> None:
    # The order is the experiment's, whatever that of the outputs is.
    shuffled = {item: TEXTS[item] for item in ("c", "a", "d", "b")}
    (record,) = corpus_records(counting, ITEMS, {"cell": shuffled})
    assert counting.asked == [ITEMS]
    assert (record.cell_id, record.metric) == ("cell", "spread")
    lengths = [1, 3, 0, 5]
    assert record.value == pytest.approx(plain_statistics.pstdev(lengths))
    assert len(record.resampled) == CORPUS_RESAMPLES
    for number, row in enumerate(corpus_draws(4)[1:].tolist()):
        expected = plain_statistics.pstdev([lengths[item] for item in row])
        assert record.resampled[number] == pytest.approx(expected, abs=1e-12)


def test_equal_outputs_are_computed_once_and_unfinished_cells_never(counting: Counting) -> None:
    outputs = {
        "plain": TEXTS,
        "lossless": dict(TEXTS),
        "unfinished": {"a": "x"},
        "other": {**TEXTS, "c": "y"},
        "known": {**TEXTS, "c": "z"},
    }
    records = list(corpus_records(counting, ITEMS, outputs, {("known", "spread")}))
    assert [record.cell_id for record in records] == ["plain", "lossless", "other"]
    assert records[0].resampled == records[1].resampled
    assert len(counting.asked) == 2


def test_few_items_have_a_number_without_resamples_and_nan_is_none(counting: Counting) -> None:
    (record,) = corpus_records(counting, ITEMS[:3], {"cell": TEXTS})
    assert (record.value is not None, record.resampled) == (True, [])
    (record,) = corpus_records(Letters(factor=math.nan), ITEMS, {"cell": TEXTS})
    assert record.value is None
    assert all(math.isnan(number) for number in record.resampled)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({}, "returned nothing for 'spread', .* it returned nothing at all"),
        ({"spraed": np.zeros(1000)}, "returned nothing for 'spread', .* it returned spraed"),
        ({"spread": np.zeros(999)}, r"one number a row of draws for 'spread', \(1000,\), got"),
        ({"spread": 3.0}, r"got \(\)"),
    ],
)
def test_a_task_that_returns_something_else_is_named(returned: Any, message: str) -> None:
    class Wrong(Letters):
        def corpus(self, outputs: Mapping[str, str], draws: Any) -> Any:
            return returned

    with pytest.raises(ValueError, match=f"Wrong.corpus .*{message}"):
        list(corpus_records(Wrong(), ITEMS, {"cell": TEXTS}))


def test_a_task_cannot_change_the_draws_that_others_see() -> None:
    class Wicked(Letters):
        def corpus(self, outputs: Mapping[str, str], draws: Any) -> Any:
            draws[0] = 0
            return {"spread": np.zeros(len(draws))}

    with pytest.raises(ValueError, match="read-only"):
        list(corpus_records(Wicked(), ITEMS, {"cell": TEXTS}))


def test_a_task_without_such_metrics_is_not_asked() -> None:
    class Plain(Letters):
        @property
        def metrics(self) -> tuple[Metric, ...]:
            return (Metric(name="length", unit="letters", kind="mean"),)

        def corpus(self, outputs: Mapping[str, str], draws: Any) -> Any:
            raise AssertionError(outputs)

    assert list(corpus_records(Plain(), ITEMS, {"cell": TEXTS})) == []


def test_numbers_are_the_same_up_to_rounding() -> None:
    assert same_number(0.3, 0.1 + 0.2)
    assert same_number(None, None)
    assert same_number(math.nan, math.nan)
    assert not same_number(None, 0.0)
    assert not same_number(0.3, 0.3001)
    assert not same_number(math.nan, 0.3)


# --- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    request = Request(
        methods=("autoregressive", "prompt-lookup"),
        tasks=("letters",),
        models=(save_model(folder / "model"),),
        store=folder / "store",
        plugins=(PLUGIN,),
    )
    with forked_workers():
        assert execute(make_plan(request), lambda event: None).failed == 0
    ingest(folder / "store")
    return folder / "store"


@pytest.fixture
def store(measured: Path, tmp_path: Path) -> Store:
    """Return a copy of the measured store, to be changed."""
    return Store(Path(shutil.copytree(measured, tmp_path / "store")))


@pytest.mark.timeout(300)
def test_the_worker_stores_metric_and_resamples_of_every_cell(measured: Path) -> None:
    store = Store(measured)
    [experiment_id] = store.experiment_ids()
    records = list(store.corpus(experiment_id))
    assert {each.cell_id for each in records} == set(store.experiment(experiment_id).cells)
    lengths = [
        len(sample.output)
        for sample in store.samples(experiment_id)
        if sample.cell_id == records[0].cell_id
    ]
    assert records[0].value == pytest.approx(plain_statistics.pstdev(lengths))
    assert records[0].value
    assert records[0].resampled == records[1].resampled  # the method is lossless
    assert "corpus.parquet" in store.manifest(experiment_id)["files"]
    assert recompute(measured, registry()) == ([], [])


def test_the_index_has_the_metric_and_the_speed_of_decoding(measured: Path) -> None:
    (table,) = tables.comparison_tables(measured / "tokenmark.duckdb")
    assert "decode speed-up" in table.columns
    (method,) = [row for row in table.data if row["method"] == "prompt-lookup"]
    assert (method["speed_of"], method["bound_by"]) == ("decode", "bytes")
    assert method["quality"] == method["baseline_quality"] > 0
    assert method["quality_low"] < method["quality"] < method["quality_high"]
    assert (method["quality_delta"], method["quality_verdict"]) == (0.0, "SAME")
    assert method["decode_bound"] > 0
    assert method["decode_verdict"]


def test_the_bound_by_bytes_is_weights_and_cache_over_the_bandwidth(measured: Path) -> None:
    store = Store(measured)
    [experiment] = store.experiments()
    facts = experiment.facts
    bandwidth = experiment.environment["read_bandwidth"]
    samples = list(store.samples(experiment.experiment_id))
    assert len(samples) == 10
    for sample in samples:
        # Eight tokens of prompt, each read by the prefill once.
        cached = (sample.kv_bytes or 0) - 8 * facts["kv_bytes_per_token"]
        read = facts["weight_bytes"] * (sample.target_forwards or 0) + cached
        assert sample.bound_seconds == pytest.approx(read / bandwidth)


def test_a_method_s_own_count_of_bytes_and_its_drafts_are_charged() -> None:
    facts = tiny_model().facts
    trace = Trace(prefill=[Forward(8, 0)], forwards=[Forward(1, 8), Forward(3, 9)])
    whole = facts.kv_read(Forward(1, 8)) + facts.kv_read(Forward(3, 9))
    assert _bytes_read(facts, trace) == 2 * facts.weight_bytes + whole
    trace.notes["decode_kv_bytes"] = 100
    assert _bytes_read(facts, trace) == 2 * facts.weight_bytes + 100
    trace.draft_forwards = 6
    assert _bytes_read(facts, trace) == 2 * facts.weight_bytes + 100
    trace.notes["draft_share"] = 0.25
    assert _bytes_read(facts, trace) == 3.5 * facts.weight_bytes + 100


# --- verify and score ----------------------------------------------------------------------------


def changed(store: Store, **changes: Any) -> None:
    """Replace the first record of the shard and put it under a manifest again."""
    [experiment_id] = store.experiment_ids()
    first, *others = store.corpus(experiment_id)
    shard = store.shard(experiment_id)
    samples, scores = list(store.samples(experiment_id)), list(store.scores(experiment_id))
    for name in ("manifest.json", "samples.parquet", "scores.parquet", "corpus.parquet"):
        (shard / name).unlink()
    for records, journal in (
        (samples, store.samples_journal(experiment_id)),
        (scores, store.scores_journal(experiment_id)),
        ([dataclasses.replace(first, **changes), *others], store.corpus_journal(experiment_id)),
    ):
        with journal:
            for record in records:
                journal.append(record)
    store.seal(experiment_id)
    ingest(store.path)


def test_verify_computes_the_metric_again_from_the_outputs(store: Store, capsys: Any) -> None:
    command = ["verify", "--store", str(store.path), "--plugin", str(PLUGIN)]
    assert run.main(command) == 0
    [experiment_id] = store.experiment_ids()
    first = next(store.corpus(experiment_id))
    changed(store, value=9.25)
    assert run.main(command) == 1
    assert f"spread of cell {first.cell_id}: 9.25 is stored, its outputs give" in (
        capsys.readouterr().out
    )
    resampled = list(first.resampled)
    resampled[16] += 1e-6
    changed(store, value=first.value, resampled=resampled)
    (problem,) = recompute(store.path, registry()).problems
    assert f"resample 17 is stored as {resampled[16]!r}" in problem
    changed(store, resampled=first.resampled)
    assert run.main(command) == 0


def test_a_number_changed_in_the_index_is_found_without_the_task(store: Store, capsys: Any) -> None:
    with duckdb.connect(str(store.index_path)) as connection:
        connection.execute("UPDATE corpus SET resampled = [77.0] || resampled[2:]")
    assert run.main(["verify", "--store", str(store.path)]) == 1
    shown = capsys.readouterr().out
    assert ": corpus: " in shown
    # Nobody said where the task is: what could not be looked at is told.
    assert "were not computed again: no task named 'letters'" in shown


def test_score_computes_the_metric_again_and_says_where_it_changed(store: Store) -> None:
    [done] = rescore(store.path, registry())
    [experiment_id] = store.experiment_ids()
    assert done.changed == []
    (scorer,) = done.record.corpus
    assert done.record.corpus[scorer] == list(store.corpus(experiment_id))
    assert rescored.read(store, experiment_id) == done.record
    with duckdb.connect(str(ingest(store.path)), read_only=True) as connection:
        rows = connection.execute(
            "SELECT s.value = m.value, s.low = m.low, s.is_headline FROM scorer_metrics s "
            "JOIN metrics m USING (experiment_id, cell_id, metric) WHERE metric = 'spread'"
        ).fetchall()
    assert rows == [(True, True, True)] * 2
    first = next(store.corpus(experiment_id))
    changed(store, value=9.25)
    [done] = rescore(store.path, registry())
    assert done.changed == [(first.cell_id, "all items", "spread", 9.25, first.value)]


def test_files_of_scores_from_before_corpus_metrics_are_read(store: Store) -> None:
    [done] = rescore(store.path, registry())
    path = rescored.write(store, dataclasses.replace(done.record, corpus={}))
    content = json.loads(path.read_text())
    del content["corpus"], content["sha256"]
    path.write_text(json.dumps({"sha256": rescored._digest(content), **content}))
    found = rescored.read(store, done.experiment.experiment_id)
    assert found is not None
    assert found.corpus == {}
    assert found.scores == done.record.scores


def test_an_experiment_whose_task_has_changed_is_left_out(store: Store, tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(PLUGIN.read_text().replace('version = "1.0"', 'version = "2.0"'))
    found = recompute(store.path, Registry((other,)))
    assert found.problems == []
    assert "is no longer what experiment" in found.left_out[0]


def test_a_record_of_an_unfinished_cell_is_a_problem(store: Store) -> None:
    ghost = CorpusRecord(cell_id="ghost", metric="spread", value=1.0, resampled=[])
    changed(store, **vars(ghost))
    assert any(
        "cell ghost: it is stored, but not every item has an output" in problem
        for problem in recompute(store.path, registry()).problems
    )


def test_a_worker_that_goes_on_computes_only_what_is_missing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runner import worker

    [experiment_id] = store.experiment_ids()
    first, second = store.corpus(experiment_id)
    changed(store)
    shard = store.shard(experiment_id)
    samples = list(store.samples(experiment_id))
    for name in ("manifest.json", "samples.parquet", "scores.parquet", "corpus.parquet"):
        (shard / name).unlink()
    with store.samples_journal(experiment_id) as journal:
        for sample in samples:
            journal.append(sample)
    with store.corpus_journal(experiment_id) as journal:
        journal.append(dataclasses.replace(first, value=5.5))  # as an earlier process left it
    items = [f"item-{number}" for number in range(5)]
    resumed = SimpleNamespace(
        task=Letters(), store=store, spec=SimpleNamespace(experiment_id=experiment_id, items=items)
    )
    worker._Worker._score_corpus(resumed)  # type: ignore[arg-type]  # what it needs of one
    kept, added = store.corpus(experiment_id)
    assert kept.value == 5.5
    assert added == second
