"""The published numbers of an experiment, computed from its raw samples and scores.

`ingest` writes them into the index and `verify` computes them again; there is no other place where
a number of a table comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from results import statistics
from results.records import CellRecord, ExperimentRecord, MetricRecord
from results.statistics import Estimate, Floats, ItemTotals
from results.store import StoreError

_NUMBERS = (
    "seconds",
    "device_seconds",
    "prefill_seconds",
    "output_tokens",
    "decode_tokens",
    "target_forwards",
    "forward_tokens",
    "accepted_tokens",
    "flops",
    "prefill_flops",
    "peak_bytes",
    "energy_j",
    "bound_seconds",
)


# Where nothing was sampled.
_CERTAINLY_NONE = Estimate(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class Summary(NamedTuple):
    """Rows for the tables `verdicts`, `metrics` and `interactions`."""

    verdicts: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    interactions: list[dict[str, Any]]


@dataclass(frozen=True)
class _Cell:
    """Samples and scores of one cell, laid out by item.

    Attributes:
        numbers: Columns of the samples, each (items, repeats), NaN where absent.
        digests: Output digests, the same shape, "" where absent.
        scores: For each metric one value an item, NaN without a score.
        unscored: For each metric, how many items were tried and could not be scored.
        corpus: For metrics of kind `corpus` the numbers on each row of `statistics.corpus_draws`,
            the metric itself first, NaN where a row has none.
    """

    numbers: dict[str, Floats]
    digests: NDArray[np.object_]
    scores: dict[str, Floats]
    unscored: dict[str, int]
    corpus: dict[str, Floats]

    def total(self, column: str) -> float | None:
        """Return the sum over all samples, None if one of them lacks the value."""
        values = self.numbers[column][self.measured]
        return None if not values.size or np.isnan(values).any() else float(values.sum())

    def on(self, items: NDArray[np.bool_]) -> _Cell:
        """Return the cell as if it had run only some items, (items,), without corpus metrics."""
        return _Cell(
            numbers={name: values[items] for name, values in self.numbers.items()},
            digests=self.digests[items],
            scores={name: values[items] for name, values in self.scores.items()},
            unscored={},
            corpus={},
        )

    @property
    def measured(self) -> NDArray[np.bool_]:
        """Which (item, repeat) were measured; what somebody else measured may have no time."""
        return np.asarray(self.digests != "")

    @property
    def timed_items(self) -> NDArray[np.bool_]:
        """Which items were measured at least once, and every time by a clock."""
        lacks_time = self.measured & np.isnan(self.numbers["seconds"])
        return self.measured_items & ~lacks_time.any(axis=1)

    @property
    def measured_items(self) -> NDArray[np.bool_]:
        """Which items were measured at least once."""
        return np.asarray(self.measured.any(axis=1))


def summarize(
    experiment: ExperimentRecord,
    cells: Sequence[CellRecord],
    samples: pa.Table,
    scores: pa.Table,
    corpus: pa.Table | None = None,
) -> Summary:
    """Compute every published number of an experiment.

    Cells that did not end `ok` get rows of None. Numbers that need a baseline are None where the
    baseline did not end `ok`.

    Args:
        experiment: What was measured.
        cells: The cells that have ended.
        samples: As `Store.sample_table` returns them.
        scores: As `Store.score_table` returns them.
        corpus: As `Store.corpus_table` returns them; without it, corpus metrics are None.

    Raises:
        StoreError: A sample names an item or a repeat that the experiment does not have, or a
            corpus metric was resampled otherwise than by `statistics.corpus_draws`.
    """
    experiment = _in_order(experiment)
    ended_well = {cell.cell_id for cell in cells if cell.status == "ok"}
    data = _by_cell(experiment, ended_well, samples, scores, corpus)
    baseline = data.get(experiment.baseline)
    verdicts, metrics = [], []
    for cell in cells:
        identity = {"experiment_id": experiment.experiment_id, "cell_id": cell.cell_id}
        found = data.get(cell.cell_id)
        is_baseline = cell.cell_id == experiment.baseline
        row = dict(identity)
        if found is not None:
            row |= _own_numbers(found) | {"harness_share": _harness_share(cell)}
            if baseline is not None:
                row |= _compared_numbers(experiment, found, baseline, is_baseline=is_baseline)
        verdicts.append(row)
        for place, metric in enumerate(experiment.metrics):
            quality = _Quality(experiment, metric, is_headline=place == 0)
            reference = None if is_baseline else baseline
            metrics.append(identity | quality.row(found, reference))
    return Summary(verdicts, metrics, _interactions(experiment, cells, data))


def paired_totals(
    experiment: ExperimentRecord, samples: pa.Table, cell_ids: Sequence[str]
) -> dict[str, ItemTotals]:
    """Return seconds and units of output of each item, over the items that all cells measured.

    Args:
        experiment: Names items, repeats and the unit of output.
        samples: As `Store.sample_table` returns them.
        cell_ids: The cells.

    Returns:
        The totals of each cell, all with the same items in the same order; empty if a cell has no
        samples or they share no item.
    """
    experiment = _in_order(experiment)
    nothing = pa.table({name: [] for name in ("cell_id", "item_id", "metric", "value")})
    found = _by_cell(experiment, set(cell_ids), samples, nothing)
    if any(cell_id not in found for cell_id in cell_ids):
        return {}
    paired = np.logical_and.reduce([found[cell_id].timed_items for cell_id in cell_ids])
    if not paired.any():
        return {}
    per_sample = experiment.facts.get("output_unit", "token") != "token"
    return {
        cell_id: _totals(found[cell_id].on(paired), "seconds", per_sample) for cell_id in cell_ids
    }


def _in_order(experiment: ExperimentRecord) -> ExperimentRecord:
    """Return the experiment with its items in the order of their ids.

    Resamples draw places, so an interval belongs to an order: tables, claims and comparisons, which
    find the samples in different places, have this one in common.
    """
    pairs = sorted(zip(experiment.items, experiment.groups, strict=True))
    return replace(
        experiment, items=[item for item, _ in pairs], groups=[group for _, group in pairs]
    )


def _by_cell(
    experiment: ExperimentRecord,
    wanted: set[str],
    samples: pa.Table,
    scores: pa.Table,
    corpus: pa.Table | None = None,
) -> dict[str, _Cell]:
    """Lay samples and scores of the wanted cells out by item; cells without samples drop out."""
    places = {item: place for place, item in enumerate(experiment.items)}
    rows: dict[str, list[int]] = {cell_id: [] for cell_id in wanted}
    cell_ids = samples["cell_id"].to_pylist()
    for row, cell_id in enumerate(cell_ids):
        if cell_id in rows:
            rows[cell_id].append(row)
    try:
        items = np.array([places[item] for item in samples["item_id"].to_pylist()], dtype=int)
        scored_items = [places[item] for item in scores["item_id"].to_pylist()]
    except KeyError as error:
        raise StoreError(
            f"experiment {experiment.experiment_id!r} has no item {error}, but a sample or score "
            "names it. Discard its shard and measure again."
        ) from None
    repeats = samples["repeat"].to_numpy()
    if len(repeats) and not 0 <= repeats.min() <= repeats.max() < experiment.repeats:
        raise StoreError(
            f"experiment {experiment.experiment_id!r} has {experiment.repeats} repeats, but a "
            f"sample names repeat {repeats.max()}, counted from 0. Discard its shard and measure "
            "again."
        )
    columns = {
        name: samples[name].cast(pa.float64()).to_numpy(zero_copy_only=False) for name in _NUMBERS
    }
    digests = np.array(samples["output_digest"].to_pylist(), dtype=object)
    shape = (len(experiment.items), experiment.repeats)
    found = {}
    for cell_id, chosen in rows.items():
        if not chosen:
            continue
        place = (items[chosen], repeats[chosen])
        numbers = {name: np.full(shape, np.nan) for name in _NUMBERS}
        for name, values in columns.items():
            numbers[name][place] = values[chosen]
        texts = np.full(shape, "", dtype=object)
        texts[place] = digests[chosen]
        names = [metric.name for metric in experiment.metrics]
        found[cell_id] = _Cell(
            numbers=numbers,
            digests=texts,
            scores={name: np.full(shape[0], np.nan) for name in names},
            unscored=dict.fromkeys(names, 0),
            corpus={},
        )
    for cell_id, item_place, metric_name, value in zip(
        scores["cell_id"].to_pylist(),
        scored_items,
        scores["metric"].to_pylist(),
        scores["value"].to_pylist(),
        strict=True,
    ):
        cell = found.get(cell_id)
        if cell is not None and metric_name in cell.scores:
            # NaN is no score either; a metric that means something by it says so with a reason.
            if value is None or math.isnan(value):
                cell.unscored[metric_name] += 1
            else:
                cell.scores[metric_name][item_place] = value
    for row in [] if corpus is None else corpus.to_pylist():
        if (cell := found.get(row["cell_id"])) is not None:
            try:
                cell.corpus[row["metric"]] = statistics.corpus_replicates(
                    row["value"], row["resampled"], shape[0]
                )
            except ValueError as error:
                raise StoreError(
                    f"experiment {experiment.experiment_id!r}: {row['metric']} of cell "
                    f"{row['cell_id']!r} does not fit its items: {error} Discard its shard and "
                    "measure again."
                ) from None
    return found


def _own_numbers(cell: _Cell) -> dict[str, Any]:
    """Return what can be said of a cell without its baseline."""
    seconds, tokens = cell.total("seconds"), cell.total("output_tokens")
    prefill, bound = cell.total("prefill_seconds"), cell.total("bound_seconds")
    forwards, fed = cell.total("target_forwards"), cell.total("forward_tokens")
    decode = None if seconds is None or prefill is None else seconds - prefill
    overhead = _ratio(decode, bound)
    drafted = None if forwards is None or fed is None else fed - forwards
    return {
        "items": int(cell.measured_items.sum()),
        "repeats": int(cell.measured.sum(axis=1).max()),
        "output_tokens": None if tokens is None else int(tokens),
        "seconds_per_item": _ratio(seconds, float(cell.measured.sum())),
        "tokens_per_second": _ratio(tokens or None, seconds),  # an encoder emits none
        "tokens_per_forward": _ratio(cell.total("decode_tokens"), forwards),
        "acceptance_rate": _ratio(cell.total("accepted_tokens"), drafted),
        "joules_per_token": _ratio(cell.total("energy_j"), tokens),
        "overhead": overhead,
        "draft_share": 1 - 1 / overhead if overhead else None,
    }


def _harness_share(cell: CellRecord) -> float | None:
    """Return the share of the experiment's wall time that the harness took for itself."""
    return _ratio(cell.seconds.get("harness"), cell.seconds.get("wall"))


