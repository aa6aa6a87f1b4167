"""The worker: one experiment in one process, interleaved sample by sample.

It loads the model once, measures what a forward costs by its width, warms up, and then runs every
method on every item back to back, in an order drawn from the seed. Each sample is on the disk
before the next one begins. What a method breaks is its own cell: the failure is recorded and the
process ends with `RESTART`, so that the others go on in a clean one.
"""

from __future__ import annotations

import functools
import json
import os
import random
import resource
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast, overload

import psutil

from hardware import ceilings, detect
from hardware.meters import Meter, Reading
from hardware.profile import Profile, StepCost
from hardware.step_cost import measure_step_cost
from methods.base import Method, Output
from models.base import (
    AutoregressiveImageModel,
    Condition,
    Forward,
    Generation,
    InvalidOutput,
    MaskedDiffusionLM,
    TextGenerator,
    TextModelFacts,
    Trace,
    Unsupported,
)
from models.loading import LoadSettings, capabilities, load
from results.records import (
    CellRecord,
    ExperimentRecord,
    MetricRecord,
    OutputCheck,
    SampleRecord,
    ScoreRecord,
    Status,
)
from results.store import Store
from runner import audit
from runner.audit import Evidence
from runner.blame import in_a_line
from runner.capabilities import CONVENTIONS, Conventions, taken_as
from runner.certificate import (
    DISTRIBUTION_LEVEL,
    Asked,
    AskedImages,
    Centred,
    asked,
    difference,
    distribution_test,
    output_digest,
    reading,
    summary,
)
from runner.corpus import corpus_metrics, corpus_records, outputs_of
from runner.guards import Damage, Ledger, ProcessGuard, WeightGuard, held_bytes
from runner.registry import Registry
from runner.settings import build, parse_spec
from runner.spec import BUSY, RESTART, CellSpec, ExperimentSpec, now
from runner.stacking import make_method
from runner.system import die_with_parent, exclusive
from tasks.base import Item, Result, Task, Unscored

# Warm-up ends when a round of the baseline is not faster than the one before by more than this
# share, or after so many rounds. A slower one is noise, not a lack of warmth.
_FLAT = 0.1
_WARMUP_ROUNDS = 4
_LOG_LINES = 30
# Contexts at which lat(N) is measured: a short prompt, and one with its answer.
_CONTEXTS = (128, 384)
_WIDTHS = (1, 2, 4, 8, 16, 32, 64, 81)
_CANVAS_CONTEXTS = (0, 128, 384)
_CANVAS_WIDTHS = (1, 8, 32, 64, 128, 256)
_ONE_TOKEN = Forward(width=1, context=0)


