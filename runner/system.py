"""What the runner asks of the operating system: an end with the parent, and locks."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from results.store import Store

# Folder of the lane's lock: a fact of the machine, where its own is not shared by all who measure.
_LANE_FOLDER = "TOKENMARK_LANE_FOLDER"


def die_with_parent(by: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to end this process with the one that started it (Linux only).

    And to hand it the children of children that have ended, so that none escapes its sight.

    Args:
        by: How to end it.
    """
    try:
        set_parent_death_signal, set_child_subreaper = 1, 36
        ctypes.CDLL(None).prctl(set_parent_death_signal, by)
        ctypes.CDLL(None).prctl(set_child_subreaper, 1)
    except (OSError, AttributeError):
        return


@contextmanager
def exclusive(store: Store, experiment_id: str) -> Iterator[bool]:
    """Hold an experiment of a store: yield False if another process does.

    The kernel lets go when the process ends, so neither a kill nor a wrong clock leaves it held.
    """
    locks = store.path / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / experiment_id).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def measuring_lane() -> Iterator[None]:
    """Hold this machine's one lane for measuring; wait until whoever measures has ended.

    Whatever sends the work (two schedulers, Ray beside Slurm), two experiments of a fleet never
    measure one another. The lock lies in the folder for temporary files that all processes of the
    machine share, or in the one that `TOKENMARK_LANE_FOLDER` names.
    """
    folder = Path(os.environ.get(_LANE_FOLDER) or tempfile.gettempdir())
    descriptor = os.open(folder / "tokenmark-lane.lock", os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
