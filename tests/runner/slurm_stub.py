"""A Slurm for tests: the three commands that the executor calls, and a controller that runs jobs.

Not a test. Executed as a script under one of their names it is `sbatch`, `squeue` or `scancel`,
which read and write small files; imported it brings `Controller`, which runs what lies there with
bash, as many jobs at once as there are nodes. The interpreter that the jobs are given, `python`,
asks the controller for a process forked from a server that has imported torch.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, Any

PYTHON = """#!/bin/bash
request=$(mktemp -d {folder}/requests/XXXXXX)
printf '%s\\0' "$@" > $request/arguments
env -0 > $request/environment
echo $$ > $request/pid.new && mv $request/pid.new $request/pid
while [ ! -e $request/code ]; do sleep 0.02; done
exit $(cat $request/code)
"""


def sbatch(jobs: Path, arguments: list[str]) -> None:
    script = Path(arguments[-1])
    text = script.read_text()
    last = int(re.search(r"^#SBATCH --array=0-(\d+)$", text, re.MULTILINE)[1])
    array = 1 + max((int(path.name.split("_")[0]) for path in jobs.iterdir()), default=0)
    for index in range(last + 1):
        job = jobs / f"{array}_{index}"
        job.mkdir()
        (job / "script").write_text(str(script))
        (job / "state").write_text("PENDING")
    print(array)


def squeue(jobs: Path, arguments: list[str]) -> None:
    assert "--format=%F|%K|%T" in arguments
    for job in jobs.iterdir():
        print("|".join([*job.name.split("_"), (job / "state").read_text()]))


def scancel(jobs: Path, arguments: list[str]) -> None:
    for name in arguments:
        if (jobs / name / "state").read_text() in ("PENDING", "RUNNING"):
            (jobs / name / "cancel").touch()


def install(folder: Path) -> None:
    """Write the commands into `folder/bin` and the interpreter into `folder/python`."""
    for name in ("bin", "jobs", "requests"):
        (folder / name).mkdir(parents=True)
    for name in ("sbatch", "squeue", "scancel"):
        path = folder / "bin" / name
        # Isolated and without `site`, so that a call takes a fiftieth of a second.
        path.write_text(f"#!{sys.executable} -IS\n" + Path(__file__).read_text())
        path.chmod(0o755)
    (folder / "python").write_text(PYTHON.format(folder=folder))
    (folder / "python").chmod(0o755)


def be_python(arguments: list[str], environment: dict[str, str], pid: int) -> None:
    """Be the interpreter that a job has started, in a process of its own."""
    os.setsid()
    for stream in (1, 2):
        # The job's own streams, redirected as its script says.
        os.dup2(os.open(f"/proc/{pid}/fd/{stream}", os.O_WRONLY | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(environment)
    import run
    from runner import supervise

    supervise.start_anew = start_forked
    sys.argv = arguments
    code = 1
    try:
        code = run.main(arguments[1:])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start_forked(spec: Path, events: int) -> Any:
    """Start a worker from this process, which has imported torch and run nothing."""
    from runner import supervise, worker

    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.environ[supervise.TAG] = "a stubbed job"
        for stream in (1, 2):
            os.dup2(write_end, stream)
        os.closerange(3, events)
        # A worker executes plug-ins itself; what this process has made of them is not there.
        for name in [each for each in sys.modules if each.startswith("tokenmark_plugin_")]:
            del sys.modules[name]
        code = 1
        try:
            code = worker.main(spec, events)
        finally:
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(write_end)
    return supervise.Started(Forked(pid, os.fdopen(read_end, "rb")), f"{pid} has no tag of its own")


class Forked:
    """A child of this process, with the words of `subprocess`."""

    def __init__(self, pid: int, stdout: IO[bytes]) -> None:
        self.pid, self.stdout = pid, stdout
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.wait(os.WNOHANG)

    def wait(self, options: int = 0) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


class Controller:
    """Runs the jobs of a folder that `install` has made."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.jobs, self.requests, self.nodes = folder / "jobs", folder / "requests", nodes
        self.running: dict[Path, subprocess.Popen[bytes]] = {}
        self.processes: dict[Path, Any] = {}
        self.started = 0
        self.is_over = threading.Event()
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.is_over.set()
        self.thread.join()
        for job in list(self.running):
            self._kill(job, "CANCELLED")

    def lose_node(self) -> None:
        """Take the machine of a running job away, at once."""
        with self.lock:
            job = next(iter(self.running))
            self._kill(job, "NODE_FAIL")

    def _run(self) -> None:
        while not self.is_over.wait(0.02):
            with self.lock:
                self._serve()
                self._end()
                self._start()

    def _start(self) -> None:
        for job in sorted(self.jobs.iterdir()):
            if not (job / "state").exists() or (job / "state").read_text() != "PENDING":
                continue
            if (job / "cancel").exists():
                (job / "state").write_text("CANCELLED")
            elif len(self.running) < self.nodes:
                script, index = (job / "script").read_text(), job.name.split("_")[1]
                text = Path(script).read_text()
                log = re.search(r"^#SBATCH --output=(.*)$", text, re.MULTILINE)[1]
                with Path(log.replace("%a", index)).open("ab") as output:
                    self.running[job] = subprocess.Popen(
                        ["bash", script],
                        env={**os.environ, "SLURM_ARRAY_TASK_ID": index},
                        stdout=output,
                        stderr=output,
                    )
                self.started += 1
                (job / "state").write_text("RUNNING")

    def _serve(self) -> None:
        """Fork what jobs have asked for, and tell them how it ended."""
        for request in self.requests.iterdir():
            if request in self.processes:
                process = self.processes[request]
                if process.exitcode is not None and not (request / "code").exists():
                    (request / "code").write_text(str(process.exitcode % 256))
            elif (request / "pid").exists():
                arguments = (request / "arguments").read_text().split("\0")[:-1]
                lines = (request / "environment").read_text().split("\0")[:-1]
                environment = dict(line.split("=", 1) for line in lines)
                context = multiprocessing.get_context("forkserver")
                context.set_forkserver_preload(["runner.preloaded"])
                process = context.Process(
                    target=be_python,
                    args=(arguments, environment, int((request / "pid").read_text())),
                )
                process.start()
                self.processes[request] = process

    def _end(self) -> None:
        for job, process in list(self.running.items()):
            if (job / "cancel").exists():
                self._kill(job, "CANCELLED")
            elif process.poll() is not None:
                del self.running[job]
                (job / "state").write_text("FAILED" if process.returncode else "COMPLETED")

    def _kill(self, job: Path, state: str) -> None:
        script = self.running.pop(job)
        for request, process in self.processes.items():
            if (request / "pid").read_text().strip() == str(script.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                process.join()
        script.kill()
        script.wait()
        (job / "state").write_text(state)
        time.sleep(0.05)


if __name__ == "__main__":
    command = Path(sys.argv[0])
    globals()[command.name](command.parent.parent / "jobs", sys.argv[1:])