def main(spec_path: Path, events: int | None = None) -> int:
    """Run an experiment to its end.

    Args:
        spec_path: File written by `ExperimentSpec.write`.
        events: File descriptor for progress, one JSON object a line; None for none.

    Returns:
        0 when every cell has ended, `RESTART` when a cell failed and others are left, `BUSY` when
        another process measures this experiment.
    """
    spec = ExperimentSpec.read(spec_path)
    die_with_parent()
    if spec.cpu_seconds:
        # At the soft limit the kernel says why (SIGXCPU), at the hard one it does not (SIGKILL).
        resource.setrlimit(resource.RLIMIT_CPU, (spec.cpu_seconds, spec.cpu_seconds + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if spec.memory_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (spec.memory_bytes, spec.memory_bytes))
    if spec.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    store = Store(Path(spec.store))
    if store.is_sealed(spec.experiment_id):
        store.seal(spec.experiment_id)  # clears what a kill in the middle of sealing left
        return 0
    with exclusive(store, spec.experiment_id) as is_ours:
        if not is_ours:
            return BUSY
        return _Worker(spec, store, _Events(events)).run()


class _Events:
    """Tells the parent what happens, so that it knows whose fault a death is."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def __call__(self, kind: str, **data: Any) -> None:
        if self._descriptor is not None:
            line = json.dumps({"kind": kind, **data}, default=str) + "\n"
            try:
                os.write(self._descriptor, line.encode())
            except BrokenPipeError:
                sys.exit(1)  # nobody is there to answer to


@dataclass
class _Cell:
    """A cell while it is measured."""

    spec: CellSpec
    method: Method[Any]
    item_ids: frozenset[str]
    is_open: bool = True
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    notes: dict[str, Any] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    evidence: Evidence = field(default_factory=Evidence)


class _Measured(NamedTuple):
    """A sample: what came back, what it took, and when it began (`time.perf_counter`)."""

    result: Result
    reading: Reading
    started: float


class _Restart(Exception):  # a signal, no error
    """A cell has failed, and this process cannot be trusted with the others."""


class _Worker:
    def __init__(self, spec: ExperimentSpec, store: Store, tell: _Events) -> None:
        self.spec = spec
        self.store = store
        self.tell = tell
        self.started = time.perf_counter()
        self.phases: dict[str, float] = {}
        self.read: dict[tuple[str, tuple[int, ...]], Centred] = {}
        self.registry = Registry(tuple(Path(path) for path in spec.plugins))
        task = parse_spec(spec.task)
        self.task: Task[Any] = build(
            self.registry.load_task(task.name), task.params, f"task {task.name!r}"
        )
        by_id = {item.id: item for item in self.task.items()}
        self.items = [by_id[item_id] for item_id in spec.items]
        if spec.audit:
            self.items = audit.shuffled(self.items, spec.seed)

    def run(self) -> int:
        with self._phase("loading"):
            model_spec = parse_spec(self.spec.model)
            settings = build(LoadSettings, model_spec.params, f"model {model_spec.name!r}")
            offered = capabilities(model_spec.name, settings.revision)
            capability = taken_as(self.task.capability, offered)
            self.model: Any = load(
                model_spec.name,
                settings,
                offline=self.spec.offline,
                capability=capability,
            )
            self.conventions = CONVENTIONS.get(
                capability, Conventions(baseline="", output_unit="item")
            )
            self.profile = ceilings.measured(detect.select(self.spec.hardware))
            self.meter = Meter(self.profile)
            self.weights = WeightGuard(self.model)
        with self._phase("calibrating"):
            step_cost = self._begin()
            self.profile = replace(self.profile, step_cost=step_cost)
        ended = {cell.cell_id: cell for cell in self.store.cells(self.spec.experiment_id)}
        self.cells = [
            _Cell(
                cell,
                self._method(cell),
                frozenset(self.spec.items[: cell.num_items]),
                is_open=cell.cell_id not in ended,
            )
            for cell in self.spec.cells
        ]
        try:
            with self._phase("warming up"):
                self._warm_up()
            with self._phase("measuring"):
                self._measure_all()
            if self.spec.audit:
                with self._phase("auditing"):
                    self._audit()
        except _Restart:
            return RESTART
        with self._phase("scoring"):
            self._score()
        with self._phase("certifying"):
            records = self._certify()
        self._finish(records)
        return 0

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.tell("phase", phase=name)
        before = time.perf_counter()
        yield
        self.phases[name] = time.perf_counter() - before

    def _method(self, cell: CellSpec) -> Method[Any]:
        return make_method(cell.method, self.registry).method

    # Beginning

    def _begin(self) -> StepCost | None:
        """Write the experiment's record, or take up the one that is there; return lat(N)."""
        if (self.store.shard(self.spec.experiment_id) / "experiment.json").exists():
            curve = self.store.experiment(self.spec.experiment_id).step_cost
        else:
            curve = self._curve_of_this_run()
            if curve is None and (measured := self._calibrate()):
                curve = vars(measured)
            self.store.write_experiment(self._experiment_record(curve))
        if curve is None:
            return None
        return StepCost(
            widths=tuple(curve["widths"]),
            contexts=tuple(curve["contexts"]),
            seconds=tuple(tuple(row) for row in curve["seconds"]),
        )

    @property
    def _has_steps(self) -> bool:
        """Whether calls are sequences of forwards; an image generator's need not be."""
        steps = (TextGenerator, MaskedDiffusionLM, AutoregressiveImageModel)
        return self.conventions.has_steps and isinstance(self.model, steps)

    def _curve_of_this_run(self) -> dict[str, Any] | None:
        """Return lat(N) as an earlier experiment of the run measured it for the same model."""
        if not self._has_steps:
            return None
        for experiment_id in self.store.experiment_ids():
            other = self.store.experiment(experiment_id)
            if (
                other.run_id == self.spec.run_id
                and other.model_hash == self.spec.model_hash
                and other.model_params == dict(parse_spec(self.spec.model).params)
                and other.step_cost
            ):
                return other.step_cost
        return None

    def _calibrate(self) -> StepCost | None:
        """Measure lat(N), for models whose calls are sequences of forwards."""
        if not self._has_steps:
            return None
        return calibrate(self.model, self.spec.calibration_seconds, self.spec.seed)

    def _experiment_record(self, step_cost: dict[str, Any] | None) -> ExperimentRecord:
        spec, facts = self.spec, self.model.facts
        return ExperimentRecord(
            experiment_id=spec.experiment_id,
            run_id=spec.run_id,
            task=parse_spec(spec.task).name,
            task_params=self.task.parameters(),
            task_version=spec.task_version,
            task_hash=spec.task_hash,
            model=parse_spec(spec.model).name,
            model_params=dict(parse_spec(spec.model).params),
            model_hash=spec.model_hash,
            hardware=spec.hardware,
            scenario=spec.scenario,
            seed=spec.seed,
            scale=spec.scale,
            margin=spec.margin,
            quality_margin=spec.quality_margin,
            items=spec.items,
            groups=spec.groups,
            repeats=spec.repeats,
            baseline=spec.cells[0].cell_id,
            cells=[cell.cell_id for cell in spec.cells],
            metrics=[MetricRecord(**vars(metric)) for metric in self.task.metrics],
            step_cost=step_cost,
            environment={**detect.environment(), **_ceiling_columns(self.profile)},
            facts={
                "weight_bytes": facts.weight_bytes,
                "dtype": facts.dtype,
                "kernels": getattr(self.model, "kernels", "transformers"),
                "matrix_parameters": facts.matrix_parameters,
                "output_unit": self.conventions.output_unit,
                "speed_of": self.task.speed_of,
                "bound_by": self.task.bound_by,
                **({"kv_bytes_per_token": facts.kv_read(_ONE_TOKEN)} if self._has_steps else {}),
                **self.task.conditions(),
            },
            created=now(),
        )

    # Measuring

    def _warm_up(self) -> None:
        """Run an item with every method, and more with the baseline until its times are flat."""
        self.processes = ProcessGuard()  # what loading and calibration left is not a method's
        items = list(self.task.warmup_items())
        before = 0.0
        for round_ in range(_WARMUP_ROUNDS):
            item, now = items[round_ % len(items)], 0.0
            for index, cell in enumerate(self.cells[: 1 if round_ else None]):
                measured = self._guarded(cell, item) if cell.is_open else None
                if index == 0 and measured:
                    now = measured.reading.seconds / max(1, len(measured.result.token_ids))
            if before and now >= (1 - _FLAT) * before:
                break
            before = now
        for cell in self.cells:
            if cell.method.state_policy != "hot":
                cell.method.reset_state()

    def _measure_all(self) -> None:
        spec = self.spec
        done = {
            (sample.cell_id, sample.item_id, sample.repeat)
            for sample in self.store.samples(spec.experiment_id)
        }
        total = spec.num_samples
        count = len(done)
        with self.store.samples_journal(spec.experiment_id) as journal:
            for item in self.items:
                for repeat in range(spec.repeats):
                    for position, index in enumerate(_order(spec, item.id, repeat)):
                        cell = self.cells[index]
                        if not cell.is_open or item.id not in cell.item_ids:
                            continue
                        if (cell.spec.cell_id, item.id, repeat) in done:
                            # What was measured before an interruption also taught the method.
                            if cell.method.state_policy != "cold":
                                self._guarded(cell, item)
                            continue
                        measured = self._guarded(cell, item)
                        if measured is None:
                            continue
                        cell.notes.update(measured.result.trace.notes)
                        journal.append(self._sample(cell, item, repeat, position, measured))
                        count += 1
                        self.tell(
                            "sample",
                            cell=cell.spec.cell_id,
                            method=cell.spec.method,
                            item=item.id,
                            done=count,
                            total=total,
                            seconds=measured.reading.seconds,
                        )

    @overload
    def _guarded(self, cell: _Cell, item: Item) -> _Measured | None: ...

    @overload
    def _guarded(
        self, cell: _Cell, item: Item, run: Callable[[_Cell, Item], Result]
    ) -> Result | None: ...

    def _guarded(
        self, cell: _Cell, item: Item, run: Callable[[_Cell, Item], Any] | None = None
    ) -> Any:
        """Measure one sample; whatever a method does wrong ends its own cell.

        Args:
            cell: Whose method.
            item: On what.
            run: What to do instead of measuring.

        Returns:
            None if the method declined the model, which ends its cell too.
        """
        self.tell("begin", cell=cell.spec.cell_id, method=cell.spec.method, item=item.id)
        try:
            return (run or self._measure)(cell, item)
        except Exception as error:  # the one broad except: any failure of a method is a result
            status = _status(error)
            self._end_cell(cell, status, _one_line(error), traceback.format_exc())
            if status == "unsupported":
                return None
            raise _Restart from error

    def _measure(self, cell: _Cell, item: Item) -> _Measured:
        fixed_length = self.spec.scenario == "fixed-length"
        held = held_bytes()
        before = time.perf_counter()
        with cell.method.apply(self.model, self.profile) as changed:
            entered = time.perf_counter()

            def call() -> tuple[float, Result]:
                started = time.perf_counter()
                return started, self.task.call(changed, item, fixed_length=fixed_length)

            resident = self._resident_bytes()
            (started, result), reading = self.meter.measure(call)
            if reading.peak_bytes is not None:
                # A GPU's mark holds the weights already; the host's is growth until here.
                reading = replace(reading, peak_bytes=reading.peak_bytes + resident)
            called = time.perf_counter()
        applying = entered - before + time.perf_counter() - called
        cell.seconds["apply"] += applying
        cell.seconds["measured"] += reading.seconds
        cell.ledger.apply_seconds.append(applying)
        cell.ledger.measured_seconds.append(reading.seconds)
        self._check_damage()
        cell.ledger.check_memory(held, self.spec.memory_bytes)
        self._check_result(result, cell, item)
        return _Measured(self.task.stored(self.model, item, result), reading, started)

    def _untimed(self, cell: _Cell, item: Item) -> Result:
        """Run an item as `_measure` does, but for the clock."""
        with cell.method.apply(self.model, self.profile) as changed:
            fixed_length = self.spec.scenario == "fixed-length"
            result = self.task.call(changed, item, fixed_length=fixed_length)
        self._check_damage()
        self._check_result(result, cell, item)
        return self.task.stored(self.model, item, result)

    def _check_damage(self) -> None:
        """Look for what a method left behind or changed.

        Raises:
            Damage: With what it is.
        """
        self.processes.check()
        self.weights.check()

    def _check_result(self, result: object, cell: _Cell, item: Item) -> None:
        """Refuse what cannot be a result, and look whether tokens and ends were counted right.

        Raises:
            InvalidOutput: With what is wrong.
        """
        _check_result(result, self.model)
        if not isinstance(result, Generation):
            return
        question = asked(self.task, self.model, item)
        if not isinstance(question, Asked):
            return
        decoding = question.decoding
        if self.spec.scenario == "fixed-length":
            decoding = replace(decoding, ignore_eos=True)
        if complaint := audit.miscount(result, decoding, self.model):
            raise InvalidOutput(complaint)
        cell.evidence.counted += 1
        if complaint := audit.overcount(result):
            cell.evidence.miscounts.append(complaint)

    def _audit(self) -> None:
        """Run some items again, timed and untimed, every method in turn."""
        for item in self._audited_items():
            for is_timed in (True, False):
                for cell in self.cells:
                    if not cell.is_open:
                        continue
                    if is_timed:
                        measured = self._guarded(cell, item)
                        if measured is not None:
                            again = _again(item, measured.result, measured.reading.seconds)
                            cell.evidence.repeated.append(again)
                    elif (result := self._guarded(cell, item, self._untimed)) is not None:
                        cell.evidence.untimed.append(_again(item, result, None))

    def _audited_items(self) -> list[Item]:
        """Return the items that are run again: some of those that all cells ran."""
        shared = frozenset.intersection(*(cell.item_ids for cell in self.cells))
        return audit.chosen([item for item in self.items if item.id in shared], self.spec.seed)

    def _resident_bytes(self) -> int:
        """Return what the process holds in host memory; 0 where a device is metered instead."""
        return int(psutil.Process().memory_info().rss) if self.profile.kind == "cpu" else 0

    def _sample(
        self, cell: _Cell, item: Item, repeat: int, position: int, measured: _Measured
    ) -> SampleRecord:
        result, reading = measured.result, measured.reading
        trace = result.trace
        ids = list(result.token_ids)
        forwards = trace.forwards
        is_told = bool(forwards) or bool(trace.prefill)
        kept = trace.notes.get("evidence_kept")
        prefilled, tokenized = trace.marks.get("prefill"), trace.marks.get("tokenized")
        return SampleRecord(
            cell_id=cell.spec.cell_id,
            item_id=item.id,
            repeat=repeat,
            position=position,
            seconds=reading.seconds,
            device_seconds=reading.device_seconds,
            cpu_seconds=reading.cpu_seconds,
            prefill_seconds=prefilled - measured.started if prefilled else None,
            tokenized_seconds=tokenized - measured.started if tokenized else None,
            output_tokens=len(ids),
            # The prefill emits one token; a peer that drafts before it may emit more there.
            decode_tokens=max(0, len(ids) - int(trace.notes.get("prefill_tokens", 1))),
            target_forwards=len(forwards) if is_told else None,
            forward_tokens=sum(forward.width for forward in forwards) if is_told else None,
            draft_forwards=trace.draft_forwards if is_told else None,
            accepted_tokens=trace.accepted_drafts if is_told else None,
            flops=trace.flops if is_told else None,
            kv_bytes=trace.kv_bytes if is_told else None,
            peak_bytes=reading.peak_bytes,
            energy_j=reading.energy_j,
            bound_seconds=self._bound_seconds(trace) if is_told else None,
            output_digest=output_digest(ids, result.text),
            output=result.text,
            output_ids=ids,
            evidence_kept=None if kept is None else float(kept),
            prefill_flops=trace.prefill_flops if is_told else None,
        )

    def _bound_seconds(self, trace: Trace) -> float | None:
        """Return the least that a text's forwards take after its prefill; None if unknown."""
        if self.task.bound_by == "bytes":
            if (reached := self.profile.ceilings) is None:
                return None
            return _bytes_read(self.model.facts, trace) / reached.read_bandwidth
        # A forward over a batch of images costs less than its images one by one.
        if isinstance(self.model, AutoregressiveImageModel) and len(trace.prefill) > 1:
            return None
        curve = self.profile.step_cost
        return _step_seconds(curve, trace) if curve else None

    # Ending

    def _end_cell(self, cell: _Cell, status: Status, error: str, log: str = "") -> None:
        cell.is_open = False
        record = self._cell_record(cell, status, error, "\n".join(log.splitlines()[-_LOG_LINES:]))
        self.store.write_cell(record)
        self.tell(
            "cell", cell=cell.spec.cell_id, method=cell.spec.method, status=status, detail=error
        )

    def _cell_record(
        self, cell: _Cell, status: Status, error: str = "", log_tail: str = ""
    ) -> CellRecord:
        return cell.spec.record(
            self.spec.experiment_id,
            status,
            error=error,
            log_tail=log_tail,
            notes={**cell.notes, "state": cell.method.state_policy},
            seconds={**cell.seconds, **self.phases},
        )

    def _score(self) -> None:
        """Score each distinct output of an item once; what was scored before stays."""
        spec = self.spec
        known = {(s.cell_id, s.item_id) for s in self.store.scores(spec.experiment_id)}
        by_id = {item.id: item for item in self.items}
        cache: dict[tuple[str, str], list[ScoreRecord]] = {}
        with self.store.scores_journal(spec.experiment_id) as journal:
            for sample in self.store.samples(spec.experiment_id):
                if sample.repeat or (sample.cell_id, sample.item_id) in known:
                    continue
                key = (sample.item_id, sample.output)
                if key not in cache:
                    scored = self.task.score_with_detail(by_id[sample.item_id], sample.output)
                    cache[key] = [
                        ScoreRecord(
                            cell_id="",
                            item_id=sample.item_id,
                            metric=metric,
                            value=None if isinstance(value, Unscored) else float(value),
                            unscored=value.reason if isinstance(value, Unscored) else "",
                            detail=scored.detail,
                        )
                        for metric, value in scored.scores.items()
                    ]
                for record in cache[key]:
                    journal.append(replace(record, cell_id=sample.cell_id))
        if corpus_metrics(self.task):
            self._score_corpus()

    def _score_corpus(self) -> None:
        """Compute the metrics of all outputs together; what was computed before stays."""
        spec = self.spec
        known = {(each.cell_id, each.metric) for each in self.store.corpus(spec.experiment_id)}
        outputs = outputs_of(self.store, spec.experiment_id)
        with self.store.corpus_journal(spec.experiment_id) as journal:
            # In the standard order, whatever the order of measuring was.
            for record in corpus_records(self.task, spec.items, outputs, known):
                journal.append(record)

    def _certify(self) -> list[CellRecord]:
        """Hold outputs against the baseline's; return the records of the cells that ended here."""
        outputs: dict[str, dict[str, SampleRecord]] = defaultdict(dict)
        for sample in self.store.samples(self.spec.experiment_id):
            if sample.repeat == 0:
                outputs[sample.cell_id][sample.item_id] = sample
        baseline = outputs[self.spec.cells[0].cell_id]
        tampered = self._tampered()
        records = []
        for cell in self.cells:
            if not cell.is_open:
                continue
            record = self._cell_record(cell, "ok")
            check: OutputCheck | None = None
            divergences: list[dict[str, Any]] = []
            if cell.spec.declared_output != Output.IDENTICAL:
                check = cast(OutputCheck, cell.spec.declared_output)
                if check == "same-distribution" and cell is not self.cells[0] and baseline:
                    test = self._distribution_test(baseline, outputs[cell.spec.cell_id])
                    record = replace(record, notes={**record.notes, "distribution": test})
                    if test["p"] < DISTRIBUTION_LEVEL:
                        check = "violation"
                        record = replace(record, status="failed", error=_bias(test))
            elif baseline:
                divergences = self._divergences(baseline, outputs[cell.spec.cell_id])
                check = summary(divergences)
                if check == "violation":
                    record = replace(record, status="failed", error=_violation(divergences))
            record = replace(record, output_check=check, divergences=divergences)
            if self.spec.audit:
                record = replace(record, audit=self._audited(cell))
            error = tampered or cell.ledger.hidden_time()
            error = error or (audit.failure(record.audit) if record.audit else "")
            # Changed weights explain whatever else is wrong.
            if tampered or (error and record.status == "ok"):
                record = replace(record, status="failed", error=error)
            records.append(record)
        return records

    def _finish(self, records: Sequence[CellRecord]) -> None:
        wall = time.perf_counter() - self.started
        methods = sum(cell.seconds["measured"] + cell.seconds["apply"] for cell in self.cells)
        harness = self.phases["measuring"] + self.phases["warming up"] - methods
        self.phases |= {"wall": wall, "harness": max(0.0, harness)}
        for record in records:
            self.store.write_cell(replace(record, seconds={**record.seconds, **self.phases}))
            self.tell(
                "cell",
                cell=record.cell_id,
                method=record.spec,
                status=record.status,
                detail=record.error,
            )
        self.store.seal(self.spec.experiment_id)

    def _tampered(self) -> str:
        """Return what is wrong with the weights at the end, "" if nothing is."""
        try:
            self.weights.check_all()
        except Damage as damage:
            return f"one of the experiment's methods {damage}: none of its numbers can be trusted"
        return ""

    def _audited(self, cell: _Cell) -> dict[str, Any]:
        samples: dict[str, list[SampleRecord]] = defaultdict(list)
        for sample in self.store.samples(self.spec.experiment_id):
            samples[sample.cell_id].append(sample)
        baseline = self.cells[0]
        return audit.settle(
            cell.evidence,
            baseline.evidence,
            samples[cell.spec.cell_id],
            samples[baseline.spec.cell_id],
            model=self.model,
            questions={
                item.id: asked(self.task, self.model, item) for item in self._audited_items()
            },
            keeps_state=cell.method.state_policy != "cold",
            is_baseline=cell is baseline,
        )

    def _divergences(
        self, baseline: dict[str, SampleRecord], method: dict[str, SampleRecord]
    ) -> list[dict[str, Any]]:
        found = []
        for item in self.items:
            ours, theirs = baseline.get(item.id), method.get(item.id)
            if ours is None or theirs is None or ours.output_digest == theirs.output_digest:
                continue
            question = asked(self.task, self.model, item)
            different = difference(self.model, question, ours.output_ids, theirs.output_ids)
            if different:
                found.append({"item_id": item.id, **different})
        return found

    def _distribution_test(
        self, baseline: dict[str, SampleRecord], method: dict[str, SampleRecord]
    ) -> dict[str, float | int]:
        """Hold a sampling method's texts against the baseline's, item by item."""
        pairs: list[tuple[Centred, Centred]] = []
        for item in self.items:
            texts = baseline.get(item.id), method.get(item.id)
            if texts[0] is None or texts[1] is None:
                continue
            question = asked(self.task, self.model, item)
            if question is None:
                continue
            first, second = (
                self._centred(item.id, question, tuple(text.output_ids)) for text in texts if text
            )
            pairs.append((first, second))
        return distribution_test(
            [first for first, _ in pairs], [second for _, second in pairs], seed=self.spec.seed
        )

    def _centred(
        self, item_id: str, question: Asked | AskedImages, output_ids: tuple[int, ...]
    ) -> Centred:
        """Read a sampled output once more; each output once, whoever made it."""
        key = (item_id, output_ids)
        if key not in self.read:
            self.read[key] = reading(self.model, question, output_ids)
        return self.read[key]


def calibrate(
    model: TextGenerator | MaskedDiffusionLM | AutoregressiveImageModel,
    budget_seconds: float,
    seed: int,
) -> StepCost:
    """Measure lat(N), what a forward costs by its width and context, of a model that decodes.

    Args:
        model: Its forwards are run as its tasks run them.
        budget_seconds: Time for it, about.
        seed: Of the order of the forwards.
    """
    if isinstance(model, MaskedDiffusionLM):
        forwards = _canvas_forwards(model)
    elif isinstance(model, AutoregressiveImageModel):
        forwards = _image_forwards(model)
    else:
        forwards = _text_forwards(model)
    return measure_step_cost(
        **forwards._asdict(),
        budget_seconds=budget_seconds,
        seed=seed,
        synchronize=model.synchronize,
    )


class _Forwards(NamedTuple):
    """Forwards whose cost is measured, as `measure_step_cost` takes them."""

    prepare: Callable[[int], Callable[[int], Any]]
    widths: Sequence[int]
    contexts: Sequence[int]


def _text_forwards(model: TextGenerator) -> _Forwards:
    """Return forwards of a text that grows at its end."""
    from models.draft_tree import DraftTree

    room = model.facts.max_positions
    contexts = [context for context in _CONTEXTS if context + _WIDTHS[-1] <= room]
    widths = [width for width in _WIDTHS if width + (contexts or [1])[0] <= room]
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(model.facts.vocab_size) for _ in range(count)]

    def prepare(context: int) -> Any:
        session = model.session(context + widths[-1])
        session.prefill(tokens(context))
        trees = {width: DraftTree.chain(tokens(1)[0], tokens(width - 1)) for width in widths}
        return lambda width: session.verify(trees[width])

    return _Forwards(prepare, widths, contexts or [1])