def _compared_numbers(
    experiment: ExperimentRecord, cell: _Cell, baseline: _Cell, *, is_baseline: bool
) -> dict[str, Any]:
    """Return the ratios of a cell to its baseline over the items that both measured.

    The baseline's own are 1, without verdict.
    """
    paired = cell.timed_items & baseline.timed_items
    if not paired.any():
        return {}
    cell, baseline = cell.on(paired), baseline.on(paired)
    per_sample = experiment.facts.get("output_unit", "token") != "token"
    totals = _totals(cell, "seconds", per_sample)
    baseline_totals = _totals(baseline, "seconds", per_sample)
    estimate = statistics.speed_up(baseline_totals, totals)
    bound = _speed_bound(experiment, cell, baseline, per_sample)
    device = None
    if cell.total("device_seconds") is not None and baseline.total("device_seconds") is not None:
        device = statistics.speed_up(
            _totals(baseline, "device_seconds", per_sample),
            _totals(cell, "device_seconds", per_sample),
        ).value
    row: dict[str, Any] = {
        "baseline_tokens": _integer(baseline.total("output_tokens")),
        "speedup": _number(estimate.value),
        "speedup_geomean": _number(statistics.geometric_mean_speed_up(baseline_totals, totals)),
        "speedup_device": _number(device),
        "speedup_bound": bound,
        "bound_ratio": _ratio(_number(estimate.value), bound),
        "step_cost_ratio": _ratio(_seconds_per_forward(cell), _seconds_per_forward(baseline)),
        "work_ratio": _ratio(_work(cell, per_sample), _work(baseline, per_sample)),
        "memory_ratio": _ratio(_peak(cell), _peak(baseline)),
        **_phases(experiment, cell, baseline, is_baseline=is_baseline),
    }
    if not is_baseline:
        row |= {
            **_ends("speedup", estimate),
            "speed_verdict": statistics.speed_verdict(estimate, experiment.margin),
            "smallest_speed_difference": statistics.smallest_speed_difference(
                estimate, experiment.margin, int(paired.sum())
            ),
        }
    return row


