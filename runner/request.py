"""What a user asks the runner to do, and what the runner says while it does it. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Scenario = Literal["latency", "throughput", "fixed-length"]
SCENARIOS: tuple[Scenario, ...] = ("latency", "throughput", "fixed-length")
ExecutorName = Literal["local", "ray", "slurm"]
EXECUTORS: tuple[ExecutorName, ...] = ("local", "ray", "slurm")


class UsageError(Exception):
    """The user's own mistake: what was wrong, what is allowed, the nearest valid name. Exit 2."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A matrix of cells, from a suite file or from flags.

    Attributes:
        methods: Specs `name[:key=value,…]`; a baseline is added where the list has none.
        tasks: Specs `name[:key=value,…]`.
        models: Model ids: an embedded name, `hf:<id>` or `path:<folder>`, with parameters.
        hardware: `auto` or a profile's name.
        limit: Items of each task; None for all.
        limits: Items by the task's text, from a suite; `limit` wins.
        method_limits: Items by the task's text and the method's, from a suite, for methods that run
            only the first of a task's items; empty where `limit` is given.
        names_methods: Whether the user named `methods`, or they are what a suite has.
        task_methods: Methods by the task's text, from a suite, in the place of `methods`.
        task_models: Models by the task's text, from a suite, in the place of `models`.
        seed: Seed of order, sampling and resampling.
        repeats: Measurements of each item and method.
        scenario: How lengths are treated.
        store: Folder of the results.
        fresh: Measure finished cells again.
        audit: Look for methods that earn their numbers otherwise than it seems.
        timeout: Seconds that one sample may take.
        budget: Seconds that the whole run may take; None for no limit.
        memory_bytes: Host memory that a worker may use; None for nine tenths of the machine's.
        offline: Never reach for the network.
        executor: Where experiments run.
        plugins: Python files that bring methods or tasks.
        label: Name of the suite, for the record.
    """

    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    models: tuple[str, ...]
    hardware: str = "auto"
    limit: int | None = None
    limits: dict[str, int] = field(default_factory=dict)
    method_limits: dict[str, dict[str, int]] = field(default_factory=dict)
    names_methods: bool = False
    task_methods: dict[str, tuple[str, ...]] = field(default_factory=dict)
    task_models: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seed: int = 0
    repeats: int = 1
    scenario: Scenario = "latency"
    store: Path = Path("results/store")
    fresh: bool = False
    audit: bool = False
    timeout: float = 120.0
    budget: float | None = None
    memory_bytes: int | None = None
    offline: bool = False
    executor: ExecutorName = "local"
    plugins: tuple[Path, ...] = ()
    label: str = ""

    def methods_of(self, task: str) -> tuple[str, ...]:
        """Return the methods of a task."""
        return self.task_methods.get(task, self.methods)

    def models_of(self, task: str) -> tuple[str, ...]:
        """Return the models of a task."""
        return self.task_models.get(task, self.models)


@dataclass(frozen=True)
class Event:
    """Something that happened while running; `kind` says what.

    Kinds: `experiment` (one starts), `phase` (loading, calibrating, warming up, measuring,
    scoring, certifying), `sample` (one measured), `cell` (one ended; `status` and `detail` say
    how), `restart` (the worker was started again without the cell that broke it), `run` (all done).
    """

    kind: Literal["experiment", "phase", "sample", "cell", "restart", "run"]
    experiment: str = ""
    title: str = ""
    phase: str = ""
    method: str = ""
    item: str = ""
    status: str = ""
    detail: str = ""
    done: int = 0
    total: int = 0
    seconds: float = 0.0


Listener = Callable[[Event], None]