def _canvas_forwards(model: MaskedDiffusionLM) -> _Forwards:
    """Return forwards over parts of a canvas: whole sequences at context 0, blocks beside it."""
    import torch

    from models.masked_diffusion_decode import BLOCK_LENGTH

    generator = torch.Generator().manual_seed(0)

    def prepare(context: int) -> Any:
        steps = {}
        for width in _CANVAS_WIDTHS:
            length = context + width
            ids = torch.randint(model.facts.vocab_size, (1, length), generator=generator)
            canvas = model.canvas([0], length, keeps=context > 0)
            # A block's logits are what a step wants of it; a shifted model has none of its first.
            shown = min(BLOCK_LENGTH, width - model.facts.is_shifted)
            wanted = range(length - shown, length)
            canvas.denoise(ids, 0, wanted)
            steps[width] = functools.partial(canvas.denoise, ids[:, context:], context, wanted)
        return lambda width: steps[width]()

    return _Forwards(prepare, _CANVAS_WIDTHS, _CANVAS_CONTEXTS)


def _image_forwards(model: AutoregressiveImageModel) -> _Forwards:
    """Return windows of one image with guidance, both halves, as the default tasks run them."""
    import torch

    tokens = model.facts.image_tokens
    widths = [width for width in _WIDTHS if width <= tokens]
    contexts = [place for place in _CONTEXTS if place + widths[-1] <= tokens] or [0]
    generator = torch.Generator().manual_seed(0)
    condition: Condition = 0 if model.facts.classes else "a picture"
    codes = torch.randint(model.facts.vocab_size, (1, tokens), generator=generator)
    codes = codes.to(model.device)

    def prepare(context: int) -> Any:
        session = model.session(
            [condition], guided=True, capacity=context + widths[-1], trace=Trace()
        )
        session.prefill()
        if context:
            session.forward(codes[:, :context])

        def step(width: int) -> None:
            session.forward(codes[:, context : context + width])
            session.crop(context)

        return step

    return _Forwards(prepare, widths, contexts)


