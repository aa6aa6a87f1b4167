"""A budget goes to the pairs whose verdicts it can settle, and says what it leaves."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from results.evidence import Belief, Evidence, finished_cells
from results.store import Store
from runner.budget import MOST_GROWTH, growth, information
from runner.indexing import update_index
from runner.plan import Plan, make_plan
from runner.registry import Registry
from runner.request import Request
from tests.results.factory import make_cell, make_experiment, make_run, make_samples, write_shard
from tests.runner.world import PLUGIN, save_model

MARGIN = math.log1p(0.05)
ITEMS = 12
EQUAL = {"autoregressive": 1.0, "prompt-lookup": 1.0, "twin": 1.0}
SHORT, LONG = "parity:num_items=400", "parity:num_items=401,max_new_tokens=24"


# --- information ---


def test_bits_are_those_of_drawing_the_new_estimate_many_times() -> None:
    belief, deviation = Belief(0.08, 0.05, MARGIN), 0.03
    random = np.random.default_rng(0)
    truth = random.normal(belief.mean, belief.deviation, 40_000)
    seen = random.normal(truth, deviation)
    after = 1 / (1 / belief.deviation**2 + 1 / deviation**2)
    means = after * (belief.mean / belief.deviation**2 + seen / deviation**2)

    def entropy(mean: np.ndarray, spread: float) -> np.ndarray:
        from scipy.stats import norm

        shares = np.stack([norm.cdf(-MARGIN, mean, spread), norm.sf(MARGIN, mean, spread)])
        shares = np.concatenate([shares, 1 - shares.sum(axis=0, keepdims=True)]).clip(1e-300)
        return -(shares * np.log2(shares)).sum(axis=0)

    now = entropy(np.array([belief.mean]), belief.deviation)[0]
    expected = now - entropy(means, math.sqrt(after)).mean()
    assert information(belief, deviation) == pytest.approx(expected, abs=0.01)
    assert expected > 0.2


@pytest.mark.parametrize("mean", [-0.4, 0.0, 0.4])
def test_nothing_is_to_be_learnt_where_the_verdict_is_clear(mean: float) -> None:
    clear = information(Belief(mean, 0.01, MARGIN), 0.01)
    assert clear < 1e-3 < information(Belief(mean, 0.3, MARGIN), 0.01)


def test_more_samples_tell_more_and_never_more_than_there_is_to_know() -> None:
    belief = Belief(0.06, 0.04, MARGIN)
    told = [information(belief, deviation) for deviation in (1.0, 0.1, 0.03, 0.001)]
    assert told == sorted(told)
    assert 0 < told[0] < told[-1] < math.log2(3)


def test_a_pair_needs_what_moves_its_interval_off_the_margin() -> None:
    # The interval of 99% reaches twice as far as the margin is away.
    belief = Belief(MARGIN + 2.5758293 * 0.04 / 2, 0.04, MARGIN)
    assert growth(Evidence(items=8, repeats=1, beliefs=(belief,))) == pytest.approx(4)
    at_it = Belief(MARGIN, 0.04, MARGIN)
    assert growth(Evidence(items=8, repeats=1, beliefs=(belief, at_it))) == MOST_GROWTH


# --- plans ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("budget") / "model")


def asked(store: Path, model: str, *tasks: str, **changes: object) -> Request:
    request = Request(
        methods=("autoregressive", "prompt-lookup", "twin"),
        tasks=tasks,
        models=(model,),
        limit=ITEMS,
        store=store,
        plugins=(PLUGIN,),
    )
    return dataclasses.replace(request, **changes)


def measure(plan: Plan, speeds: dict[str, float], noise: float, pace: float = 1.0) -> None:
    """Write what measuring a plan's experiments could have left, and index it."""
    store = Store(plan.request.store)
    written = []
    for spec in plan.experiments:
        cells = {f"cell-{cell.name}": cell.cell_id for cell in spec.cells}
        experiment = make_experiment(
            tuple(cell.name for cell in spec.cells),
            experiment_id=spec.experiment_id,
            run_id=plan.run_id,
            task=spec.task.partition(":")[0],
            model=spec.model,
            repeats=spec.repeats,
        )
        experiment = dataclasses.replace(experiment, items=spec.items, groups=spec.groups)
        rates = {cell.name: speeds[cell.name] for cell in spec.cells}
        samples = [
            dataclasses.replace(
                sample, cell_id=cells[sample.cell_id], seconds=pace * sample.seconds
            )
            for sample in make_samples(experiment, rates, noise)
        ]
        records = [
            dataclasses.replace(
                make_cell(experiment, cell.name),
                cell_id=cell.cell_id,
                spec=cell.method,
                seconds={"measured": 1.0, "wall": 40.0},
            )
            for cell in spec.cells
        ]
        experiment = dataclasses.replace(
            experiment, baseline=spec.cells[0].cell_id, cells=list(cells.values())
        )
        write_shard(store, experiment, records, samples)
        written.append(experiment)
    store.write_run(make_run(written, run_id=plan.run_id))
    update_index(store.path, Registry((PLUGIN,)))


def methods(plan: Plan) -> list[list[str]]:
    return [[cell.name for cell in spec.cells] for spec in plan.experiments]