class _Factorial(NamedTuple):
    """The four cells of a design of two methods, on the items that all of them have."""

    neither: _Cell
    first: _Cell
    second: _Cell
    both: _Cell

    def interaction(self, totals: Callable[[_Cell], ItemTotals]) -> Estimate:
        """Return the gain of both over the product of each alone, where lower totals are gains.

        Args:
            totals: What is gained (seconds, forwards) and units of output of each item.
        """
        neither, first, second, both = map(totals, self)
        return statistics.speed_up_change((neither, second), (first, both))


def _interactions(
    experiment: ExperimentRecord, cells: Sequence[CellRecord], data: Mapping[str, _Cell]
) -> list[dict[str, Any]]:
    """Return what becomes of the gains of two methods in a stack of them.

    A stack has a row where both parts were measured beside it. Its numbers are None where one of
    the four cells did not end `ok`, or where they have no item in common.
    """
    by_spec = {cell.spec: cell.cell_id for cell in cells if cell.spec}
    rows = []
    for cell in cells:
        parts = [by_spec[part] for part in cell.parts if part in by_spec]
        if len(cell.parts) != 2 or len(parts) != 2:
            continue
        row = {
            "experiment_id": experiment.experiment_id,
            "cell_id": cell.cell_id,
            "first_cell": parts[0],
            "second_cell": parts[1],
        }
        four = [data.get(each) for each in (experiment.baseline, *parts, cell.cell_id)]
        found = [each for each in four if each is not None]
        if len(found) == len(four):
            row |= _interaction_numbers(experiment, _Factorial(*found))
        rows.append(row)
    return rows


