"""Measuring lat(N): what a forward costs by its width, on this machine, for this model."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

from hardware.profile import StepCost

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 81)
CONTEXTS = (64, 320)
MIN_ROUNDS = 3
MAX_ROUNDS = 25

Step = Callable[[int], object]


def measure_step_cost(
    prepare: Callable[[int], Step],
    *,
    widths: Sequence[int] = WIDTHS,
    contexts: Sequence[int] = CONTEXTS,
    budget_seconds: float = 20.0,
    seed: int = 0,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> StepCost:
    """Return the median seconds of one forward at each width and context.

    A round measures every point once, in random order, so that a slow stretch of the machine falls
    on all points alike; rounds go on until the budget is spent (between 3 and 25 of them, whatever
    the budget: a median of fewer says nothing, more say nothing new). The median and not the
    minimum or a lower quartile, because the curve prices the forwards of samples, and these meet
    the same disturbances. Nothing is smoothed: a wider forward can be cheaper than a narrow one
    where the library changes kernels, and a method that picks its width by this curve should know.

    Args:
        prepare: Called once for each context, untimed: fills a cache with so many tokens and
            returns the step, which runs one forward of the width it is given and leaves the cache
            as it was. All the steps live at once.
        widths: Ascending, starting with 1.
        contexts: Ascending.
        budget_seconds: Time for warm-up (one forward a point) and rounds, preparation not counted.
        seed: Of the order.
        synchronize: Waits for the device; called on both edges of each forward.
        clock: Seconds; replaced in tests.

    Raises:
        ValueError: Widths or contexts are not ascending, or widths do not start with 1.
    """
    _check_ascending("widths", widths, 1)
    _check_ascending("contexts", contexts, 0)
    if widths[0] != 1:
        raise ValueError(f"widths must start with 1, the plain step, got {widths[0]}.")
    steps = {context: prepare(context) for context in contexts}
    points = [(context, width) for context in contexts for width in widths]
    synchronize()
    deadline = clock() + budget_seconds
    for context, width in points:
        steps[context](width)
    synchronize()
    order = random.Random(seed)
    times: dict[tuple[int, int], list[float]] = {point: [] for point in points}
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and clock() >= deadline:
            break
        order.shuffle(points)
        for context, width in points:
            step = steps[context]
            started = clock()
            step(width)
            synchronize()
            times[context, width].append(clock() - started)
    return StepCost(
        widths=tuple(widths),
        contexts=tuple(contexts),
        seconds=tuple(
            tuple(statistics.median(times[context, width]) for width in widths)
            for context in contexts
        ),
    )


def _check_ascending(name: str, values: Sequence[int], least: int) -> None:
    if not values or values[0] < least or any(b <= a for a, b in pairwise(values)):
        raise ValueError(f"{name} must ascend from at least {least}, got {list(values)}.")
