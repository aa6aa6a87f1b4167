"""Why a method is as fast as it is: its speed-up taken apart, and predicted from counts.

Everything follows from the samples of an index. With F forwards that emit n tokens in D seconds of
decoding, and B what these forwards cost at the measured lat(N),

    D / n = 1 / (n / F) * (B / F) * (D / B) = step cost * overhead / tokens per forward,

so the speed-up of decoding is exactly

    tokens per forward / step cost ratio / overhead ratio,

each the method's over the baseline's. What remains up to the published speed-up is the prefill,
which both sides pay, and how repeats are combined.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import duckdb
import numpy as np

from results.statistics import Floats
from results.tables import rows_of

Latency = Callable[[float, float], float]
"""Seconds of one forward by its width and its context, both means and so no whole numbers."""

_COLUMNS = (
    "seconds",
    "prefill_seconds",
    "output_tokens",
    "decode_tokens",
    "target_forwards",
    "forward_tokens",
    "kv_bytes",
    "bound_seconds",
)


class Side(NamedTuple):
    """What one side of a comparison took on each item, the mean of its repeats, (items,) each.

    Attributes:
        seconds, prefill_seconds: Measured.
        output_tokens: Tokens of the text; 1 where the unit of output is a sample.
        decode_tokens: Tokens after those of the prefill.
        forwards: Target forwards after the prefill.
        forward_tokens: Tokens fed in them.
        kv_bytes: Cache bytes read, prefill included.
        bound_seconds: The forwards at the measured lat(N).
    """

    seconds: Floats
    prefill_seconds: Floats
    output_tokens: Floats
    decode_tokens: Floats
    forwards: Floats
    forward_tokens: Floats
    kv_bytes: Floats
    bound_seconds: Floats


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A speed-up with its parts; `speedup` is their product.

    Attributes:
        method, task, model, hardware, role: Which cell.
        baseline, own: Counts and times of both sides on the items that both finished.
        speedup, speedup_low, speedup_high: As published.
        decode_speedup: Of the decoding alone.
        tokens_per_forward: Method over baseline.
        step_cost_ratio: Mean cost of a forward, method over baseline: at lat(N), or that of reading
            its bytes where `is_bound_by_bytes`.
        overhead_ratio: Decode time over the cost of its forwards, method over baseline: what
            drafting, acceptance and bookkeeping add.
        draft_share: Share of the method's decode time that its forwards would not take if they ran
            as the baseline's do: 1 - 1 / overhead_ratio.
        rest: Speed-up over decode speed-up: the prefill, which no drafts shorten.
        bound: Largest speed-up that the counts allow, as published.
        harness_share: Of the experiment's wall time.
        kv_token_bytes, weight_bytes, matrix_parameters, dtype: Of the model, for projections; None
            where the experiment does not tell.
        step_cost: The measured lat(N), as recorded.
        is_bound_by_bytes: Whether forwards are charged by the bytes that they read, not by lat(N).
    """

    method: str
    task: str
    model: str
    hardware: str
    role: str
    baseline: Side
    own: Side
    speedup: float
    speedup_low: float | None
    speedup_high: float | None
    decode_speedup: float
    tokens_per_forward: float
    step_cost_ratio: float
    overhead_ratio: float
    draft_share: float
    rest: float
    bound: float | None
    harness_share: float | None
    kv_token_bytes: float | None
    weight_bytes: float | None
    matrix_parameters: float | None
    dtype: str
    step_cost: dict[str, Any] | None
    is_bound_by_bytes: bool

    def prompt_tokens(self) -> Floats | None:
        """Return the prompt's length of each item, (items,); None if no cache was counted.

        The baseline reads P + (P + 1) + … + (P + F) cached tokens: prefill, then one a forward.
        """
        if not self.kv_token_bytes or np.isnan(self.baseline.kv_bytes).any():
            return None
        read = self.baseline.kv_bytes / self.kv_token_bytes
        forwards = self.baseline.forwards
        return np.asarray((read - forwards * (forwards + 1) / 2) / (1 + forwards))

    def predict(self, latency: Latency, *, prefill: Latency | None = None) -> float | None:
        """Return the speed-up that counts and a step-cost curve foretell; None without counts.

        Each side pays its forwards at their mean width and context, and the same prefill.

        Args:
            latency: lat(N): measured, or of another machine.
            prefill: Cost of the prompt on the other machine; None takes the measured prefill of the
                baseline.
        """
        prompts = self.prompt_tokens()
        if prompts is None or np.isnan(self.own.kv_bytes).any():
            return None
        if prefill is None:
            shared = self.baseline.prefill_seconds
        else:
            shared = np.array([prefill(float(tokens), 0.0) for tokens in prompts])
        rates = []
        for side in (self.baseline, self.own):
            cost = shared + self._decode_cost(side, prompts, latency)
            rates.append(float(cost.sum() / side.output_tokens.sum()))
        return rates[0] / rates[1]

    def step_seconds(self, latency: Latency) -> tuple[float, float] | None:
        """Return the mean cost of a forward of the baseline and of the method at a curve."""
        prompts = self.prompt_tokens()
        if prompts is None or np.isnan(self.own.kv_bytes).any():
            return None
        baseline, own = (
            float(self._decode_cost(side, prompts, latency).sum() / side.forwards.sum())
            for side in (self.baseline, self.own)
        )
        return baseline, own

    def _decode_cost(self, side: Side, prompts: Floats, latency: Latency) -> Floats:
        costs = np.zeros(len(prompts))
        assert self.kv_token_bytes  # there are prompts
        for item, forwards in enumerate(side.forwards):
            if forwards:
                width = side.forward_tokens[item] / forwards
                read = side.kv_bytes[item] / self.kv_token_bytes - prompts[item]
                costs[item] = forwards * latency(width, read / forwards - width)
        return costs


