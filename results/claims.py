"""Verdicts of claims: what a measurement, or arithmetic alone, says about a number of a paper.

Pure functions on the claims, as the cards' readers pass them, and on the index. Ingesting writes
the verdicts into the table `claim_verdicts`; since they follow from claims and samples alone, they
come back when the index is rebuilt, and `verify` computes them again. docs/methodology.md says how
each one is reached by hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, get_args

import duckdb
import numpy as np
from numpy.typing import NDArray

from results import statistics, text
from results.statistics import Estimate, Floats, ItemTotals
from results.tables import rows_of

Verdict = Literal[
    "reproduced",
    "direction",
    "not-reproduced",
    "not-reproduced (mechanism)",
    "exceeds-bound",
    "protocol-differs",
    "not-testable-here",
]
VERDICTS: Final[tuple[Verdict, ...]] = get_args(Verdict)

# Printed numbers carry three digits or so: half a unit in the last place of both sides.
ROUNDING: Final = 0.01
# "About" leaves more room than a number with decimals.
ABOUT_TOLERANCE: Final = 0.15
# A cell of fewer items does not stand for a method when there is a larger one.
ENOUGH_ITEMS: Final = 8
# A note is of one text, the last: it counts as known up to this factor either way.
NOTE_FACTOR: Final = 10.0
_MOST_ITEMS_NAMED = 100_000
# Differences: their neutral value is 0; all other measures are ratios and neutral at 1.
_DIFFERENCES = ("quality",)
_DIGITS = 4
# Whose baseline needs no implementation of another method.
_PLAIN = (
    "autoregressive",
    "greedy",
    "vanilla",
    "plain",
    "same model",
    "full model",
    "target alone",
)
# What somebody may have whom a command would serve.
_THINGS_TO_HAVE = frozenset({"weights", "data", "hardware"})
# What a `[claim.check]` table leaves out, as `methods.base.Check` has it.
_CHECK_DEFAULTS: Mapping[str, Any] = {
    "metric": "",
    "direction": "above",
    "params": {},
    "rival": "",
    "rival_params": {},
    "task_params": {},
    "expected": None,
    "tolerance": 0.1,
    "quantity": "",
    "per": "",
    "times": 1.0,
    "paper_model": "",
    "paper_params": {},
    "paper_task": "",
    "paper_task_params": {},
    "paper_hardware": (),
}
# By measure: the columns whose ratio is taken, numerator per denominator; and whether more of that
# quotient is more of the measure.
_RATIOS: Mapping[str, tuple[str, str, bool]] = {
    "speedup": ("seconds", "units", False),
    "decode_speedup": ("decode_seconds", "decode_tokens", False),
    "tokens_per_forward": ("target_forwards", "decode_tokens", False),
    "acceptance_rate": ("drafted_tokens", "accepted_tokens", False),
    "work": ("flops", "units", True),
    "memory": ("peak_bytes", "samples", True),
}
_COLUMNS = (
    "seconds",
    "prefill_seconds",
    "output_tokens",
    "decode_tokens",
    "target_forwards",
    "draft_forwards",
    "forward_tokens",
    "accepted_tokens",
    "flops",
    "kv_bytes",
    "peak_bytes",
)


class Cell(NamedTuple):
    """A measured cell that can answer a check, with the cell it is compared with."""

    experiment_id: str
    cell_id: str
    rival_id: str
    task: str
    model: str
    hardware: str
    scale: str
    items: int
    margin: float
    quality_margin: float
    speedup_bound: float | None
    decode_bound: float | None


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A claim with its verdict.

    Attributes:
        method, claim_id: Which claim.
        verdict: One of `VERDICTS`.
        detail: Why, in a sentence.
        missing: What it takes to say more: implementation, weights, data, hardware, rival.
        command: What to run where those are; empty if nothing would help.
        scale: `embedded` or `paper` if it was measured, `arithmetic` if it was computed from the
            claim or does not depend on scale; empty otherwise.
        measure, measured, measured_low, measured_high: What was found, with the 95% interval.
        expected: The claim's number in terms of the measure; for `exceeds-bound`, its ceiling.
        items: Items measured.
        evidence_experiment, evidence_cell, rival_cell: Where the samples lie.
    """

    method: str
    claim_id: str
    verdict: Verdict
    detail: str
    missing: list[str] = field(default_factory=list)
    command: str = ""
    scale: str = ""
    measure: str = ""
    measured: float | None = None
    measured_low: float | None = None
    measured_high: float | None = None
    expected: float | None = None
    items: int | None = None
    evidence_experiment: str = ""
    evidence_cell: str = ""
    rival_cell: str = ""


