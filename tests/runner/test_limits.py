"""Methods that run fewer items than the others of their experiment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from results import tables
from results.store import Store
from runner.execute import execute
from runner.indexing import update_index
from runner.plan import make_plan
from runner.registry import Registry
from runner.request import Request, UsageError
from tests.runner.corpus_plugin import __file__ as corpus_plugin
from tests.runner.forked import forked_workers
from tests.runner.world import PLUGIN, save_model

TASK = "parity:num_items=12,max_new_tokens=8"


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """A request whose second method runs 9 of 12 items; it was measured, audited, once."""
    folder = tmp_path_factory.mktemp("limits")
    request = Request(
        methods=("autoregressive", "prompt-lookup", "twin:after=0"),
        tasks=(TASK,),
        models=(save_model(folder / "model"),),
        method_limits={TASK: {"prompt-lookup:num_tokens=10": 9}},  # its default: the same method
        store=folder / "store",
        plugins=(PLUGIN,),
        audit=True,
    )
    total = []
    with forked_workers():
        outcome = execute(make_plan(request), lambda event: total.append((event.done, event.total)))
    assert not outcome.failed
    assert (33, 33) in total
    return request


def rows(request: Request) -> dict[str, dict[str, object]]:
    index = update_index(request.store, Registry(request.plugins))
    [table] = tables.comparison_tables(index)
    return {str(row["method"]): dict(row) for row in table.data}


def test_a_limited_method_runs_the_first_items_and_the_others_all(asked):
    store = Store(asked.store)
    [experiment_id] = store.experiment_ids()
    experiment = store.experiment(experiment_id)
    names = {cell.cell_id: cell.method for cell in store.cells(experiment_id)}
    measured: dict[str, set[str]] = {name: set() for name in names.values()}
    for sample in store.samples(experiment_id):
        measured[names[sample.cell_id]].add(sample.item_id)
    assert measured["autoregressive"] == measured["twin"] == set(experiment.items)
    assert measured["prompt-lookup"] == set(experiment.items[:9])


def test_it_is_compared_over_the_items_that_it_shares(asked):
    found = rows(asked)
    assert [found[name]["items"] for name in ("autoregressive", "prompt-lookup")] == [12, 9]
    assert found["prompt-lookup"]["output_check"] == "identical"
    assert found["prompt-lookup"]["baseline_tokens"] == found["prompt-lookup"]["output_tokens"]
    assert found["prompt-lookup"]["speed_verdict"]


def test_the_table_says_that_items_differ(asked):
    [table] = tables.comparison_tables(update_index(asked.store, Registry(asked.plugins)))
    assert "items" in table.columns
    assert "shared with the baseline" in table.notes[0]


def test_an_audit_repeats_only_items_that_every_method_ran(asked):
    assert {row["audit"] for row in rows(asked).values()} == {"passed"}


def test_a_limited_cell_is_the_cell_of_a_run_with_that_limit(asked):
    again = make_plan(asked)
    assert not again.experiments
    assert len(again.cached) == 3
    fewer = make_plan(replace(asked, limit=9, method_limits={}))
    assert [cell["method"] for cell in fewer.cached] == ["prompt-lookup"]


def test_a_plan_counts_the_items_of_each_method(asked):
    plan = make_plan(replace(asked, fresh=True))
    assert [row["items"] for row in plan.describe()] == ["12", "9", "12"]
    assert plan.experiments[0].num_samples == 33


def test_the_baseline_runs_all_items(asked):
    with pytest.raises(UsageError, match="'autoregressive' is the baseline and takes no limit"):
        make_plan(replace(asked, method_limits={TASK: {"autoregressive": 9}}))


def test_metrics_of_all_outputs_need_all_items(asked):
    request = replace(
        asked,
        tasks=("letters",),
        plugins=(PLUGIN, Path(corpus_plugin)),
        method_limits={"letters": {"twin:after=0": 1}},
    )
    with pytest.raises(UsageError, match=r"judged on all outputs together.*'twin:after=0'"):
        make_plan(request)
