"""Starts workers fast: forked from a server that has imported torch and run nothing.

Imports take most of the time before a worker's first sample, and a suite has a dozen workers. A
fork is a process like any other: what it loads, changes or breaks dies with it, and the server has
no threads and no weights that it could find half-way. Where there is a GPU workers start anew: a
driver that was asked anything before a fork is of no use after it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any

from runner.supervise import TAG, Started, tagged

_NAME = uuid.uuid4().hex


def start_forked(spec: Path, events: int, *, offline: bool) -> Started:
    """Start a worker, in a session of its own; the first one waits for the server's imports.

    Args:
        spec: File of its experiment.
        events: Descriptor that it tells its progress to.
        offline: Whether workers keep to the caches. The hub's library asks when it is imported, so
            what the first worker of a process is told holds for all.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runner.preloaded"])
    # `multiprocessing` keeps one server for all that a process asks of it, and so one tag.
    tag = f"{_NAME}-{os.getpid()}"
    with _environment(tag, offline=offline):
        forkserver.ensure_running()
    read_end, write_end = os.pipe()
    arguments = (str(spec), dict(os.environ), _Descriptor(events), _Descriptor(write_end))
    process = context.Process(target=_work, args=arguments)
    process.start()
    os.close(write_end)
    # The server, and what watches over its pipes: a worker starts nothing in its first moments.
    spared = frozenset(tagged(tag)) - {process.pid}
    return Started(_Forked(process, os.fdopen(read_end, "rb")), tag, spared)


@contextmanager
def _environment(tag: str, *, offline: bool) -> Iterator[None]:
    """Let what is started inside the block have the environment of workers."""
    before = dict(os.environ)
    os.environ[TAG] = tag
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Forked:
    """A process of `multiprocessing`, with the words of `subprocess`."""

    def __init__(self, process: Any, stdout: IO[bytes]) -> None:
        self._process = process
        self.pid: int = process.pid
        self.stdout: IO[bytes] | None = stdout

    def poll(self) -> int | None:
        exit_code: int | None = self._process.exitcode
        return exit_code

    def wait(self) -> int:
        self._process.join()
        exit_code: int = self._process.exitcode
        return exit_code


class _Descriptor:
    """A file descriptor that is handed over when it is pickled for the new process."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (DupFd(self.descriptor),)


def _same(handed: Any) -> Any:
    return handed


def _work(spec: str, environment: dict[str, str], events: Any, output: Any) -> None:
    """Be the worker."""
    os.setsid()
    descriptor = output.detach()
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    os.environ.update(environment)
    from runner.worker import main

    code = 1
    try:
        code = main(Path(spec), events.detach())
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # everything is on the disk; torch would take seconds to tear itself down
