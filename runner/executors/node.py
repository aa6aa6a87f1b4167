"""What runs on a machine of a fleet: one experiment, watched as at home, and its delivery.

A machine that would compute other keys than the planner, since its code, libraries, weights or
device differ, refuses: a number must not stand under a key that does not describe it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from hardware import catalog, detect, host
from models.loading import LoadSettings, fetch, weights_hash
from results.store import Store
from runner.keys import PROTOCOL_VERSION, file_digest, shared_source, versions
from runner.plan import LONGEST_CPU_SECONDS, usable_memory
from runner.registry import Registry
from runner.request import Event, Listener
from runner.settings import build, parse_spec
from runner.spec import ExperimentSpec
from runner.stacking import source_of
from runner.supervise import Supervisor
from runner.system import die_with_parent, measuring_lane

DELIVERY = "delivery.json"


class Refused(Exception):
    """This machine cannot measure what was sent to it; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """An experiment on its way to another machine: all that it needs beside a checkout.

    Attributes:
        spec: What to measure. Its store is the planner's, and not used there.
        code: What the planner's keys say of the code, see `code_of`.
        plugins: Name and text of each plug-in file, in order.
    """

    spec: ExperimentSpec
    code: dict[str, Any]
    plugins: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, spec: ExperimentSpec) -> Job:
        """Return the job of an experiment, as this machine's files are now."""
        files = [Path(path) for path in spec.plugins]
        return cls(
            spec=spec,
            code=code_of(spec),
            plugins=[(path.name, path.read_text(encoding="utf-8")) for path in files],
        )

    def text(self) -> str:
        """Return the job as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read a file that holds `text`."""
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            spec=ExperimentSpec.of(data["spec"]),
            code=data["code"],
            plugins=[(name, text) for name, text in data["plugins"]],
        )


def code_of(spec: ExperimentSpec) -> dict[str, Any]:
    """Return what the keys of an experiment's cells say of code and libraries."""
    registry = Registry(tuple(Path(path) for path in spec.plugins))
    task = registry.find("task", parse_spec(spec.task).name).source
    return {
        "protocol": PROTOCOL_VERSION,
        "models": shared_source(),
        "task": file_digest([task]) if task else "",
        "methods": {cell.name: source_of(cell.name, registry) for cell in spec.cells},
        **versions(),
    }


def main(job_path: Path, deliver: Path) -> None:
    """Be the machine: measure a job, print events as lines of JSON, put the delivery down.

    Raises:
        Refused: The machine is not the one that was planned for.
        OSError: The delivery cannot be written.
        results.store.StoreError: Nor can the shard.
    """
    # A plain end would leave the scratch folder behind.
    signal.signal(signal.SIGTERM, _leave)
    die_with_parent(signal.SIGTERM)
    measure(Job.read(job_path), deliver, lambda event: print(line_of(event), flush=True))


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def line_of(event: Event) -> str:
    """Return an event as a line of JSON."""
    return json.dumps(dataclasses.asdict(event))


def read_event(line: str | bytes) -> Event | None:
    """Return the event of a line that `line_of` wrote; None for whatever else was printed."""
    try:
        return Event(**json.loads(line))
    except (ValueError, TypeError):
        return None


def measure(job: Job, deliver: Path, listener: Listener) -> None:
    """Measure a job in a scratch store of this machine, and deliver what came of it.

    The delivery is a store of its own with the one shard, whole or not there at all, and beside it
    how each cell ended. A job that was delivered before is left alone.

    Raises:
        Refused, OSError, StoreError: As `main`.
    """
    if deliver.exists():
        return  # the scheduler ran it twice
    with _at_home(job) as spec, measuring_lane():
        endings: dict[str, dict[str, str]] = {}

        def listen(event: Event) -> None:
            if event.kind == "cell":
                endings[event.method] = {"status": event.status, "detail": event.detail}
            listener(event)

        store = Store(Path(spec.store))
        Supervisor(spec, store, listen).run()
        _deliver(store, spec.experiment_id, endings, deliver)


@contextmanager
def _at_home(job: Job) -> Iterator[ExperimentSpec]:
    """Yield the experiment as it runs on this machine, in a folder that goes afterwards.

    Raises:
        Refused: It cannot run here.
    """
    with tempfile.TemporaryDirectory(prefix="tokenmark-", ignore_cleanup_errors=True) as scratch:
        plugins = []
        for number, (name, text) in enumerate(job.plugins):
            path = Path(scratch) / "plugins" / str(number) / Path(name).name
            path.parent.mkdir(parents=True)
            path.write_text(text, encoding="utf-8")
            plugins.append(str(path))
        spec = dataclasses.replace(
            job.spec,
            store=str(Path(scratch) / "store"),
            plugins=plugins,
            # The planner does not know this machine: 0 is all of it, and seconds are of one core.
            memory_bytes=job.spec.memory_bytes or usable_memory(),
            cpu_seconds=min(job.spec.cpu_seconds * (os.cpu_count() or 1), LONGEST_CPU_SECONDS),
        )
        _check(spec, job.code)
        yield spec


def _check(spec: ExperimentSpec, code: Mapping[str, Any]) -> None:
    here = code_of(spec)
    if different := sorted(name for name in code if code[name] != here.get(name)):
        raise Refused(
            f"this machine differs from the planner's in {', '.join(different)}: bring the "
            "checkout to the same commit, and the installation to the same versions."
        )
    profile = catalog.profile(spec.hardware)
    if profile.kind == "cuda":
        found = detect.detect().name
    else:
        found = detect.cpu_profile(host.read_cpu(), catalog.entries()).name
    # `cpu` and `cuda` are any machine of their kind.
    if found != spec.hardware and spec.hardware not in ("cpu", "cuda"):
        raise Refused(f"this machine is {found!r}, the job is for {spec.hardware!r}.")
    model = parse_spec(spec.model)
    settings = build(LoadSettings, model.params, f"model {model.name!r}")
    fetch(model.name, offline=spec.offline, revision=settings.revision)
    if weights_hash(model.name, settings) != spec.model_hash:
        raise Refused(f"the weights of {spec.model!r} on this machine are not the planner's.")


def _deliver(
    store: Store, experiment_id: str, endings: dict[str, dict[str, str]], deliver: Path
) -> None:
    incoming = deliver.with_name(f".{deliver.name}.{os.getpid()}")
    try:
        shard = store.shard(experiment_id)
        target = Store(incoming).shard(experiment_id)
        if shard.exists():
            shutil.copytree(shard, target)
        else:
            incoming.mkdir(parents=True)
        (incoming / DELIVERY).write_text(json.dumps({"endings": endings}, indent=1))
        for path in incoming.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        incoming.rename(deliver)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