def test_an_undecided_pair_is_measured_with_more_items_and_a_decided_one_is_not(
    tmp_path: Path, model: str
) -> None:
    request = asked(tmp_path, model, SHORT)
    first = make_plan(request)
    measure(first, {"autoregressive": 1.0, "prompt-lookup": 3.0, "twin": 1.12}, noise=0.2)
    assert make_plan(request).experiments == []
    again = make_plan(dataclasses.replace(request, budget=7200.0))
    assert methods(again) == [["autoregressive", "twin"]]
    [spec] = again.experiments
    assert ITEMS < len(spec.items) <= MOST_GROWTH * ITEMS
    assert spec.repeats == 1
    assert again.estimate_seconds is not None
    assert again.estimate_seconds > 30  # its overhead was seen

    ids = {cell.name: cell.cell_id for cell in first.experiments[0].cells}
    new = {cell.name: cell.cell_id for cell in spec.cells}
    answered = {cell for _, cell in again.cells}
    assert answered == {ids["autoregressive"], ids["prompt-lookup"], *new.values()}

    measure(again, {"autoregressive": 1.0, "twin": 1.5}, noise=0.05)
    settled = make_plan(dataclasses.replace(request, budget=7200.0))
    assert settled.experiments == settled.later == []
    assert new["twin"] in {cell for _, cell in settled.cells}


def test_where_a_task_has_no_more_items_repeats_are_asked_for(tmp_path: Path, model: str) -> None:
    request = asked(tmp_path, model, f"parity:num_items={ITEMS}")
    measure(
        make_plan(request), dict.fromkeys(("autoregressive", "prompt-lookup", "twin"), 1.0), 0.3
    )
    [spec] = make_plan(dataclasses.replace(request, budget=7200.0)).experiments
    assert len(spec.items) == ITEMS
    assert spec.repeats > 1


def test_an_undecided_stack_is_measured_again_with_its_parts(tmp_path: Path, model: str) -> None:
    """Otherwise nothing could be said of what became of their gains."""
    kv, stack = "snapkv:budget=12,window=4", "snapkv:budget=12,window=4+prompt-lookup"
    request = asked(
        tmp_path, model, SHORT, methods=("autoregressive", kv, "twin", "prompt-lookup", stack)
    )
    first = make_plan(request)
    speeds = {"autoregressive": 1.0, "snapkv": 2.0, "twin": 3.0, "prompt-lookup": 3.0}
    measure(first, {**speeds, "snapkv+prompt-lookup": 1.12}, noise=0.2)
    again = make_plan(dataclasses.replace(request, budget=7200.0))
    both = ["autoregressive", "snapkv", "prompt-lookup", "snapkv+prompt-lookup"]
    assert methods(again) == [both]
    ids = {cell.name: cell.cell_id for cell in first.experiments[0].cells}
    new = {cell.name: cell.cell_id for cell in again.experiments[0].cells}
    # One row a method: the larger measurement of a part takes the place of the smaller one.
    answered = {cell for _, cell in again.cells}
    assert answered == {ids["autoregressive"], ids["twin"], *new.values()}

    alone = make_plan(dataclasses.replace(request, methods=(kv, stack), budget=7200.0))
    assert methods(alone) == [["autoregressive", "snapkv", "snapkv+prompt-lookup"]]


def test_what_does_not_fit_is_left_for_later_with_the_time_that_it_needs(
    tmp_path: Path, model: str
) -> None:
    request = asked(tmp_path, model, SHORT, LONG)
    everything = make_plan(request)
    assert len(everything.experiments) == 2
    measure(
        make_plan(dataclasses.replace(request, tasks=("parity:num_items=9",))),
        {"autoregressive": 1.0, "prompt-lookup": 2.0, "twin": 2.0},
        noise=0.01,
    )
    one = make_plan(dataclasses.replace(request, budget=45.0))
    assert len(one.experiments) == len(one.later) == 1
    assert one.later_seconds == pytest.approx(one.later[0].seconds)
    left = {cell for _, cell in everything.cells} - {cell for _, cell in one.cells}
    assert left == {cell for _, cell in one.later[0].cells}
    assert "2 pairs of 1 experiments do not fit into the budget" in one.outlook()
    assert [row["what"][:6] for row in one.describe()][-2:] == ["later:", "later:"]
    both = make_plan(dataclasses.replace(request, budget=1000.0))
    assert len(both.experiments) == 2
    assert not both.later


def test_pairs_that_tell_more_for_their_time_come_first(tmp_path: Path, model: str) -> None:
    short, long = f"{SHORT},max_new_tokens=3", LONG
    request = asked(tmp_path, model, long, short, methods=("twin",))
    for task, pace in ((long, 40.0), (short, 1.0)):
        one = make_plan(dataclasses.replace(request, tasks=(task,)))
        measure(one, {"autoregressive": 1.0, "twin": 1.1}, noise=0.25, pace=pace)
    # As undecided as one another, and the long one takes forty times as long.
    plan = make_plan(dataclasses.replace(request, budget=7200.0))
    assert [spec.task for spec in plan.experiments] == [
        "parity:max_new_tokens=3,num_items=400",
        "parity:max_new_tokens=24,num_items=401",
    ]
    little = make_plan(dataclasses.replace(request, budget=60.0))
    assert [spec.task for spec in little.experiments] == [plan.experiments[0].task]
    assert [step.spec.task for step in little.later] == [plan.experiments[1].task]
    # What is left for later keeps the answer that it has.
    assert len(little.cells) == 5


def test_finished_cells_are_the_same_from_the_index_and_from_the_files(
    tmp_path: Path, model: str
) -> None:
    request = asked(tmp_path, model, SHORT)
    measure(
        make_plan(request), dict.fromkeys(("autoregressive", "prompt-lookup", "twin"), 1.0), 0.1
    )
    store = Store(tmp_path)
    indexed = finished_cells(store, ("ok",))
    assert len(indexed) == 3
    store.index_path.unlink()
    assert finished_cells(store, ("ok",)) == indexed
    assert finished_cells(store, ("failed",)) == {}
