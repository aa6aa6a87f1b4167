"""One experiment after the other, on this machine."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from hardware import catalog
from results.store import Store
from runner import supervise
from runner.forking import start_forked
from runner.request import Listener
from runner.spec import ExperimentSpec
from runner.supervise import Start, Supervisor


@dataclass(frozen=True)
class Local:
    """Workers of this process, which write into the store themselves."""

    store: Store

    def run(
        self, experiments: Sequence[ExperimentSpec], listener: Listener, deadline: float
    ) -> None:
        """Measure experiments in their order."""
        for spec in experiments:
            start: Start = supervise.start_anew
            # A single worker does not pay for a server.
            if len(experiments) > 1 and catalog.profile(spec.hardware).kind == "cpu":
                start = functools.partial(start_forked, offline=spec.offline)
            Supervisor(spec, self.store, listener, deadline, start=start).run()
