"""Measuring lat(N) with a clock that only moves when told to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from hardware import step_cost
from hardware.step_cost import measure_step_cost


class Machine:
    """A clock and a model whose forwards move it."""

    def __init__(self, cost: Callable[[int, int, int], float]) -> None:
        self.now = 0.0
        self.cost = cost
        self.calls: list[tuple[int, int]] = []
        self.prepared: list[int] = []
        self.pending = 0.0
        self.asynchronous = False

    def clock(self) -> float:
        return self.now

    def synchronize(self) -> None:
        self.now += self.pending
        self.pending = 0.0

    def prepare(self, context: int) -> Callable[[int], None]:
        self.prepared.append(context)
        self.now += 1000.0

        def step(width: int) -> None:
            self.calls.append((context, width))
            seconds = self.cost(context, width, len(self.calls))
            if self.asynchronous:
                self.pending += seconds
            else:
                self.now += seconds

        return step


def run(machine: Machine, **settings: object) -> tuple[tuple[float, ...], ...]:
    curve = measure_step_cost(
        machine.prepare,
        clock=machine.clock,
        synchronize=machine.synchronize,
        **settings,  # type: ignore[arg-type]  # the tests' own keywords
    )
    assert len(curve.seconds) == len(curve.contexts)
    return curve.seconds


def plain(context: int, width: int, call: int) -> float:
    return 0.01 * width + 0.001 * context


def test_each_point_gets_its_own_time() -> None:
    machine = Machine(plain)
    seconds = run(machine, widths=(1, 2, 8), contexts=(10, 20))
    expected = [[plain(context, width, 0) for width in (1, 2, 8)] for context in (10, 20)]
    assert [list(row) for row in seconds] == [pytest.approx(row) for row in expected]
    assert machine.prepared == [10, 20]


def test_the_defaults_are_the_shared_grid() -> None:
    machine = Machine(lambda *_: 1e-3)
    curve = measure_step_cost(machine.prepare, clock=machine.clock)
    assert curve.widths == (1, 2, 4, 8, 16, 32, 64, 81)
    assert len(curve.contexts) == 2


def test_work_still_in_flight_is_waited_for() -> None:
    machine = Machine(plain)
    machine.asynchronous = True
    seconds = run(machine, widths=(1, 2), contexts=(10,))
    assert seconds[0] == pytest.approx((plain(10, 1, 0), plain(10, 2, 0)))


def test_the_first_call_of_each_point_is_not_counted() -> None:
    seen: set[tuple[int, int]] = set()

    def cold_start(context: int, width: int, call: int) -> float:
        fresh = (context, width) not in seen
        seen.add((context, width))
        return 1e6 if fresh else plain(context, width, call)

    # Rounds go on although the warm-up used up the budget, but only three of them.
    seconds = run(Machine(cold_start), widths=(1, 2), contexts=(10,))
    assert seconds[0] == pytest.approx((plain(10, 1, 0), plain(10, 2, 0)))


def test_a_few_disturbed_calls_do_not_show() -> None:
    def disturbed(context: int, width: int, call: int) -> float:
        return plain(context, width, call) * (10 if call % 5 == 0 else 1)

    seconds = run(Machine(disturbed), widths=(1, 2, 4), contexts=(10,), budget_seconds=1e9)
    assert seconds[0] == pytest.approx([plain(10, width, 0) for width in (1, 2, 4)])


def test_a_few_lucky_calls_do_not_show_either() -> None:
    def lucky(context: int, width: int, call: int) -> float:
        return plain(context, width, call) * (0.1 if call % 5 == 0 else 1)

    seconds = run(Machine(lucky), widths=(1, 2, 4), contexts=(10,), budget_seconds=1e9)
    assert seconds[0] == pytest.approx([plain(10, width, 0) for width in (1, 2, 4)])


def test_a_slow_stretch_falls_on_all_points_alike() -> None:
    def throttled(context: int, width: int, call: int) -> float:
        return plain(context, width, call) * (3 if call > 2 + 2 * 10 else 1)

    one, two = run(Machine(throttled), widths=(1, 2), contexts=(0,), budget_seconds=1e9)[0]
    assert two / one == pytest.approx(2.0)


def test_a_wider_forward_may_be_cheaper() -> None:
    seconds = run(
        Machine(lambda context, width, call: 0.05 if width == 1 else 0.045), widths=(1, 8)
    )
    assert seconds[0] == pytest.approx((0.05, 0.045))


def test_each_round_measures_every_point_once_in_another_order() -> None:
    machine = Machine(plain)
    run(machine, widths=(1, 2, 4, 8), contexts=(10, 20), budget_seconds=1e9)
    points = 8
    rounds = [
        machine.calls[start : start + points] for start in range(points, len(machine.calls), points)
    ]
    assert len(rounds) == step_cost.MAX_ROUNDS
    assert all(len(set(calls)) == points for calls in rounds)
    assert len({tuple(calls) for calls in rounds}) > 20


def test_the_seed_settles_the_order() -> None:
    orders = []
    for seed in (1, 1, 2):
        machine = Machine(plain)
        run(machine, widths=(1, 2, 4), contexts=(10,), seed=seed)
        orders.append(machine.calls)
    assert orders[0] == orders[1] != orders[2]


def test_rounds_end_when_the_budget_is_spent_but_three_are_made() -> None:
    machine = Machine(lambda *_: 1.0)
    run(machine, widths=(1, 2), contexts=(10,), budget_seconds=10.5)
    # Warm-up takes two seconds and each round two: after four rounds ten seconds are gone.
    assert len(machine.calls) == 2 + 2 * 5
    machine = Machine(lambda *_: 1.0)
    run(machine, widths=(1, 2), contexts=(10,), budget_seconds=0.0)
    assert len(machine.calls) == 2 + 2 * step_cost.MIN_ROUNDS


@pytest.mark.parametrize(
    ("widths", "contexts", "message"),
    [
        ((2, 4), (10,), "start with 1"),
        ((1, 4, 4), (10,), "widths must ascend"),
        ((), (10,), "widths must ascend"),
        ((1,), (20, 10), "contexts must ascend"),
        ((1,), (-1,), "at least 0"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(
    widths: Sequence[int], contexts: Sequence[int], message: str
) -> None:
    machine = Machine(plain)
    with pytest.raises(ValueError, match=message):
        run(machine, widths=widths, contexts=contexts)
    assert machine.prepared == []
