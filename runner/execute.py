"""Runs a plan: hands its experiments to an executor, and records the run."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, replace
from typing import Literal

from hardware import detect
from results.records import RunRecord
from results.store import Store
from runner.executors import make_executor
from runner.plan import Plan
from runner.registry import ROOT
from runner.request import Event, Listener
from runner.spec import now
from runner.supervise import OutOfTime


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        run_id: Name of the run.
        failed: Cells that did not end well, or not at all; `unsupported` is an answer.
        interrupted: Whether the user stopped it, or the budget was spent.
        out_of_time: Whether it was the budget.
    """

    run_id: str
    failed: int
    interrupted: bool
    out_of_time: bool = False


def execute(plan: Plan, listener: Listener) -> Outcome:
    """Measure what a plan asks for, and record the run.

    Ctrl-C ends the worker, and so does the end of the request's budget; every finished sample is
    kept, and the same request goes on from there.

    Raises:
        results.store.StoreError: The store cannot be written.
        UsageError: The executor is not to be had here.
    """
    store = Store(plan.request.store)
    # Asked first: where there is no cluster, there is no run either.
    executor = make_executor(plan.request.executor, store, plan.run_id)
    record = RunRecord(
        run_id=plan.run_id,
        command=" ".join(sys.argv[1:]) or "run",
        started=now(),
        finished="",
        status="running",
        cells=[list(pair) for pair in plan.cells],
        skipped=plan.skipped,
        git_commit=detect.git_state(ROOT).commit or "",
    )
    store.write_run(record)
    interrupted = out_of_time = False
    budget = plan.request.budget
    deadline = math.inf if budget is None else time.monotonic() + budget
    try:
        executor.run(plan.experiments, listener, deadline)
    except KeyboardInterrupt:
        interrupted = True
    except OutOfTime:
        interrupted = out_of_time = True
    status: Literal["interrupted", "finished"] = "interrupted" if interrupted else "finished"
    store.write_run(replace(record, finished=now(), status=status))
    fine = {
        (experiment_id, cell.cell_id)
        for experiment_id in {experiment_id for experiment_id, _ in plan.cells}
        for cell in store.cells(experiment_id)
        if cell.status in ("ok", "unsupported")
    }
    # A cell without a record has failed too: its worker died before there was a shard to write to.
    failed = sum(pair not in fine for pair in plan.cells)
    listener(Event(kind="run", status=status))
    return Outcome(plan.run_id, failed, interrupted, out_of_time)
