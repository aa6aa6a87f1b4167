"""`compare`: what one run does worse, better or otherwise than another, cell by cell.

Cells are matched by method, task, model (each with its settings), hardware, scenario and seed, and
paired item by item. Between runs two things are compared that do not depend on the clock, counted
work and outputs, and two that do: the **speed-up** over the run's own baseline, in which the
machine's mood cancels, and, where both runs were made on the same machine, the **seconds**.

A change of speed is a regression if its 99% interval over items lies beyond the margin of the
profile *and* the change itself is larger than what repeating a measurement changes on that machine
(`Threshold`). Counted work has no noise: any rise is one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.special import stdtrit

from results import statistics, text
from results.records import CellRecord, ExperimentRecord, RunRecord
from results.statistics import Estimate
from results.store import Store, StoreError
from results.summary import paired_totals, summarize

Check = Literal[
    "cell",
    "conditions",
    "status",
    "losslessness",
    "audit",
    "work",
    "output",
    "quality",
    "speed",
    "seconds",
]
Verdict = Literal[
    "REGRESSED",  # worse, and by more than noise
    "MISSING",  # the base has the cell, the head does not
    "STALE",  # the head run did not measure the cell itself
    "CHANGED",  # different, neither better nor worse
    "INCONCLUSIVE",
    "SAME",
    "NO LOSS",  # of quality: a loss is excluded, a gain is not
    "IMPROVED",
    "NEW",  # the head has the cell, the base does not
]
RED: tuple[Verdict, ...] = ("REGRESSED", "MISSING", "STALE")
FORMATS = ("md", "json")

# Counters that cost something; a rise of any of them is more work.
_COSTS = ("target_forwards", "forward_tokens", "draft_forwards", "flops", "kv_bytes")
# Sums of floating-point operations may be added up in another order by another version.
_RELATIVE_TOLERANCE = 1e-9
_OUTPUT_RANKS = {"identical": 0, "tie": 1, "violation": 2}
_PROMISES = ("identical", "same-distribution", "approximate")
# Repetitions of a measurement below which they say nothing about its noise.
_FEWEST_REPETITIONS = 3
# A change that is chance alone stays below the threshold with this probability.
_CONFIDENCE = 0.99
# Newest experiments of a store that are looked at for repetitions.
_MOST_EXPERIMENTS = 60
_SHORTEST_COMMIT = 4


class Side(NamedTuple):
    """What is compared: a run, or all of a store that has none.

    Attributes:
        store: Where the shards are.
        run: The run; None for every cell as it was last measured.
    """

    store: Store
    run: RunRecord | None

    @property
    def label(self) -> str:
        """Name for people: run and commit, or the store's folder."""
        if self.run is None:
            return str(self.store.path)
        commit = f" at commit {self.run.git_commit[:12]}" if self.run.git_commit else ""
        return f"{self.run.run_id}{commit}"


