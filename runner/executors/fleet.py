"""Experiments on other machines: sent, sent again where a machine was lost, collected as shards.

An experiment is measured whole on one machine: its pairs are paired there. So a machine that is
lost takes its samples with it, and the experiment begins anew on another. What comes back is held
against what was asked and against its own manifest before it enters the store, in one step; what
comes twice enters once. No decision compares the clocks of two machines: whoever measures an
experiment holds a lock of the kernel, waiting is counted on this machine's clock, and the first
whole delivery counts.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from results.store import Store, StoreError
from runner.executors.node import DELIVERY, Job
from runner.indexing import copy_shard, take_in
from runner.request import Event, Listener, UsageError
from runner.settings import parse_spec
from runner.spec import ExperimentSpec
from runner.supervise import OutOfTime
from runner.system import exclusive


class Happening(NamedTuple):
    """What a backend has to say about a job.

    Kinds: `progress` (`event` says how far), `delivered` (`delivery` is the folder), `lost`
    (`reason` says how: the machine is gone, or refused).
    """

    kind: Literal["progress", "delivered", "lost"]
    experiment_id: str
    event: Event | None = None
    delivery: Path = Path()
    reason: str = ""


class Backend(Protocol):
    """A scheduler of other machines: sends jobs there and says what became of them."""

    @property
    def title(self) -> str:
        """Name for people."""
        ...

    def room(self) -> int:
        """Return how many jobs it would take now."""
        ...

    def submit(self, jobs: Sequence[Job]) -> None:
        """Start jobs, or take up those that an interrupted run has left with the scheduler.

        Raises:
            runner.request.UsageError: The scheduler takes none of them; says why.
        """
        ...

    def happenings(self, seconds: float) -> Iterator[Happening]:
        """Yield what happened since the last call; wait that long at most."""
        ...

    def forget(self, experiment_id: str) -> None:
        """Remove what was delivered and stop what still measures it."""
        ...

    def close(self) -> None:
        """Stop everything that is running."""
        ...


class BadDelivery(Exception):
    """A delivery is not what was asked for, or not whole."""


@dataclass
class Fleet:
    """Sends experiments to a backend and collects them.

    Attributes:
        store: Where shards end up.
        backend: Who has the machines.
        attempts: Machines that an experiment may lose before its cells fail.
        patience_seconds: How long a backend may have no place for anything at all.
        poll_seconds: How often the backend is asked.
    """

    store: Store
    backend: Backend
    attempts: int = 3
    patience_seconds: float = 600.0
    poll_seconds: float = 0.5

    def run(
        self, experiments: Sequence[ExperimentSpec], listener: Listener, deadline: float
    ) -> None:
        """Measure experiments, in their order as far as there is room."""
        if experiments:
            with ExitStack() as closing:
                closing.callback(self.backend.close)
                _Round(self, listener, experiments).run(deadline)


@dataclass
class _Flight:
    """An experiment that is somewhere else."""

    spec: ExperimentSpec
    held: ExitStack
    lost: int = 0


@dataclass
class _Round:
    """One run of a fleet."""

    fleet: Fleet
    listener: Listener
    experiments: Sequence[ExperimentSpec]
    flying: dict[str, _Flight] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    trouble: StoreError | None = None
    has_flown: bool = False
    refusal: str = ""

    def __post_init__(self) -> None:
        self.waiting = deque(self.experiments)
        self.again: deque[_Flight] = deque()
        self.store, self.backend = self.fleet.store, self.fleet.backend
        self.total = sum(spec.num_samples for spec in self.experiments)

    def run(self, deadline: float) -> None:
        """Go on until every experiment has ended.

        Raises:
            OutOfTime, StoreError, UsageError: As an executor and its backend do.
        """
        count = len(self.experiments)
        title = f"{count} experiment{'s' if count > 1 else ''} on {self.backend.title}"
        self.listener(Event(kind="experiment", title=title, total=self.total))
        since = time.monotonic()
        try:
            while self.waiting or self.again or self.flying:
                if time.monotonic() > deadline:
                    raise OutOfTime
                self._launch()
                had_place = bool(self.flying)
                for happening in self.backend.happenings(self.fleet.poll_seconds):
                    self._handle(happening)
                if had_place or self._others_measure():
                    since = time.monotonic()
                elif time.monotonic() - since > self.fleet.patience_seconds:
                    self._give_up(self.refusal or f"{self.backend.title} had no machine for it")
        finally:
            for flight in (*self.flying.values(), *self.again):
                flight.held.close()
        if self.trouble is not None:
            raise self.trouble

    def _launch(self) -> None:
        """Send what there is room for; lost ones first."""
        room = self.backend.room()
        flights = [self.again.popleft() for _ in range(min(room, len(self.again)))]
        for _ in range(len(self.waiting)):
            if len(flights) >= room:
                break
            spec = self.waiting.popleft()
            held = ExitStack()
            if not held.enter_context(exclusive(self.store, spec.experiment_id)):
                held.close()
                self.waiting.append(spec)  # asked again when it is another's no more
            elif self.store.is_sealed(spec.experiment_id):
                held.close()
                self._count(spec, spec.num_samples)  # another run has measured it meanwhile
            else:
                flights.append(_Flight(spec, held))
        if not flights:
            return
        self.flying |= {flight.spec.experiment_id: flight for flight in flights}
        try:
            self.backend.submit([Job.of(flight.spec) for flight in flights])
        except UsageError as error:
            if not self.has_flown:
                raise
            # It took others before: the last machine is gone, or the scheduler is in trouble.
            self.refusal = str(error)
            for flight in flights:
                del self.flying[flight.spec.experiment_id]
                self.again.append(flight)
        self.has_flown = True

    def _others_measure(self) -> bool:
        """Return whether all that is waiting is held by another run."""
        for spec in self.waiting:
            with exclusive(self.store, spec.experiment_id) as is_ours:
                # One that has been delivered in this moment is taken note of by the next launch.
                if is_ours and not self.store.is_sealed(spec.experiment_id):
                    return False
        return not self.again and bool(self.waiting)

    def _handle(self, happening: Happening) -> None:
        flight = self.flying.get(happening.experiment_id)
        if flight is None:  # it came twice, unless there was no room for it
            if happening.experiment_id not in self.kept:
                self.backend.forget(happening.experiment_id)
        elif happening.kind == "lost":
            self._lose(flight, happening.reason)
        elif happening.kind == "delivered":
            self._collect(flight, happening.delivery)
        elif happening.event is not None and happening.event.kind == "sample":
            event = happening.event
            self._count(flight.spec, event.done, event)

    def _count(self, spec: ExperimentSpec, done: int, event: Event | None = None) -> None:
        self.done[spec.experiment_id] = done
        self._say(
            spec,
            kind="sample",
            method=event.method if event else spec.title,
            item=event.item if event else self.backend.title,
            seconds=event.seconds if event else 0.0,
            done=sum(self.done.values()),
            total=self.total,
        )

    def _collect(self, flight: _Flight, delivery: Path) -> None:
        spec = flight.spec
        try:
            endings = collect(self.store, spec, delivery)
        except BadDelivery as error:
            self._lose(flight, str(error))
            return
        except StoreError as error:
            # The delivery stays where it is: the same command takes it in when there is room.
            self.trouble = self.trouble or error
            self.kept.add(spec.experiment_id)
            self._end(flight)
            self._fail(spec, str(error))
            return
        self.backend.forget(spec.experiment_id)
        self._end(flight)
        self._count(spec, spec.num_samples)
        for cell in spec.cells:
            ending = endings.get(cell.method, {"status": "failed", "detail": "it did not end"})
            self._say(spec, kind="cell", method=cell.method, **ending)

    def _lose(self, flight: _Flight, reason: str) -> None:
        """Send an experiment again, or end its cells where that has been done often enough."""
        spec = flight.spec
        self.backend.forget(spec.experiment_id)
        self._count(spec, 0)
        flight.lost += 1
        if flight.lost < self.fleet.attempts:
            self._say(spec, kind="restart", detail=reason)
            del self.flying[spec.experiment_id]
            self.again.append(flight)
            return
        self._end(flight)
        self._fail(spec, f"{reason} (attempt {flight.lost}, the last one)")

    def _give_up(self, reason: str) -> None:
        for flight in self.again:
            flight.held.close()
            self._fail(flight.spec, reason)
        for spec in self.waiting:
            self._fail(spec, reason)
        self.again.clear()
        self.waiting.clear()

    def _end(self, flight: _Flight) -> None:
        del self.flying[flight.spec.experiment_id]
        flight.held.close()

    def _fail(self, spec: ExperimentSpec, reason: str) -> None:
        for cell in spec.cells:
            self._say(spec, kind="cell", method=cell.method, status="failed", detail=reason)

    def _say(self, spec: ExperimentSpec, **event: object) -> None:
        self.listener(Event(experiment=spec.experiment_id, title=spec.title, **event))  # type: ignore[arg-type]  # the fields of an event


def collect(store: Store, spec: ExperimentSpec, delivery: Path) -> dict[str, dict[str, str]]:
    """Take a delivered shard into a store, once.

    A sealed shard in the store stays; what an ended attempt left there unsealed is replaced whole,
    since samples of two machines make no pairs.

    Args:
        store: Where it goes; the caller holds the experiment.
        spec: What was asked.
        delivery: As `node.measure` made it.

    Returns:
        How each cell ended, `status` and `detail`, by method.

    Raises:
        BadDelivery: It is damaged, or answers another question.
        StoreError: The store cannot take it.
    """
    experiment_id = spec.experiment_id
    try:
        endings: dict[str, dict[str, str]] = json.loads(
            (delivery / DELIVERY).read_text(encoding="utf-8")
        )["endings"]
        source = Store(delivery)
        delivered = source.experiment_ids()
        if delivered not in ([], [experiment_id]):
            raise BadDelivery(f"it holds the shards {delivered}, asked for was {experiment_id}")
        if delivered:
            _check_answer(source, spec)
    except (OSError, ValueError, KeyError, StoreError) as error:
        raise BadDelivery(f"the delivery cannot be read: {error}") from error
    if not delivered or store.is_sealed(experiment_id):
        return endings
    if store.shard(experiment_id).exists():
        store.discard(experiment_id)
    if source.is_sealed(experiment_id):
        take_in(delivery, store.path)
        return endings
    try:
        copy_shard(source, store, experiment_id)
    except (OSError, shutil.Error) as error:
        raise StoreError(
            f"{store.path}: shard {experiment_id} cannot be copied to it: {error}."
        ) from error
    return endings


def _check_answer(source: Store, spec: ExperimentSpec) -> None:
    record = source.experiment(spec.experiment_id)
    asked = {
        "task": parse_spec(spec.task).name,
        "task_hash": spec.task_hash,
        "model": parse_spec(spec.model).name,
        "model_hash": spec.model_hash,
        "hardware": spec.hardware,
        "scenario": spec.scenario,
        "seed": spec.seed,
        "repeats": spec.repeats,
        "items": spec.items,
        "cells": [cell.cell_id for cell in spec.cells],
    }
    if other := [name for name in asked if getattr(record, name) != asked[name]]:
        raise BadDelivery(f"it answers another question: {', '.join(other)} differ")
    if source.is_sealed(spec.experiment_id) and (damage := source.damage(spec.experiment_id)):
        raise BadDelivery(f"it is damaged: {damage[0]}")
