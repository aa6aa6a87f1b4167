"""How a fleet sends, collects and refuses, with a genuine delivery and a backend that is told what
to say."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from hardware import catalog
from results.store import Store, StoreError
from runner.executors import make_executor
from runner.executors.fleet import BadDelivery, Fleet, Happening, collect
from runner.executors.node import DELIVERY, Job, Refused, measure, read_event
from runner.executors.ray_cluster import hosts, suits
from runner.executors.slurm import Slurm
from runner.plan import Plan, make_plan
from runner.registry import Registry
from runner.request import Event, Request, UsageError
from runner.spec import ExperimentSpec
from runner.suites import make_request
from runner.supervise import OutOfTime
from runner.system import exclusive, measuring_lane
from tests.runner import slurm_stub
from tests.runner.forked import forked_workers
from tests.runner.world import PLUGIN, save_model


class Delivered(NamedTuple):
    """A question, and two answers to it that were measured one after the other."""

    spec: ExperimentSpec
    first: Path
    second: Path


@pytest.fixture(scope="module")
def delivered(tmp_path_factory: pytest.TempPathFactory) -> Delivered:
    folder = tmp_path_factory.mktemp("delivered")
    request = Request(
        methods=("autoregressive",),
        tasks=("parity:num_items=2",),
        models=(save_model(folder / "model"),),
        store=folder / "store",
        plugins=(PLUGIN,),
        executor="slurm",
    )
    [spec] = make_plan(request).experiments
    spec = dataclasses.replace(spec, calibration_seconds=0.1)
    with pytest.MonkeyPatch.context() as patch, forked_workers():
        patch.setenv("TOKENMARK_LANE_FOLDER", str(folder))
        for name in ("first", "second"):
            measure(Job.of(spec), folder / name, lambda event: None)
    return Delivered(spec, folder / "first", folder / "second")


@pytest.fixture
def delivery(delivered: Delivered, tmp_path: Path) -> Path:
    return shutil.copytree(delivered.first, tmp_path / "delivery")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


# What a machine does


def test_a_delivery_is_a_store_with_one_sealed_shard(delivered: Delivered) -> None:
    source = Store(delivered.first)
    assert source.experiment_ids() == [delivered.spec.experiment_id]
    assert source.damage(delivered.spec.experiment_id) == []
    endings = json.loads((delivered.first / DELIVERY).read_text())["endings"]
    assert endings == {"autoregressive": {"status": "ok", "detail": ""}}
    # Neither the scratch folder nor the planner's memory and plug-in paths came along.
    text = (source.shard(delivered.spec.experiment_id) / "experiment.json").read_text()
    assert "tokenmark-" not in text


def test_a_job_that_was_delivered_is_not_measured_again(
    delivered: Delivered, delivery: Path
) -> None:
    before = sorted(delivery.rglob("*"))
    measure(Job.of(delivered.spec), delivery, lambda event: pytest.fail("it was measured"))
    assert sorted(delivery.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "code", "reason"),
    [
        ({}, {"torch": "0.1"}, "differs from the planner's in torch"),
        ({}, {"models": "x", "task": "y"}, "differs from the planner's in models, task"),
        ({"hardware": "cpu-arm"}, {}, "the job is for 'cpu-arm'"),
        ({"model_hash": "0" * 64}, {}, "are not the planner's"),
    ],
)
def test_a_machine_that_is_not_the_planned_one_refuses(
    delivered: Delivered, tmp_path: Path, changes: dict[str, str], code: dict[str, str], reason: str
) -> None:
    job = Job.of(delivered.spec)
    other = dataclasses.replace(
        job, spec=dataclasses.replace(job.spec, **changes), code={**job.code, **code}
    )
    with pytest.raises(Refused, match=reason):
        measure(other, tmp_path / "delivery", lambda event: pytest.fail("it was measured"))
    assert not (tmp_path / "delivery").exists()


def test_a_job_is_text_and_comes_back_the_same(delivered: Delivered, tmp_path: Path) -> None:
    job = Job.of(delivered.spec)
    (tmp_path / "job.json").write_text(job.text(), encoding="utf-8")
    assert Job.read(tmp_path / "job.json") == job
    assert job.plugins == [("plugin.py", PLUGIN.read_text(encoding="utf-8"))]


def test_what_is_no_event_is_passed_over() -> None:
    assert read_event('{"kind": "sample", "done": 3}') == Event(kind="sample", done=3)
    for line in ("Loading weights: 100%", "[1]", '{"kind": "sample", "colour": "red"}', b"\xff"):
        assert read_event(line) is None


def test_a_machine_measures_one_experiment_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENMARK_LANE_FOLDER", str(tmp_path))
    got_it = threading.Event()

    def second() -> None:
        with measuring_lane():
            got_it.set()

    waiting = threading.Thread(target=second)
    with measuring_lane():
        waiting.start()
        assert not got_it.wait(0.2)
    waiting.join(timeout=10)
    assert got_it.is_set()


# What is planned


def test_a_planner_of_any_machine_asks_a_fleet_for_the_same_cells(
    delivered: Delivered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plans(**options: object) -> list[Plan]:
        request = Request(
            methods=("autoregressive",),
            tasks=("parity:num_items=2",),
            models=(delivered.spec.model,),
            store=tmp_path / "store",
            plugins=(PLUGIN,),
            **options,
        )
        found = [make_plan(request)]
        with monkeypatch.context() as patch:
            patch.setattr("hardware.detect.machine_id", lambda: "another one")
            return [*found, make_plan(request)]

    ours, others = plans(executor="slurm")
    assert ours.cells == others.cells
    assert [spec.memory_bytes for spec in ours.experiments] == [0]  # what the machine has
    ours, others = plans()
    assert ours.cells != others.cells
    # A GPU that this machine has not may be planned for, but not measured here.
    [planned, _] = plans(executor="ray", hardware="h100-sxm")
    assert planned.experiments[0].hardware == "h100-sxm"
    with pytest.raises(UsageError, match="torch sees none on this machine"):
        plans(hardware="h100-sxm")


def test_an_executor_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match=r"slrum.*slurm"):
        make_request(Registry(), executor="slrum")


# What enters the store


def test_the_first_whole_delivery_counts(
    delivered: Delivered, delivery: Path, store: Store
) -> None:
    experiment_id = delivered.spec.experiment_id
    collect(store, delivered.spec, delivery)
    first = store.manifest(experiment_id)
    assert first == Store(delivered.first).manifest(experiment_id)
    for again in (delivery, delivered.second):
        assert collect(store, delivered.spec, again)["autoregressive"]["status"] == "ok"
        assert store.manifest(experiment_id) == first
    assert Store(delivered.second).manifest(experiment_id) != first


def test_what_an_earlier_attempt_left_unsealed_is_replaced_whole(
    delivered: Delivered, delivery: Path, store: Store
) -> None:
    experiment_id = delivered.spec.experiment_id
    unsealed = shutil.copytree(delivered.second, delivery.with_name("unsealed"))
    (unsealed / "shards" / experiment_id / "manifest.json").unlink()
    collect(store, delivered.spec, unsealed)
    assert not store.is_sealed(experiment_id)
    collect(store, delivered.spec, delivery)
    assert store.damage(experiment_id) == []
    assert store.manifest(experiment_id) == Store(delivery).manifest(experiment_id)


def test_a_delivery_that_is_not_whole_is_refused(
    delivered: Delivered, delivery: Path, store: Store
) -> None:
    path = delivery / "shards" / delivered.spec.experiment_id / "samples.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BadDelivery, match="changed since it was sealed"):
        collect(store, delivered.spec, delivery)
    path.unlink()
    with pytest.raises(BadDelivery, match="is missing"):
        collect(store, delivered.spec, delivery)
    (delivery / DELIVERY).write_text("{")
    with pytest.raises(BadDelivery, match="cannot be read"):
        collect(store, delivered.spec, delivery)
    assert store.experiment_ids() == []


@pytest.mark.parametrize(
    ("field", "value"), [("seed", 5), ("task_hash", "0"), ("items", ["item-1"]), ("repeats", 2)]
)
def test_an_answer_to_another_question_is_refused(
    delivered: Delivered, delivery: Path, store: Store, field: str, value: object
) -> None:
    asked = dataclasses.replace(delivered.spec, **{field: value})
    with pytest.raises(BadDelivery, match=f"another question: {field} differ"):
        collect(store, asked, delivery)
    (delivery / "shards" / delivered.spec.experiment_id).rename(delivery / "shards" / "other-1")
    with pytest.raises(BadDelivery, match="asked for was"):
        collect(store, delivered.spec, delivery)
    assert store.experiment_ids() == []


# How a run goes


class Scripted:
    """A backend that answers each submission of an experiment with the next of its lines."""

    title = "a script"

    def __init__(self, delivery: Path, *lines: str, places: int = 9) -> None:
        self.delivery, self.lines, self.places = delivery, list(lines), places
        self.waiting: list[Happening] = []
        self.forgotten: list[str] = []
        self.is_closed = False

    def room(self) -> int:
        return self.places

    def submit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            for word in self.lines.pop(0).split():
                name = job.spec.experiment_id
                if word == "refused":
                    raise UsageError("no such partition")
                if word == "delivered":
                    self.waiting.append(Happening(word, name, delivery=self.delivery))
                else:
                    self.waiting.append(Happening("lost", name, reason=f"the machine is {word}"))

    def happenings(self, seconds: float) -> Iterator[Happening]:
        told, self.waiting = self.waiting, []
        # A delivery lies there until it is taken away.
        self.waiting = [each for each in told if each.kind == "delivered"]
        yield from told

    def forget(self, experiment_id: str) -> None:
        self.forgotten.append(experiment_id)
        found = [each for each in self.waiting if each.experiment_id == experiment_id]
        if found:
            self.waiting.remove(found[0])

    def close(self) -> None:
        self.is_closed = True


def run(fleet: Fleet, *specs: ExperimentSpec, deadline: float = math.inf) -> list[Event]:
    events: list[Event] = []
    fleet.run(specs, events.append, deadline)
    return events


def cells(events: Sequence[Event]) -> list[tuple[str, str]]:
    return [(event.status, event.detail) for event in events if event.kind == "cell"]


def test_a_lost_experiment_is_sent_again_and_what_comes_twice_enters_once(
    delivered: Delivered, delivery: Path, store: Store
) -> None:
    backend = Scripted(delivery, "gone", "delivered delivered")
    events = run(Fleet(store, backend, poll_seconds=0.0), delivered.spec)
    assert cells(events) == [("ok", "")]
    assert [e.detail for e in events if e.kind == "restart"] == ["the machine is gone"]
    assert backend.forgotten == [delivered.spec.experiment_id] * 3
    assert backend.is_closed
    assert store.is_sealed(delivered.spec.experiment_id)
    assert [e.done for e in events if e.kind == "sample"][-1] == delivered.spec.num_samples


def test_an_experiment_that_is_lost_too_often_fails_with_the_reason(
    delivered: Delivered, delivery: Path, store: Store
) -> None:
    backend = Scripted(delivery, "gone", "gone", "burning", "delivered")
    events = run(Fleet(store, backend, poll_seconds=0.0), delivered.spec)
    assert cells(events) == [("failed", "the machine is burning (attempt 3, the last one)")]
    assert backend.lines == ["delivered"]
    with exclusive(store, delivered.spec.experiment_id) as is_ours:
        assert is_ours


def test_a_damaged_delivery_is_a_lost_one(
    delivered: Delivered, delivery: Path, store: Store
) -> None:
    (delivery / DELIVERY).unlink()
    backend = Scripted(delivery, "delivered", "delivered", "delivered")
    [(status, detail)] = cells(run(Fleet(store, backend, poll_seconds=0.0), delivered.spec))
    assert status == "failed"
    assert "cannot be read" in detail


def test_a_store_that_is_full_keeps_deliveries_for_the_next_run(
    delivered: Delivered, delivery: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    events: list[Event] = []
    other = dataclasses.replace(delivered.spec, experiment_id="other-1")
    backend = Scripted(delivery, "delivered", "gone", "gone", "gone")
    with monkeypatch.context() as patch:
        patch.setattr("runner.indexing.shutil.copytree", full)
        fleet = Fleet(store, backend, poll_seconds=0.0)
        with pytest.raises(StoreError, match="No space left on device"):
            fleet.run([delivered.spec, other], events.append, math.inf)
    # The others went on meanwhile.
    assert [status for status, _ in cells(events)] == ["failed", "failed"]
    assert "Make room" in cells(events)[0][1]
    assert backend.forgotten == ["other-1"] * 3
    backend.lines = ["delivered"]
    assert store.experiment_ids() == []
    assert cells(run(Fleet(store, backend, poll_seconds=0.0), delivered.spec)) == [("ok", "")]


def test_a_fleet_without_a_place_for_anything_gives_up(
    delivered: Delivered, delivery: Path, store: Store
) -> None:
    fleet = Fleet(store, Scripted(delivery, places=0), patience_seconds=0.0, poll_seconds=0.0)
    assert cells(run(fleet, delivered.spec)) == [("failed", "a script had no machine for it")]


def test_a_scheduler_that_refuses_is_wrong_usage_first_and_trouble_later(
    delivered: Delivered, delivery: Path, store: Store
) -> None:
    fleet = Fleet(store, Scripted(delivery, "refused"), patience_seconds=0.2, poll_seconds=0.0)
    with pytest.raises(UsageError, match="no such partition"):
        run(fleet, delivered.spec)
    fleet.backend = Scripted(delivery, "gone", *["refused"] * 100_000)
    assert cells(run(fleet, delivered.spec)) == [("failed", "no such partition")]
    fleet.backend = Scripted(delivery, "gone", "refused", "delivered")
    fleet.patience_seconds = 60.0
    assert cells(run(fleet, delivered.spec)) == [("ok", "")]


def test_what_another_run_measures_is_waited_for(
    delivered: Delivered, delivery: Path, store: Store
) -> None:
    """The other run takes the shard in while ours waits, longer than ours has patience."""
    backend = Scripted(delivery)
    fleet = Fleet(store, backend, patience_seconds=0.0, poll_seconds=0.0)
    events: list[list[Event]] = []
    with exclusive(store, delivered.spec.experiment_id):
        ours = threading.Thread(target=lambda: events.append(run(fleet, delivered.spec)))
        ours.start()
        ours.join(timeout=0.3)
        assert ours.is_alive()
        collect(store, delivered.spec, delivery)
    ours.join(timeout=10)
    [told] = events
    assert cells(told) == []
    assert [e.done for e in told if e.kind == "sample"] == [delivered.spec.num_samples]


def test_a_spent_budget_cancels_what_runs(
    delivered: Delivered, delivery: Path, store: Store
) -> None:
    backend = Scripted(delivery, "")
    fleet = Fleet(store, backend, poll_seconds=0.01)
    with pytest.raises(OutOfTime):
        run(fleet, delivered.spec, deadline=time.monotonic() + 0.2)
    assert backend.lines == []  # it had been sent
    assert backend.is_closed
    with exclusive(store, delivered.spec.experiment_id) as is_ours:
        assert is_ours


# Slurm


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands; nothing runs what they submit."""
    slurm_stub.install(tmp_path / "stub")
    monkeypatch.setenv("PATH", f"{tmp_path / 'stub' / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "stub"


def test_a_slurm_job_has_a_node_of_its_own_and_no_secrets(
    delivered: Delivered, store: Store, stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    on_gpu = dataclasses.replace(delivered.spec, hardware="h100-sxm", experiment_id="other-1")
    Slurm.connect(store, "run-1").submit([Job.of(delivered.spec), Job.of(delivered.spec)])
    Slurm.connect(store, "run-2").submit([Job.of(on_gpu)])
    first, second = (path.read_text() for path in sorted((store.path / "fleet").glob("*/batch.sh")))
    for line in ("--exclusive", "--nodes=1", "--array=0-1", "--no-requeue"):
        assert f"#SBATCH {line}\n" in first
    [kept] = [line for line in first.splitlines() if "--export" in line]
    assert "PATH" in kept
    assert "HF_TOKEN" not in kept
    assert "--gres" not in first
    assert "#SBATCH --gres=gpu:1\n" in second
    assert "secret" not in first + second


def test_a_run_takes_up_what_slurm_has_from_an_earlier_one(
    delivered: Delivered, delivery: Path, store: Store, stub: Path
) -> None:
    """Its planner died: the job still waits, then it has delivered."""
    job, experiment_id = Job.of(delivered.spec), delivered.spec.experiment_id
    Slurm.connect(store, "run-1").submit([job])
    again = Slurm.connect(store, "run-2")
    again.submit([job])
    assert len(list((stub / "jobs").iterdir())) == 1
    assert list(again.happenings(0.0)) == []
    [folder] = (store.path / "fleet").iterdir()
    delivery.rename(folder / "delivery-0")
    third = Slurm.connect(store, "run-3")
    third.submit([job])
    [happening] = third.happenings(0.0)
    assert happening == Happening("delivered", experiment_id, delivery=folder / "delivery-0")
    third.forget(experiment_id)
    assert not folder.exists()


def test_slurm_is_believed_when_it_speaks_and_waited_for_when_it_does_not(
    delivered: Delivered, store: Store, stub: Path
) -> None:
    backend = Slurm.connect(store, "run-1")
    backend.submit([Job.of(delivered.spec)])
    [job] = (stub / "jobs").iterdir()
    squeue = stub / "bin" / "squeue"
    speaks = squeue.read_text()
    squeue.write_text("#!/bin/sh\nexit 1\n")
    (job / "state").write_text("NODE_FAIL")
    assert [list(backend.happenings(0.0)) for _ in range(4)] == [[]] * 4
    squeue.write_text(speaks)
    # A job that ended well may have delivered into a folder that is seen here a little later.
    (job / "state").write_text("COMPLETED")
    assert list(backend.happenings(0.0)) == []
    (job / "state").write_text("NODE_FAIL")
    [folder] = (store.path / "fleet").iterdir()
    (folder / "log-0.txt").write_text("Error: this machine differs\n\n")
    [lost] = backend.happenings(0.0)
    assert lost.reason == (
        "its job ended as NODE_FAIL and delivered nothing; it said: Error: this machine differs"
    )
    backend.forget(delivered.spec.experiment_id)
    assert [path.name for path in folder.glob("log-*")] == ["log-0.txt"]
    assert (job / "cancel").exists() is False  # it had ended


def test_a_job_that_slurm_does_not_take_is_a_usage_error(
    delivered: Delivered, store: Store, stub: Path
) -> None:
    (stub / "bin" / "sbatch").write_text("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    with pytest.raises(UsageError, match="invalid partition"):
        Slurm.connect(store, "run-1").submit([Job.of(delivered.spec)])
    assert list((store.path / "fleet").iterdir()) == []


def test_executors_that_are_not_to_be_had_say_what_to_do(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match="sbatch, squeue, scancel cannot be found"):
        make_executor("slurm", store, "run-1")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[cluster\]'"):
        make_executor("ray", store, "run-1")


# Ray


def node(name: str, address: str, cpus: float = 8.0, **more: object) -> dict[str, object]:
    resources = {"CPU": cpus, **more.pop("resources", {})}
    return {
        "NodeID": name,
        "Alive": True,
        "NodeManagerAddress": address,
        "Resources": resources,
        "Labels": {},
        **more,
    }


def test_a_host_has_one_lane_however_many_nodes_it_has() -> None:
    nodes = [
        node("a", "10.0.0.1"),
        node("b", "10.0.0.1", cpus=16.0),
        node("c", "10.0.0.2", Alive=False),
        node("d", "10.0.0.3", cpus=0.0),
        node("e", "172.17.0.2", Labels={"tokenmark-host": "rack3"}),
        node("f", "172.17.0.3", Labels={"tokenmark-host": "rack3"}),
    ]
    assert {host: each["NodeID"] for host, each in hosts(nodes).items()} == {
        "10.0.0.1": "b",
        "rack3": "f",
    }


@pytest.mark.parametrize(
    ("profile", "resources", "expected"),
    [
        ("cpu", {}, True),
        ("h100-sxm", {}, False),
        ("h100-sxm", {"GPU": 1.0}, True),
        ("h100-sxm", {"GPU": 1.0, "accelerator_type:H100": 1.0}, True),
        ("h100-sxm", {"GPU": 1.0, "accelerator_type:A100": 1.0}, False),
        ("cuda", {"GPU": 1.0, "accelerator_type:A100": 1.0}, True),
    ],
)
def test_a_node_suits_a_profile_if_it_has_such_a_gpu(
    profile: str, resources: dict[str, float], expected: bool
) -> None:
    assert suits(node("a", "10.0.0.1", resources=resources), catalog.profile(profile)) is expected
