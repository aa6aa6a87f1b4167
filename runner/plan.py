"""From a request to experiments: expand the matrix, refuse nonsense, skip what is known."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

from hardware import catalog, detect
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
from results import evidence
from results.statistics import QUALITY_MARGIN, SPEED_MARGIN
from results.store import Store
from runner import budget
from runner.budget import Step
from runner.capabilities import CONVENTIONS, taken_as
from runner.corpus import corpus_metrics
from runner.keys import (
    PROTOCOL_VERSION,
    PartialDigest,
    digest,
    shared_source,
    versions,
    written_pairs,
)
from runner.progress import duration
from runner.registry import Registry
from runner.request import Request, UsageError
from runner.settings import build, format_spec, parse_spec
from runner.spec import CellSpec, ExperimentSpec
from runner.stacking import ImpossibleStack, Made, make_method, source_of
from tasks.base import Item, Task

# Loading, calibration, warm-up and scoring of an experiment, at the very most.
_OTHER_SECONDS = 7200.0
LONGEST_CPU_SECONDS = 10**9  # what the kernel takes


class Answer(NamedTuple):
    """A cell that is there already.

    Attributes:
        pair: Ids of experiment and cell.
        method, task, model: Specs; task and model as the request writes them.
    """

    pair: tuple[str, str]
    method: str
    task: str
    model: str


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
        answers: The cached ones of `cells`, with what they answer.
        later: What does not fit into the budget, in the order of what it would tell.
    """

    run_id: str
    request: Request
    experiments: list[ExperimentSpec] = field(default_factory=list)
    cells: list[tuple[str, str]] = field(default_factory=list)
    cached: list[dict[str, str]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    later: list[Step] = field(default_factory=list)

    @cached_property
    def known(self) -> evidence.Known:
        """What the store's index says about times and undecided pairs."""
        return evidence.known(Store(self.request.store))

    @property
    def estimate_seconds(self) -> float | None:
        """Seconds it will take, judged by earlier samples of the same methods; None if unknown."""
        return budget.estimate(self.experiments, self.known)

    @property
    def num_kept(self) -> int:
        """Samples that are there already of experiments that are not over."""
        return sum(map(self._num_kept, self.experiments))

    def _num_kept(self, spec: ExperimentSpec) -> int:
        store = Store(self.request.store)
        if store.is_sealed(spec.experiment_id):
            return 0
        return store.num_samples(spec.experiment_id)

    @property
    def later_seconds(self) -> float:
        """Seconds that what does not fit into the budget would take, guesses included."""
        return sum(step.seconds for step in self.later)

    def outlook(self) -> str:
        """Return how long it takes, and what is left beyond the budget; "" if neither is known."""
        seconds, told = self.estimate_seconds, []
        if seconds is not None:
            told.append(f"about {duration(seconds)}")
        if self.later:
            pairs = sum(len(step.spec.cells[1:]) for step in self.later)
            told.append(
                f"{pairs} pairs of {len(self.later)} experiments do not fit into the budget: they "
                f"would need about {duration(self.later_seconds)} more"
            )
        return "; ".join(told)

    def describe(self) -> list[dict[str, str]]:
        """Return one row a cell: what happens to it, and why."""
        rows = []
        for spec in self.experiments:
            what = "baseline, measured with the others"
            if count := self._num_kept(spec):
                what += f"; {count} of their {spec.num_samples} samples are there"
            rows += [
                {
                    "method": each.method,
                    "task": spec.task,
                    "model": spec.model,
                    "items": str(each.num_items),
                    "repeats": str(spec.repeats),
                    "what": "measured" if place else what,
                }
                for place, each in enumerate(spec.cells)
            ]
        rows += [
            {
                "method": cell.method,
                "task": step.spec.task,
                "model": step.spec.model,
                "items": str(cell.num_items),
                "repeats": str(step.spec.repeats),
                "what": f"later: {'at a guess' if step.is_guessed else 'about'} "
                f"{duration(step.seconds)} more than the budget",
            }
            for step in self.later
            for cell in step.spec.cells[1:] or step.spec.cells
        ]
        blank = {"items": "", "repeats": ""}
        rows += [{**cell, **blank, "what": "cached"} for cell in self.cached]
        for cell in self.skipped:
            kept = {key: cell[key] for key in ("method", "task", "model")}
            rows.append({**kept, **blank, "what": f"skipped: {cell['reason']}"})
        return rows


def make_plan(request: Request) -> Plan:
    """Expand a request; with a budget, into what that is best spent on.

    Raises:
        UsageError: A name or parameter is wrong, or a model or its data cannot be had.
    """
    finished = evidence.finished_cells(Store(request.store), ("ok", "unsupported"))
    started = datetime.now(UTC)
    run_id = f"{started:%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    plan = _expand(request, run_id, finished)
    if request.budget is None:
        return plan
    return budget.within_budget(plan, plan.known, lambda asked: _expand(asked, run_id, finished))


def _expand(request: Request, run_id: str, finished: Mapping[str, str]) -> Plan:
    """Return the plan of all that a request asks for.

    Args:
        request: What is asked.
        run_id: Name of the run.
        finished: Experiment of each cell that need not be measured.
    """
    registry = Registry(request.plugins)
    known = _Known(registry, request)
    # Names and settings first: what is wrong with them is said before anything slow is looked at.
    tasks = []
    for text in request.tasks:
        material = _Material(text, registry, request)
        limits = request.method_limits.get(text, {})
        tasks.append((text, material, known.methods(request.methods_of(text), limits)))
    plan = Plan(run_id=run_id, request=request)
    store = Store(request.store)
    profile = _profile(request)
    for text, material, asked in tasks:
        for model in request.models_of(text):
            _plan_experiment(plan, known, profile, store, finished, material, model, asked)
    return plan


def _profile(request: Request) -> Profile:
    """Return the hardware that is planned for: this machine's, or that of a fleet's machines.

    Raises:
        UsageError: There is no such profile, or this machine is not one.
    """
    try:
        if request.executor == "local" or request.hardware == "auto":
            return detect.select(request.hardware)
        return catalog.profile(request.hardware)
    except (LookupError, ValueError) as error:
        raise UsageError(str(error)) from error


@dataclass(frozen=True)
class _Wanted:
    made: Made
    limit: int | None = None  # of its own

    @property
    def spec(self) -> str:
        return self.made.spec

    @property
    def method(self) -> Method[Any]:
        return self.made.method


class _Asked(NamedTuple):
    """The methods of a task.

    Attributes:
        methods: In order, each once.
        refused: Stacks that cannot be, as they are written, each with the reason.
    """

    methods: list[_Wanted]
    refused: dict[str, str]


class _Material:
    """What a plan must know of a task, worked out once for all models."""

    def __init__(self, text: str, registry: Registry, request: Request) -> None:
        self.text = text
        spec = parse_spec(text)
        self.name = spec.name
        task: Task[Any] = build(registry.load_task(spec.name), spec.params, f"task {spec.name!r}")
        self.limit = request.limit if request.limit is not None else _suite_limit(request, text)
        self.task: Task[Any] = task.limited(self.limit) if self.limit else task
        self.spec = format_spec(self.task, self.name)

    @cached_property
    def items(self) -> list[Item]:
        """The items that are run.

        Raises:
            UsageError: They are not to be had, or there are none.
        """
        try:
            self.task.conditions()
            items = list(islice(self.task.items(), self.limit))
        except Unsupported as error:
            raise UsageError(str(error)) from error
        except ValueError as error:  # a setting that only its data can refute, `mteb:task=`
            raise UsageError(f"{self.spec}: {error}") from error
        if not items:
            raise UsageError(f"task {self.name!r} has no items to run; its limit is {self.limit}.")
        return items

    @cached_property
    def ids(self) -> list[str]:
        """Ids of the items."""
        return [item.id for item in self.items]

    @cached_property
    def hash(self) -> str:
        """Hash of the task's content."""
        try:
            return self.task.content_hash()
        except Unsupported as error:
            raise UsageError(str(error)) from error

    @cached_property
    def is_of_corpus(self) -> bool:
        """Whether the task is judged on all outputs together."""
        return bool(corpus_metrics(self.task))

    @cached_property
    def temperature(self) -> float:
        """At which texts are sampled; 0 where the task has no such setting."""
        return float(self.task.parameters().get("temperature", 0.0))


class _Model(NamedTuple):
    """A model with its settings.

    Attributes:
        id: Its name.
        settings: How it is loaded.
        spec: Both as text, defaults left out.
        offered: What it can be loaded as; () where that is not known.
    """

    id: str
    settings: LoadSettings
    spec: str
    offered: tuple[str, ...]


class _Known:
    """What a plan has looked up, each once: a matrix names the same things over and over."""

    def __init__(self, registry: Registry, request: Request) -> None:
        self.registry = registry
        self._request = request
        self._models: dict[str, _Model] = {}
        self._weights: dict[str, str] = {}
        self._wanted: dict[str, _Wanted] = {}
        self._sources: dict[str, str] = {}
        self._about: dict[str, _About] = {}

    def methods(self, texts: Sequence[str], limits: Mapping[str, int]) -> _Asked:
        """Return the methods with the limits of their own.

        Raises:
            UsageError: A method is wrong; so is a stack that cannot be where methods were named one
                by one, while a suite's others go on without it.
        """
        own: dict[str, int] = {}
        for text, limit in limits.items():
            with suppress(ImpossibleStack):
                own[self.wanted(text).spec] = limit
        found: dict[str, _Wanted] = {}
        refused: dict[str, str] = {}
        for text in texts:
            try:
                wanted = self.wanted(text)
            except ImpossibleStack as error:
                if self._request.names_methods:
                    raise
                refused[text] = str(error)
                continue
            if wanted.spec in own:
                wanted = replace(wanted, limit=own[wanted.spec])
            found.setdefault(wanted.spec, wanted)
        return _Asked(list(found.values()), refused)

    def wanted(self, text: str) -> _Wanted:
        """Return a method by its spec."""
        if text not in self._wanted:
            self._wanted[text] = _Wanted(make_method(text, self.registry))
        return self._wanted[text]

    def model(self, text: str) -> _Model:
        """Return a model by its spec."""
        if text not in self._models:
            model_id, settings = named_model(text, self.registry)
            offered = offered_as(model_id, settings, offline=self._request.offline)
            spec = format_spec(settings, model_id)
            self._models[text] = _Model(model_id, settings, spec, offered)
        return self._models[text]

    def weights(self, model: _Model) -> str:
        """Return the hash of a model's weights, which are fetched first.

        Raises:
            UsageError: They are not to be had.
        """
        if model.spec not in self._weights:
            try:
                fetch(model.id, offline=self._request.offline, revision=model.settings.revision)
                self._weights[model.spec] = weights_hash(model.id, model.settings)
            except (ModelError, Unsupported) as error:
                raise UsageError(str(error)) from error
        return self._weights[model.spec]

    def about(self, wanted: _Wanted) -> _About:
        """Return what every cell of a method holds."""
        if wanted.spec not in self._about:
            name = wanted.made.name
            if name not in self._sources:
                self._sources[name] = source_of(name, self.registry)
            params = wanted.method.parameters()
            own = {
                **_hashes(wanted.made, params),
                "method": name,
                "params": params,
                "method_source": self._sources[name],
            }
            self._about[wanted.spec] = _About(params, written_pairs(own))
        return self._about[wanted.spec]


class _About(NamedTuple):
    """What every cell of a method holds.

    Attributes:
        params: Its hyper-parameters.
        pairs: What of it decides about an answer, as written in the digest of a cell.
    """

    params: dict[str, Any]
    pairs: dict[str, str]


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
    wanted.insert(0, _Wanted(make_method(CONVENTIONS[capability].baseline, registry)))


def _plan_experiment(
    plan: Plan,
    known: _Known,
    profile: Profile,
    store: Store,
    finished: Mapping[str, str],
    material: _Material,
    model_text: str,
    asked: _Asked,
) -> None:
    request, methods = plan.request, asked.methods
    is_local = request.executor == "local"
    task, task_spec = material.task, material.spec
    model = known.model(model_text)
    model_spec, offered = model.spec, model.offered

    def skip(method: str, reason: str) -> None:
        plan.skipped.append(
            {"method": method, "task": task_spec, "model": model_spec, "reason": reason}
        )

    for spec, reason in asked.refused.items():
        skip(spec, reason)
    capability = taken_as(task.capability, offered)
    fitting = [each for each in methods if each.method.capability == capability]
    if fitting or request.names_methods:
        for each in methods:
            takes = each.method.capability
            if takes != capability:
                skip(each.spec, f"it changes a {takes}, the task runs a {capability}")
    if offered and capability not in offered:
        for each in methods:
            reason = f"the task runs a {task.capability}, the model is {' or '.join(offered)}"
            skip(each.spec, reason)
        return
    if not fitting and request.names_methods:
        return
    # A suite whose methods are of another kind leaves the baseline.
    _baseline_first(fitting, capability, known.registry)
    if request.scenario == "throughput":
        for each in fitting:
            reason = "the throughput scenario needs batches, which no text model here runs yet"
            skip(each.spec, reason)
        return
    items, task_hash = material.items, material.hash
    model_hash = known.weights(model)
    if material.is_of_corpus and (limited := [each.spec for each in fitting if each.limit]):
        raise UsageError(
            f"{task_spec} is judged on all outputs together, so all methods must run the same "
            f"items; {limited[0]!r} has a limit of its own."
        )
    conditions = {
        "protocol": PROTOCOL_VERSION,
        "task": task_spec,
        "task_hash": task_hash,
        "items": material.ids,
        "model": model_spec,
        "model_hash": model_hash,
        "hardware": profile.name,
        # Whichever machine of a fleet gets it: each checks that it is one of the profile.
        "machine": detect.machine_id() if is_local else f"any {profile.name}",
        "scenario": request.scenario,
        "seed": request.seed,
        "repeats": request.repeats,
        "source": shared_source(),
        "versions": versions(),
    }
    if request.audit:
        conditions["audit"] = True  # it changes the order, and the row must carry its result
    key_of = PartialDigest(conditions)
    cells = [_cell(each, key_of, material, known) for each in fitting]
    apart = _measured_apart(cells, finished)
    missing = [c for c in cells if request.fresh or c.cell_id not in finished or c.cell_id in apart]
    if missing and missing[0] is not cells[0]:
        # Ratios are taken within one process: the baseline is measured again beside new methods.
        missing.insert(0, cells[0])
    are_missing = {cell.cell_id for cell in missing}
    experiment_id = ""
    if missing:
        experiment_id = _experiment_id(store, missing, request.fresh)
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
                items=material.ids,
                groups=[item.group or item.id for item in items],
                cells=missing,
                store=str(request.store.resolve()),
                plugins=[str(path.resolve()) for path in request.plugins],
                sample_timeout=request.timeout,
                memory_bytes=request.memory_bytes or (usable_memory() if is_local else 0),
                cpu_seconds=_cpu_seconds(request, sum(cell.num_items for cell in missing)),
                audit=request.audit,
                offline=request.offline,
                margin=SPEED_MARGIN[profile.kind],
                quality_margin=QUALITY_MARGIN,
                scale="embedded" if _is_embedded(model.id, task) else "paper",
            )
        )
    for cell in cells:
        if cell.cell_id in are_missing:
            plan.cells.append((experiment_id, cell.cell_id))
        else:
            pair = (finished[cell.cell_id], cell.cell_id)
            plan.cells.append(pair)
            plan.cached.append({"method": cell.method, "task": task_spec, "model": model_spec})
            plan.answers.append(Answer(pair, cell.method, material.text, model_text))


