from __future__ import annotations

import io

import pytest
from rich.console import Console

from runner.progress import LiveProgress, Pace, PlainProgress, duration, live_bars, progress
from runner.request import Event


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain_lines(events: list[tuple[float, Event]]) -> list[str]:
    lines: list[str] = []
    clock = Clock()
    listener = PlainProgress(lines.append, clock)
    for seconds, event in events:
        clock.now += seconds
        listener(event)
    return lines


def sample(done: int, total: int = 100) -> Event:
    return Event(kind="sample", method="m", item=f"i/{done}", done=done, total=total)


def test_plain_lines_tell_the_whole_story():
    lines = plain_lines(
        [
            (0, Event(kind="experiment", title="task with model", total=100)),
            (0, Event(kind="phase", phase="loading")),
            (1, sample(1)),
            (10, sample(11)),
            (0, Event(kind="restart")),
            (0, Event(kind="cell", title="task with model", method="m", status="ok")),
            (0, Event(kind="cell", title="t", method="n", status="failed", detail="ValueError: x")),
            (0, Event(kind="run", status="finished")),
        ]
    )
    assert lines == [
        "task with model",
        "  loading",
        "  11 of 100 samples, about 1 min 29 s left (m on i/11)",
        "  the worker was started again",
        "  m on task with model: ok",
        "  n on t: failed: ValueError: x",
    ]


def test_samples_are_said_at_most_once_in_ten_seconds():
    lines = plain_lines([(1, sample(done)) for done in range(1, 101)])
    assert len(lines) == 10


def test_text_from_outside_cannot_steer_the_terminal():
    nasty = "\x1b[31mred\x1b[0m\r\nnext\x07\u202e"
    lines = plain_lines(
        [
            (0, Event(kind="experiment", title=nasty)),
            (0, Event(kind="cell", method=nasty, status="failed", detail=nasty)),
            (11, Event(kind="sample", method=nasty, item=nasty, done=1, total=2)),
        ]
    )
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations_are_written_for_people(seconds, text):
    assert duration(seconds) == text


def test_the_rest_is_extrapolated_from_what_was_measured_here():
    clock = Clock()
    pace = Pace(clock)
    assert pace.remaining(80, 100) is None  # 80 of them were kept from an earlier run
    clock.now += 10
    assert pace.remaining(85, 100) == pytest.approx(30)


def test_a_file_gets_plain_lines_and_a_terminal_a_live_view():
    file = Console(file=io.StringIO(), force_terminal=False)
    with progress(file) as listener:
        assert isinstance(listener, PlainProgress)
        listener(Event(kind="experiment", title="[bold]task[/bold] with model"))
    assert file.file.getvalue() == "[bold]task[/bold] with model\n"
    with progress(Console(file=io.StringIO(), force_terminal=True)) as listener:
        assert isinstance(listener, LiveProgress)


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with progress(Console(file=io.StringIO(), force_terminal=True)) as listener:
        assert isinstance(listener, PlainProgress)


def test_the_live_view_shows_bar_method_item_time_left_and_finished_cells():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    clock = Clock()
    with live_bars(console) as bars:
        listener = LiveProgress(bars, clock)
        listener(Event(kind="experiment", title="[red]task[/red]", total=50))
        listener(Event(kind="phase", phase="warming up"))
        task = bars.tasks[0]
        assert (task.description, task.total, task.fields["now"]) == (
            "[red]task[/red]",
            50,
            "warming up",
        )
        listener(sample(1, 50))
        clock.now += 8
        listener(sample(5, 50))
        assert (task.completed, task.fields["left"], task.fields["now"]) == (
            5,
            "1 min 30 s left",
            "m on i/5",
        )
        listener(Event(kind="cell", title="t", method="m", status="failed", detail="[b]why[/b]"))
        listener(Event(kind="restart"))
        listener(Event(kind="experiment", title="second", total=1))
        assert len(bars.tasks) == 2
    assert "m on t: failed: [b]why[/b]" in console.file.getvalue()
    assert "the worker was started again" in console.file.getvalue()


def test_an_event_before_any_experiment_breaks_nothing():
    with live_bars(Console(file=io.StringIO(), force_terminal=True)) as bars:
        LiveProgress(bars)(Event(kind="phase", phase="loading"))
        assert not bars.tasks