@dataclass(frozen=True)
class Threshold:
    """The smallest change of speed that is called one.

    Measurements of the same cell, repeated in other runs (`--fresh`), differ by noise alone, and so
    do a method that does exactly the baseline's work and the baseline. With n such changes d, on a
    log scale around zero, a further one stays within t(n, 99%) * sqrt(mean of d squared).

    Attributes:
        margin: The profile's, which holds at least.
        repetitions: Changes that were found.
        value: The threshold, relative: 0.05 for 5%.
    """

    margin: float
    repetitions: int
    value: float

    @classmethod
    def of(cls, changes: Sequence[float], margin: float) -> Threshold:
        """Return the threshold for changes that are noise, each the log of a ratio."""
        spread = 0.0
        if len(changes) >= _FEWEST_REPETITIONS:
            quantile = float(stdtrit(len(changes), (1 + _CONFIDENCE) / 2))
            spread = quantile * math.sqrt(sum(change**2 for change in changes) / len(changes))
        return cls(margin, len(changes), math.expm1(max(math.log1p(margin), spread)))

    def __str__(self) -> str:
        source = (
            f"{self.repetitions} repeated measurements"
            if self.repetitions >= _FEWEST_REPETITIONS
            else f"the profile's margin, only {self.repetitions} repeated measurements"
        )
        return f"threshold {text.percent(self.value)} ({source})"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was compared of one cell.

    Attributes:
        experiment: Task, model, hardware and scenario, for people.
        method: Method with its settings.
        check: What was compared.
        verdict: How it ended.
        base, head: The two values, as text.
        detail: Why, in words.
    """

    experiment: str
    method: str
    check: Check
    verdict: Verdict
    base: str = ""
    head: str = ""
    detail: str = ""

    @property
    def is_regression(self) -> bool:
        """Whether it makes the comparison fail."""
        return self.verdict in RED

    @property
    def line(self) -> str:
        """The finding in one line, without control characters."""
        change = f"{self.base} -> {self.head}" if self.base or self.head else ""
        told = "; ".join(part for part in (change, self.detail) if part)
        line = f"{self.method} on {self.experiment}: {self.check} {self.verdict}"
        return text.plain(f"{line}: {told}" if told else line)


@dataclass(frozen=True)
class Comparison:
    """What was found between two runs.

    Attributes:
        base, head: Labels.
        findings: In the order of the base's cells, new cells last.
        notes: What a reader must know to judge them.
    """

    base: str
    head: str
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Finding, ...]:
        """The findings that make the comparison fail."""
        return tuple(finding for finding in self.findings if finding.is_regression)

    @property
    def summary(self) -> str:
        """The outcome in one line."""
        counts: dict[str, int] = {}
        for finding in self.findings:
            counts[finding.verdict] = counts.get(finding.verdict, 0) + 1
        listed = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
        number = len(self.regressions)
        what = "no regression" if not number else f"{number} regression{'s' * (number > 1)}"
        return f"{what} from {self.base} to {self.head} ({listed or 'nothing to compare'})"


@dataclass(frozen=True)
class _Cell:
    """A cell of one side, with the experiment that measured it; `record` is None if unfinished."""

    store: Store
    experiment: ExperimentRecord
    record: CellRecord | None
    cell_id: str

    @property
    def place(self) -> tuple[Any, ...]:
        """What must agree, apart from settings, for two cells to be the same one."""
        experiment = self.experiment
        return (
            experiment.task,
            experiment.model,
            experiment.hardware,
            experiment.scenario,
            experiment.seed,
            self.record.method if self.record else None,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of method, task and model, by dotted name."""
        parts = {
            "method": self.record.params if self.record else {},
            "task": self.experiment.task_params,
            "model": self.experiment.model_params,
        }
        return {f"{part}.{name}": each[name] for part, each in parts.items() for name in each}

    @property
    def is_baseline(self) -> bool:
        return self.cell_id == self.experiment.baseline

    @property
    def machine(self) -> Any:
        return self.experiment.environment.get("machine_id")

    @property
    def title(self) -> str:
        experiment = self.experiment
        return " · ".join(
            (experiment.task, experiment.model, experiment.hardware, experiment.scenario)
        )

    def name(self, rivals: Iterable[_Cell]) -> str:
        """Return the method with the settings in which it differs from its namesakes."""
        assert self.record is not None
        own = self.record.params
        others = [
            rival.record.params
            for rival in rivals
            if rival.record is not None and rival.place == self.place
        ]
        shown = [
            f"{key}={_setting(value)}"
            for key, value in own.items()
            if any(other.get(key) != value for other in others)
        ]
        return f"{self.record.method}:{','.join(shown)}" if shown else self.record.method


def resolve(reference: str, store: Store) -> Side:
    """Return the side that a reference names.

    Args:
        reference: `latest`; a run's id or an unambiguous start of it; a commit, at least 4 digits
            of it, whose newest run is meant; the folder of a store, whose newest run is meant; or
            FOLDER@ with one of these.
        store: Where runs and commits are looked up when no folder is named.

    Raises:
        StoreError: There is no such run or store, or several.
    """
    folder, at, name = reference.rpartition("@")
    if at and Path(folder).is_dir():
        return _named(name or "latest", _checked(Store(Path(folder))))
    if reference and Path(reference).is_dir():
        found = _checked(Store(Path(reference)))
        return _named("latest", found) if found.run_ids() else Side(found, None)
    if "/" in reference:
        raise StoreError(f"{reference}: there is no such folder.")
    return _named(reference, store)


