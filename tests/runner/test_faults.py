"""A method that breaks loses its own cell, with the right status and reason, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from results.store import Store
from runner.execute import Outcome, execute
from runner.plan import make_plan
from runner.request import Event, Request
from tests.runner.world import PLUGIN, save_model

# How each method of the plug-in must end, and a part of the reason given.
EXPECTED = {
    "autoregressive": ("ok", ""),
    "twin": ("ok", ""),
    "floods": ("ok", ""),
    "raises": ("failed", "RuntimeError: the draft table is empty"),
    "hangs": ("timeout", "took longer than 6 s"),
    "returns-nan": ("invalid-output", "NaN"),
    "exits": ("killed", "ended with exit code 0, in the middle of item"),
    "crashes": ("killed", "SIGSEGV"),
    "eats-memory": ("oom-host", ""),
    "wrong-type": ("invalid-output", "returned a str"),
    "out-of-range": ("invalid-output", "4000 is no token"),
    "lies": ("failed", "differ from the baseline beyond a tie"),
    "declines": ("unsupported", "second head"),
}


@pytest.fixture(scope="module")
def broken_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Store, list[Event]]:
    folder = tmp_path_factory.mktemp("faults")
    request = Request(
        methods=tuple(EXPECTED),
        tasks=("parity:num_items=3",),
        models=(save_model(folder / "model"),),
        store=folder / "store",
        plugins=(PLUGIN,),
        timeout=6.0,
        memory_bytes=4 * 1024**3,
    )
    events: list[Event] = []
    outcome = execute(make_plan(request), events.append)
    return outcome, Store(folder / "store"), events


@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", EXPECTED)
def test_each_fault_costs_its_own_cell(
    broken_run: tuple[Outcome, Store, list[Event]], method: str
) -> None:
    _, store, _ = broken_run
    [experiment_id] = store.experiment_ids()
    cells = {cell.method: cell for cell in store.cells(experiment_id)}
    status, reason = EXPECTED[method]
    assert cells[method].status == status, cells[method].error
    assert reason in cells[method].error
    if status == "ok":
        samples = [s for s in store.samples(experiment_id) if s.cell_id == cells[method].cell_id]
        assert sorted(sample.item_id for sample in samples) == ["item-0", "item-1", "item-2"]
        assert cells[method].output_check == "identical"


def test_the_run_counts_its_failures(broken_run: tuple[Outcome, Store, list[Event]]) -> None:
    outcome, _, _ = broken_run
    fine = sum(status in ("ok", "unsupported") for status, _ in EXPECTED.values())
    assert outcome.failed == len(EXPECTED) - fine
    assert not outcome.interrupted


def test_a_failed_method_leaves_its_last_words(
    broken_run: tuple[Outcome, Store, list[Event]],
) -> None:
    _, store, _ = broken_run
    [experiment_id] = store.experiment_ids()
    cells = {cell.method: cell for cell in store.cells(experiment_id)}
    assert "the draft table is empty" in cells["raises"].log_tail
    assert "Traceback" in cells["raises"].log_tail


def test_what_is_sealed_is_not_measured_again(
    broken_run: tuple[Outcome, Store, list[Event]], tmp_path: Path
) -> None:
    _, store, _ = broken_run
    run = store.run(store.run_ids()[0])
    request = Request(
        methods=("autoregressive", "twin"),
        tasks=("parity:num_items=3",),
        models=(f"path:{store.path.parent / 'model'}",),
        store=store.path,
        plugins=(PLUGIN,),
    )
    plan = make_plan(request)
    assert plan.experiments == []
    assert [row["method"] for row in plan.cached] == ["autoregressive", "twin"]
    assert [list(pair) for pair in plan.cells] == run.cells[:2]


def test_a_worker_that_cannot_begin_fails_every_cell(tmp_path: Path) -> None:
    request = Request(
        methods=("autoregressive", "twin"),
        tasks=("parity:num_items=2",),
        models=(save_model(tmp_path / "model"),),
        store=tmp_path / "store",
        plugins=(PLUGIN,),
    )
    plan = make_plan(request)
    (tmp_path / "model" / "model.safetensors").unlink()
    events: list[Event] = []
    outcome = execute(plan, events.append)
    assert outcome.failed == 2
    assert [event.status for event in events if event.kind == "cell"] == ["failed", "failed"]
