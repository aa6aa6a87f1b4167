"""One contract for every place where experiments run, whatever happens to workers and machines."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from results.store import Store
from runner.execute import Outcome
from runner.plan import Plan, make_plan
from runner.request import Event, Request
from runner.supervise import IS_BUSY
from runner.system import exclusive
from tests.runner import places
from tests.runner.places import Place
from tests.runner.world import PLUGIN, save_model

# What a plug-in brings to the machine that measures. It is sent as text, so all it knows is in it.
TROUBLE = """
import datetime, errno, os, time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import runner.spec, runner.worker
from methods.base import Method, Output

FLAGS = Path({flags!r})
CALLS = []

if "TOKENMARK_WORKER" in os.environ:
    skew = datetime.timedelta(days={skew_days})
    def wrong_time():
        return (datetime.datetime.now(datetime.UTC) + skew).isoformat(timespec="milliseconds")
    runner.spec.now = runner.worker.now = wrong_time

    if (FLAGS / "full").exists():
        def fsync(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync = fsync

@dataclass(frozen=True, kw_only=True)
class Waits(Method):
    \"\"\"Waits in its third sample for as long as a file is there.\"\"\"
    output = Output.IDENTICAL
    capability = "TextGenerator"
    name = "waits"

    @contextmanager
    def apply(self, model, hardware):
        CALLS.append(1)
        while len(CALLS) > 2 and (FLAGS / "wait").exists():
            time.sleep(0.02)
        yield model
"""

KINDS = [
    "local",
    "stubbed slurm",
    pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    pytest.param("slurm", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
]


@pytest.fixture(scope="module", params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    with ExitStack() as stack:
        if request.param == "local":
            yield Place()
        elif request.param == "stubbed slurm":
            yield stack.enter_context(places.stubbed_slurm(tmp_path_factory.mktemp("slurm")))
        elif request.param == "ray":
            pytest.importorskip("ray")
            yield stack.enter_context(places.ray_cluster())
        else:
            needed = ("munged", "slurmctld", "slurmd", "sbatch")
            if os.geteuid() or not all(map(shutil.which, needed)):
                pytest.skip("needs root and the packages slurm-wlm and munge")
            folder = tmp_path_factory.mktemp("s")
            yield stack.enter_context(places.real_slurm(folder, (18817, 18818)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("world") / "model")


@dataclasses.dataclass
class World:
    """A store, and a plug-in whose trouble can be switched on."""

    folder: Path
    model: str
    place: Place

    @property
    def store(self) -> Store:
        return Store(self.folder / "store")

    def plan(
        self,
        *methods: str,
        tasks: tuple[str, ...] = ("parity:num_items=2",),
        skew_days: int = 0,
        **options: object,
    ) -> Plan:
        path = self.folder / f"trouble_{skew_days % 9}.py"
        path.write_text(TROUBLE.format(flags=str(self.folder), skew_days=skew_days))
        plan = make_plan(
            Request(
                methods=("autoregressive", *methods),
                tasks=tasks,
                models=(self.model,),
                store=self.folder / "store",
                plugins=(PLUGIN, path),
                executor=self.place.name,
                **options,
            )
        )
        quick = [dataclasses.replace(s, calibration_seconds=0.1) for s in plan.experiments]
        return dataclasses.replace(plan, experiments=quick)

    def flag(self, name: str, up: bool = True) -> None:
        (self.folder / name).touch() if up else (self.folder / name).unlink(missing_ok=True)

    def statuses(self) -> dict[str, str]:
        return {
            cell.method: cell.status
            for experiment_id in self.store.experiment_ids()
            for cell in self.store.cells(experiment_id)
        }

    def check_whole(self, outcome: Outcome, plan: Plan) -> None:
        """Everything was measured, once, and nothing else lies about."""
        assert (outcome.failed, outcome.interrupted) == (0, False)
        wanted = sorted(spec.experiment_id for spec in plan.experiments)
        assert self.store.experiment_ids() == wanted
        for spec in plan.experiments:
            assert self.store.is_sealed(spec.experiment_id)
            assert sum(1 for _ in self.store.samples(spec.experiment_id)) == spec.num_samples
        left = {path.name for path in self.store.path.glob("fleet/*/*")}
        assert left <= {"log-0.txt", "array", "batch.sh"}  # of a job that was lost the log stays
        assert not list(self.store.path.glob(".incoming-*"))


@pytest.fixture
def world(tmp_path: Path, model: str, place: Place) -> Iterator[World]:
    with place.in_use():
        yield World(tmp_path, model, place)


# The contract


def test_experiments_are_measured_and_a_killed_worker_costs_one_cell(
    world: World, place: Place
) -> None:
    plan = world.plan("twin", "kills-itself:after=1")
    assert place.run(plan).failed == 1
    [spec] = plan.experiments
    assert world.store.is_sealed(spec.experiment_id)
    assert world.statuses() == {"autoregressive": "ok", "twin": "ok", "kills-itself": "killed"}
    told = [(event.method, event.status) for event in place.events if event.kind == "cell"]
    expected = [("autoregressive", "ok"), ("twin", "ok"), ("kills-itself:after=1", "killed")]
    assert sorted(told) == sorted(expected)
    # The paths and settings of the place that measured have left no trace.
    again = world.plan("twin")
    assert [row["method"] for row in again.cached] == ["autoregressive", "twin"]
    assert again.experiments == []
    assert world.store.damage(spec.experiment_id) == []


def test_a_lost_machine_costs_time_and_nothing_else(world: World, place: Place) -> None:
    world.flag("wait")
    plan = world.plan("waits")
    lost: list[str] = []

    def lose(event: Event) -> None:
        if event.kind == "sample" and event.method and not lost:
            lost.append(event.item)
            world.flag("wait", up=False)
            place.lose_machine()

    outcome = place.run(plan, lose)
    assert lost
    if place.name == "local":
        assert outcome.interrupted
        outcome = place.run(world.plan("waits"))
    else:
        assert any(event.kind == "restart" and event.detail for event in place.events)
    world.check_whole(outcome, plan)
    assert world.statuses() == {"autoregressive": "ok", "waits": "ok"}


def test_what_is_sealed_stays_when_it_is_measured_again(world: World, place: Place) -> None:
    plan = world.plan()
    world.check_whole(place.run(plan), plan)
    [spec] = plan.experiments
    before = world.store.manifest(spec.experiment_id)
    world.check_whole(place.run(plan), plan)
    assert world.store.manifest(spec.experiment_id) == before


def test_clocks_that_are_wrong_change_nothing(world: World, place: Place) -> None:
    ahead = world.plan(skew_days=2)
    assert place.run(ahead).failed == 0
    [first] = ahead.experiments
    assert (
        world.store.experiment(first.experiment_id).created > world.store.run(ahead.run_id).finished
    )
    # What was measured later counts, though the clock of its machine says otherwise.
    behind = world.plan(skew_days=-2, fresh=True)
    assert place.run(behind).failed == 0
    [second] = behind.experiments
    assert second.experiment_id != first.experiment_id
    assert [experiment_id for experiment_id, _ in world.plan().cells] == [second.experiment_id]


def test_a_full_disk_fails_with_the_reason_and_the_next_run_goes_on(
    world: World, place: Place
) -> None:
    world.flag("full")
    assert place.run(world.plan("twin")).failed == 2
    ended = [event for event in place.events if event.kind == "cell"]
    assert [event.status for event in ended] == ["failed", "failed"]
    world.flag("full", up=False)
    plan = world.plan("twin")
    world.check_whole(place.run(plan), plan)


def test_two_runs_at_once_measure_everything_once(world: World, place: Place) -> None:
    tasks = ("parity:num_items=2", "parity:num_items=1")
    plans = [world.plan("twin", tasks=tasks) for _ in range(2)]
    outcomes: list[Outcome] = []
    started = place.controller.started if isinstance(place, places.StubbedSlurm) else 0
    if place.name == "local":
        # The other one measures the first experiment; ours says so and measures the second.
        with exclusive(world.store, plans[0].experiments[0].experiment_id):
            assert place.run(plans[0]).failed == 2
        ended = [(event.status, event.detail) for event in place.events if event.kind == "cell"]
        assert ended == [("failed", IS_BUSY)] * 2 + [("ok", "")] * 2
        outcomes.append(place.run(world.plan("twin", tasks=tasks)))
    else:
        both = [
            threading.Thread(target=lambda plan=plan: outcomes.append(place.run(plan)))
            for plan in plans
        ]
        for each in both:
            each.start()
        for each in both:
            each.join()
        assert len(outcomes) == 2
    for outcome in outcomes:
        world.check_whole(outcome, plans[0])
    assert world.plan("twin", tasks=tasks).experiments == []
    if isinstance(place, places.StubbedSlurm):
        assert place.controller.started - started == 2