def _checked(store: Store) -> Store:
    if not store.experiment_ids():
        raise StoreError(f"{store.path}: holds no shards: name a store, with `shards` in it.")
    return store


def _named(name: str, store: Store) -> Side:
    runs, damaged = [], []
    for run_id in store.run_ids():
        try:
            runs.append(store.run(run_id))
        except StoreError as error:
            damaged.append(error)
            if run_id == name:
                raise
    runs.sort(key=lambda run: (run.started, run.run_id))
    if damaged and not runs:
        raise damaged[0]
    if not runs:
        raise StoreError(f"there is no run in {store.path} yet. `python run.py` makes one.")
    if name == "latest":
        return Side(store, runs[-1])
    found = [run for run in runs if run.run_id == name] or [
        run for run in runs if name and run.run_id.startswith(name)
    ]
    if len(found) > 1:
        listed = ", ".join(run.run_id for run in found[-5:])
        raise StoreError(f"{len(found)} runs begin with {name!r}: {listed}. Give more of the id.")
    if not found and re.fullmatch(rf"[0-9a-f]{{{_SHORTEST_COMMIT},40}}", name):
        found = [run for run in runs if run.git_commit.startswith(name)]
        commits = sorted({run.git_commit for run in found})
        if len(commits) > 1:
            raise StoreError(f"{len(commits)} commits begin with {name!r}: {', '.join(commits)}.")
    if not found:
        ids = [run.run_id for run in runs]
        near = get_close_matches(name, ids, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise StoreError(
            f"no run, commit or folder {name!r}.{hint} The last runs are {', '.join(ids[-5:])}."
        )
    return Side(store, found[-1])


def refuse_same(base: Side, head: Side) -> None:
    """Refuse to compare a run with itself.

    Raises:
        StoreError: Both sides are the same.
    """
    if base.store.path.resolve() == head.store.path.resolve() and base.run == head.run:
        raise StoreError(f"both sides are {base.label}: name two different runs.")


def compare(base: Side, head: Side) -> Comparison:
    """Compare two runs.

    Args:
        base: What was good.
        head: What is to be judged.

    Raises:
        StoreError: A shard cannot be read, or both sides are the same run.
    """
    refuse_same(base, head)
    before, after = list(_cells(base)), list(_cells(head))
    named_before = [cell for cell in before if cell.record]
    pairs = _match(named_before, [cell for cell in after if cell.record])
    # What is to be judged is no measure of noise.
    judged = {cell.experiment.experiment_id for cell in after}
    thresholds = _Thresholds([base.store, head.store], judged)
    findings: list[Finding] = []
    for cell in before:
        if cell.record is None:
            continue  # it was unfinished already
        partner = pairs.get(id(cell))
        compared = _Pair(cell, partner, head.run, thresholds)
        findings += compared.findings(cell.name(named_before))
    matched = {id(partner) for partner in pairs.values()}
    for cell in after:
        if cell.record is not None and id(cell) not in matched:
            findings.append(
                Finding(
                    experiment=cell.title,
                    method=cell.name([each for each in after if each.record]),
                    check="cell",
                    verdict="NEW",
                    head=cell.record.status,
                )
            )
    return Comparison(base.label, head.label, tuple(findings), tuple(_notes(base, head, before)))


def _notes(base: Side, head: Side, before: Sequence[_Cell]) -> Iterator[str]:
    for side in (base, head):
        if side.run is not None and side.run.status != "finished":
            yield f"Run {side.run.run_id}: {side.run.status}."
    lost = 0 if base.run is None else len(base.run.cells) - len(before)
    if lost:
        yield f"{lost} cells of {base.label} have no shard any more and were not compared."
    if not before:
        yield f"{base.label} has no cells: nothing could get worse."
    yield (
        "Speed: speed-up over the run's own baseline, head over base. Seconds: time per unit of "
        "output, only where both runs were made on the same machine. Intervals are 95%; REGRESSED "
        "and IMPROVED hold at 99% and go beyond the threshold."
    )


def _cells(side: Side) -> Iterator[_Cell]:
    """Yield the cells of a side; without a run every cell, as it was last measured."""
    store = side.store
    if side.run is None:
        newest: dict[str, tuple[str, str]] = {}
        for experiment in store.experiments():
            for cell in store.cells(experiment.experiment_id):
                candidate = (experiment.created, experiment.experiment_id)
                newest[cell.cell_id] = max(newest.get(cell.cell_id, candidate), candidate)
        pairs = [[experiment_id, cell_id] for cell_id, (_, experiment_id) in newest.items()]
    else:
        pairs = side.run.cells
    known = set(store.experiment_ids())
    experiments: dict[str, tuple[ExperimentRecord, dict[str, CellRecord]]] = {}
    for experiment_id, cell_id in pairs:
        if experiment_id not in known:
            continue  # its shard was discarded, or never begun
        if experiment_id not in experiments:
            records = {cell.cell_id: cell for cell in store.cells(experiment_id)}
            experiments[experiment_id] = (store.experiment(experiment_id), records)
        experiment, records = experiments[experiment_id]
        yield _Cell(store, experiment, records.get(cell_id), cell_id)


def _match(before: Sequence[_Cell], after: Sequence[_Cell]) -> dict[int, _Cell]:
    """Return the head's cell of each cell of the base, by the identity of the base's.

    Settings must agree; where exactly one cell is left whose settings agree as far as both sides
    have them, it is the same cell with a setting that came or went.
    """
    pairs: dict[int, _Cell] = {}
    for is_exact in (True, False):
        for cell in before:
            if id(cell) in pairs:
                continue
            taken = {id(partner) for partner in pairs.values()}
            own = cell.settings
            found = [
                rival
                for rival in after
                if id(rival) not in taken
                and rival.place == cell.place
                and (
                    rival.settings == own
                    if is_exact
                    else all(
                        rival.settings[name] == own[name] for name in own.keys() & rival.settings
                    )
                )
            ]
            if len(found) == 1 or (is_exact and found):
                pairs[id(cell)] = found[0]
    return pairs


@dataclass(frozen=True)
class _Pair:
    """A cell of the base and what became of it in the head."""

    base: _Cell
    head: _Cell | None
    run: RunRecord | None
    thresholds: _Thresholds

    def findings(self, method: str) -> list[Finding]:
        """Compare everything that can be."""

        def finding(check: Check, verdict: Verdict, *told: str) -> Finding:
            base, head, detail = (*told, "", "", "")[:3]
            return Finding(
                experiment=self.base.title,
                method=method,
                check=check,
                verdict=verdict,
                base=base,
                head=head,
                detail=detail,
            )

        old, new = self.base.record, self.head.record if self.head else None
        assert old is not None
        if self.head is None or new is None:
            return [finding("cell", "MISSING", old.status, "", "the head did not measure it")]
        if self.run is not None and new.finished < self.run.started:
            return [
                finding(
                    "cell",
                    "STALE",
                    "",
                    "",
                    f"measured {new.finished or 'at an unknown time'}, before the run; "
                    "`run --fresh` measures it again",
                )
            ]
        changed = [
            name
            for name in ("task_hash", "model_hash", "scale")
            if getattr(self.base.experiment, name) != getattr(self.head.experiment, name)
        ]
        if changed:
            what = " and ".join(name.removesuffix("_hash") for name in changed)
            return [
                finding("conditions", "REGRESSED", "", "", f"another {what}: nothing is comparable")
            ]
        found = [finding(*told) for told in self._endings(old, new)]
        if old.status == new.status == "ok":
            merged = _merge(self.base, self.head)
            if merged is None:
                detail = "the two have no measured item in common"
                return [*found, finding("conditions", "REGRESSED", "", "", detail)]
            found += [finding(*told) for told in self._numbers(merged)]
        return found

    def _endings(self, old: CellRecord, new: CellRecord) -> Iterator[tuple[Any, ...]]:
        """Yield what is said by how the cells ended."""
        was, now = (_OUTPUT_RANKS.get(each.output_check or "") for each in (old, new))
        promise, kept = (
            _PROMISES.index(each.declared_output) if each.declared_output in _PROMISES else 0
            for each in (old, new)
        )
        lossless: Verdict | None = None
        detail = ""
        if now == _OUTPUT_RANKS["violation"] and was != now:
            lossless, detail = "REGRESSED", new.error
        elif kept > promise:
            lossless, detail = "REGRESSED", f"it now promises only {new.declared_output} output"
        elif was is not None and now is not None:
            lossless = "SAME" if was == now else "IMPROVED" if now < was else "CHANGED"
        if lossless:
            yield (
                "losslessness",
                lossless,
                old.output_check or old.declared_output,
                new.output_check or new.declared_output,
                detail,
            )
        audited = [each.audit.get("result") if each.audit else None for each in (old, new)]
        if audited[1] is not None:
            worse = audited == ["passed", "failed"] or audited == [None, "failed"]
            verdict = "REGRESSED" if worse else "SAME" if audited[0] in (None, audited[1]) else ""
            yield (
                "audit",
                verdict or "IMPROVED",
                audited[0] or "not audited",
                audited[1],
                new.error if worse else "",
            )
        if old.status != new.status or new.status not in ("ok", "unsupported"):
            if new.status == old.status:
                yield "status", "SAME", old.status, new.status, new.error
            elif new.status == "ok":
                yield "status", "IMPROVED", old.status, new.status
            elif lossless != "REGRESSED" and audited[1] != "failed":
                yield "status", "REGRESSED", old.status, new.status, new.error

    def _numbers(self, merged: _Merged) -> Iterator[tuple[Any, ...]]:
        """Yield what is said by samples and scores."""
        yield from _work(merged)
        yield from self._quality(merged)
        yield from self._speed(merged)

    def _quality(self, merged: _Merged) -> Iterator[tuple[Any, ...]]:
        row = next((row for row in merged.metrics() if row["is_headline"]), None)
        if row is not None and row["kind"] == "corpus" and merged.corpus is None:
            detail = f"{row['metric']} is of all items together, and the items are not the same"
            yield "quality", "INCONCLUSIVE", "", "", detail
        if row is None or row.get("value") is None:
            return
        told: dict[str, Verdict] = {"BETTER": "IMPROVED", "WORSE": "REGRESSED"}
        verdict = row.get("verdict") or "INCONCLUSIVE"
        is_fraction = row["unit"] == "fraction"
        low, value, high = (
            text.score(row.get(name), is_fraction=is_fraction)
            for name in ("difference_low", "difference", "difference_high")
        )
        yield (
            "quality",
            told.get(verdict, verdict),
            text.score(row.get("baseline_value"), is_fraction=is_fraction),
            text.score(row["value"], is_fraction=is_fraction),
            f"{row['metric']} {text.interval(value, low, high)} over {merged.items} items, margin "
            f"{text.score(merged.experiment.quality_margin, is_fraction=is_fraction)}",
        )

    def _speed(self, merged: _Merged) -> Iterator[tuple[Any, ...]]:
        head = self.head
        assert head is not None
        margin = merged.experiment.margin
        noise = self.thresholds.of(head.experiment)
        if not self.base.is_baseline and not head.is_baseline:
            totals = merged.totals()
            if totals:
                sides = [
                    (totals[f"{side} baseline"], totals[f"{side} method"])
                    for side in ("base", "head")
                ]
                change = statistics.speed_up_change(sides[0], sides[1])
                values = [text.ratio(statistics.speed_up(*side).value) for side in sides]
                yield ("speed", *_settled(change, Threshold.of(noise.ratios, margin), values))
            else:
                yield "speed", "INCONCLUSIVE", "", "", "a baseline did not end well"
        if self.base.machine is not None and self.base.machine == head.machine:
            totals = merged.totals(("base method", "head method"))
            if totals:
                change = statistics.speed_up(totals["base method"], totals["head method"])
                values = [
                    f"{text.number(float(each.seconds.sum() / each.units.sum()))} s"
                    for each in totals.values()
                ]
                yield ("seconds", *_settled(change, Threshold.of(noise.seconds, margin), values))


def _settled(
    change: Estimate, threshold: Threshold, values: Sequence[str]
) -> tuple[Verdict, str, str, str]:
    """Return the verdict on a change of speed, above 1 for the better, and what to say of it."""
    verdict: Verdict = "INCONCLUSIVE"
    is_large = abs(math.log(change.value)) > math.log1p(threshold.value) if change.value else False
    found = statistics.speed_verdict(change, threshold.margin)
    if found in ("FASTER", "SLOWER") and is_large:
        verdict = "IMPROVED" if found == "FASTER" else "REGRESSED"
    elif statistics.speed_verdict(change, threshold.value) == "SAME":
        verdict = "SAME"
    ends = (text.ratio(end) for end in (change.low, change.high))
    shown = text.interval(text.ratio(change.value), *ends)
    return verdict, values[0], values[1], f"x{shown}, {threshold}"


class _Merged:
    """Samples and scores of both sides on their common items, as if they were one experiment.

    Its cells are called `base method`, `base baseline`, `head method` and `head baseline`, so that
    the numbers between runs are computed by the code that computes those within one. `corpus` is
    None where the two have not measured the same items in the same order: a metric of all items
    together is none of some of them, and its resamples are drawn by their places.
    """

    def __init__(
        self,
        experiment: ExperimentRecord,
        records: dict[str, CellRecord],
        samples: pa.Table,
        scores: pa.Table,
        corpus: pa.Table | None,
    ) -> None:
        self.experiment = experiment
        self.records = records
        self.samples = samples
        self.scores = scores
        self.corpus = corpus
        self.items = len(experiment.items)

    def totals(
        self,
        cells: Sequence[str] = ("base baseline", "base method", "head baseline", "head method"),
    ) -> dict[str, statistics.ItemTotals]:
        """Return seconds and units of each item; empty if a cell has none."""
        if any(self.records[cell].status != "ok" for cell in cells if cell in self.records):
            return {}
        return paired_totals(self.experiment, self.samples, cells)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the head's metrics, with their paired differences from the base's."""
        cells = [self.records["base method"], self.records["head method"]]
        summary = summarize(self.experiment, cells, self.samples, self.scores, self.corpus)
        return [row for row in summary.metrics if row["cell_id"] == "head method"]

    def column(self, cell: str, name: str) -> dict[tuple[str, int], Any]:
        """Return a column of a cell's samples by item and repeat."""
        chosen = self.samples.filter(pc.equal(self.samples["cell_id"], cell))
        keys = zip(chosen["item_id"].to_pylist(), chosen["repeat"].to_pylist(), strict=True)
        return dict(zip(keys, chosen[name].to_pylist(), strict=True))


def _merge(base: _Cell, head: _Cell) -> _Merged | None:
    """Return both sides on the items that both measured; None if there are none."""
    tables: list[pa.Table] = []
    scores: list[pa.Table] = []
    corpora: list[pa.Table] = []
    records: dict[str, CellRecord] = {}
    measured: list[set[str]] = []
    for side, cell in (("base", base), ("head", head)):
        experiment_id = cell.experiment.experiment_id
        samples = cell.store.sample_table(experiment_id)
        scored = cell.store.score_table(experiment_id)
        corpus = cell.store.corpus_table(experiment_id)
        by_id = {record.cell_id: record for record in cell.store.cells(experiment_id)}
        for role, cell_id in (("method", cell.cell_id), ("baseline", cell.experiment.baseline)):
            name = f"{side} {role}"
            own = _renamed(samples, cell_id, name)
            tables.append(own)
            scores.append(_renamed(scored, cell_id, name))
            corpora.append(_renamed(corpus, cell_id, name))
            if cell_id in by_id:
                records[name] = replace(by_id[cell_id], cell_id=name)
            if role == "method":
                measured.append(set(own["item_id"].to_pylist()))
    items = [item for item in head.experiment.items if item in measured[0] & measured[1]]
    if not items:
        return None
    groups = dict(zip(head.experiment.items, head.experiment.groups, strict=True))
    experiment = replace(
        head.experiment,
        items=items,
        groups=[groups[item] for item in items],
        repeats=max(base.experiment.repeats, head.experiment.repeats),
        baseline="base method",
        cells=["base method", "head method"],
    )
    is_whole = items == base.experiment.items == head.experiment.items
    return _Merged(
        experiment,
        records,
        _only(items, tables),
        _only(items, scores),
        pa.concat_tables(corpora) if is_whole else None,
    )


def _renamed(table: pa.Table, cell_id: str, name: str) -> pa.Table:
    chosen = table.filter(pc.equal(table["cell_id"], cell_id))
    place = chosen.schema.get_field_index("cell_id")
    names = pa.array([name] * len(chosen), pa.string())
    return chosen.set_column(place, chosen.schema.field(place), names)


def _only(items: Sequence[str], tables: Sequence[pa.Table]) -> pa.Table:
    table = pa.concat_tables(tables)
    return table.filter(pc.is_in(table["item_id"], value_set=pa.array(items)))


def _work(merged: _Merged) -> Iterator[tuple[Any, ...]]:
    """Yield how outputs and counted work changed; work only over samples with equal outputs."""
    old, new = (merged.column(f"{side} method", "output_digest") for side in ("base", "head"))
    shared = [key for key in old if key in new]
    agreeing = [key for key in shared if old[key] == new[key]]
    differing = dict.fromkeys(
        item for item, repeat in shared if old[item, repeat] != new[item, repeat]
    )
    if differing:
        shown = ", ".join([*list(differing)[:3], *(["…"] if len(differing) > 3 else [])])
        detail = f"{len(differing)} of {merged.items} items have another output: {shown}"
        yield "output", "CHANGED", "", "", detail
    else:
        yield "output", "SAME"
    if not agreeing:
        return
    changes: dict[str, tuple[float, float]] = {}
    for name in _COSTS:
        sides = [merged.column(f"{side} method", name) for side in ("base", "head")]
        values = [[column[key] for key in agreeing] for column in sides]
        if any(value is None for side in values for value in side):
            continue  # a peer that does not tell
        before, after = (float(sum(side)) for side in values)
        if not math.isclose(before, after, rel_tol=_RELATIVE_TOLERANCE):
            changes[name] = (before, after)
    if not changes:
        yield "work", "SAME"
        return
    rises = any(after > before for before, after in changes.values())
    detail = ", ".join(
        f"{name} {text.number(before, 6)} -> {text.number(after, 6)}"
        for name, (before, after) in changes.items()
    )
    yield "work", "REGRESSED" if rises else "IMPROVED", "", "", f"{detail} on equal outputs"


class _Noise(NamedTuple):
    """Changes between measurements of the same thing, each the log of a ratio."""

    ratios: list[float]
    seconds: list[float]


class _Thresholds:
    """What repeating a measurement changes, by machine; read once, from both stores."""

    def __init__(self, stores: Sequence[Store], left_out: Collection[str]) -> None:
        self._stores = {store.path.resolve(): store for store in stores}
        self._left_out = left_out
        self._found: dict[tuple[Any, ...], _Noise] | None = None

    def of(self, experiment: ExperimentRecord) -> _Noise:
        """Return the changes that were seen on the machine of an experiment."""
        if self._found is None:
            self._found = self._look()
        return self._found.get(_machine(experiment), _Noise([], []))

    def _look(self) -> dict[tuple[Any, ...], _Noise]:
        found: dict[tuple[Any, ...], _Noise] = {}
        seen: dict[str, tuple[Store, ExperimentRecord]] = {}
        for store in self._stores.values():
            for experiment in store.experiments():
                if experiment.experiment_id not in self._left_out:
                    seen.setdefault(experiment.experiment_id, (store, experiment))
        newest = sorted(seen.values(), key=lambda each: each[1].created)[-_MOST_EXPERIMENTS:]
        by_cell: dict[str, list[_Cell]] = {}
        for store, experiment in newest:
            records = {cell.cell_id: cell for cell in store.cells(experiment.experiment_id)}
            for cell_id, record in records.items():
                if record.status == "ok":
                    by_cell.setdefault(cell_id, []).append(
                        _Cell(store, experiment, record, cell_id)
                    )
            noise = found.setdefault(_machine(experiment), _Noise([], []))
            baseline = records.get(experiment.baseline)
            if baseline is not None and baseline.status == "ok" and len(records) > 1:
                noise.ratios.extend(_twins(store, experiment, records))
        # The same id means the same source, settings, weights, items, versions and machine.
        for cells in by_cell.values():
            for old, new in pairwise(cells):
                merged = _merge(old, new)
                if merged is None:
                    continue
                noise = found.setdefault(_machine(new.experiment), _Noise([], []))
                if two := merged.totals(("base method", "head method")):
                    change = statistics.speed_up(two["base method"], two["head method"]).value
                    noise.seconds.extend(_finite_log(change))
                if not old.is_baseline and (four := merged.totals()):
                    change = statistics.speed_up_change(
                        (four["base baseline"], four["base method"]),
                        (four["head baseline"], four["head method"]),
                    ).value
                    noise.ratios.extend(_finite_log(change))
        return found


def _machine(experiment: ExperimentRecord) -> tuple[Any, ...]:
    return experiment.hardware, experiment.environment.get("machine_id"), experiment.scenario


def _twins(
    store: Store, experiment: ExperimentRecord, records: Mapping[str, CellRecord]
) -> Iterator[float]:
    """Yield the log speed-up of each cell that does exactly what the baseline does.

    Its speed-up is noise, of one run; that of a change between two runs is sqrt(2) times as large.
    """
    names = ["cell_id", "item_id", "repeat", "output_digest", "target_forwards", "forward_tokens"]
    samples = store.sample_table(experiment.experiment_id)
    done: dict[str, dict[tuple[Any, ...], tuple[Any, ...]]] = {}
    for cell_id, item, repeat, *counted in zip(
        *(samples[name].to_pylist() for name in names), strict=True
    ):
        done.setdefault(cell_id, {})[item, repeat] = tuple(counted)
    reference = done.get(experiment.baseline)
    for cell_id, work in done.items():
        record = records.get(cell_id)
        if record is None or record.status != "ok" or record.role == "peer":
            continue
        is_told = all(forwards is not None for _, forwards, _ in work.values())
        if cell_id != experiment.baseline and is_told and work == reference:
            totals = paired_totals(experiment, samples, (experiment.baseline, cell_id))
            if totals:
                change = statistics.speed_up(totals[experiment.baseline], totals[cell_id]).value
                yield from (math.sqrt(2) * log for log in _finite_log(change))


def _finite_log(ratio: float) -> list[float]:
    return [math.log(ratio)] if np.isfinite(ratio) and ratio > 0 else []


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# Formats


COLUMNS = ("verdict", "check", "method", "where", "base", "head", "detail")


def rows(comparison: Comparison, *, everything: bool = True) -> list[dict[str, str]]:
    """Return a row a finding, the regressions first; without `everything`, no SAME."""
    order: dict[str, int] = {verdict: place for place, verdict in enumerate(RED)}
    chosen = [finding for finding in comparison.findings if everything or finding.verdict != "SAME"]
    return [
        {
            "verdict": finding.verdict,
            "check": finding.check,
            "method": finding.method,
            "where": finding.experiment,
            "base": finding.base,
            "head": finding.head,
            "detail": finding.detail,
        }
        for finding in sorted(chosen, key=lambda each: order.get(each.verdict, len(order)))
    ]


def render(comparison: Comparison, format: str) -> str:
    """Return the comparison as Markdown or JSON.

    Raises:
        ValueError: `format` is none of `FORMATS`.
    """
    if format == "json":
        content = {
            "base": comparison.base,
            "head": comparison.head,
            "regressions": len(comparison.regressions),
            "findings": rows(comparison),
            "notes": comparison.notes,
        }
        return text.json_text(content, indent=1) + "\n"
    if format != "md":
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    lines = [f"### {text.markdown(comparison.summary)}", ""]
    shown = rows(comparison, everything=False)
    if shown:
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        for row in shown:
            lines.append("| " + " | ".join(text.markdown(row[name]) for name in COLUMNS) + " |")
        lines.append("")
    lines += [f"- {text.markdown(note)}" for note in comparison.notes]
    return "\n".join(lines) + "\n"