def _cell(wanted: _Wanted, key_of: PartialDigest, material: _Material, known: _Known) -> CellSpec:
    about = known.about(wanted)
    items = material.ids if wanted.limit is None else material.ids[: wanted.limit]
    own = about.pairs if items is material.ids else about.pairs | written_pairs({"items": items})
    return CellSpec(
        cell_id=key_of(own)[:24],
        method=wanted.spec,
        name=wanted.made.name,
        params=about.params,
        num_items=len(items),
        family=wanted.made.family,
        role=wanted.method.role,
        declared_output=wanted.method.declared_output(material.temperature).value,
        parts=list(wanted.made.parts),
    )


def _measured_apart(cells: Sequence[CellSpec], finished: Mapping[str, str]) -> set[str]:
    """Return stacks and their parts that were not all measured in one experiment.

    What a stack makes of its parts is told by ratios within one process, like any other.

    Args:
        cells: Of an experiment.
        finished: Experiment of each cell that was measured.
    """
    by_spec = {cell.method: cell.cell_id for cell in cells}
    found: set[str] = set()
    for cell in cells:
        together = [cell.cell_id, *(by_spec[part] for part in cell.parts if part in by_spec)]
        if len({finished.get(cell_id) for cell_id in together}) > 1:
            found.update(together)
    return found


