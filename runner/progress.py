"""What a user sees while cells are measured: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from results.text import plain
from runner.request import Event, Listener

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

PLAIN_INTERVAL_SECONDS = 10.0


def duration(seconds: float) -> str:
    """Return a duration for people: `8 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@contextmanager
def progress(console: Console) -> Iterator[Listener]:
    """Yield the listener that suits the console; the live view is cleared up on exit."""
    if console.is_terminal and not console.is_dumb_terminal:
        with live_bars(console) as bars:
            yield LiveProgress(bars)
    else:
        yield PlainProgress(
            lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
        )


class Pace:
    """How long the rest takes, from what was done since the first sample seen here."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._start: tuple[float, int] | None = None

    def remaining(self, done: int, total: int) -> float | None:
        """Return seconds, None before two samples; samples of an earlier run do not count."""
        if self._start is None:
            self._start = (self._clock(), done)
            return None
        started, already = self._start
        if done <= already:
            return None
        return (self._clock() - started) / (done - already) * (total - done)


class PlainProgress:
    """Whole lines without control characters, at most one sample in ten seconds: for logs."""

    def __init__(
        self, write: Callable[[str], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._clock = clock
        self._pace = Pace(clock)
        self._last = clock()

    def __call__(self, event: Event) -> None:
        """Say what happened."""
        if event.kind == "experiment":
            self._pace = Pace(self._clock)
            self._last = self._clock()
            self._write(plain(event.title))
        elif event.kind == "phase":
            self._write(f"  {plain(event.phase)}")
        elif event.kind == "sample":
            self._sample(event)
        elif event.kind == "cell":
            self._write(f"  {cell_line(event)}")
        elif event.kind == "restart":
            self._write(f"  {restart_line(event)}")

    def _sample(self, event: Event) -> None:
        remaining = self._pace.remaining(event.done, event.total)
        now = self._clock()
        if now - self._last < PLAIN_INTERVAL_SECONDS:
            return
        self._last = now
        left = "" if remaining is None else f", about {duration(remaining)} left"
        what = plain(f"{event.method} on {event.item}")
        self._write(f"  {event.done} of {event.total} samples{left} ({what})")


@contextmanager
def live_bars(console: Console) -> Iterator[Progress]:
    """Yield the bars of the live view."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}", markup=False),
        TextColumn("{task.fields[now]}", style="dim", markup=False),
    )
    with Progress(*columns, console=console) as bars:
        yield bars


class LiveProgress:
    """One bar an experiment, with what is being measured, the time left, and each finished cell."""

    def __init__(self, bars: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self._bars = bars
        self._clock = clock
        self._pace = Pace(clock)
        self._task: TaskID | None = None

    def __call__(self, event: Event) -> None:
        """Show what happened."""
        if event.kind == "experiment":
            self._pace = Pace(self._clock)
            self._task = self._bars.add_task(
                plain(event.title), total=event.total or None, left="", now=""
            )
        elif event.kind == "cell":
            self._bars.console.print(
                cell_line(event),
                style="" if event.status == "ok" else "red",
                markup=False,
                highlight=False,
            )
        elif event.kind == "restart":
            self._bars.console.print(
                restart_line(event),
                style="yellow",
                markup=False,
                highlight=False,
            )
        elif self._task is not None:
            self._update(self._task, event)

    def _update(self, task: TaskID, event: Event) -> None:
        if event.kind == "phase":
            self._bars.update(task, now=plain(event.phase), left="")
        elif event.kind == "sample":
            remaining = self._pace.remaining(event.done, event.total)
            self._bars.update(
                task,
                completed=event.done,
                total=event.total,
                left="" if remaining is None else f"{duration(remaining)} left",
                now=plain(f"{event.method} on {event.item}"),
            )


def restart_line(event: Event) -> str:
    """Return that something was started again, on one line, and why if that is known."""
    detail = f": {event.detail}" if event.detail else ""
    return plain(f"the worker was started again{detail}")


def cell_line(event: Event) -> str:
    """Return how a cell ended, on one line."""
    detail = f": {event.detail}" if event.detail else ""
    return plain(f"{event.method} on {event.title or event.experiment}: {event.status}{detail}")
