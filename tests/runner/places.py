"""The places where experiments can run, as tests need them: made, used, and robbed of a machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from results.store import Store
from runner.execute import Outcome, execute
from runner.executors.base import Executor
from runner.executors.fleet import Fleet
from runner.executors.local import Local
from runner.executors.slurm import Slurm
from runner.plan import Plan
from runner.request import Event, ExecutorName, Listener
from tests.runner import slurm_stub
from tests.runner.forked import forked_workers

LOOPBACK = "127.0.0.1"


@dataclass
class Place:
    """This machine, and what all places have in common."""

    name: ExecutorName = "local"
    events: list[Event] = field(default_factory=list)

    def executor(self, store: Store, run_id: str) -> Executor:
        return Local(store)

    def workers(self) -> Any:
        return forked_workers()

    def lose_machine(self) -> None:
        """Take the machine away that measures; what measures here is the run itself."""
        raise KeyboardInterrupt

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Have `execute` run plans here."""

        def make(name: str, store: Store, run_id: str) -> Executor:
            assert name == self.name
            return self.executor(store, run_id)

        self.events.clear()
        with self.workers(), mock.patch("runner.execute.make_executor", make):
            yield

    def run(self, plan: Plan, listener: Listener | None = None) -> Outcome:
        """Execute a plan; threads may do so at once."""

        def listen(event: Event) -> None:
            self.events.append(event)
            if listener is not None:
                listener(event)

        return execute(plan, listen)


@dataclass
class StubbedSlurm(Place):
    """The Slurm of `slurm_stub`."""

    name: ExecutorName = "slurm"
    folder: Path = Path()
    controller: Any = None

    def executor(self, store: Store, run_id: str) -> Executor:
        spool = store.path.resolve() / "fleet"
        backend = Slurm(spool, run_id, python=str(self.folder / "python"), grace_seconds=2.0)
        return Fleet(store, backend, poll_seconds=0.05)

    def workers(self) -> Any:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return mock.patch.dict(
            os.environ, {"PATH": path, "TOKENMARK_LANE_FOLDER": str(self.folder)}
        )

    def lose_machine(self) -> None:
        self.controller.lose_node()


@contextmanager
def stubbed_slurm(folder: Path) -> Iterator[Place]:
    slurm_stub.install(folder)
    controller = slurm_stub.Controller(folder)
    try:
        yield StubbedSlurm(folder=folder, controller=controller)
    finally:
        controller.close()


@dataclass
class RayPlace(Place):
    """A Ray cluster of three nodes on this machine: a head without processors, and two hosts."""

    name: ExecutorName = "ray"
    cluster: Any = None
    backend: Any = None
    nodes: dict[str, Any] = field(default_factory=dict)
    added: int = 0

    def executor(self, store: Store, run_id: str) -> Executor:
        from runner.executors.ray_cluster import RayCluster

        self.backend = RayCluster.connect()
        return Fleet(store, self.backend)

    def workers(self) -> Any:
        return nullcontext()

    def add_host(self) -> None:
        host = f"host-{self.added}"
        self.added += 1
        self.nodes[host] = self.cluster.add_node(
            num_cpus=1,
            object_store_memory=80 * 2**20,
            node_ip_address=LOOPBACK,
            labels={"tokenmark-host": host},
        )

    def lose_machine(self) -> None:
        """Kill the node that works, with all of its processes; another one joins in its place."""
        [flight] = self.backend.flying.values()
        node = self.nodes.pop(flight.host)
        self.cluster.remove_node(node, allow_graceful=False)
        self.add_host()


@contextmanager
def ray_cluster() -> Iterator[Place]:
    import ray
    from ray.cluster_utils import Cluster

    with (
        mock.patch.dict(os.environ, {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}),
        # Otherwise the driver takes the loopback for a name of the machine's own address.
        mock.patch("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False),
    ):
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "node_ip_address": LOOPBACK,
                "object_store_memory": 80 * 2**20,
            },
        )
        place = RayPlace(cluster=cluster)
        try:
            place.add_host()
            place.add_host()
            cluster.wait_for_nodes()
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            yield place
        finally:
            ray.shutdown()
            cluster.shutdown()


SLURM_CONF = """
ClusterName=tokenmark
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={port_of_node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SchedulerParameters=sched_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class RealSlurm(Place):
    """A Slurm of one node on this machine."""

    name: ExecutorName = "slurm"
    host: str = ""
    conf: Path = Path()

    def executor(self, store: Store, run_id: str) -> Executor:
        return Fleet(store, Slurm.connect(store, run_id))

    def workers(self) -> Any:
        return mock.patch.dict(os.environ, {"SLURM_CONF": str(self.conf)})

    def lose_machine(self) -> None:
        """Have Slurm give the node up, and its job with it; then take it back."""
        for state in ("DOWN", "RESUME"):
            subprocess.run(
                ["scontrol", "update", f"NodeName={self.host}", f"State={state}", "Reason=test"],
                check=True,
            )


@contextmanager
def real_slurm(folder: Path, ports: tuple[int, int]) -> Iterator[Place]:
    """Start munge and Slurm; their sockets need a short path, and they run as root only."""
    host = os.uname().nodename
    for name in ("state", "spool"):
        (folder / name).mkdir()
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    conf = folder / "slurm.conf"
    conf.write_text(
        SLURM_CONF.format(host=host, folder=folder, port=ports[0], port_of_node=ports[1])
    )
    munge = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("key-file", "seed-file")]
    munge += [f"--socket={folder}/munge.sock", f"--pid-file={folder}/munged.pid"]
    daemons = [
        ["munged", "--foreground", "--force", *munge, f"--log-file={folder}/munged.log"],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D"],
    ]
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    started = []
    try:
        for command in daemons:
            path = shutil.which(command[0])
            assert path is not None
            started.append(
                subprocess.Popen(
                    [path, *command[1:]],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            time.sleep(1.0)
        _wait_for_idle(environment)
        yield RealSlurm(host=host, conf=conf)
    finally:
        for daemon in reversed(started):
            daemon.terminate()
            daemon.wait(timeout=30)


def _wait_for_idle(environment: dict[str, str]) -> None:
    for _ in range(60):
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%T"], env=environment, capture_output=True, text=True
        )
        if done.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    raise RuntimeError(f"Slurm did not come up: {done.stdout}{done.stderr}")