def _interaction_numbers(experiment: ExperimentRecord, whole: _Factorial) -> dict[str, Any]:
    """Return the interactions of speed, of decoding speed, of tokens a forward and of quality."""
    row: dict[str, Any] = {}
    for headline in experiment.metrics[:1]:
        row |= _Quality(experiment, headline, is_headline=True).interaction(whole)
    paired = np.logical_and.reduce([cell.timed_items for cell in whole])
    if not paired.any():
        return row
    timed = _Factorial(*(cell.on(paired) for cell in whole))
    row["items"] = int(paired.sum())
    row["as_first"] = int((timed.first.digests == timed.both.digests).all(axis=1).sum())
    per_sample = experiment.facts.get("output_unit", "token") != "token"
    kinds: dict[str, Callable[[_Cell], ItemTotals]] = {
        "speed": lambda cell: _totals(cell, "seconds", per_sample)
    }
    if all(_knows(cell, "prefill_seconds") for cell in timed):
        kinds["decode"] = _decode_totals
    if all(_knows(cell, "target_forwards") for cell in timed):
        kinds["tokens_per_forward"] = lambda cell: statistics.combine_repeats(
            cell.numbers["target_forwards"], cell.numbers["decode_tokens"]
        )
    for kind, totals in kinds.items():
        estimate = timed.interaction(totals)
        if _number(estimate.value) is None:
            continue
        row |= {
            kind: estimate.value,
            **_ends(kind, estimate),
            f"{kind}_verdict": statistics.interaction_verdict(estimate, experiment.margin),
            f"{kind}_smallest": statistics.smallest_speed_difference(
                estimate, experiment.margin, row["items"]
            ),
        }
    return row


def _ends(name: str, estimate: Estimate) -> dict[str, float | None]:
    """Return the columns of an estimate's intervals, of 95% and of 99%."""
    return {
        f"{name}_low": estimate.low,
        f"{name}_high": estimate.high,
        f"{name}_low_99": estimate.wide_low,
        f"{name}_high_99": estimate.wide_high,
    }


def _knows(cell: _Cell, column: str) -> bool:
    """Return whether every sample has a value."""
    return not np.isnan(cell.numbers[column][cell.measured]).any()


def _decode_totals(cell: _Cell) -> ItemTotals:
    """Return the seconds after the prefill and the tokens that they brought, of each item."""
    return statistics.combine_repeats(
        cell.numbers["seconds"] - cell.numbers["prefill_seconds"], cell.numbers["decode_tokens"]
    )


