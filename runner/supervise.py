"""Watches one experiment: a worker is killed where it hangs, replaced where a method broke it."""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import psutil

from results.records import Status
from results.store import Store
from runner.registry import ROOT
from runner.request import Event, Listener
from runner.spec import BUSY, RESTART, CellSpec, ExperimentSpec

# Loading may fetch and convert weights; scoring runs programs with limits of their own.
_PHASE_TIMEOUT = 1800.0
_POLL_SECONDS = 0.2
_LOG_CHARACTERS = 4000
_READ_BYTES = 65536
# Names a worker in the environment of everything that it starts.
TAG = "TOKENMARK_WORKER"
# What a cell whose experiment somebody else measures is told, wherever that is found out.
IS_BUSY = "another run is measuring this experiment now"


class OutOfTime(Exception):  # a signal, no error
    """The run's budget is spent."""


class WorkerProcess(Protocol):
    """A worker, in the words of `subprocess.Popen`."""

    pid: int
    stdout: IO[bytes] | None

    def poll(self) -> int | None:
        """Return the exit code, the negative number of a signal; None while it runs."""
        ...

    def wait(self) -> int:
        """Wait for its end, and return the exit code."""
        ...


@dataclass(frozen=True)
class Started:
    """A worker that was started.

    Attributes:
        process: The worker, which leads its group and its session.
        tag: What the environment of all that it starts names it by.
        spared: Processes with that tag that it did not start.
    """

    process: WorkerProcess
    tag: str
    spared: frozenset[int] = frozenset()


# Starts a worker from the file of its spec and the descriptor that it tells its progress to.
Start = Callable[[Path, int], Started]


