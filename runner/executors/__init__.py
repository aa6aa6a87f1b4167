"""Where experiments run: on this machine, on a Ray cluster, through Slurm. Never what they do."""

from __future__ import annotations

from results.store import Store
from runner.executors.base import Executor
from runner.request import ExecutorName


def make_executor(name: ExecutorName, store: Store, run_id: str) -> Executor:
    """Return the executor of a name; only the one that is asked for is imported.

    Args:
        name: One of `runner.request.EXECUTORS`.
        store: Where shards end up.
        run_id: Names what a scheduler shows.

    Raises:
        runner.request.UsageError: There is no such cluster here, or its extra is not installed.
    """
    if name == "local":
        from runner.executors.local import Local

        return Local(store)
    from runner.executors.fleet import Fleet

    if name == "ray":
        from runner.executors.ray_cluster import RayCluster

        return Fleet(store, RayCluster.connect())
    from runner.executors.slurm import Slurm

    return Fleet(store, Slurm.connect(store, run_id))
