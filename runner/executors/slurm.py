"""Slurm: experiments as the tasks of array jobs, one a machine, delivered over a shared folder.

The store's folder must be visible under the same path on all machines. Partition, account, time
limit and constraints are Slurm's own variables: SBATCH_PARTITION, SBATCH_ACCOUNT,
SBATCH_TIMELIMIT, SBATCH_CONSTRAINT.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hardware import catalog
from results.store import Store
from runner.executors.fleet import Happening
from runner.executors.node import Job, read_event
from runner.registry import ROOT
from runner.request import Event, UsageError

# What an array may hold at most where Slurm was not told otherwise is 1000.
_MOST_JOBS = 500
# How long a delivery may take to be seen here after its job has ended: shared folders are cached.
_GRACE_SECONDS = 60.0
_COMMAND_SECONDS = 60.0
# States of a job that Slurm has not given up.
_ALIVE = frozenset(
    {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING",
     "STAGE_OUT", "RESIZING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD",
     "SPECIAL_EXIT"}
)  # fmt: skip
# What of the user's environment a job sees: never tokens or passwords.
_KEPT = (
    "PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "HF_HOME",
    "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "TOKENMARK_LANE_FOLDER",
)  # fmt: skip
_SCRIPT = """#!/bin/bash
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --exclusive
#SBATCH --no-requeue
{options}
cd {root} || exit 1
exec {python} run.py experiment --job {folder}/job-$SLURM_ARRAY_TASK_ID.json \\
  --deliver {folder}/delivery-$SLURM_ARRAY_TASK_ID > {folder}/events-$SLURM_ARRAY_TASK_ID.jsonl
