"""`--budget`: what a limited time is spent on, how long it takes, and what would be left to do.

A pair of a method and its baseline is **undecided** while it is not measured, or while a verdict on
it, of speed or of quality, is INCONCLUSIVE. What a measurement would tell is counted in bits: how
much less uncertain it is expected to leave which verdict is right (worse, the same, better), for an
estimate that is about normal and whose interval shrinks with the square root of the samples.
Experiments are taken in the order of bits per second, as long as they fit.

An undecided pair is measured again with as many items as its verdict needs, judged by where it
stands now; where a task has no more items, with more repeats. What it needs beyond `MOST_GROWTH`
times what it has is too near the margin to be worth the time at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.stats import norm

from results.evidence import Belief, Evidence, Known, Place
from results.statistics import WIDE_NORMAL_QUANTILE
from runner.request import Request
from runner.settings import parse_method, parse_spec
from runner.spec import ExperimentSpec

if TYPE_CHECKING:
    from runner.plan import Plan

# Largest number of samples, in multiples of what an undecided pair has, that is asked for at once.
MOST_GROWTH = 8
# Before a pair was measured: a method may well halve or double the speed, and the ratio of an item
# varies by about so much.
_UNMEASURED_DEVIATION = math.log(2)
_ITEM_DEVIATION = 0.3
# Of what nothing like it was ever measured.
_GUESSED_SAMPLE_SECONDS = 2.0
_GUESSED_OVERHEAD_SECONDS = 30.0
# Nodes and weights for the mean over a normal distribution.
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(24)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One experiment that could be measured.

    Attributes:
        spec: The experiment.
        cells: (experiment_id, cell_id) of its cells.
        seconds: How long it takes, as far as is known.
        is_guessed: Whether nothing like it was measured before.
        bits: What it is expected to tell about verdicts.
        replaced: Cells whose place in the answer it takes, smaller measurements of the same pairs.
    """

    spec: ExperimentSpec
    cells: tuple[tuple[str, str], ...]
    seconds: float
    is_guessed: bool
    bits: float
    replaced: Mapping[tuple[str, str], tuple[str, str]] = field(default_factory=dict)


class Undecided(NamedTuple):
    """A measured pair without a verdict.

    Attributes:
        pair: Ids of experiment and cell.
        method: Its spec.
        evidence: What is known of it.
    """

    pair: tuple[str, str]
    method: str
    evidence: Evidence


Expand = Callable[[Request], "Plan"]
Instead = dict[tuple[str, str], tuple[str, str]]


def within_budget(plan: Plan, known: Known, expand: Expand) -> Plan:
    """Return the plan that spends the request's budget.

    Args:
        plan: All that the request asks for.
        known: What the store says.
        expand: Makes the plan of another request, in the same store.

    Returns:
        A plan whose experiments are in the order of what they tell for their time and fit into the
        budget together, the first one in any case; the others are its `later`.
    """
    budget = plan.request.budget
    assert budget is not None
    again, instead = _again(plan, known, expand)
    steps = [_step(spec, known) for spec in plan.experiments] + again
    # At equal worth in the order of the request: sorting keeps it.
    steps.sort(key=lambda step: -step.bits / step.seconds)
    chosen: list[Step] = []
    later: list[Step] = []
    spent = 0.0
    for step in steps:
        fits = spent + step.seconds <= budget or not chosen
        (chosen if fits else later).append(step)
        spent += step.seconds if fits else 0.0
    not_now = {pair for step in later if not step.replaced for pair in step.cells}
    for step in chosen:
        instead |= step.replaced
    plan.experiments[:] = [step.spec for step in chosen]
    answers = [instead.get(pair, pair) for pair in plan.cells if pair not in not_now]
    # What a pair was measured beside anew belongs to the answer too.
    answers += [pair for step in chosen if step.replaced for pair in step.cells]
    plan.cells[:] = dict.fromkeys(answers)
    plan.later[:] = later
    return plan