class Measurements:
    """What an index holds about checks, looked up once each.

    Attributes:
        connection: Over the index; None where nothing has been measured.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection | None) -> None:
        self.connection = connection
        self._cells: dict[str, list[dict[str, Any]]] = {}
        self._numbers: dict[tuple[str, str], dict[str, Floats]] = {}
        self._estimates: dict[tuple[str, ...], Estimate | None] = {}

    def find(
        self, method: str, check: Mapping[str, Any], scale: Literal["embedded", "paper"]
    ) -> Cell | None:
        """Return the cell that answers a check: the newest of enough items, or the newest.

        At the embedded scale task and model must be the check's; at the paper's scale the model
        must be, and the check's own paper task is preferred over others. Settings of the task are
        asked for where it is the check's.
        """
        if scale == "paper" and not check["paper_model"]:
            return None
        rival = check["rival"]
        wanted = check["params"]
        if scale == "paper":
            wanted = check["paper_params"] or wanted
        of_task, task_wanted = task_settings(check, scale)
        found = []
        for row in self._of(method):
            if row["scale"] != scale or not _has(row["params"], wanted):
                continue
            if scale == "embedded" and (row["task"], row["model"]) != (
                check["task"],
                check["model"],
            ):
                continue
            if scale == "paper" and row["model"] != check["paper_model"]:
                continue
            if row["task"] == of_task and not _has(row["task_params"], task_wanted):
                continue
            if rival:
                beside = [
                    other
                    for other in self._of(rival)
                    if other["experiment_id"] == row["experiment_id"]
                    and other["cell_id"] != row["cell_id"]
                    and _has(other["params"], check["rival_params"])
                ]
                rival_id = beside[0]["cell_id"] if beside else ""
            else:
                rival_id = row["baseline_cell_id"]
            if rival_id:
                found.append((row, rival_id))
        if not found:
            return None

        def preference(pair: tuple[dict[str, Any], str]) -> tuple[Any, ...]:
            row = pair[0]
            return (
                scale == "paper" and row["task"] == check["paper_task"],
                row["items"] >= ENOUGH_ITEMS,
                row["created"],
                row["experiment_id"],
                row["cell_id"],
            )

        row, rival_id = max(found, key=preference)
        names = [name for name in Cell._fields if name != "rival_id"]
        return Cell(rival_id=rival_id, **{name: row[name] for name in names})

    def estimate(self, check: Mapping[str, Any], cell: Cell) -> Estimate | None:
        """Return a check's measure with its interval; None where the samples lack something."""
        measure, note, metric = check["measure"], check["quantity"], check["metric"]
        key = (measure, note, metric, cell.experiment_id, cell.cell_id, cell.rival_id)
        if key not in self._estimates:
            if measure in _DIFFERENCES:
                found = self._quality(cell, metric)
            elif measure == "note":
                found = self._notes_ratio(note, cell)
            else:
                found = self._ratio(measure, cell)
            if found is not None and not math.isfinite(found.value):
                found = None
            self._estimates[key] = found
        return self._estimates[key]

    def quantity(self, name: str, cell: Cell) -> float | None:
        """Return a note of the cell, or the sum of a column of its samples; None if unknown."""
        ((notes,),) = self._rows(
            "SELECT notes FROM cells WHERE experiment_id = ? AND cell_id = ?",
            cell.experiment_id,
            cell.cell_id,
        )
        value = json.loads(notes or "{}").get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if name not in _COLUMNS:
            return None
        total = self._samples(cell.experiment_id, cell.cell_id)[name]
        return None if np.isnan(total).all() else float(np.nansum(total))

    def _notes_ratio(self, name: str, cell: Cell) -> Estimate | None:
        own, other = (
            self.quantity(name, cell._replace(cell_id=each))
            for each in (cell.cell_id, cell.rival_id)
        )
        if not own or not other:
            return None
        ratio = own / other
        return Estimate(ratio, ratio / NOTE_FACTOR, ratio * NOTE_FACTOR)

    def _of(self, method: str) -> list[dict[str, Any]]:
        """Return the finished cells of a method, the newest first."""
        if self.connection is None:
            return []
        if method not in self._cells:
            rows = rows_of(
                self.connection.execute(
                    "SELECT experiment_id, cell_id, baseline_cell_id, params, task, task_params, "
                    "model, hardware, scale, items, margin, quality_margin, speedup_bound, "
                    "decode_bound, created "
                    "FROM comparison WHERE method = ? AND status = 'ok' AND items > 0 "
                    "ORDER BY created DESC, experiment_id, cell_id",
                    [method],
                )
            )
            for row in rows:
                row["params"] = json.loads(row["params"])
                row["task_params"] = json.loads(row["task_params"])
            self._cells[method] = rows
        return self._cells[method]

    def _samples(self, experiment_id: str, cell_id: str) -> dict[str, Floats]:
        """Return the columns of a cell's samples, (items, repeats), NaN where absent."""
        key = (experiment_id, cell_id)
        if key in self._numbers:
            return self._numbers[key]
        items = [
            item
            for (item,) in self._rows(
                "SELECT DISTINCT item_id FROM samples WHERE experiment_id = ? ORDER BY item_id",
                experiment_id,
            )
        ]
        places = {item: place for place, item in enumerate(items)}
        rows = self._rows(
            f"SELECT item_id, repeat, {', '.join(_COLUMNS)} FROM samples "
            "WHERE experiment_id = ? AND cell_id = ?",
            experiment_id,
            cell_id,
        )
        repeats = max((row[1] for row in rows), default=0) + 1
        numbers = {name: np.full((len(items), repeats), np.nan) for name in _COLUMNS}
        for item, repeat, *values in rows:
            for name, value in zip(_COLUMNS, values, strict=True):
                if value is not None:
                    numbers[name][places[item], repeat] = value
        measured = ~np.isnan(numbers["seconds"])
        numbers["samples"] = np.where(measured, 1.0, np.nan)
        numbers["decode_seconds"] = numbers["seconds"] - numbers["prefill_seconds"]
        numbers["drafted_tokens"] = numbers["forward_tokens"] - numbers["target_forwards"]
        ((unit,),) = self._rows(
            "SELECT coalesce(facts ->> 'output_unit', 'token') FROM experiments "
            "WHERE experiment_id = ?",
            experiment_id,
        )
        numbers["units"] = numbers["output_tokens" if unit == "token" else "samples"]
        self._numbers[key] = numbers
        return numbers

    def _ratio(self, measure: str, cell: Cell) -> Estimate | None:
        over, per, is_more = _RATIOS[measure]
        sides = [
            self._samples(cell.experiment_id, cell_id) for cell_id in (cell.cell_id, cell.rival_id)
        ]
        known = [~(np.isnan(side[over]) | np.isnan(side[per])).all(axis=1) for side in sides]
        paired: NDArray[np.bool_] = np.asarray(known[0] & known[1])
        if not paired.any():
            return None
        method, rival = (_totals(side[over][paired], side[per][paired]) for side in sides)
        if min(method.units.sum(), rival.units.sum(), method.seconds.sum()) <= 0:
            return None
        # `speed_up` is the ratio of two such quotients with its paired interval.
        return statistics.speed_up(method, rival) if is_more else statistics.speed_up(rival, method)

    def _quality(self, cell: Cell, wanted: str) -> Estimate | None:
        """Return the difference of a metric, the sign turned so that more is better.

        Args:
            cell: The cell and its rival.
            wanted: The metric; empty for the headline.
        """
        found = self._rows(
            "SELECT metric, kind, unit, higher_is_better, difference, difference_low, "
            "difference_high, baseline = ? FROM metrics JOIN experiments USING (experiment_id) "
            "WHERE experiment_id = ? AND cell_id = ? AND CASE WHEN ? = '' THEN is_headline "
            "ELSE metric = ? END",
            cell.rival_id,
            cell.experiment_id,
            cell.cell_id,
            wanted,
            wanted,
        )
        if not found:
            return None
        ((metric, kind, unit, is_better, value, low, high, is_baseline),) = found
        if is_baseline:
            if value is None:
                return None
            return Estimate(value, low, high) if is_better else _negated(Estimate(value, low, high))
        if kind == "pass@k":
            return None  # no paired difference of two methods without the problems' groups
        if kind == "corpus":
            if (difference := self._corpus_difference(cell, metric)) is None:
                return None
            return difference if is_better else _negated(difference)
        own, other = (
            self._scores(cell, cell_id, metric) for cell_id in (cell.cell_id, cell.rival_id)
        )
        shared = sorted(own.keys() & other.keys())
        if not shared:
            return None
        if self._same_outputs(cell):
            return Estimate(0.0, 0.0, 0.0)
        difference = statistics.paired_difference(
            np.array([other[item] for item in shared]),
            np.array([own[item] for item in shared]),
            is_fraction=kind == "binary" or unit == "fraction",
        )
        return difference if is_better else _negated(difference)

    def _corpus_difference(self, cell: Cell, metric: str) -> Estimate | None:
        """Return the difference of a corpus metric from the rival's, on the same resamples."""
        ((items,),) = self._rows(
            "SELECT items FROM experiments WHERE experiment_id = ?", cell.experiment_id
        )
        sides = []
        for cell_id in (cell.cell_id, cell.rival_id):
            found = self._rows(
                "SELECT value, resampled FROM corpus WHERE experiment_id = ? AND cell_id = ? "
                "AND metric = ?",
                cell.experiment_id,
                cell_id,
                metric,
            )
            sides += [
                statistics.corpus_replicates(value, resampled, items) for value, resampled in found
            ]
        if len(sides) < 2:
            return None
        if self._same_outputs(cell):
            return Estimate(0.0, 0.0, 0.0)
        return statistics.corpus_metric(sides[0] - sides[1], items)

    def _scores(self, cell: Cell, cell_id: str, metric: str) -> dict[str, float]:
        return dict(
            self._rows(
                "SELECT item_id, value FROM scores WHERE experiment_id = ? AND cell_id = ? "
                "AND metric = ? AND value IS NOT NULL AND NOT isnan(value)",
                cell.experiment_id,
                cell_id,
                metric,
            )
        )

    def _same_outputs(self, cell: Cell) -> bool:
        ((differing,),) = self._rows(
            "SELECT count(*) FROM samples a JOIN samples b USING (experiment_id, item_id, repeat) "
            "WHERE a.experiment_id = ? AND a.cell_id = ? AND b.cell_id = ? "
            "AND a.output_digest <> b.output_digest",
            cell.experiment_id,
            cell.cell_id,
            cell.rival_id,
        )
        return bool(differing == 0)

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        assert self.connection is not None  # whoever asks has found a cell there
        return self.connection.execute(query, list(values)).fetchall()