def _again(item: Item, result: Result, seconds: float | None) -> audit.Again:
    trace = result.trace
    forwards = len(trace.forwards) if trace.forwards or trace.prefill else None
    digest = output_digest(result.token_ids, result.text)
    return audit.Again(item.id, list(result.token_ids), digest, forwards, seconds)


def _bytes_read(facts: TextModelFacts, trace: Trace) -> float:
    """Return the bytes of weights, keys and values that the forwards after the prefill read.

    A method that reads fewer keys and values than there are says how many bytes it read in them
    (`decode_kv_bytes`); each forward of a draft model reads its share of the target's weights.
    """
    cached = trace.notes.get("decode_kv_bytes")
    if cached is None:
        cached = sum(facts.kv_read(forward) for forward in trace.forwards)
    drafts = float(trace.notes.get("draft_share", 0.0)) * trace.draft_forwards
    return facts.weight_bytes * (len(trace.forwards) + drafts) + float(cached)


def _step_seconds(curve: StepCost, trace: Trace) -> float:
    """Return the time of a text's forwards by the measured curve, those of a draft included.

    A forward of a draft model takes at least its share of the target's weight bytes of a plain
    step; a method that has one says that share in its notes.
    """
    seconds = sum(curve.at(forward.width, forward.context) for forward in trace.forwards)
    share = float(trace.notes.get("draft_share", 0.0))
    if share and trace.draft_forwards:
        context = max(forward.context for forward in (*trace.forwards, *trace.prefill))
        seconds += trace.draft_forwards * share * curve.at(1, context)
    return seconds