"""


@dataclass
class _Task:
    """A job as one task of an array."""

    folder: Path
    index: int
    array: str
    offset: int = 0  # bytes of its events that were read
    missing: int = 0  # answers of Slurm in a row that did not know it
    ended: float | None = None  # when Slurm said so first, `time.monotonic`
    state: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.array, str(self.index)

    @property
    def delivery(self) -> Path:
        return self.folder / f"delivery-{self.index}"

    @property
    def log(self) -> Path:
        return self.folder / f"log-{self.index}.txt"


@dataclass
class Slurm:
    """A backend of Slurm.

    Attributes:
        spool: Folder for jobs, logs and deliveries, shared by all machines.
        name: What `squeue` shows.
        python: Interpreter on the machines.
        grace_seconds: How long to wait for the delivery of a job that has ended.
        tasks: Jobs that Slurm has, by experiment.
        failed: Folders in which a job was lost: their logs stay.
        arrays: How many arrays were submitted.
    """

    spool: Path
    name: str
    python: str = sys.executable
    grace_seconds: float = _GRACE_SECONDS
    tasks: dict[str, _Task] = field(default_factory=dict)
    failed: set[Path] = field(default_factory=set)
    arrays: int = 0

    title = "Slurm"

    @classmethod
    def connect(cls, store: Store, run_id: str) -> Slurm:
        """Return the backend of the Slurm that this machine can submit to.

        Raises:
            UsageError: There is none.
        """
        if missing := [name for name in ("sbatch", "squeue", "scancel") if not shutil.which(name)]:
            raise UsageError(
                f"--executor slurm needs Slurm's commands, and {', '.join(missing)} cannot be "
                "found: run on a machine from which jobs are submitted, or use --executor local."
            )
        return cls(store.path.resolve() / "fleet", run_id)

    def room(self) -> int:
        """Return how many jobs still fit."""
        return _MOST_JOBS - len(self.tasks)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Submit jobs as one array, but for those that Slurm or the spool has already.

        Raises:
            UsageError: Slurm refuses them.
        """
        left = self._left({job.spec.experiment_id for job in jobs})
        self.tasks |= left
        new = [job for job in jobs if job.spec.experiment_id not in left]
        if not new:
            return
        folder = self.spool / f"{self.name}-{self.arrays}-{os.getpid()}"
        self.arrays += 1
        folder.mkdir(parents=True)
        for index, job in enumerate(new):
            (folder / f"job-{index}.json").write_text(job.text(), encoding="utf-8")
        options = [f"#SBATCH --array=0-{len(new) - 1}", f"#SBATCH --job-name=tokenmark-{self.name}"]
        options += [f"#SBATCH --output={shlex.quote(str(folder))}/log-%a.txt"]
        options += [f"#SBATCH --export={','.join(each for each in _KEPT if each in os.environ)}"]
        if catalog.profile(new[0].spec.hardware).kind == "cuda":
            options.append("#SBATCH --gres=gpu:1")
        script = folder / "batch.sh"
        script.write_text(
            _SCRIPT.format(
                options="\n".join(options),
                root=shlex.quote(str(ROOT)),
                python=shlex.quote(self.python),
                folder=shlex.quote(str(folder)),
            )
        )
        done = _call("sbatch", "--parsable", str(script))
        if done is None or done.returncode:
            shutil.rmtree(folder)
            said = done.stderr.strip() if done else "no answer"
            raise UsageError(f"Slurm does not take the experiments: {said}")
        array = done.stdout.strip().partition(";")[0]
        (folder / "array").write_text(array)
        for index, job in enumerate(new):
            self.tasks[job.spec.experiment_id] = _Task(folder, index, array)

    def happenings(self, seconds: float) -> Iterator[Happening]:
        """Yield what the shared folder and `squeue` say."""
        time.sleep(seconds)
        states = self._states()
        for experiment_id, task in list(self.tasks.items()):
            for event in _new_events(task):
                yield Happening("progress", experiment_id, event)
            # Looked at after Slurm was asked: what ended before is there, or it is late.
            if task.delivery.exists():
                yield Happening("delivered", experiment_id, delivery=task.delivery)
            elif states is not None and self._is_lost(task, states):
                self.failed.add(task.folder)
                yield Happening("lost", experiment_id, reason=_last_words(task))

    def forget(self, experiment_id: str) -> None:
        """Remove a job and its delivery, and its folder after the last one unless one was lost."""
        task = self.tasks.pop(experiment_id, None)
        if task is None:
            return
        if not task.delivery.exists():
            _call("scancel", f"{task.array}_{task.index}")
        self._clear(task)

    def _clear(self, task: _Task) -> None:
        shutil.rmtree(task.delivery, ignore_errors=True)
        for name in (f"job-{task.index}.json", f"events-{task.index}.jsonl"):
            (task.folder / name).unlink(missing_ok=True)
        if task.folder not in self.failed and not any(task.folder.glob("job-*.json")):
            shutil.rmtree(task.folder, ignore_errors=True)

    def close(self) -> None:
        """Cancel what is running; deliveries that nobody took stay for the next run."""
        left = {name: task for name, task in self.tasks.items() if not task.delivery.exists()}
        if left:
            _call("scancel", *(f"{task.array}_{task.index}" for task in left.values()))
        for experiment_id, task in left.items():
            del self.tasks[experiment_id]
            self._clear(task)

    def _left(self, experiment_ids: set[str]) -> dict[str, _Task]:
        """Return what an earlier run of these experiments left: deliveries, and jobs alive."""
        found: dict[str, _Task] = {}
        states = self._states() or {}
        for path in sorted(self.spool.glob("*/job-*.json")):
            folder, index = path.parent, int(path.stem.removeprefix("job-"))
            try:
                array = (folder / "array").read_text()
                experiment_id = json.loads(path.read_text())["spec"]["experiment_id"]
            except (OSError, ValueError, KeyError):
                continue  # its run ended while it was submitted
            task = _Task(folder, index, array)
            if experiment_id in experiment_ids and (
                task.delivery.exists() or states.get(task.key) in _ALIVE
            ):
                found.setdefault(experiment_id, task)
        return found

    def _states(self) -> dict[tuple[str, str], str] | None:
        """Return the state of all jobs of this user that Slurm remembers; None if it is silent."""
        listed = ("--noheader", "--array", "--me", "--states=all", "--format=%F|%K|%T")
        done = _call("squeue", *listed)
        if done is None or done.returncode:
            return None
        rows = (line.strip().split("|") for line in done.stdout.splitlines())
        return {(row[0], row[1]): row[2] for row in rows if len(row) == 3}

    def _is_lost(self, task: _Task, states: dict[tuple[str, str], str]) -> bool:
        state = states.get(task.key)
        if state in _ALIVE:
            task.missing, task.ended = 0, None
            return False
        if state is None:
            # Just submitted, or ended so long ago that Slurm has forgotten it.
            task.missing += 1
            if task.missing < 3:
                return False
        task.state = state or "forgotten by Slurm"
        if task.ended is None:
            task.ended = time.monotonic()
        is_late = time.monotonic() - task.ended > self.grace_seconds
        return is_late or state not in ("COMPLETED", None)


def _call(*command: str) -> subprocess.CompletedProcess[str] | None:
    """Run one of Slurm's commands; None if it does not answer."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_COMMAND_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def _new_events(task: _Task) -> Iterator[Event]:
    """Yield what a task has said since it was asked last; half a line is left for later."""
    try:
        with (task.folder / f"events-{task.index}.jsonl").open("rb") as file:
            file.seek(task.offset)
            whole, newline, _ = file.read().rpartition(b"\n")
    except OSError:
        return
    task.offset += len(whole) + len(newline)
    for line in whole.splitlines():
        if event := read_event(line):
            yield event


def _last_words(task: _Task) -> str:
    """Return why a task did not deliver: what it said last, and what Slurm calls its end."""
    try:
        lines = task.log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        lines = []
    said = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    return f"its job ended as {task.state} and delivered nothing; it said: {said[:500]}"
