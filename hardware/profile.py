"""Hardware profiles: a device's limits, and what was measured on the one at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What this machine was measured to reach.

    Attributes:
        read_bandwidth: Bytes read from main memory per second, all cores.
        copy_bandwidth: Bytes read and written per second by a copy.
        matmul_flops: Operations per second of a large matrix product, by dtype name.
    """

    read_bandwidth: float
    copy_bandwidth: float
    matmul_flops: Mapping[str, float]


@dataclass(frozen=True)
class StepCost:
    """Measured seconds of one verification forward, lat(N), by width and context.

    Attributes:
        widths: Numbers of tokens fed, ascending, starting with 1.
        contexts: Cached tokens, ascending.
        seconds: `seconds[c][w]`: median time at `contexts[c]` and `widths[w]`.
    """

    widths: tuple[int, ...]
    contexts: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def at(self, width: int, context: int) -> float:
        """Return seconds, linear between measured points; past the last one, extrapolated."""
        rows = [_interpolate(self.widths, row, width) for row in self.seconds]
        return _interpolate(self.contexts, rows, context)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A device with its peaks, memory and power, and how it is recognised.

    Attributes:
        name: Id on the command line: `cpu-avx2`, `h100-sxm`.
        kind: `cpu` or `cuda`.
        label: Name for people.
        memory_bytes: Device memory; 0 if it is the host's.
        bandwidth: Peak memory bandwidth, bytes per second; 0 if unknown.
        peak_flops: Dense peak by dtype name, operations per second.
        power_watts: Board or package power; 0 if unknown.
        match: Regular expression found in the device's own name.
        ceilings: Measured on this machine; None before.
        step_cost: Measured for the model at hand; None outside an experiment.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    label: str
    memory_bytes: int = 0
    bandwidth: float = 0.0
    peak_flops: Mapping[str, float] = field(default_factory=dict)
    power_watts: float = 0.0
    match: str = ""
    ceilings: Ceilings | None = None
    step_cost: StepCost | None = None


def _interpolate(
    points: tuple[int, ...], values: tuple[float, ...] | list[float], at: int
) -> float:
    """Return the value at `at` on the broken line through the points; flat before the first one."""
    if len(points) == 1 or at <= points[0]:
        return values[0]
    right = next((i for i, point in enumerate(points) if point >= at), len(points) - 1)
    left = right - 1
    slope = (values[right] - values[left]) / (points[right] - points[left])
    return values[left] + slope * (at - points[left])
