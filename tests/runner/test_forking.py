"""Workers of a suite come from one server, are processes of their own, and leave nothing behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
import pytest

from results.store import Store
from runner import supervise
from runner.execute import execute
from runner.executors import local
from runner.plan import make_plan
from runner.request import Request
from tests.runner.world import PLUGIN, save_model


class Run(NamedTuple):
    """A suite of two experiments that was measured.

    Attributes:
        store: What it left.
        workers: Each worker's process and its parent at the start.
        left: A process that a method left behind, without parent and session, before it died.
    """

    store: Store
    workers: list[tuple[int, int]]
    left: int


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("forking")
    pids = folder / "pids"
    workers: list[tuple[int, int]] = []
    start = local.start_forked

    def watched(*arguments: Any, **settings: Any) -> supervise.Started:
        started = start(*arguments, **settings)
        workers.append((started.process.pid, psutil.Process(started.process.pid).ppid()))
        return started

    request = Request(
        methods=("autoregressive", "forks-and-dies:after=1"),
        tasks=("parity:num_items=2", "parity:num_items=3"),
        models=(save_model(folder / "model"),),
        store=folder / "store",
        plugins=(PLUGIN,),
        offline=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENMARK_TEST_PIDS", str(pids))
        patch.setattr(local, "start_forked", watched)
        assert execute(make_plan(request), lambda event: None).failed == 2
        yield Run(Store(request.store), workers, int(pids.read_text()))


@pytest.mark.timeout(300)
def test_the_workers_of_a_suite_are_forks_of_one_server(run: Run) -> None:
    workers = [worker for worker, _ in run.workers]
    assert len(set(workers)) == 4  # two experiments, each begun again after a method died
    [server] = {parent for _, parent in run.workers}
    assert server != os.getpid()
    assert psutil.pid_exists(server)
    assert not any(psutil.pid_exists(worker) for worker in workers)


def test_what_dies_in_a_fork_is_its_own_cell(run: Run) -> None:
    for experiment_id in run.store.experiment_ids():
        cells = {cell.method: cell for cell in run.store.cells(experiment_id)}
        assert cells["autoregressive"].status == "ok"
        assert cells["forks-and-dies"].error.startswith("the process ended with exit code 3")


def test_what_a_fork_left_behind_is_ended(run: Run) -> None:
    assert not psutil.pid_exists(run.left) or (
        psutil.Process(run.left).status() == psutil.STATUS_ZOMBIE
    )


@pytest.mark.parametrize(
    ("kind", "experiments", "is_forked"), [("cpu", 2, True), ("cpu", 1, False), ("cuda", 2, False)]
)
def test_workers_are_forked_where_several_share_the_server_and_no_gpu_is_there(
    monkeypatch: pytest.MonkeyPatch, kind: str, experiments: int, is_forked: bool
) -> None:
    starts: list[Any] = []

    def supervisor(*arguments: Any, start: Any) -> Any:
        return SimpleNamespace(run=lambda: starts.append(start))

    profile = SimpleNamespace(profile=lambda name: SimpleNamespace(kind=kind))
    monkeypatch.setattr(local, "catalog", profile)
    monkeypatch.setattr(local, "Supervisor", supervisor)
    spec: Any = SimpleNamespace(hardware="any", offline=True)
    local.Local(Store(Path("nowhere"))).run([spec] * experiments, lambda event: None, 0.0)
    assert [start is not supervise.start_anew for start in starts] == [is_forked] * experiments