def _totals(cell: _Cell, clock: str, per_sample: bool) -> ItemTotals:
    units = cell.numbers["output_tokens"]
    if per_sample:
        units = np.where(cell.measured, 1.0, np.nan)
    return statistics.combine_repeats(cell.numbers[clock], units)


def _phases(
    experiment: ExperimentRecord,
    cell: _Cell,
    baseline: _Cell,
    *,
    is_baseline: bool,
) -> dict[str, Any]:
    """Return the ratios of prefill and of decoding apart; the baseline's own are 1, no verdict.

    Empty where a sample does not say when its prefill ended; a text without tokens after the
    prefill has no decoding.
    """
    prefills, decodes = [], []
    for side in (baseline, cell):
        if not _knows(side, "prefill_seconds"):
            return {}
        texts = np.where(side.measured, 1.0, np.nan)
        prefills.append(statistics.combine_repeats(side.numbers["prefill_seconds"], texts))
        decodes.append(_decode_totals(side))
    # `speed_up` takes what stands above the line first.
    ratio = statistics.speed_up(prefills[1], prefills[0])
    decode = statistics.speed_up(decodes[0], decodes[1])
    bounds = [
        _ratio(
            float(side.numbers["bound_seconds"][:, 0].sum()),
            float(side.numbers["decode_tokens"][:, 0].sum()),
        )
        for side in (baseline, cell)
    ]
    row: dict[str, Any] = {
        "prefill_ratio": _number(ratio.value),
        "decode_speedup": _number(decode.value),
        "decode_bound": _ratio(bounds[0], bounds[1]),
    }
    if is_baseline:
        return row
    row |= {"prefill_ratio_low": ratio.low, "prefill_ratio_high": ratio.high}
    if row["decode_speedup"] is not None:
        row |= {
            **_ends("decode_speedup", decode),
            "decode_verdict": statistics.speed_verdict(decode, experiment.margin),
        }
    return row


def _speed_bound(
    experiment: ExperimentRecord,
    cell: _Cell,
    baseline: _Cell,
    per_sample: bool,
) -> float | None:
    """Return the largest speed-up that the counted forwards allow at their measured cost.

    Where calls are charged by their operations it is the ratio of these, encoder, selector and
    projector included. Otherwise each side pays the baseline's prefill and its own forwards at
    lat(width, context), in the first repeat of every item, and nothing else. Where forwards are
    charged by their bytes, a byte takes what it took the baseline: beside a measured prefill, bytes
    at the full bandwidth would weigh too little, and the ratio would bound nothing. There a prefill
    that does not compute what the baseline's does is charged what it took itself.
    """
    if experiment.facts.get("bound_by") == "operations":
        return _ratio(_work(baseline, per_sample), _work(cell, per_sample))
    prefill = baseline.numbers["prefill_seconds"]
    if np.isnan(prefill).all(axis=1).any():
        return None
    shared = np.nanmedian(prefill, axis=1)
    pace = 1.0
    if experiment.facts.get("bound_by") == "bytes":
        decode = np.nanmedian(baseline.numbers["seconds"], axis=1) - shared
        reading = baseline.numbers["bound_seconds"][:, 0].sum()
        pace = float(decode.sum() / reading) if reading else math.nan
    rates = []
    for side in (baseline, cell):
        cost = _prefill_cost(experiment, side, baseline, shared)
        cost = cost + pace * side.numbers["bound_seconds"][:, 0]
        units = np.ones(len(cost)) if per_sample else side.numbers["output_tokens"][:, 0]
        if np.isnan(cost).any() or np.isnan(units).any() or not units.sum():
            return None
        rates.append(float(cost.sum() / units.sum()))
    return _ratio(rates[0], rates[1])


