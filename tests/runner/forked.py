"""Workers that start in a tenth of the time: forked from a server that has imported torch.

Not a test. `forked_workers` replaces what `runner.execute` starts processes with; everything else,
and the worker itself, is the real thing. Only the environment of the processes is the server's.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

# What takes long to import, and what transformers imports only when asked.
PRELOADED = [
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "tests.runner.zygote",
    "runner.worker",
]


def _serve(spec: str, events: Any, output: Any, environment: Mapping[str, str]) -> None:
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
        os._exit(code)


class ForkedWorker:
    """What `runner.execute` uses of a `subprocess.Popen`."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], pass_fds: Sequence[int], **_: Any
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        read_end, write_end = os.pipe()
        spec = command[command.index("--spec") + 1]
        arguments = (spec, _Descriptor(pass_fds[0]), _Descriptor(write_end), dict(env))
        self._process = context.Process(target=_serve, args=arguments)
        self._process.start()
        os.close(write_end)
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.stdout = os.fdopen(read_end, "rb")

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode


class _Descriptor:
    """A file descriptor that is handed over when it is pickled for the new process."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (DupFd(self.descriptor),)


def _same(handed: Any) -> Any:
    return handed


@contextmanager
def forked_workers() -> Iterator[None]:
    """Start workers from the server inside the block."""
    names = {name: getattr(subprocess, name) for name in ("PIPE", "STDOUT", "DEVNULL")}
    replaced = SimpleNamespace(Popen=ForkedWorker, **names)
    with mock.patch("runner.execute.subprocess", replaced):
        yield