def explain(
    connection: duckdb.DuckDBPyConnection, experiment_id: str, cell_id: str
) -> Explanation | None:
    """Take a cell's speed-up apart.

    Returns:
        None where there is nothing to explain or not enough to do it with: the baseline itself, a
        cell that did not end well, a method that counts no forwards, an experiment without lat(N).
    """
    found = rows_of(
        connection.execute(
            "SELECT c.*, e.step_cost, e.facts FROM comparison c JOIN experiments e "
            "USING (experiment_id) WHERE c.experiment_id = ? AND c.cell_id = ?",
            [experiment_id, cell_id],
        )
    )
    if not found:
        return None
    (row,) = found
    if row["speedup"] is None or row["cell_id"] == row["baseline_cell_id"]:
        return None
    facts = json.loads(row["facts"] or "{}")
    per_sample = facts.get("output_unit", "token") != "token"
    sides = _sides(connection, experiment_id, row["baseline_cell_id"], cell_id, per_sample)
    if sides is None:
        return None
    baseline, own = sides
    needed = ("prefill_seconds", "forwards", "bound_seconds", "decode_tokens")
    if any(
        np.isnan(getattr(side, name)).any() or getattr(side, name).sum() <= 0
        for side in sides
        for name in needed
    ):
        return None
    plain, changed = (_decoding(side) for side in sides)
    overhead_ratio = changed.overhead / plain.overhead
    decode_speedup = plain.seconds_per_token / changed.seconds_per_token
    return Explanation(
        **{name: row[name] for name in ("method", "task", "model", "hardware", "role")},
        **{name: row[name] for name in ("speedup", "speedup_low", "speedup_high")},
        baseline=baseline,
        own=own,
        decode_speedup=decode_speedup,
        tokens_per_forward=changed.tokens_per_forward / plain.tokens_per_forward,
        step_cost_ratio=changed.step_seconds / plain.step_seconds,
        overhead_ratio=overhead_ratio,
        draft_share=1 - 1 / overhead_ratio,
        rest=row["speedup"] / decode_speedup,
        bound=row["speedup_bound"],
        harness_share=row["harness_share"],
        kv_token_bytes=facts.get("kv_bytes_per_token"),
        weight_bytes=facts.get("weight_bytes"),
        matrix_parameters=facts.get("matrix_parameters"),
        dtype=str(facts.get("dtype") or ""),
        step_cost=json.loads(row["step_cost"]) if row["step_cost"] else None,
        is_bound_by_bytes=facts.get("bound_by") == "bytes",
    )


class _Decoding(NamedTuple):
    """What decoding took on one side, over all items."""

    seconds_per_token: float
    tokens_per_forward: float
    step_seconds: float
    overhead: float


def _decoding(side: Side) -> _Decoding:
    seconds = float((side.seconds - side.prefill_seconds).sum())
    tokens, forwards, bound = (
        float(values.sum()) for values in (side.decode_tokens, side.forwards, side.bound_seconds)
    )
    return _Decoding(seconds / tokens, tokens / forwards, bound / forwards, seconds / bound)


def _sides(
    connection: duckdb.DuckDBPyConnection,
    experiment_id: str,
    baseline_id: str,
    cell_id: str,
    per_sample: bool,
) -> tuple[Side, Side] | None:
    """Return both sides on the items that both finished; None if there is none."""
    means = ", ".join(f"avg({name})" for name in _COLUMNS)
    by_cell: dict[str, dict[str, tuple[Any, ...]]] = {}
    for cell in (baseline_id, cell_id):
        rows = connection.execute(
            f"SELECT item_id, {means} FROM samples WHERE experiment_id = ? AND cell_id = ? "
            "GROUP BY item_id",
            [experiment_id, cell],
        ).fetchall()
        by_cell[cell] = {item: tuple(values) for item, *values in rows}
    shared = sorted(by_cell[baseline_id].keys() & by_cell[cell_id].keys())
    if not shared:
        return None
    baseline, own = (
        _side([by_cell[cell][item] for item in shared], per_sample)
        for cell in (baseline_id, cell_id)
    )
    return baseline, own


def _side(rows: list[tuple[Any, ...]], per_sample: bool) -> Side:
    side = Side(*np.array(rows, dtype=np.float64).T)  # None becomes NaN
    return side._replace(output_tokens=np.ones(len(rows))) if per_sample else side