def _prefill_cost(
    experiment: ExperimentRecord, side: _Cell, baseline: _Cell, shared: Floats
) -> Floats:
    """Return the seconds that a side's prefill of each item is charged; NaN where unknown.

    Those of the baseline's, so that its noise is on both sides; but an operation of attention does
    not take what one of a matrix takes, so no count says what other operations would have taken.

    Args:
        experiment: Says how forwards are charged.
        side: The baseline or a cell.
        baseline: Measured on the same items.
        shared: Seconds of the baseline's prefill, (items,).
    """
    if experiment.facts.get("bound_by") != "bytes":
        return shared
    ours, theirs = (each.numbers["prefill_flops"][:, 0] for each in (side, baseline))
    is_other = ~(np.isnan(ours) | np.isnan(theirs) | np.isclose(ours, theirs, rtol=1e-6))
    own = side.numbers["prefill_seconds"]
    is_known = ~np.isnan(own).all(axis=1)
    charged = np.where(is_other, np.nan, shared)
    charged[is_other & is_known] = np.nanmedian(own[is_other & is_known], axis=1)
    return charged


class _Quality:
    """One metric of an experiment: its value and its paired difference from the baseline."""

    def __init__(
        self,
        experiment: ExperimentRecord,
        metric: MetricRecord,
        *,
        is_headline: bool,
    ) -> None:
        self.experiment = experiment
        self.metric = metric
        self.is_headline = is_headline
        self.is_fraction = metric.kind in ("binary", "pass@k") or metric.unit == "fraction"

    def row(self, cell: _Cell | None, baseline: _Cell | None) -> dict[str, Any]:
        """Return the metric's row in the table `metrics`; without a cell it only has its name."""
        name = self.metric.name
        row: dict[str, Any] = {
            "metric": name,
            "is_headline": self.is_headline,
            "unit": self.metric.unit,
            "kind": self.metric.kind,
            "higher_is_better": self.metric.higher_is_better,
        }
        if cell is None:
            return row
        row["scored"] = int((~np.isnan(cell.scores[name])).sum())
        if self.metric.kind == "corpus":
            row["scored"] = len(self.experiment.items) if name in cell.corpus else 0
        row["unscored"] = cell.unscored[name]
        own = self._value(cell)
        if own is not None:
            row |= {"value": own.value, "low": own.low, "high": own.high}
        if baseline is None:
            return row
        reference = self._value(self._shared(cell, baseline))
        row["baseline_value"] = None if reference is None else reference.value
        difference = self._difference(cell, baseline)
        if difference is None:
            return row
        margin = self.experiment.quality_margin
        if self.is_headline:
            row["smallest_difference"] = statistics.smallest_quality_difference(difference, margin)
        if difference.value == 0 and _outputs_agree(cell, baseline):
            # These are the baseline's own outputs and scores.
            difference = _CERTAINLY_NONE
        row |= {
            "difference": difference.value,
            **_ends("difference", difference),
            "mcnemar_p": self._mcnemar(cell, baseline),
        }
        if self.is_headline:
            row["verdict"] = self._verdict(difference, self._lost_answers(cell, baseline))
        return row

    def _verdict(self, difference: Estimate, is_short: bool) -> statistics.QualityVerdict:
        """Settle a difference; where answers are lost, nothing says that none got worse."""
        verdict = statistics.quality_verdict(
            difference,
            self.experiment.quality_margin,
            higher_is_better=self.metric.higher_is_better,
        )
        return "INCONCLUSIVE" if is_short and verdict in statistics.NOT_WORSE else verdict

    def interaction(self, whole: _Factorial) -> dict[str, Any]:
        """Return the difference of differences: what both change beyond what each changes alone."""
        difference = self._interaction(whole)
        if difference is None:
            return {}
        if difference.value == 0 and (
            _outputs_agree(whole.both, whole.first) and _outputs_agree(whole.second, whole.neither)
        ):
            difference = _CERTAINLY_NONE
        is_short = any(self._lost_answers(cell, whole.neither) for cell in whole[1:])
        return {
            "metric": self.metric.name,
            "quality": difference.value,
            **_ends("quality", difference),
            "quality_verdict": self._verdict(difference, is_short),
            "quality_smallest": statistics.smallest_quality_difference(
                difference, self.experiment.quality_margin
            ),
        }

    def _interaction(self, whole: _Factorial) -> Estimate | None:
        if self.metric.kind == "corpus":
            found = [cell.corpus.get(self.metric.name) for cell in whole]
            numbers = [each for each in found if each is not None]
            if len(numbers) < len(found):
                return None
            neither, first, second, both = numbers
            return self._corpus(both - first - second + neither)
        units = [self._units(cell) for cell in whole]
        shared = [unit for unit in units[0] if all(unit in each for each in units)]
        if not shared:
            return None
        neither, first, second, both = (np.array([each[unit] for unit in shared]) for each in units)
        return statistics.mean(both - first - second + neither)

    def _shared(self, cell: _Cell, baseline: _Cell) -> _Cell:
        """Return the baseline without its scores of items that the cell did not run."""
        name = self.metric.name
        scores = np.where(cell.measured_items, baseline.scores[name], np.nan)
        return replace(baseline, scores={**baseline.scores, name: scores})

    def _lost_answers(self, cell: _Cell, baseline: _Cell) -> bool:
        """Return whether items that the baseline answered are without a score here.

        They are missing from the pairs, or, in a corpus metric, count as the task thinks best.
        """
        name = self.metric.name
        if self.metric.kind == "corpus":
            return cell.unscored[name] > baseline.unscored[name]
        answered = ~np.isnan(self._shared(cell, baseline).scores[name])
        return bool((np.isnan(cell.scores[name]) & answered).any())

    def _value(self, cell: _Cell) -> Estimate | None:
        if self.metric.kind == "corpus":
            return self._corpus(cell.corpus.get(self.metric.name))
        values = np.array(list(self._units(cell).values()))
        if not values.size:
            return None
        return statistics.fraction_mean(values) if self.is_fraction else statistics.mean(values)

    def _difference(self, cell: _Cell, baseline: _Cell) -> Estimate | None:
        if self.metric.kind == "corpus":
            sides = [side.corpus.get(self.metric.name) for side in (baseline, cell)]
            if sides[0] is None or sides[1] is None:
                return None
            return self._corpus(sides[1] - sides[0])
        own, reference = self._units(cell), self._units(baseline)
        shared = [unit for unit in own if unit in reference]
        if not shared:
            return None
        return statistics.paired_difference(
            np.array([reference[unit] for unit in shared]),
            np.array([own[unit] for unit in shared]),
            is_fraction=self.is_fraction,
        )

    def _units(self, cell: _Cell) -> dict[str, float]:
        """Return the value of each unit of resampling: the scored items, or problems of pass@k."""
        scores = cell.scores[self.metric.name]
        if self.metric.kind == "pass@k":
            values = [None if math.isnan(score) else float(score) for score in scores]
            return statistics.pass_rates(values, self.experiment.groups, self.metric.k)
        return {
            item: float(score)
            for item, score in zip(self.experiment.items, scores, strict=True)
            if not math.isnan(score)
        }

    def _corpus(self, replicates: Floats | None) -> Estimate | None:
        """Return the estimate of a corpus metric or of a difference; None where there is none."""
        if replicates is None or not math.isfinite(replicates[0]):
            return None
        return statistics.corpus_metric(replicates, len(self.experiment.items))

    def _mcnemar(self, cell: _Cell, baseline: _Cell) -> float | None:
        if self.metric.kind != "binary":
            return None
        differences = cell.scores[self.metric.name] - baseline.scores[self.metric.name]
        return statistics.mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))


