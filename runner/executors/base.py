"""What an executor does for a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from runner.request import Listener
from runner.spec import ExperimentSpec


class Executor(Protocol):
    """Measures experiments somewhere, each by the same worker command.

    Whatever happens to workers and machines, when `run` returns every cell has ended: with a record
    in the store, or with an event that says why there is none.
    """

    def run(
        self, experiments: Sequence[ExperimentSpec], listener: Listener, deadline: float
    ) -> None:
        """Measure experiments.

        Args:
            experiments: As a plan has them; those that are sealed by now are left alone.
            listener: Is told what happens.
            deadline: When to stop, by `time.monotonic`.

        Raises:
            runner.supervise.OutOfTime: The deadline has passed; nothing is left running.
            KeyboardInterrupt: The user stops it; nothing is left running.
            results.store.StoreError: The store cannot be written.
        """
        ...