def estimate(specs: Sequence[ExperimentSpec], known: Known) -> float | None:
    """Return the seconds that experiments take; None where nothing like one was ever measured."""
    total = 0.0
    for spec in specs:
        seconds, is_guessed = _seconds(spec, known)
        if is_guessed:
            return None
        total += seconds
    return total


def information(belief: Belief, deviation: float) -> float:
    """Return the bits that a new estimate is expected to tell about which verdict is right.

    Args:
        belief: What is believed now.
        deviation: Standard deviation of the new estimate.

    Returns:
        The entropy of {below the margin, within, above} now, less its mean once the new estimate,
        whatever it is, has been weighed with what is believed.
    """
    if belief.deviation <= 0 or not math.isfinite(belief.deviation):
        return 0.0
    after = 1 / math.sqrt(1 / belief.deviation**2 + 1 / deviation**2)
    spread = math.sqrt(max(belief.deviation**2 - after**2, 0.0))
    means = belief.mean + spread * _NODES
    weights = _WEIGHTS / _WEIGHTS.sum()
    expected = sum(
        weight * _entropy(Belief(float(mean), after, belief.margin))
        for mean, weight in zip(means, weights, strict=True)
    )
    return max(_entropy(belief) - float(expected), 0.0)


def growth(evidence: Evidence) -> float:
    """Return how many times its samples a pair needs for its verdicts, at most `MOST_GROWTH`.

    A verdict is settled when the 99% interval lies on one side of the nearest margin.
    """
    needed = 1.0
    for belief in evidence.beliefs:
        distance = min(abs(belief.mean - belief.margin), abs(belief.mean + belief.margin))
        reach = WIDE_NORMAL_QUANTILE * belief.deviation
        needed = max(needed, (reach / distance) ** 2 if distance else math.inf)
    return min(needed, MOST_GROWTH)


def _entropy(belief: Belief) -> float:
    below = norm.cdf(-belief.margin, belief.mean, belief.deviation)
    above = norm.sf(belief.margin, belief.mean, belief.deviation)
    shares = np.array([below, max(1 - below - above, 0.0), above])
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def _step(spec: ExperimentSpec, known: Known) -> Step:
    """Return an experiment that is not measured yet, as far as the store knows."""
    seconds, is_guessed = _seconds(spec, known)
    unmeasured = Belief(0.0, _UNMEASURED_DEVIATION, math.log1p(spec.margin))
    bits = sum(
        information(unmeasured, _ITEM_DEVIATION / math.sqrt(cell.num_items * spec.repeats))
        for cell in spec.cells[1:]
    )
    cells = tuple((spec.experiment_id, cell.cell_id) for cell in spec.cells)
    return Step(spec=spec, cells=cells, seconds=seconds, is_guessed=is_guessed, bits=bits)


def _again(plan: Plan, known: Known, expand: Expand) -> tuple[list[Step], Instead]:
    """Return an experiment for the undecided pairs of each task and model that are measured.

    And, for pairs that a larger measurement has decided since, that one's cells.
    """
    request = plan.request
    groups: dict[tuple[str, str], list[Undecided]] = {}
    taken: dict[tuple[str, str], dict[str, float]] = {}
    answered: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}
    for each in plan.answers:
        answered.setdefault((each.task, each.model), {})[each.method] = each.pair
        evidence = known.evidence.get(each.pair[1])
        if evidence is not None and evidence.seconds is not None:
            taken.setdefault((each.task, each.model), {})[each.method] = evidence.seconds
        if evidence is not None and evidence.beliefs:
            undecided = Undecided(each.pair, each.method, evidence)
            groups.setdefault((each.task, each.model), []).append(undecided)
    steps: list[Step] = []
    settled: Instead = {}
    for (task, model), group in groups.items():
        # A stack without its parts would not say what became of their gains.
        named = {str(part) for each in group for part in parse_method(each.method).parts}
        parts = {method: pair for method, pair in answered[task, model].items() if method in named}
        asked = replace(
            request,
            methods=tuple(dict.fromkeys((*parts, *(each.method for each in group)))),
            tasks=(task,),
            models=(model,),
            names_methods=True,
            fresh=False,
            # What a suite says of its own matrix does not hold for this one.
            limits={},
            method_limits={},
            task_methods={},
            task_models={},
        )
        more = _more(asked, [each.evidence for each in group], known, expand)
        answers = {answer.method: answer.pair for answer in more.answers}
        pairs = {**parts, **{each.method: each.pair for each in group}}
        settled |= {pair: answers[method] for method, pair in pairs.items() if method in answers}
        if more.experiments:
            steps.append(_replacing(more, group, pairs, known, taken[task, model]))
    return steps, settled


