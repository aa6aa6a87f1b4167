"""Ray: each experiment is a task that is pinned to one host and claims all of its processors.

The checkout must lie at the same path on every node. What travels is the job as text, events as
text, and the delivery as an archive; no code of ours is pickled but the few lines of `_measure`.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hardware import catalog
from hardware.profile import Profile
from runner.executors.fleet import Happening
from runner.executors.node import Job, read_event
from runner.registry import ROOT
from runner.request import UsageError

# Label of a Ray node that names its host, where its address does not: containers of one machine.
HOST_LABEL = "tokenmark-host"


def _measure(command: list[str], folder: str, job: str) -> Iterator[tuple[str, bytes]]:
    """Run a job on a node; Ray sends this function by value, so it imports what it needs.

    Yields:
        `event` with a line of what is said, then `delivery` with a tar archive, or `error` with
        the last words.
    """
    import io
    import pathlib
    import subprocess
    import tarfile
    import tempfile
    import time

    with tempfile.TemporaryDirectory(
        prefix="tokenmark-ray-", ignore_cleanup_errors=True
    ) as scratch:
        place = pathlib.Path(scratch)
        (place / "job.json").write_text(job, encoding="utf-8")
        process = None
        try:
            with (place / "log.txt").open("wb") as log:
                process = subprocess.Popen(
                    [*command, "--job", f"{place}/job.json", "--deliver", f"{place}/delivery"],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    cwd=folder,
                )
            assert process.stdout is not None
            told = -1.0
            for line in process.stdout:
                # A sample says how far it is in all: one a second is enough.
                if b'"kind": "sample"' in line:
                    if time.monotonic() - told < 1.0:
                        continue
                    told = time.monotonic()
                yield "event", line
            process.wait()
            if (place / "delivery").is_dir():
                packed = io.BytesIO()
                with tarfile.open(fileobj=packed, mode="w") as archive:
                    archive.add(place / "delivery", arcname=".")
                yield "delivery", packed.getvalue()
            else:
                words = (place / "log.txt").read_bytes().strip().split(b"\n")[-1]
                yield "error", words or f"exit code {process.returncode}".encode()
        finally:
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait()


@dataclass
class _Flight:
    """A job on its way: what Ray knows it by, where it is, where its delivery goes."""

    answers: Any
    host: str
    folder: Path


@dataclass
class RayCluster:
    """A backend of Ray.

    Attributes:
        ray: The package, connected.
        flying: What is out, by experiment.
        avoided: Hosts that have lost or refused an experiment: the last ones to be tried again.
    """

    ray: Any
    flying: dict[str, _Flight] = field(default_factory=dict)
    avoided: dict[str, set[str]] = field(default_factory=dict)

    title = "Ray"

    @classmethod
    def connect(cls) -> RayCluster:
        """Return the backend of the running cluster, the one that RAY_ADDRESS names if it does.

        Raises:
            UsageError: Ray is not installed, or there is no cluster.
        """
        # Ray reports its use to its makers unless told otherwise.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise UsageError(
                "--executor ray needs the extra 'cluster', which is not installed: "
                "pip install -e '.[cluster]' -c constraints.txt"
            ) from error
        if not ray.is_initialized():
            address = os.environ.get("RAY_ADDRESS", "auto")
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except ConnectionError as error:
                raise UsageError(
                    f"there is no Ray cluster at {address!r}: start one with `ray start --head`, "
                    "name one in RAY_ADDRESS, or use --executor local."
                ) from error
        return cls(ray)

    def room(self) -> int:
        """Return how many hosts measure nothing of ours."""
        busy = {flight.host for flight in self.flying.values()}
        return len(hosts(self.ray.nodes()).keys() - busy)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Send each job to a free host that suits it.

        Raises:
            UsageError: No host of the cluster suits it.
        """
        found = hosts(self.ray.nodes())
        for job in jobs:
            profile = catalog.profile(job.spec.hardware)
            suitable = {host: node for host, node in found.items() if suits(node, profile)}
            if not suitable:
                raise UsageError(
                    f"no node of the Ray cluster is a {profile.name!r}: its nodes offer "
                    f"{sorted({name for node in found.values() for name in node['Resources']})}."
                )
            busy = {flight.host for flight in self.flying.values()}
            avoided = self.avoided.get(job.spec.experiment_id, set())
            host = min(suitable, key=lambda each: (each in busy, each in avoided, each))
            self._send(job, host, suitable[host], profile)

    def _send(self, job: Job, host: str, node: Mapping[str, Any], profile: Profile) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        task = self.ray.remote(_measure).options(
            # All of them: nothing else that Ray runs measures with us.
            num_cpus=node["Resources"].get("CPU", 0),
            num_gpus=1 if profile.kind == "cuda" else 0,
            max_retries=0,  # another host is chosen here
            num_returns="streaming",
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )
        command = [sys.executable, str(ROOT / "run.py"), "experiment"]
        self.flying[job.spec.experiment_id] = _Flight(
            task.remote(command, str(ROOT), job.text()),
            host,
            Path(tempfile.mkdtemp(prefix="tokenmark-delivery-")),
        )

    def happenings(self, seconds: float) -> Iterator[Happening]:
        """Yield what the tasks have said."""
        by_answers = {flight.answers: name for name, flight in self.flying.items()}
        if not by_answers:
            time.sleep(seconds)
            return
        ready, _ = self.ray.wait(list(by_answers), num_returns=1, timeout=seconds)
        for answers in ready:
            yield from self._answer(by_answers[answers])

    def _answer(self, experiment_id: str) -> Iterator[Happening]:
        """Yield what the next word of a task is."""
        flight = self.flying[experiment_id]
        try:
            kind, data = self.ray.get(next(flight.answers))
        except StopIteration:
            yield self._lost(experiment_id, "its task ended without a word")
        except self.ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines()
            yield self._lost(experiment_id, f"{type(error).__name__}: {lines[0][:500]}")
        else:
            if kind == "event":
                if event := read_event(data):
                    yield Happening("progress", experiment_id, event)
            elif kind == "delivery":
                delivery = flight.folder / "delivery"
                with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                    archive.extractall(delivery, filter="data")
                yield Happening("delivered", experiment_id, delivery=delivery)
            else:
                words = data.decode(errors="replace")[:500]
                yield self._lost(experiment_id, f"it delivered nothing; it said: {words}")

    def _lost(self, experiment_id: str, reason: str) -> Happening:
        host = self.flying[experiment_id].host
        self.avoided.setdefault(experiment_id, set()).add(host)
        return Happening("lost", experiment_id, reason=f"host {host}: {reason}")

    def forget(self, experiment_id: str) -> None:
        """Cancel what still runs, remove the delivery."""
        flight = self.flying.pop(experiment_id, None)
        if flight is not None:
            self.ray.cancel(flight.answers)
            shutil.rmtree(flight.folder, ignore_errors=True)

    def close(self) -> None:
        """Cancel everything."""
        for experiment_id in list(self.flying):
            self.forget(experiment_id)


def hosts(nodes: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return one node of each host, that with the most processors: a host has one measuring lane.

    Args:
        nodes: As `ray.nodes()` has them.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for node in sorted(nodes, key=lambda node: (node["Resources"].get("CPU", 0), node["NodeID"])):
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1:
            labels = node.get("Labels") or {}
            found[labels.get(HOST_LABEL) or node["NodeManagerAddress"]] = node
    return found


def suits(node: Mapping[str, Any], profile: Profile) -> bool:
    """Return whether a node offers what a profile needs, as far as Ray knows; it looks itself too.

    Ray names a GPU's kind as a resource, `accelerator_type:H100`; a profile `h100-sxm` is one.
    """
    if profile.kind == "cpu":
        return True
    offered = node["Resources"]
    kinds = [name.partition(":")[2].lower() for name in offered if name.startswith("accelerator_")]
    is_kind = profile.name == "cuda" or not kinds
    return offered.get("GPU", 0) >= 1 and (is_kind or any(k in profile.name for k in kinds))