def settle(
    claims: Iterable[Mapping[str, Any]], connection: duckdb.DuckDBPyConnection | None = None
) -> list[Settled]:
    """Return a verdict for every claim, in their order.

    Args:
        claims: Rows with the fields of a card's claim, `method`, and if known `implementation`
            (`ready` or `planned`) and `card`; missing fields count as empty.
        connection: Over the index; None where nothing has been measured.
    """
    measurements = Measurements(connection)
    return [settle_claim(claim, measurements) for claim in claims]


def settle_claim(claim: Mapping[str, Any], measurements: Measurements) -> Settled:
    """Return the verdict of one claim.

    In this order: arithmetic on the claim's own counts; a measurement at the paper's scale; one of
    ours; what is missing. A protocol that differs for certain is said whatever was measured.
    """
    settled = _Judge(claim, measurements).verdict()
    assert settled.verdict in VERDICTS
    return settled


def read_claims(connection: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    """Return the claims that an index holds, as they were handed to `ingest`."""
    claims = []
    for row in rows_of(connection.execute("SELECT * FROM claims ORDER BY rowid")):
        extra = json.loads(row.pop("extra") or "{}")
        row["id"], row["where"] = row.pop("claim_id"), row.pop("stated_in")
        claims.append(row | extra)
    return claims


def counts(settled: Iterable[Settled]) -> dict[Verdict, int]:
    """Return how often each verdict was given, the given ones only, in the order of `VERDICTS`."""
    given = [each.verdict for each in settled]
    return {verdict: given.count(verdict) for verdict in VERDICTS if verdict in given}


class _Judge:
    """One claim on its way to a verdict."""

    def __init__(self, claim: Mapping[str, Any], measurements: Measurements) -> None:
        self.claim = claim
        self.measurements = measurements
        self.method = str(claim.get("method") or "")
        check = claim.get("check")
        self.check = {**_CHECK_DEFAULTS, **check} if check else None
        self.number: float | None = claim.get("number")
        self.bound = str(claim.get("bound") or "exact")

    def verdict(self) -> Settled:
        if (exceeded := self._exceeds()) is not None:
            return exceeded
        found = self._measured()
        if differs := self.claim.get("differs"):
            seen = f" Measured: {found.detail}" if found is not None and found.measured else ""
            kept = {} if found is None else _evidence(found)
            return self._settled("protocol-differs", f"{_sentence(differs)}{seen}", **kept)
        if found is not None:
            return found
        return self._untestable()

    def _settled(self, verdict: Verdict, detail: str, **more: Any) -> Settled:
        return Settled(
            method=self.method,
            claim_id=str(self.claim.get("id") or ""),
            verdict=verdict,
            detail=detail,
            **more,
        )

    # Arithmetic

    def _exceeds(self) -> Settled | None:
        ceiling = self.claim.get("ceiling")
        if ceiling is None or self.number is None or self.bound == "at-most":
            return None
        if self.number <= ceiling * (1 + ROUNDING):
            return None
        unit = str(self.claim.get("unit") or "")
        return self._settled(
            "exceeds-bound",
            f"{_with_unit(self.number, unit)} is claimed, its own counts allow at most "
            f"{_with_unit(ceiling, unit)}: {_sentence(self.claim['ceiling_from'])}",
            scale="arithmetic",
            expected=float(ceiling),
        )

    # Measured

    def _measured(self) -> Settled | None:
        if self.check is None:
            return None
        if self.check["measure"] == "computed":
            return self._computed(self.check)
        for scale in ("paper", "embedded"):
            cell = self.measurements.find(self.method, self.check, scale)
            estimate = cell and self.measurements.estimate(self.check, cell)
            if cell is None or estimate is None:
                continue
            judge = self._at_paper_scale if scale == "paper" else self._embedded
            verdict, detail, missing = judge(self.check, cell, estimate)
            return self._settled(
                verdict,
                detail,
                missing=missing,
                command=self._command_after(scale, verdict, cell),
                scale=scale,
                measure=self.check["measure"],
                measured=estimate.value,
                measured_low=estimate.low,
                measured_high=estimate.high,
                expected=self._expected(self.check),
                items=cell.items,
                evidence_experiment=cell.experiment_id,
                evidence_cell=cell.cell_id,
                rival_cell=cell.rival_id,
            )
        return None

    def _computed(self, check: Mapping[str, Any]) -> Settled | None:
        cell = self.measurements.find(self.method, check, "embedded")
        if cell is None:
            return None
        value = self.measurements.quantity(check["quantity"], cell)
        divisor = self.measurements.quantity(check["per"], cell) if check["per"] else 1.0
        expected = self._expected(check)
        if value is None or not divisor or expected is None:
            return None
        found = value / divisor * check["times"]
        is_met = _meets(found, expected, self.bound, check["tolerance"])
        what = check["quantity"] + (f" per {check['per']}" if check["per"] else "")
        # What the number means in terms of the quantity has not the number's unit.
        is_meant = check["expected"] is not None
        unit = "" if is_meant else str(self.claim.get("unit") or "")
        meant = f", which means {text.number(expected, _DIGITS)}" if is_meant else ""
        scaled = "" if check["times"] == 1 else ", scaled to the claim's conditions,"
        return self._settled(
            "reproduced" if is_met else "not-reproduced",
            f"{what} of our implementation{scaled} gives {_with_unit(found, unit)}; claimed "
            f"{self.claim.get('value') or text.number(expected, _DIGITS)}{meant}. This does not "
            "depend on scale.",
            scale="arithmetic",
            measure="computed",
            measured=found,
            expected=expected,
            items=cell.items,
            evidence_experiment=cell.experiment_id,
            evidence_cell=cell.cell_id,
        )

    def _embedded(
        self, check: Mapping[str, Any], cell: Cell, estimate: Estimate
    ) -> tuple[Verdict, str, list[str]]:
        """Judge by a small model: the direction and the mechanism, never the number."""
        found = self._found(check, cell, estimate)
        side = _side(check, cell, estimate)
        if side > 0:
            return "direction", f"{found}: {_holds(check)}, at the embedded scale.", []
        if side < 0:
            bound = {
                "speedup": cell.speedup_bound,
                "decode_speedup": cell.decode_bound,
            }.get(check["measure"])
            allowed = (
                f" The forwards that were counted allow {text.ratio(bound)}x here."
                if bound is not None and not check["rival"]
                else ""
            )
            return (
                "not-reproduced (mechanism)",
                f"{found}: {_fails(check)} at the embedded scale.{allowed}",
                [],
            )
        reason, more = _undecided(check, cell, estimate)
        return "not-testable-here", f"undecided: {found}; {reason}.", [more]

    def _at_paper_scale(
        self, check: Mapping[str, Any], cell: Cell, estimate: Estimate
    ) -> tuple[Verdict, str, list[str]]:
        found = self._found(check, cell, estimate)
        differs = []
        if cell.task != check["paper_task"]:
            differs.append(f"our task is {cell.task}, the claim's {self.claim.get('task') or '?'}")
        fitting = check["paper_hardware"]
        if fitting and cell.hardware not in fitting:
            named = self.claim.get("hardware") or ", ".join(fitting)
            differs.append(f"our hardware is {cell.hardware}, the claim's {named}")
        if differs:
            return "protocol-differs", f"{'; '.join(differs)}. Measured there: {found}.", []
        side, expected = _side(check, cell, estimate), self._expected(check)
        if expected is None:
            if side > 0:
                return "reproduced", f"{found}: {_holds(check)}.", []
            if side < 0:
                return "not-reproduced", f"{found}: {_fails(check)}.", []
        elif _reaches(check, estimate.value, expected, self._tolerance(check)) and side > 0:
            return "reproduced", f"{found}; claimed {text.number(expected, _DIGITS)}.", []
        elif side > 0:
            return (
                "direction",
                f"{found}: {_holds(check)}, but short of the claimed "
                f"{text.number(expected, _DIGITS)}.",
                [],
            )
        elif side < 0 or not _may_reach(check, estimate, expected, self._tolerance(check)):
            return "not-reproduced", f"{found}; claimed {text.number(expected, _DIGITS)}.", []
        reason, more = _undecided(check, cell, estimate)
        return "not-testable-here", f"undecided: {found}; {reason}.", [more]

    def _found(self, check: Mapping[str, Any], cell: Cell, estimate: Estimate) -> str:
        name = check["quantity"] if check["measure"] == "note" else check["measure"]
        name = check["metric"] or name
        name = name.replace("_", " ").replace("speedup", "speed-up")
        against = f" against {check['rival']}" if check["rival"] else ""
        ends = ["" if end is None else text.number(end, 3) for end in (estimate.low, estimate.high)]
        value = text.interval(text.number(estimate.value, 3), *ends)
        return f"{name}{against} {value} on {cell.items} items of {cell.task} with {cell.model}"

    def _expected(self, check: Mapping[str, Any]) -> float | None:
        return self.number if check["expected"] is None else float(check["expected"])

    def _tolerance(self, check: Mapping[str, Any]) -> float:
        allowed = float(check["tolerance"])
        if self.bound == "about":
            return max(allowed, ABOUT_TOLERANCE)
        return 0.0 if self.bound in ("at-least", "at-most") else allowed

    # Missing

    def _untestable(self) -> Settled:
        claim, missing = self.claim, []
        is_planned = claim.get("implementation") == "planned"
        if is_planned:
            missing.append(f"implementation: the method is planned, {claim.get('card')}")
        elif self.check is not None:
            missing.append("a measurement: nothing in the store answers the check")
        missing += list(claim.get("missing") or ())
        if self.check is None or is_planned:
            missing += self._conditions(named={each.partition(":")[0] for each in missing})
        if self.check is not None and not is_planned:
            detail, command = "not measured yet", f"python run.py reproduce {self.method}"
        else:
            if not missing:
                missing = ["conditions: the claim states neither model nor task nor hardware"]
            kinds = {each.partition(":")[0] for each in missing}
            if not is_planned and kinds <= _THINGS_TO_HAVE:
                missing.append("task: none of ours measures it")
            detail, command = f"needs {'; '.join(missing)}", self._paper_command()
        return self._settled(
            "not-testable-here", _sentence(detail), missing=missing, command=command
        )

    def _conditions(self, named: set[str]) -> list[str]:
        """Return what of the claim's conditions a machine without them lacks.

        Args:
            named: Kinds of things that the card itself says are missing.
        """
        claim = self.claim
        needs = {"weights": claim.get("model"), "data": claim.get("task")}
        baseline = str(claim.get("baseline") or "")
        # A baseline may be a number of the same table, which takes nothing to run.
        if baseline[:1].isalpha() and not baseline.lower().startswith(_PLAIN):
            needs["rival"] = baseline
        # Weights without a machine: the claim's authors had a GPU, and small machines will not do.
        unnamed = "a GPU, the claim names none" if claim.get("model") else ""
        needs["hardware"] = claim.get("hardware") or unnamed
        return [f"{kind}: {what}" for kind, what in needs.items() if what and kind not in named]

    def _command_after(self, scale: str, verdict: Verdict, cell: Cell) -> str:
        """Return what would say more than a measurement did."""
        if scale == "embedded" and self.check is not None and self.check["paper_model"]:
            return self._paper_command()
        if verdict == "not-testable-here":
            return f"python run.py reproduce {self.method} --limit {4 * cell.items}"
        return ""

    def _paper_command(self) -> str:
        model = (self.check or {}).get("paper_model") or ""
        if not model and self.claim.get("implementation") != "planned" and self.check is None:
            return ""  # no measurement of ours would answer it
        return f"python run.py reproduce {self.method}" + (f" --model {model}" if model else "")


def _evidence(found: Settled) -> dict[str, Any]:
    names = (
        *("scale", "measure", "measured", "measured_low", "measured_high", "expected", "items"),
        *("evidence_experiment", "evidence_cell", "rival_cell", "command"),
    )
    return {name: getattr(found, name) for name in names}


def _totals(over: Floats, per: Floats) -> ItemTotals:
    return statistics.combine_repeats(over, per)


def _negated(estimate: Estimate) -> Estimate:
    low, high = estimate.low, estimate.high
    return Estimate(-estimate.value, None if high is None else -high, None if low is None else -low)


def _has(params: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether a cell was measured with these settings; 1 and true are not the same."""
    return all(
        name in params
        and params[name] == value
        and isinstance(params[name], bool) == isinstance(value, bool)
        for name, value in wanted.items()
    )


def task_settings(
    check: Mapping[str, Any], scale: Literal["embedded", "paper"]
) -> tuple[str, Mapping[str, Any]]:
    """Return the task that a check is measured on, and the settings that it must have.

    The settings of the embedded measurement hold at the paper's scale too if the task is the same.
    """
    if scale == "embedded":
        return check["task"], check["task_params"]
    task = check["paper_task"] or check["task"]
    settings = check["paper_task_params"]
    if not settings and task == check["task"]:
        settings = check["task_params"]
    return task, settings


def _neutral(check: Mapping[str, Any], cell: Cell) -> float:
    """Return the value at which a check's effect is none; for `no-loss`, the worst allowed."""
    if check["measure"] in _DIFFERENCES:
        return -cell.quality_margin if check["direction"] == "no-loss" else 0.0
    return 1 / (1 + cell.margin) if check["direction"] == "no-loss" else 1.0


def _side(check: Mapping[str, Any], cell: Cell, estimate: Estimate) -> int:
    """Return 1 if the interval lies on the claimed side, -1 on the other one, else 0."""
    if estimate.low is None or estimate.high is None:
        return 0
    neutral = _neutral(check, cell)
    above = 1 if estimate.low > neutral else -1 if estimate.high < neutral else 0
    return -above if check["direction"] == "below" else above


def _holds(check: Mapping[str, Any]) -> str:
    if check["direction"] == "no-loss":
        return "no loss beyond the margin"
    return "the interval lies on the claimed side"


def _fails(check: Mapping[str, Any]) -> str:
    if check["direction"] == "no-loss":
        return "a loss beyond the margin"
    return "the interval lies on the other side of the claim"


def _reaches(check: Mapping[str, Any], value: float, expected: float, tolerance: float) -> bool:
    """Return whether a value is as large an effect as claimed, up to the tolerance, or larger."""
    room = tolerance * abs(expected)
    return value <= expected + room if check["direction"] == "below" else value >= expected - room


def _may_reach(
    check: Mapping[str, Any], estimate: Estimate, expected: float, tolerance: float
) -> bool:
    """Return whether the interval holds a value that `_reaches`."""
    end = estimate.low if check["direction"] == "below" else estimate.high
    return end is None or _reaches(check, end, expected, tolerance)


def _meets(value: float, expected: float, bound: str, tolerance: float) -> bool:
    """Return whether a computed value is what a number with its bound says."""
    if bound in ("at-most", "up-to"):
        return value <= expected
    if bound == "at-least":
        return value >= expected
    allowed = max(tolerance, ABOUT_TOLERANCE) if bound == "about" else tolerance
    return abs(value - expected) <= allowed * abs(expected)


def _undecided(check: Mapping[str, Any], cell: Cell, estimate: Estimate) -> tuple[str, str]:
    """Return why an interval decides nothing, and what would."""
    if estimate.low is None or estimate.high is None:
        return "one item has no interval", "more items"
    neutral = _neutral(check, cell)
    contains = f"the interval contains {text.number(neutral)}"
    if check["measure"] == "note":
        return (
            f"{contains}; a count of one text decides a tenfold difference",
            "a larger difference",
        )
    # An interval's width falls with the root of the number of items.
    if check["measure"] in _DIFFERENCES:
        width, distance = (estimate.high - estimate.low) / 2, abs(estimate.value - neutral)
    else:
        width = math.log(estimate.high / estimate.low) / 2
        distance = abs(math.log(estimate.value / neutral))
    if not distance or cell.items * (width / distance) ** 2 > _MOST_ITEMS_NAMED:
        return contains, "an effect that is there: this one is as good as none"
    more = max(1, math.ceil(cell.items * (width / distance) ** 2) - cell.items)
    return f"{contains}, about {more} more items are needed", f"about {more} more items"


def _with_unit(value: float, unit: str) -> str:
    shown = text.number(value, _DIGITS)
    if "." in shown:  # 9.4 was claimed, not 9.400
        shown = shown.rstrip("0").rstrip(".")
    return f"{shown}{unit}" if unit in ("x", "%") else f"{shown} {unit}".rstrip()


def _sentence(words: str) -> str:
    return words if words.endswith((".", "!", "?")) else f"{words}."


def rows(settled: Sequence[Settled]) -> list[dict[str, Any]]:
    """Return rows for the table `claim_verdicts`."""
    return [{**vars(each), "missing": text.json_text(each.missing)} for each in settled]
