"""From a request to experiments: expand the matrix, refuse nonsense, skip what is known."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from hardware import detect
from hardware.profile import Profile
from methods.base import Method
from models.base import Unsupported
from models.loading import (
    LoadSettings,
    ModelError,
    capabilities,
    donor_hash,
    embedded_models,
    fetch,
    weights_hash,
)
from results.store import Store
from runner.capabilities import CONVENTIONS, taken_as
from runner.corpus import corpus_metrics
from runner.keys import PROTOCOL_VERSION, digest, method_source, shared_source, versions
from runner.registry import Registry
from runner.request import Request, UsageError
from runner.settings import build, format_spec, parse_spec
from runner.spec import CellSpec, ExperimentSpec
from tasks.base import Item, Task

# Relative difference in speed that counts as none, by kind of device (design: 2% GPU, 5% CPU).
SPEED_MARGIN = {"cpu": 0.05, "cuda": 0.02}
# Loss of a fraction metric that still counts as "no loss".
QUALITY_MARGIN = 0.02
# Loading, calibration, warm-up and scoring of an experiment, at the very most.
_OTHER_SECONDS = 7200.0
_LONGEST_CPU_SECONDS = 1e9  # what the kernel takes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do.

    Attributes:
        run_id: Name of the run.
        request: What was asked.
        experiments: To be measured, in order.
        cells: (experiment_id, cell_id) of every cell of the answer, cached ones included, in the
            order of the request.
        cached: Cells that are there already: method, task, model.
        skipped: Cells that cannot be: method, task, model, reason.
    """

    run_id: str
    request: Request
    experiments: list[ExperimentSpec] = field(default_factory=list)
    cells: list[tuple[str, str]] = field(default_factory=list)
    cached: list[dict[str, str]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    @property
    def estimate_seconds(self) -> float | None:
        """Seconds it will take, judged by earlier samples of the same methods; None if unknown."""
        store = Store(self.request.store)
        known: dict[tuple[str, str, str], list[float]] = {}
        for experiment_id in store.experiment_ids():
            experiment = store.experiment(experiment_id)
            names = {cell.cell_id: cell.method for cell in store.cells(experiment_id)}
            for sample in store.samples(experiment_id):
                if sample.cell_id in names:
                    key = (names[sample.cell_id], experiment.task, experiment.model)
                    known.setdefault(key, []).append(sample.seconds)
        total = 0.0
        for spec in self.experiments:
            task, model = parse_spec(spec.task).name, parse_spec(spec.model).name
            for cell in spec.cells:
                seconds = known.get((cell.name, task, model))
                if seconds is None:
                    return None
                total += sum(seconds) / len(seconds) * cell.num_items * spec.repeats
        return total

    def describe(self) -> list[dict[str, str]]:
        """Return one row a cell: what happens to it, and why."""
        rows = [
            {
                "method": cell.method,
                "task": spec.task,
                "model": spec.model,
                "items": str(cell.num_items),
                "repeats": str(spec.repeats),
                "what": "baseline, measured with the others" if index == 0 else "measured",
            }
            for spec in self.experiments
            for index, cell in enumerate(spec.cells)
        ]
        blank = {"items": "", "repeats": ""}
        rows += [{**cell, **blank, "what": "cached"} for cell in self.cached]
        for cell in self.skipped:
            kept = {key: cell[key] for key in ("method", "task", "model")}
            rows.append({**kept, **blank, "what": f"skipped: {cell['reason']}"})
        return rows


def make_plan(request: Request) -> Plan:
    """Expand a request.

    Raises:
        UsageError: A name or parameter is wrong, or a model or its data cannot be had.
    """
    registry = Registry(request.plugins)
    try:
        profile = detect.select(request.hardware)
    except LookupError as error:
        raise UsageError(str(error)) from error
    started = datetime.now(UTC)
    plan = Plan(run_id=f"{started:%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}", request=request)
    store = Store(request.store)
    finished = {
        cell_id: experiment_id
        for cell_id, experiment_id in store.finished_cells(("ok", "unsupported")).items()
        if store.is_sealed(experiment_id)
    }
    for task_text in request.tasks:
        spec = parse_spec(task_text)
        task = build(registry.load_task(spec.name), spec.params, f"task {spec.name!r}")
        methods = _methods(
            request.methods_of(task_text), request.method_limits.get(task_text, {}), registry
        )
        for model_text in request.models_of(task_text):
            _plan_experiment(
                plan, registry, profile, store, finished, task, task_text, model_text, methods
            )
    return plan


@dataclass(frozen=True)
class _Wanted:
    spec: str
    name: str
    method: Method[Any]
    limit: int | None = None  # of its own


def _methods(texts: Sequence[str], limits: Mapping[str, int], registry: Registry) -> list[_Wanted]:
    """Return the methods in order, each once, with the limits of their own."""
    own = {_wanted(text, registry).spec: limit for text, limit in limits.items()}
    found: dict[str, _Wanted] = {}
    for text in texts:
        wanted = _wanted(text, registry)
        found.setdefault(wanted.spec, replace(wanted, limit=own.get(wanted.spec)))
    return list(found.values())


def _wanted(text: str, registry: Registry) -> _Wanted:
    spec = parse_spec(text)
    method = build(registry.load_method(spec.name), spec.params, f"method {spec.name!r}")
    return _Wanted(format_spec(method, spec.name), spec.name, method)


def _baseline_first(wanted: list[_Wanted], capability: str, registry: Registry) -> None:
    """Put the baseline in front; the capability's own joins where none was asked for.

    Raises:
        UsageError: The capability has none, or it has a limit of its own.
    """
    baselines = [each for each in wanted if each.method.role == "baseline"]
    if baselines:
        if baselines[0].limit is not None:
            raise UsageError(
                f"{baselines[0].spec!r} is the baseline and takes no limit of its own: the others "
                "are compared with it on each of their items."
            )
        wanted.remove(baselines[0])
        wanted.insert(0, baselines[0])
        return
    if capability not in CONVENTIONS:
        raise UsageError(
            f"no baseline among the methods: name one that takes a {capability} with --method."
        )
    name = CONVENTIONS[capability].baseline
    wanted.insert(0, _Wanted(name, name, registry.load_method(name)()))


def _plan_experiment(
    plan: Plan,
    registry: Registry,
    profile: Profile,
    store: Store,
    finished: dict[str, str],
    task: Task[Any],
    task_text: str,
    model_text: str,
    methods: Sequence[_Wanted],
) -> None:
    request = plan.request
    task_name = parse_spec(task_text).name
    task_spec = format_spec(task, task_name)
    model_id, settings = _model(model_text, registry)
    model_spec = format_spec(settings, model_id)

    def skip(each: _Wanted, reason: str) -> None:
        plan.skipped.append(
            {"method": each.spec, "task": task_spec, "model": model_spec, "reason": reason}
        )

    offered = _offered(model_id, settings, offline=request.offline)
    capability = taken_as(task.capability, offered)
    fitting = [each for each in methods if each.method.capability == capability]
    if fitting or request.names_methods:
        for each in methods:
            takes = each.method.capability
            if takes != capability:
                skip(each, f"it changes a {takes}, the task runs a {capability}")
    if offered and capability not in offered:
        for each in methods:
            skip(each, f"the task runs a {task.capability}, the model is {' or '.join(offered)}")
        return
    if not fitting and request.names_methods:
        return
    # A suite whose methods are of another kind leaves the baseline.
    _baseline_first(fitting, capability, registry)
    if request.scenario == "throughput":
        for each in fitting:
            skip(each, "the throughput scenario needs batches, which no text model here runs yet")
        return
    limit = request.limit if request.limit is not None else _suite_limit(request, task_text)
    try:
        task.conditions()
        items: list[Item] = list(islice(task.items(), limit))
        task_hash = task.content_hash()
        fetch(model_id, offline=request.offline, revision=settings.revision)
        model_hash = weights_hash(model_id, settings)
    except (ModelError, Unsupported) as error:
        raise UsageError(str(error)) from error
    except ValueError as error:  # a setting that only its data can refute, `mteb:task=`
        raise UsageError(f"{task_spec}: {error}") from error
    if not items:
        raise UsageError(f"task {task_name!r} has no items to run; its limit is {limit}.")
    if corpus_metrics(task) and (limited := [each.spec for each in fitting if each.limit]):
        raise UsageError(
            f"{task_spec} is judged on all outputs together, so all methods must run the same "
            f"items; {limited[0]!r} has a limit of its own."
        )
    conditions = {
        "protocol": PROTOCOL_VERSION,
        "task": task_spec,
        "task_hash": task_hash,
        "items": [item.id for item in items],
        "model": model_spec,
        "model_hash": model_hash,
        "hardware": profile.name,
        "machine": detect.machine_id(),
        "scenario": request.scenario,
        "seed": request.seed,
        "repeats": request.repeats,
        "source": shared_source(),
        "versions": versions(),
    }
    if request.audit:
        conditions["audit"] = True  # it changes the order, and the row must carry its result
    cells = [_cell(each, conditions, registry, task) for each in fitting]
    missing = [c for c in cells if request.fresh or c.cell_id not in finished]
    if missing and cells[0] not in missing:
        # Ratios are taken within one process: the baseline is measured again beside new methods.
        missing.insert(0, cells[0])
    experiment_id = ""
    if missing:
        experiment_id = _experiment_id(store, missing, request.fresh)
        margin = SPEED_MARGIN[profile.kind]
        plan.experiments.append(
            ExperimentSpec(
                experiment_id=experiment_id,
                run_id=plan.run_id,
                task=task_spec,
                task_hash=task_hash,
                task_version=task.version,
                model=model_spec,
                model_hash=model_hash,
                hardware=profile.name,
                scenario=request.scenario,
                seed=request.seed,
                repeats=request.repeats,
                items=[item.id for item in items],
                groups=[item.group or item.id for item in items],
                cells=missing,
                store=str(request.store.resolve()),
                plugins=[str(path.resolve()) for path in request.plugins],
                sample_timeout=request.timeout,
                memory_bytes=request.memory_bytes or _usable_memory(),
                cpu_seconds=_cpu_seconds(request, sum(cell.num_items for cell in missing)),
                audit=request.audit,
                offline=request.offline,
                margin=margin,
                quality_margin=QUALITY_MARGIN,
                scale="embedded" if _is_embedded(model_id, task) else "paper",
            )
        )
    for cell in cells:
        if cell in missing:
            plan.cells.append((experiment_id, cell.cell_id))
        else:
            plan.cells.append((finished[cell.cell_id], cell.cell_id))
            plan.cached.append({"method": cell.method, "task": task_spec, "model": model_spec})


def _cell(
    wanted: _Wanted, conditions: dict[str, Any], registry: Registry, task: Task[Any]
) -> CellSpec:
    entry = registry.find("method", wanted.name)
    params = wanted.method.parameters()
    items = conditions["items"][: wanted.limit]
    key = digest(
        {
            **conditions,
            "items": items,
            **_named_hashes(params),
            "method": wanted.name,
            "params": params,
            "method_source": method_source(entry.source),
        }
    )
    temperature = float(task.parameters().get("temperature", 0.0))
    return CellSpec(
        cell_id=key[:24],
        method=wanted.spec,
        name=wanted.name,
        params=params,
        num_items=len(items),
        family=entry.family,
        role=wanted.method.role,
        declared_output=wanted.method.declared_output(temperature).value,
    )


def _named_hashes(params: Mapping[str, Any]) -> dict[str, str]:
    """Return the hashes of other files that a method's parameters name and its work depends on."""
    found = {}
    for name in ("draft", "donor"):
        value = params.get(name)
        if not isinstance(value, str):
            continue
        # What is no file (`layers:4`, `same`), or is not there: the method itself says why.
        with suppress(ModelError):
            found[f"{name}_hash"] = (
                donor_hash(value) if name == "donor" else weights_hash(value, LoadSettings())
            )
    return found


def _suite_limit(request: Request, task_text: str) -> int | None:
    """Return the suite's limit for a task: its own, or that of the only one of its name."""
    if task_text in request.limits or task_text in request.task_methods:
        return request.limits.get(task_text)
    name = parse_spec(task_text).name
    named = [limit for text, limit in request.limits.items() if parse_spec(text).name == name]
    return named[0] if len(named) == 1 else None


def _experiment_id(store: Store, cells: Sequence[CellSpec], fresh: bool) -> str:
    """Return the id of the first attempt at these cells that is not over."""
    key = digest(sorted(cell.cell_id for cell in cells))[:16]
    attempt = 1
    while True:
        experiment_id = f"{key}-{attempt}"
        begun = (store.shard(experiment_id) / "experiment.json").exists()
        if not begun or (not fresh and not store.is_sealed(experiment_id)):
            return experiment_id
        attempt += 1


def _offered(model_id: str, settings: LoadSettings, *, offline: bool) -> tuple[str, ...]:
    """Return what a model can be loaded as; () where that is not known."""
    if ":" in model_id:
        # Its files say it. Where they are not to be had, the plan says so further down.
        with suppress(ModelError):
            fetch(model_id, offline=offline, revision=settings.revision)
    return capabilities(model_id, settings.revision)


def _model(text: str, registry: Registry) -> tuple[str, LoadSettings]:
    spec = parse_spec(text)
    if not spec.name.startswith(("hf:", "path:")):
        registry.find("model", spec.name)
    return spec.name, build(LoadSettings, spec.params, f"model {spec.name!r}")


def _is_embedded(model_id: str, task: Task[Any]) -> bool:
    return model_id in embedded_models() or task.scale == "embedded"


def _cpu_seconds(request: Request, samples: int) -> int:
    """Return the processor time that a worker can need at most, with time for all else.

    It ends a worker that burns time where no clock of ours looks, in threads that a method left.
    """
    cores = os.cpu_count() or 1
    measuring = 2 * request.timeout * request.repeats * samples
    return math.ceil(min(cores * (_OTHER_SECONDS + measuring), _LONGEST_CPU_SECONDS))


def _usable_memory() -> int:
    """Return nine tenths of the machine's memory, in bytes."""
    pages: int = os.sysconf("SC_PHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE") * 9 // 10