def _outputs_agree(cell: _Cell, baseline: _Cell) -> bool:
    """Return whether both sides wrote the same wherever both were measured, at least once."""
    both = cell.measured & baseline.measured
    return bool(both.any() and (cell.digests[both] == baseline.digests[both]).all())


def _seconds_per_forward(cell: _Cell) -> float | None:
    return _ratio(cell.total("bound_seconds"), cell.total("target_forwards"))


def _work(cell: _Cell, per_sample: bool) -> float | None:
    """Return the operations of a token, or of a sample where outputs are no tokens."""
    units = float(cell.measured.sum()) if per_sample else cell.total("output_tokens")
    return _ratio(cell.total("flops"), units)


def _peak(cell: _Cell) -> float | None:
    """Return the highest peak of any sample."""
    peaks = cell.numbers["peak_bytes"][cell.measured]
    return None if not peaks.size or np.isnan(peaks).any() else float(peaks.max())


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Return the quotient; None where a side is unknown or there is nothing to divide by."""
    if numerator is None or not denominator:
        return None
    return _number(numerator / denominator)


def _number(value: float | None) -> float | None:
    """Return a finite number or None."""
    return value if value is not None and math.isfinite(value) else None


def _integer(value: float | None) -> int | None:
    return None if value is None else int(value)