def _order(spec: ExperimentSpec, item_id: str, repeat: int) -> list[int]:
    """Return the order of the cells for an item: random by seed, reversed every second repeat."""
    draw = random.Random(f"{spec.seed} {item_id} {repeat // 2}")
    order = list(range(len(spec.cells)))
    draw.shuffle(order)
    return order[::-1] if repeat % 2 else order


def _status(error: Exception) -> Status:
    """Return what kind of ending an exception is."""
    import torch

    if isinstance(error, Unsupported):
        return "unsupported"
    if isinstance(error, InvalidOutput):
        return "invalid-output"
    if isinstance(error, Damage):
        return error.status
    if isinstance(error, torch.OutOfMemoryError):
        return "oom-device"
    # torch's CPU allocator has no exception of its own.
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "oom-host"
    return "failed"


def _check_result(result: object, model: Any) -> None:
    """Refuse what cannot be a result.

    Raises:
        InvalidOutput: With what is wrong.
    """
    missing = [name for name in ("text", "token_ids", "trace") if not hasattr(result, name)]
    if missing:
        raise InvalidOutput(f"the call returned a {type(result).__name__} without {missing}.")
    ids = cast(Result, result).token_ids
    # A model without a vocabulary of its own (an encoder) returns no tokens; a method that brings
    # another tokenizer returns that one's.
    if isinstance(model, (TextGenerator, MaskedDiffusionLM, AutoregressiveImageModel)):
        vocabulary = range(model.facts.vocab_size)
        wrong = [each for each in ids if not isinstance(each, int) or each not in vocabulary]
        if wrong:
            raise InvalidOutput(f"{wrong[0]!r} is no token of a vocabulary of {len(vocabulary)}.")
    if not isinstance(cast(Result, result).text, str):
        raise InvalidOutput("the call returned a text that is no string.")


def _violation(divergences: Sequence[dict[str, Any]]) -> str:
    worst = [found for found in divergences if found["verdict"] == "violation"]
    first = worst[0]
    return (
        f"declared identical, but {len(worst)} items differ from the baseline beyond a tie; first "
        f"at token {first['position']} of {first['item_id']} (gap {first['top2_gap']})"
    )


def _bias(test: dict[str, float | int]) -> str:
    return (
        f"declared same-distribution, but over {test['items']} items its texts are those of the "
        f"baseline's distribution with p = {test['p']:.1e} only (surprise "
        f"{test['surprise_difference']:+.2f} nats a text, likeliest tokens "
        f"{test['likeliest_difference']:+.2f} a text)"
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    is_plain = isinstance(error, (Unsupported, InvalidOutput, Damage)) and text
    return text if is_plain else in_a_line(error)


def _ceiling_columns(profile: Profile) -> dict[str, Any]:
    measured = profile.ceilings
    if measured is None:
        return {}
    return {
        "read_bandwidth": measured.read_bandwidth,
        "copy_bandwidth": measured.copy_bandwidth,
        **{f"matmul_flops_{dtype}": value for dtype, value in measured.matmul_flops.items()},
    }
