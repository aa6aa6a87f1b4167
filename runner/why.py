"""The why-report of a cell: its speed-up taken apart, and what other machines would make of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from hardware import catalog
from hardware.profile import Profile, StepCost
from hardware.roofline import Limits, Work, limits, seconds_bound
from results import text
from results.tables import connect
from results.why import Explanation, Latency, explain
from runner.describe import Section

_MILLI = 1000


class Projected(NamedTuple):
    """A speed-up on hardware that nobody measured it on.

    Attributes:
        hardware: Profile.
        speedup: At the roofline of that hardware.
        plain_seconds: Mean seconds of a forward of the baseline there.
        method_seconds: The same of the method.
        basis: `data sheet` or `measured`: where the roofline comes from.
    """

    hardware: Profile
    speedup: float
    plain_seconds: float
    method_seconds: float
    basis: str


def measured_latency(explanation: Explanation) -> Latency | None:
    """Return the lat(N) that the experiment measured; None if it did not."""
    curve = explanation.step_cost
    if curve is None:
        return None
    cost = StepCost(
        widths=tuple(curve["widths"]),
        contexts=tuple(curve["contexts"]),
        seconds=tuple(tuple(row) for row in curve["seconds"]),
    )

    def latency(width: float, context: float) -> float:
        # Linear between whole widths, as between measured ones: a mean width is rarely whole.
        whole = int(width)
        low, high = (cost.at(each, round(context)) for each in (whole, whole + 1))
        return low + (high - low) * (width - whole)

    return latency


def roofline_latency(explanation: Explanation, limit: Limits) -> Latency | None:
    """Return lat(N) at a roofline; None if the experiment does not tell the model's sizes.

    The operations of attention, a few percent at the lengths of texts here, are left out.
    """
    sizes = (explanation.weight_bytes, explanation.matrix_parameters, explanation.kv_token_bytes)
    if not all(sizes):
        return None
    weight_bytes, parameters, kv_token_bytes = (float(size or 0) for size in sizes)
    work = Work(weight_bytes=weight_bytes, parameters=parameters, kv_token_bytes=kv_token_bytes)

    def latency(width: float, context: float) -> float:
        moved = work.weight_bytes + work.kv_token_bytes * (context + width)
        return seconds_bound(moved, 2.0 * work.parameters * width, limit)

    return latency


def project(explanation: Explanation, profiles: Iterable[Profile]) -> list[Projected]:
    """Return what the counted forwards would give at the rooflines of other hardware.

    Counts are taken as they are: a method that sizes its drafts by lat(N) would choose others
    there. Overheads, launches and kernels of that hardware are not in it, so real speed-ups are
    smaller where those matter. Profiles without a bandwidth or a peak for the dtype are left out.
    """
    found = []
    for profile in profiles:
        try:
            limit = limits(profile, explanation.dtype)
        except ValueError:
            continue
        latency = roofline_latency(explanation, limit)
        if latency is None:
            continue
        speedup = explanation.predict(latency, prefill=latency)
        steps = explanation.step_seconds(latency)
        if speedup is not None and steps is not None:
            found.append(Projected(profile, speedup, *steps, limit.basis))
    return found


def sections(index_path: Path, experiment_id: str, cell_id: str) -> list[Section]:
    """Return the why-report of a cell for people; empty where nothing can be explained.

    Raises:
        StoreError: The index cannot be read.
    """
    with connect(index_path) as connection:
        explanation = explain(connection, experiment_id, cell_id)
    if explanation is None:
        return []
    return [
        Section("Why", _factors(explanation)),
        Section(
            "Projection, measured by nobody: the same forwards at other rooflines",
            [
                {
                    "hardware": each.hardware.name,
                    "speed-up": text.ratio(each.speedup),
                    "plain step": f"{text.number(each.plain_seconds * _MILLI)} ms",
                    "its step": f"{text.number(each.method_seconds * _MILLI)} ms",
                    "limits from": each.basis,
                }
                for each in project(explanation, (entry.profile for entry in catalog.entries()))
            ],
        ),
    ]


def _factors(explanation: Explanation) -> list[dict[str, str]]:
    ends = [
        text.ratio(end) if end is not None else ""
        for end in (explanation.speedup_low, explanation.speedup_high)
    ]
    rows = [
        ("speed-up", text.interval(text.ratio(explanation.speedup), *ends), "the product of:"),
        ("x tokens per forward", text.ratio(explanation.tokens_per_forward), "drafts accepted"),
        (
            "/ step cost ratio",
            text.ratio(explanation.step_cost_ratio),
            "the bytes that its forwards read, at the measured bandwidth"
            if explanation.is_bound_by_bytes
            else "its wider forwards, at the measured lat(N)",
        ),
        (
            "/ overhead ratio",
            text.ratio(explanation.overhead_ratio),
            _overhead(explanation),
        ),
        (
            "x the rest",
            text.ratio(explanation.rest),
            f"prefill, which both pay; decoding alone: {text.ratio(explanation.decode_speedup)}",
        ),
        (
            "bound",
            text.ratio(explanation.bound),
            "the same bytes at the baseline's pace, and nothing else"
            if explanation.is_bound_by_bytes
            else "the same forwards with drafting and bookkeeping free",
        ),
    ]
    if (latency := measured_latency(explanation)) is not None:
        predicted = explanation.predict(latency)
        if predicted is not None:
            rows.append(
                (
                    "predicted",
                    text.ratio(predicted),
                    "from counts and lat(N) alone; "
                    f"{_percent_off(predicted, explanation.speedup)} the measured one",
                )
            )
    if explanation.harness_share is not None:
        rows.append(
            (
                "harness share",
                text.percent(explanation.harness_share),
                "of the wall time; in no clock",
            )
        )
    return [{"part": part, "value": value, "meaning": meaning} for part, value, meaning in rows]


def _overhead(explanation: Explanation) -> str:
    """Say what makes a method's decoding slower than its forwards."""
    if explanation.role == "peer":
        return "a peer's own kernels and loop"
    share = text.percent(max(0.0, explanation.draft_share))
    if explanation.is_bound_by_bytes:
        return f"{share} of its decode time goes to what is not reading: selection, small products"
    return f"{share} of its decode time goes to drafting, acceptance and bookkeeping"


def _percent_off(predicted: float, measured: float) -> str:
    off = predicted / measured - 1
    return f"{text.percent(abs(off))} {'above' if off >= 0 else 'below'}"