def _hashes(made: Made, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hashes of files that the parameters of a method or of a stack's parts name."""
    if not made.parts:
        return _named_hashes(params)
    return {"hashes": {name: _named_hashes(own) for name, own in params.items()}}


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


def offered_as(model_id: str, settings: LoadSettings, *, offline: bool) -> tuple[str, ...]:
    """Return what a model can be loaded as; () where that is not known."""
    if ":" in model_id:
        # Its files say it. Where they are not to be had, the plan says so further down.
        with suppress(ModelError):
            fetch(model_id, offline=offline, revision=settings.revision)
    return capabilities(model_id, settings.revision)


def named_model(text: str, registry: Registry) -> tuple[str, LoadSettings]:
    """Return a model's id and how it is loaded.

    Args:
        text: Spec, `smollm2-135m`, `hf:<id>` or `path:<folder>`, with settings.
        registry: Where embedded models are.

    Raises:
        UsageError: There is no such model or setting.
    """
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
    cores = (os.cpu_count() or 1) if request.executor == "local" else 1
    measuring = 2 * request.timeout * request.repeats * samples
    return math.ceil(min(cores * (_OTHER_SECONDS + measuring), LONGEST_CPU_SECONDS))


def usable_memory() -> int:
    """Return nine tenths of the machine's memory, in bytes."""
    pages: int = os.sysconf("SC_PHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE") * 9 // 10
