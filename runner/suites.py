"""Suites: a TOML file that names methods, tasks and models, read into a `Request`.

```toml
title = "What a laptop can measure in minutes"
methods = ["autoregressive", "token-recycling:tree_nodes=32"]
models = ["smollm2-135m"]
repeats = 3                # and hardware, scenario, seed, timeout: all optional

[[task]]
spec = "humaneval:max_new_tokens=128"
limit = 16                 # all items without it
methods = ["autoregressive", "beam-search"]  # in the place of the suite's, as `models` would be
limits = { beam-search = 8 }  # the first 8 of them for a slow method
```
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import cast

from runner.registry import Registry, read_toml
from runner.request import (
    EXECUTORS,
    SCENARIOS,
    ExecutorName,
    Request,
    Scenario,
    UsageError,
)
from runner.settings import MethodSpec, Spec, choose, from_table, parse_method, parse_spec

DEFAULT_SUITE = "embedded"


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """A `[[task]]` table.

    Attributes:
        spec: `name[:key=value,…]`.
        limit: Items; None for all.
        methods: Specs of the methods for this task; empty for the suite's.
        models: Ids of the models for this task; empty for the suite's.
        limits: Items by the spec of a method, for methods that are too slow for all of them: the
            first so many of the task's.
    """

    spec: str
    limit: int | None = None
    methods: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    limits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}.")
        for method, limit in self.limits.items():
            if not 1 <= limit <= (self.limit or limit):
                raise ValueError(
                    f"limits.{method} must lie in [1, {self.limit or 'items'}], got {limit}."
                )


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A suite file, key by key.

    Attributes:
        title: One line for people.
        methods: Specs; a baseline is added where the list has none.
        models: Model ids.
        task: The `[[task]]` tables.
        hardware: `auto` or a profile's name.
        scenario: How lengths are treated.
        seed: Seed of order, sampling and resampling.
        repeats: Measurements of each item and method.
        timeout: Seconds that one sample may take.
    """

    title: str = ""
    methods: tuple[str, ...]
    models: tuple[str, ...]
    task: tuple[SuiteTask, ...]
    hardware: str = Request.hardware
    scenario: Scenario = Request.scenario
    seed: int = Request.seed
    repeats: int = Request.repeats
    timeout: float = Request.timeout

    def __post_init__(self) -> None:
        for name in ("methods", "models", "task"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; a suite needs at least one.")
        check_numbers(repeats=self.repeats, timeout=self.timeout, seed=self.seed)
        specs = [task.spec for task in self.task]
        if twice := next((spec for spec in specs if specs.count(spec) > 1), None):
            raise ValueError(f"task {twice!r} stands there twice.")
        for task in self.task:
            for method in task.limits:
                choose(f"task {task.spec!r}: limits", method, task.methods or self.methods)

    def needs(self) -> tuple[str, ...]:
        """Return the specs of the models and tasks that the suite runs, each once."""
        models = chain(self.models, *(task.models for task in self.task))
        return tuple(dict.fromkeys(chain(models, (task.spec for task in self.task))))

    def request(self, label: str) -> Request:
        """Return what the suite asks the runner to do."""
        return Request(
            methods=self.methods,
            tasks=tuple(task.spec for task in self.task),
            models=self.models,
            hardware=self.hardware,
            limits={task.spec: task.limit for task in self.task if task.limit is not None},
            task_methods={task.spec: task.methods for task in self.task if task.methods},
            task_models={task.spec: task.models for task in self.task if task.models},
            method_limits={task.spec: task.limits for task in self.task if task.limits},
            seed=self.seed,
            repeats=self.repeats,
            scenario=self.scenario,
            timeout=self.timeout,
            label=label,
        )


def check_numbers(*, repeats: int, timeout: float, limit: int | None = None, seed: int = 0) -> None:
    """Check what the types of a request do not.

    Raises:
        ValueError: A number is out of its range.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    if not 0 < timeout < float("inf"):
        raise ValueError(f"timeout must be a number of seconds above 0, got {timeout:g}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}.")


def seconds_of(text: str) -> float:
    """Read a duration: `90s`, `30m`, `2h`, or seconds without a unit.

    Raises:
        UsageError: It is none, or not above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip().lower())
    seconds = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if not seconds > 0:
        raise UsageError(f"budget must be a duration such as 90s, 30m or 2h, got {text!r}.")
    return seconds


