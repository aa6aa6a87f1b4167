"""Workers that start in a tenth of the time: forked also where there is only one.

Not a test. `forked_workers` replaces how `runner.supervise` starts a single worker; everything
else, and the worker itself, is the real thing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from runner.forking import start_forked


@contextmanager
def forked_workers() -> Iterator[None]:
    """Start workers from the server inside the block."""
    start = functools.partial(start_forked, offline=True)
    with mock.patch("runner.supervise.start_anew", start):
        yield