def start_anew(spec: Path, events: int) -> Started:
    """Start a worker in an interpreter of its own."""
    tag = uuid.uuid4().hex
    command = [sys.executable, str(ROOT / "run.py"), "worker", "--spec", str(spec)]
    process = subprocess.Popen(
        [*command, "--events", str(events)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(events,),
        start_new_session=True,
        env={**os.environ, TAG: tag},
    )
    return Started(process, tag)


@dataclass
class Supervisor:
    """Watches one experiment until every cell has ended.

    Attributes:
        spec: What is measured.
        store: Where the worker writes, and where cells that cannot write for themselves are ended.
        listener: Is told what happens.
        deadline: End of the whole run, by `time.monotonic`.
        in_flight, in_flight_item: Cell and item of the sample that is running, "" between two.
        since: When the worker last said anything.
        phase: What it is doing.
        log: The end of what it printed.
        start: Starts a worker.
    """

    spec: ExperimentSpec
    store: Store
    listener: Listener
    deadline: float = math.inf
    in_flight: str = ""
    in_flight_item: str = ""
    since: float = 0.0
    phase: str = "starting"
    log: deque[str] = field(default_factory=lambda: deque(maxlen=200))
    start: Start = field(default_factory=lambda: start_anew)

    def run(self) -> None:
        """Measure, however many workers that takes.

        Raises:
            OutOfTime: The deadline has passed.
            results.store.StoreError: The end of a cell cannot be written.
        """
        spec = self.spec
        self._say(kind="experiment", total=spec.num_samples)
        folder = self.store.path / "specs"
        folder.mkdir(parents=True, exist_ok=True)
        path = (folder / f"{spec.experiment_id}.json").resolve()
        spec.write(path)
        try:
            # Each restart ends a cell, so there cannot be more of them than cells.
            for _ in range(len(spec.cells) + 1):
                if self._attempt(path):
                    return
        finally:
            path.unlink(missing_ok=True)

    def _attempt(self, path: Path) -> bool:
        """Run a worker until it ends; return whether the experiment is over."""
        read_end, write_end = os.pipe()
        started = self.start(path, write_end)
        process = started.process
        os.close(write_end)
        assert process.stdout is not None
        reader = threading.Thread(target=self._keep_log, args=(process.stdout,), daemon=True)
        reader.start()
        self.in_flight, self.phase, self.since = "", "starting", time.monotonic()
        try:
            ending = self._watch(process, read_end)
        finally:
            _kill_group(started)
            os.close(read_end)
            # A child that left the session may hold the other end: its words are not waited for.
            reader.join(timeout=2)
            if not reader.is_alive():
                process.stdout.close()
        return self._judge(process.wait(), ending)

    def _watch(self, process: WorkerProcess, events: int) -> tuple[Status, str] | None:
        """Follow a worker to its end; return why it was killed, None if it was not."""
        os.set_blocking(events, False)
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        pending = ""
        with selectors.DefaultSelector() as selector:
            selector.register(events, selectors.EVENT_READ)
            is_open = True
            while is_open or process.poll() is None:
                if is_open and selector.select(_POLL_SECONDS):
                    data = os.read(events, _READ_BYTES)
                    is_open = bool(data)
                    *lines, pending = (pending + decode(data)).split("\n")
                    for line in lines:
                        self._handle(json.loads(line))
                elif not is_open:
                    time.sleep(_POLL_SECONDS)
                if process.poll() is not None and not selector.select(0):
                    break
                if trouble := self._trouble(process):
                    return trouble
        process.wait()
        return None

    def _trouble(self, process: WorkerProcess) -> tuple[Status, str] | None:
        """Return why the worker must be killed now, None if it may go on.

        Raises:
            OutOfTime: The whole run must end.
        """
        if time.monotonic() > self.deadline:
            raise OutOfTime
        limit = self.spec.sample_timeout if self.in_flight else _PHASE_TIMEOUT
        if time.monotonic() - self.since > limit:
            what = f"item {self.in_flight_item}" if self.in_flight else self.phase
            return "timeout", f"{what} took longer than {limit:g} s"
        used = _resident_bytes(process.pid)
        if self.spec.memory_bytes and used > self.spec.memory_bytes:
            return "oom-host", (
                f"the worker held {used / 1e9:.1f} GB, more than the "
                f"{self.spec.memory_bytes / 1e9:.1f} GB it may use"
            )
        return None

    def _handle(self, event: dict[str, Any]) -> None:
        kind = event.pop("kind")
        self.since = time.monotonic()
        if kind == "begin":
            self.in_flight, self.in_flight_item = event["cell"], event["item"]
        elif kind == "phase":
            self.in_flight, self.phase = "", event["phase"]
            self._say(kind="phase", phase=event["phase"])
        elif kind == "sample":
            self._say(
                kind="sample",
                method=event["method"],
                item=event["item"],
                done=event["done"],
                total=event["total"],
                seconds=event["seconds"],
            )
        elif kind == "cell":
            self._say(
                kind="cell",
                method=event["method"],
                status=event["status"],
                detail=event["detail"],
            )

    def _judge(self, exit_code: int, ending: tuple[Status, str] | None) -> bool:
        """Record whose cell a death costs; return whether the experiment is over."""
        if exit_code == 0 and self.store.is_sealed(self.spec.experiment_id):
            return True
        if exit_code == RESTART:
            self._say(kind="restart")
            return False
        if exit_code == BUSY:
            self._fail(self._unfinished(), "failed", IS_BUSY)
            return True
        status: Status
        if ending is not None:
            status, reason = ending
        elif exit_code == -signal.SIGXCPU:
            reason = f"the worker used up its {self.spec.cpu_seconds} s of processor time"
            status = "timeout"
        elif self.in_flight:
            item = f"in the middle of item {self.in_flight_item}"
            status, reason = "killed", f"the process {_death(exit_code)}, {item}"
        else:
            said = "".join(self.log).strip().rpartition("\n")[2].strip()
            reason = f"the worker {_death(exit_code)} while {self.phase}"
            status, reason = "failed", f"{reason}: {said}" if said else reason
        if self.in_flight:
            guilty = [cell for cell in self._unfinished() if cell.cell_id == self.in_flight]
            self._fail(guilty, status, reason)
            self._say(kind="restart")
            return False
        # Nobody was being measured: loading or scoring failed, and would fail again.
        self._fail(self._unfinished(), status, reason)
        return True

    def _unfinished(self) -> list[CellSpec]:
        folder = self.store.shard(self.spec.experiment_id) / "cells"
        ended = {path.stem for path in folder.glob("*.json")} if folder.is_dir() else set()
        return [cell for cell in self.spec.cells if cell.cell_id not in ended]

    def _fail(self, cells: list[CellSpec], status: Status, reason: str) -> None:
        has_shard = (self.store.shard(self.spec.experiment_id) / "experiment.json").exists()
        for cell in cells:
            self._say(kind="cell", method=cell.method, status=status, detail=reason)
            if not has_shard:
                continue
            self.store.write_cell(
                cell.record(
                    self.spec.experiment_id,
                    status,
                    error=reason,
                    log_tail="".join(self.log)[-_LOG_CHARACTERS:],
                )
            )

    def _keep_log(self, stream: IO[bytes]) -> None:
        """Keep the end of what the worker prints; a flood costs its own time, nothing else."""
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        while data := os.read(stream.fileno(), _READ_BYTES):
            self.log.append(decode(data)[-_LOG_CHARACTERS:])

    def _say(self, **event: Any) -> None:
        self.listener(Event(experiment=self.spec.experiment_id, title=self.spec.title, **event))


def tagged(tag: str) -> Iterator[int]:
    """Yield the processes that were started with a tag in their environment."""
    mark = f"{TAG}={tag}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes():
                yield int(folder.name)
        except OSError:
            continue  # it has ended, or is another user's


def _kill_group(started: Started) -> None:
    """End a worker and what it started, in its session or in one of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.process.pid, signal.SIGKILL)
    started.process.wait()
    for pid in tagged(started.tag):
        if pid not in started.spared:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def _resident_bytes(pid: int) -> int:
    """Return the memory that a process and its children hold."""
    try:
        parent = psutil.Process(pid)
        return sum(each.memory_info().rss for each in [parent, *parent.children(recursive=True)])
    except psutil.Error:
        return 0  # it has just ended


def _death(exit_code: int) -> str:
    if exit_code < 0:
        return f"died of {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"