def _more(asked: Request, evidence: Sequence[Evidence], known: Known, expand: Expand) -> Plan:
    """Return a plan of as many items and repeats as verdicts need.

    It holds no experiment where all of it is measured already, and either decided it or came as
    far as a few rounds go.
    """
    repeats, is_whole = max(each.repeats for each in evidence), False
    while True:
        items = max(each.items for each in evidence)
        factor = max(growth(each) for each in evidence)
        if is_whole:
            repeats = math.ceil(repeats * factor)
        asked = replace(asked, limit=math.ceil(items * factor), repeats=repeats)
        larger = expand(asked)
        if larger.experiments:
            found = len(larger.experiments[0].items)
            missing = math.ceil(items * factor / found)
            if missing == 1 or is_whole:
                return larger
            # The task has no more: what is missing are repeats.
            repeats, is_whole = repeats * missing, True
            larger = expand(replace(asked, repeats=repeats))
            if larger.experiments:
                return larger
        measured = [known.evidence.get(answer.pair[1]) for answer in larger.answers]
        undecided = [each for each in measured if each is not None and each.beliefs]
        if not undecided:
            return larger
        # Measured before, at this size or at all that there is, and not decided: go on from there.
        is_same = max(each.samples for each in undecided) <= max(each.samples for each in evidence)
        if is_same and is_whole:
            return larger
        is_whole = is_whole or max(each.items for each in undecided) <= items
        repeats = max(each.repeats for each in undecided)
        evidence = undecided


def _replacing(
    more: Plan,
    undecided: Sequence[Undecided],
    pairs: Mapping[str, tuple[str, str]],
    known: Known,
    taken: Mapping[str, float],
) -> Step:
    """Return the experiment of a plan that measures undecided pairs again.

    Args:
        more: The plan.
        undecided: What it is to decide.
        pairs: Cells whose place it takes, by their methods.
        known, taken: As in `_seconds`.
    """
    [spec] = more.experiments
    seconds, is_guessed = _seconds(spec, known, taken)
    by_method = {cell.method: (spec.experiment_id, cell.cell_id) for cell in spec.cells}
    samples = len(spec.items) * spec.repeats
    bits = sum(
        information(belief, belief.deviation * math.sqrt(each.evidence.samples / samples))
        for each in undecided
        for belief in each.evidence.beliefs
    )
    return Step(
        spec=spec,
        cells=tuple(by_method.values()),
        seconds=seconds,
        is_guessed=is_guessed,
        bits=bits,
        replaced={pair: by_method[method] for method, pair in pairs.items() if method in by_method},
    )


def _seconds(
    spec: ExperimentSpec, known: Known, taken: Mapping[str, float] = MappingProxyType({})
) -> tuple[float, bool]:
    """Return what an experiment takes, and whether any of it is a guess.

    Args:
        spec: The experiment.
        known: What samples took elsewhere.
        taken: What a sample of a method took on the same task with the same settings.
    """
    place = Place(parse_spec(spec.task).name, parse_spec(spec.model).name)
    overhead = known.overhead_seconds(place)
    total, is_guessed = overhead or 0.0, overhead is None
    if overhead is None:
        total = _GUESSED_OVERHEAD_SECONDS
    for cell in spec.cells:
        each = taken.get(cell.method) or known.sample_seconds(place, cell.method)
        is_guessed = is_guessed or each is None
        each = _GUESSED_SAMPLE_SECONDS if each is None else each
        total += each * cell.num_items * spec.repeats
    return total, is_guessed
