"""A method that breaks loses its own cell, with the right status and reason, and nothing else."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import psutil
import pytest

from results.store import Store
from runner.audit import shuffled
from runner.execute import Outcome, execute
from runner.plan import make_plan
from runner.request import Event, Request
from tests.runner.forked import forked_workers
from tests.runner.world import PLUGIN, save_model

# How each method of the plug-in must end, and a part of the reason given.
EXPECTED = {
    "autoregressive": ("ok", ""),
    "twin": ("ok", ""),
    "floods": ("ok", ""),
    "raises": ("failed", "RuntimeError: the draft table is empty (plugin.py:"),
    "hangs": ("timeout", "took longer than 6 s"),
    "returns-nan": ("invalid-output", "NaN"),
    "exits": ("killed", "ended with exit code 0, in the middle of item"),
    "crashes": ("killed", "SIGSEGV"),
    "eats-memory": ("oom-host", ""),
    "wrong-type": ("invalid-output", "returned a str"),
    "out-of-range": ("invalid-output", "4000 is no token"),
    "lies": ("failed", "differ from the baseline beyond a tie"),
    "declines": ("unsupported", "second head"),
    "raises-in-apply": ("failed", "no layer of that name' (plugin.py:"),
    "raises-on-leaving": ("failed", "the hook is gone"),
    "raises-in-the-middle": ("failed", "IndexError: the tree has no such node"),
    "kills-itself": ("killed", "SIGKILL"),
    "overreports": ("invalid-output", "tokens are reported, but the text ended after"),
    "halves-its-text": ("invalid-output", "the text is not what its"),
    "mutates-weights": ("failed", "left the model's weights changed: model.embed_tokens.weight"),
    "leaks-memory": ("oom-host", "leaks memory"),
    "forks": ("failed", "left 1 processes running"),
    "sleeps-in-apply": ("failed", "in apply, outside the clock"),
    "hangs-in-apply": ("timeout", "took longer than 6 s"),
}


@pytest.fixture(scope="module")
def broken_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Store, list[Event]]:
    folder = tmp_path_factory.mktemp("faults")
    ours = ("autoregressive",)
    request = Request(
        # From the second call on: where a fault waits longer, a restart for another cell's fault
        # may leave it too few calls to show.
        methods=(*ours, *(f"{name}:after=1" for name in EXPECTED if name not in ours)),
        tasks=("parity:num_items=3",),
        models=(save_model(folder / "model"),),
        store=folder / "store",
        plugins=(PLUGIN,),
        timeout=6.0,
        memory_bytes=4 * 1024**3,
    )
    events: list[Event] = []
    with forked_workers():
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


@pytest.mark.timeout(300)
def test_no_process_outlives_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = tmp_path / "pids"
    monkeypatch.setenv("TOKENMARK_TEST_PIDS", str(pids))
    request = Request(
        # It leaves a process that has no parent and no session in common with it, and ends.
        methods=("autoregressive", "forks-and-dies"),
        tasks=("parity:num_items=2",),
        models=(save_model(tmp_path / "model"),),
        store=tmp_path / "store",
        plugins=(PLUGIN,),
    )
    assert execute(make_plan(request), lambda event: None).failed == 1
    [left] = [int(line) for line in pids.read_text().split()]
    assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE


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
        methods=("autoregressive", "twin:after=1"),
        tasks=("parity:num_items=3",),
        models=(f"path:{store.path.parent / 'model'}",),
        store=store.path,
        plugins=(PLUGIN,),
    )
    plan = make_plan(request)
    assert plan.experiments == []
    assert [row["method"] for row in plan.cached] == ["autoregressive", "twin:after=1"]
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
    cells = [event for event in events if event.kind == "cell"]
    assert [cell.status for cell in cells] == ["failed", "failed"]
    # Nothing is stored of it, so what it said last must stand here.
    assert all(
        re.fullmatch(r"the worker ended with exit code 1 while loading: .+", cell.detail)
        for cell in cells
    )


def test_a_store_and_a_model_are_named_from_where_the_user_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    request = Request(
        methods=("autoregressive",),
        tasks=("parity:num_items=2",),
        models=("path:model",),
        store=Path("mine"),
        plugins=(PLUGIN,),
    )
    events: list[Event] = []
    outcome = execute(make_plan(request), events.append)
    assert outcome.failed == 0, [event.detail for event in events]
    assert Store(tmp_path / "mine").experiment_ids()


def test_a_worker_that_uses_up_its_processor_time_has_timed_out(tmp_path: Path) -> None:
    request = Request(
        methods=("autoregressive",),
        tasks=("parity:num_items=2",),
        models=(save_model(tmp_path / "model"),),
        store=tmp_path / "store",
        plugins=(PLUGIN,),
    )
    plan = make_plan(request)
    assert plan.experiments[0].cpu_seconds > 3600
    plan.experiments[0] = dataclasses.replace(plan.experiments[0], cpu_seconds=1)
    events: list[Event] = []
    # Importing torch alone takes more than a second, in a process of its own.
    assert execute(plan, events.append).failed == 1
    [ended] = [event for event in events if event.kind == "cell"]
    assert (ended.status, ended.detail) == (
        "timeout",
        "the worker used up its 1 s of processor time",
    )


def test_weights_that_changed_unseen_spoil_the_whole_experiment(tmp_path: Path) -> None:
    request = Request(
        methods=("autoregressive", "twin:after=0", "mutates-one-number:after=0"),
        tasks=("parity:num_items=2",),
        models=(save_model(tmp_path / "model"),),
        store=tmp_path / "store",
        plugins=(PLUGIN,),
    )
    with forked_workers():
        assert execute(make_plan(request), lambda event: None).failed == 3
    store = Store(tmp_path / "store")
    [experiment_id] = store.experiment_ids()
    for cell in store.cells(experiment_id):
        assert cell.error == (
            "one of the experiment's methods left the model's weights changed: "
            "model.layers.1.mlp.down_proj.weight: none of its numbers can be trusted"
        )


# Methods that only an audit finds out, and the check that does.
CHEATS = {
    "autoregressive": "",
    "twin": "",
    "token-recycling:state=session": "",
    "remembers": "work of duplicated prompts",
    "shortens": "mean length",
    "knows-the-clock": "duplicated prompts",
    "overcounts": "token counts",
}


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Store]:
    folder = tmp_path_factory.mktemp("audited")
    request = Request(
        methods=tuple(
            name if name == "autoregressive" or ":" in name else f"{name}:after=0"
            for name in CHEATS
        ),
        tasks=("parity:num_items=12,max_new_tokens=24",),
        models=(save_model(folder / "model"),),
        store=folder / "store",
        plugins=(PLUGIN,),
        audit=True,
    )
    with forked_workers():
        outcome = execute(make_plan(request), lambda event: None)
    return outcome, Store(folder / "store")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("method", CHEATS)
def test_an_audit_finds_out_who_cheats_and_nobody_else(
    audited: tuple[Outcome, Store], method: str
) -> None:
    _, store = audited
    [experiment_id] = store.experiment_ids()
    cells = {cell.method: cell for cell in store.cells(experiment_id)}
    cell, check = cells[method.partition(":")[0]], CHEATS[method]
    assert cell.audit is not None
    failed = [each["check"] for each in cell.audit["checks"] if not each["ok"]]
    if check:
        assert check in failed
        assert cell.audit["result"] == "failed"
        assert (cell.status, cell.error.split(":")[0]) == ("failed", "audit")
    else:
        assert failed == []
        assert cell.audit["result"] == "passed"
        assert cell.status == "ok"


def test_an_audit_shuffles_the_items_and_keeps_the_samples_countable(
    audited: tuple[Outcome, Store],
) -> None:
    _, store = audited
    [experiment_id] = store.experiment_ids()
    experiment = store.experiment(experiment_id)
    samples = [s for s in store.samples(experiment_id) if s.cell_id == experiment.baseline]
    order = [sample.item_id for sample in samples]
    assert sorted(order) == sorted(experiment.items)
    assert order != experiment.items
    assert order == shuffled(experiment.items, experiment.seed)


def test_an_audited_run_measures_cells_that_were_not_audited(
    audited: tuple[Outcome, Store],
) -> None:
    outcome, store = audited
    run = store.run(outcome.run_id)
    request = Request(
        methods=("autoregressive",),
        tasks=("parity:num_items=12,max_new_tokens=24",),
        models=(f"path:{store.path.parent / 'model'}",),
        store=store.path,
        plugins=(PLUGIN,),
    )
    assert [list(pair) for pair in make_plan(request).cells] != run.cells[:1]
    again = make_plan(dataclasses.replace(request, audit=True))
    assert [list(pair) for pair in again.cells] == run.cells[:1]
    assert again.experiments == []
