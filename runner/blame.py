"""An exception of somebody's method in a line: what it was, and where."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

from runner.registry import ROOT

_PARTS = ("hardware", "methods", "models", "results", "runner", "tasks", "run.py")
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))


def in_a_line(error: BaseException) -> str:
    """Return the kind of an exception, its message, and the line of a method that it came from."""
    message = " ".join(str(error).split())
    place = place_of(error)
    return f"{type(error).__name__}: {message}" + (f" ({place})" if place else "")


def place_of(error: BaseException) -> str:
    """Return file, line and function where an exception left a method; "" where none is involved.

    The innermost frame of a plug-in counts, else that of one of our methods.
    """
    found: dict[bool, str] = {}
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if frame.filename.startswith((*_LIBRARIES, "<")):
            continue
        is_ours = any(path.is_relative_to(ROOT / part) for part in _PARTS)
        if not is_ours or path.is_relative_to(ROOT / "methods"):
            found[is_ours] = f"{path.name}:{frame.lineno}, in {frame.name}"
    return found.get(False, found.get(True, ""))
