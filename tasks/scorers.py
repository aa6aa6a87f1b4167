"""Scorers of a task: its own, and other people's rules for the same stored outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tasks.base import Item, Scored, Task

OURS = "tokenmark"


@dataclass(frozen=True)
class Scorer:
    """A way to score a stored output.

    Attributes:
        name: As rows and tables write it.
        cut: What of the output is judged.
        judge: Scores an item's output after the cut; pure, and equal texts get equal scores.
        judged_by: Name of the judge, which scorers may share.
        task: Computes the metrics of all outputs together, after the cut.
    """

    name: str
    cut: Callable[[str], str]
    judge: Callable[[Item, str], Scored]
    judged_by: str
    task: Task[Any]


def whole(output: str) -> str:
    """Cut nothing."""
    return output


def scorers(task: Task[Any]) -> list[Scorer]:
    """Return the scorers of a task, its own first."""
    own = Scorer(OURS, whole, task.score_with_detail, OURS, task)
    return [own, *task.other_scorers()]