def load_suite(name: str, registry: Registry) -> Suite:
    """Read a suite by its name below `suites/`, or by the path of a `.toml` file.

    Raises:
        UsageError: There is none, a key is unknown, missing or of the wrong type.
    """
    if name.endswith(".toml"):
        path = Path(name)
    else:
        found = registry.find("suite", name).source
        assert found is not None  # every suite is a file
        path = found
    return from_table(Suite, read_toml(path), f"suite {name!r}")


def make_request(
    registry: Registry,
    *,
    suite: str | None = None,
    methods: Sequence[str] = (),
    tasks: Sequence[str] = (),
    models: Sequence[str] = (),
    hardware: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    repeats: int | None = None,
    scenario: str | None = None,
    store: Path = Request.store,
    fresh: bool = False,
    audit: bool = False,
    timeout: float | None = None,
    budget: str | None = None,
    offline: bool = False,
    executor: str = "local",
) -> Request:
    """Return the request that a suite and flags make together.

    What no flag says comes from the suite, `embedded` unless another one is named. Methods, tasks
    or models that are given replace the suite's; a bare name that the suite holds with parameters
    stands for the suite's entry. The suite's limits hold for its own tasks, if it was named, and
    where no `limit` is given.

    Raises:
        UsageError: A flag is out of range, a name is unknown, or the suite is wrong. Parameters are
            checked when methods and tasks are made.
    """
    base = load_suite(suite or DEFAULT_SUITE, registry).request(suite or DEFAULT_SUITE)
    is_named = suite is not None
    keeps_limits = is_named or not tasks
    if scenario is not None:
        choose("scenario", scenario, SCENARIOS)
    choose("executor", executor, EXECUTORS)
    request = replace(
        base,
        methods=_narrow(base.methods, methods, is_named, parse_method),
        tasks=_narrow(base.tasks, tasks, is_named),
        models=_narrow(base.models, models, is_named),
        hardware=hardware or base.hardware,
        limit=limit,
        limits=base.limits if keeps_limits else {},
        method_limits=base.method_limits if keeps_limits and limit is None else {},
        names_methods=bool(methods),
        task_methods={} if methods else _with_forms(base.task_methods, base.tasks, tasks),
        task_models={} if models else _with_forms(base.task_models, base.tasks, tasks),
        seed=base.seed if seed is None else seed,
        repeats=base.repeats if repeats is None else repeats,
        scenario=cast(Scenario, scenario or base.scenario),
        store=store,
        fresh=fresh,
        audit=audit,
        timeout=base.timeout if timeout is None else timeout,
        budget=None if budget is None else seconds_of(budget),
        offline=offline,
        executor=cast(ExecutorName, executor),
        plugins=tuple(registry.plugins),
        label=base.label if is_named or not (methods or tasks or models) else "",
    )
    try:
        check_numbers(repeats=request.repeats, timeout=request.timeout, limit=limit)
    except ValueError as error:
        raise UsageError(str(error)) from error
    _check_names(request, registry)
    return request


def _with_forms(
    named: Mapping[str, tuple[str, ...]], held: Sequence[str], wanted: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Add wanted tasks that a suite holds in other forms only, if those forms agree."""
    found = dict(named)
    for text in wanted:
        name = parse_spec(text).name
        forms = {named.get(each, ()) for each in held if parse_spec(each).name == name}
        if text not in held and len(forms) == 1 and (values := forms.pop()):
            found[text] = values
    return found


def _check_names(request: Request, registry: Registry) -> None:
    """Look every name up, which takes no import: a slip of the pen should not wait for torch."""
    for text in chain(request.methods, *request.task_methods.values()):
        for part in parse_method(text).parts:
            registry.find("method", part.name)
    for text in request.tasks:
        registry.find("task", parse_spec(text).name)
    for text in chain(request.models, *request.task_models.values()):
        name = parse_spec(text).name
        if not name.startswith(("hf:", "path:")):
            registry.find("model", name)
    if request.hardware != "auto":
        registry.find("hardware", request.hardware)


def _narrow(
    held: Sequence[str],
    wanted: Sequence[str],
    is_named: bool,
    parse: Callable[[str], Spec | MethodSpec] = parse_spec,
) -> tuple[str, ...]:
    """Return the wanted specs, bare names replaced by what a named suite holds under them."""
    if not wanted:
        return tuple(held)
    result: list[str] = []
    for text in wanted:
        # A task's or model's spec may hold a `+`, which joins methods only.
        spec = parse(text)
        same = [each for each in held if parse(each).name == spec.name]
        result += same if is_named and same and spec.is_bare else [text]
    return tuple(result)
