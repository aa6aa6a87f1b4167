"""A run that is killed at any moment goes on from there, and ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from results.store import Store
from runner.execute import execute
from runner.plan import make_plan
from runner.registry import ROOT
from runner.request import Request
from tests.runner.world import PLUGIN, save_model

KILLS = 20
METHODS = ("autoregressive", "prompt-lookup", "token-recycling:state=session", "twin:after=0")


def request_for(store: Path, model: str) -> Request:
    return Request(
        methods=METHODS,
        tasks=("parity:num_items=16,max_new_tokens=24",),
        models=(model,),
        store=store,
        plugins=(PLUGIN,),
        repeats=2,
    )


def final_rows(store: Store) -> list[tuple[object, ...]]:
    """What must not depend on interruptions: everything but times, memory and energy."""
    [experiment_id] = store.experiment_ids()
    assert store.is_sealed(experiment_id)
    rows = [
        (s.cell_id, s.item_id, s.repeat, s.position, s.output_tokens, s.target_forwards,
         s.forward_tokens, s.accepted_tokens, s.flops, s.kv_bytes, s.output_digest, s.output)
        for s in store.samples(experiment_id)
    ]  # fmt: skip
    scores = [(s.cell_id, s.item_id, s.metric, s.value) for s in store.scores(experiment_id)]
    cells = [(c.cell_id, c.method, c.status, c.output_check) for c in store.cells(experiment_id)]
    return sorted(map(repr, rows + scores + cells))


class Zygote:
    """A process that forks workers; see `zygote.py`."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.runner.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
        )

    def run(self, spec_path: Path, wait: Callable[[], None] | None = None) -> int:
        """Run a worker, killed when `wait` returns; return its wait status."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{spec_path}\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        if wait is not None:
            wait()
            # The zygote may have waited for it just now; the pid is not in use again so soon.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return int(self.process.stdout.readline())

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.wait(timeout=30)


@pytest.fixture
def zygote() -> Iterator[Zygote]:
    started = Zygote()
    yield started
    started.close()


@pytest.mark.timeout(900)
def test_twenty_kills_change_nothing(tmp_path: Path, zygote: Zygote) -> None:
    model = save_model(tmp_path / "model")

    def spec_for(name: str) -> Path:
        [spec] = make_plan(request_for(tmp_path / name, model)).experiments
        path = tmp_path / f"{name}.json"
        spec.write(path)
        return path

    assert zygote.run(spec_for("undisturbed")) == 0
    disturbed = spec_for("disturbed")
    store = Store(tmp_path / "disturbed")
    draw = random.Random(20)
    moments = []

    def lines() -> int:
        journals = list(store.path.glob("shards/*/samples.jsonl"))
        return journals[0].read_bytes().count(b"\n") if journals else -1

    def some_moment() -> None:
        # A few kills fall into loading and calibration, the others after the next samples.
        if draw.random() < 0.2:
            time.sleep(draw.uniform(0.0, 1.0))
        else:
            goal = max(lines(), 0) + draw.randint(1, 4)
            deadline = time.monotonic() + 60
            while lines() < goal and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(draw.uniform(0.0, 0.02))
        moments.append(lines())

    for _ in range(KILLS):
        status = zygote.run(disturbed, some_moment)
        assert os.WIFSIGNALED(status), "it ended before it could be killed: raise the items"
    assert zygote.run(disturbed) == 0
    assert len(set(moments)) > KILLS // 2, moments
    assert final_rows(store) == final_rows(Store(tmp_path / "undisturbed"))


@pytest.mark.timeout(300)
def test_a_kill_of_the_whole_run_ends_the_worker_too(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    store = Store(tmp_path / "store")
    command = [sys.executable, "run.py", "run", "--store", str(store.path)]
    command += ["--model", model, "--plugin", str(PLUGIN)]
    command += ["--task", "parity:num_items=400,max_new_tokens=24", "--method", "twin"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        shards = store.experiment_ids()
        if shards and sum(1 for _ in store.samples(shards[0])) > 3:
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    time.sleep(1.0)
    [experiment_id] = store.experiment_ids()
    before = sum(1 for _ in store.samples(experiment_id))
    time.sleep(1.0)
    assert sum(1 for _ in store.samples(experiment_id)) == before > 3


@pytest.mark.timeout(300)
def test_the_same_request_takes_up_what_was_interrupted(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    request = Request(
        methods=("autoregressive", "twin:after=0"),
        tasks=("parity:num_items=4",),
        models=(model,),
        store=tmp_path / "store",
        plugins=(PLUGIN,),
    )
    samples: list[str] = []

    def stop_after_three(event: object) -> None:
        if getattr(event, "kind", "") == "sample":
            samples.append(getattr(event, "item", ""))
            if len(samples) == 3:
                raise KeyboardInterrupt

    first = execute(make_plan(request), stop_after_three)
    assert first.interrupted
    store = Store(request.store)
    assert store.run(first.run_id).status == "interrupted"
    [experiment_id] = store.experiment_ids()
    kept = [(s.cell_id, s.item_id, s.seconds) for s in store.samples(experiment_id)]
    assert len(kept) >= 3
    rest = make_plan(request)
    assert rest.num_kept == len(kept)
    what = [row["what"] for row in rest.describe()]
    assert what[0].endswith(f"; {len(kept)} of their 8 samples are there")
    assert what[1] == "measured"
    second = execute(make_plan(request), lambda event: None)
    assert not second.interrupted
    assert second.failed == 0
    again = [(s.cell_id, s.item_id, s.seconds) for s in store.samples(experiment_id)]
    assert again[: len(kept)] == kept
    assert len(again) == 2 * 4
    assert make_plan(request).num_kept == 0


@pytest.mark.timeout(300)
def test_a_spent_budget_stops_the_run_and_keeps_what_was_measured(tmp_path: Path) -> None:
    request = Request(
        methods=("autoregressive", "twin:after=0"),
        tasks=("parity:num_items=2",),
        models=(save_model(tmp_path / "model"),),
        store=tmp_path / "store",
        plugins=(PLUGIN,),
        budget=0.05,
    )
    events: list[object] = []
    stopped = execute(make_plan(request), events.append)
    assert stopped.interrupted
    assert stopped.out_of_time
    assert Store(request.store).run(stopped.run_id).status == "interrupted"
    unlimited = replace(request, budget=3600.0, methods=("autoregressive",))
    ended = execute(make_plan(unlimited), events.append)
    assert not ended.interrupted
    assert not ended.out_of_time
    assert ended.failed == 0
