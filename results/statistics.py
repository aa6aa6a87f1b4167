"""Intervals and verdicts, from paired measurements of the same items.

**The unit of resampling is the item** (the problem, where a task draws several samples of one).
Repeats of an item are combined first, and both sides of a comparison use the same resamples.

**Which bootstrap.** Intervals of speed ratios and of means are symmetric bootstrap-t intervals: the
estimate, on a log scale for ratios, plus and minus c standard errors, where c is the 95% quantile
of |t| over resamples that are each studentised by their own standard error, held between Student's
quantile and twice that. Others were tried on item sets as they occur (lengths and speed-ups that
vary between items; lognormal noise of 10 and 30%, rare spikes, correlated drift; n = 8, 16, 24; 600
trials each). Coverage of the true value by intervals meant to cover 95%, smallest and largest:

    n                            8             16            24
    percentile                   83% - 90%     88% - 93%     88% - 94%
    BCa                          80% - 89%     78% - 91%     76% - 92%
    Student's t, linearised      89% - 98%     91% - 98%     92% - 96%
    bootstrap-t, two tails       91% - 95%     91% - 96%     88% - 95%
    bootstrap-t, symmetric       93% - 99%     94% - 99%     94% - 99.7%    used here

The percentile interval that most tools print is too narrow where a benchmark has few items, and BCa
makes it worse, since its acceleration is itself a guess from few items.

**Which verdict.** A table holds dozens of comparisons, and an interval of 95% is wrong about one in
twenty. So a difference is only called where the 99% interval, made in the same way, lies beyond the
margin; for "the same" the printed 95% interval decides. Share of comparisons of a method with
itself that are then called different, margin 5%, 1500 trials each, and what the 95% interval would
have called:

    noise of a sample            10%                20%                30%
    n = 8                        0.0% (0.3%)        0.1% (1.5%)        0.3% (2.3%)
    n = 16                       0.1% (0.1%)        0.1% (1.1%)        0.4% (1.7%)
    n = 24                       0.0% (0.0%)        0.1% (0.7%)        0.1% (1.3%)

Everything is deterministic: resamples depend on the number of items alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import bdtr, ndtr, ndtri, stdtrit

Floats = NDArray[np.float64]
SpeedVerdict = Literal["FASTER", "SAME", "SLOWER", "INCONCLUSIVE"]
QualityVerdict = Literal["BETTER", "SAME", "NO LOSS", "WORSE", "INCONCLUSIVE"]
InteractionVerdict = Literal["MULTIPLY", "LESS", "MORE", "INCONCLUSIVE"]
# Verdicts that exclude a loss of quality.
NOT_WORSE: tuple[QualityVerdict, ...] = ("BETTER", "SAME", "NO LOSS")

# Relative difference in speed that counts as none, by kind of device (design: 2% GPU, 5% CPU).
SPEED_MARGIN = {"cpu": 0.05, "cuda": 0.02}
# Loss of a fraction metric that still counts as "no loss".
QUALITY_MARGIN = 0.02

CONFIDENCE = 0.95
CONFIDENCE_OF_DIFFERENCES = 0.99
POWER = 0.80
RESAMPLES = 4_999
CORPUS_RESAMPLES = 999  # each one is computed by the task, and stored
# With fewer items, too many resamples are one item repeated, which has no standard error. With more
# than the second number, the bootstrap's quantile and Student's are the same to a percent or two.
FEWEST_ITEMS_TO_RESAMPLE = 4
MOST_ITEMS_TO_RESAMPLE = 1_000
# Keeps the table of resamples at 16 MB; above 200 items there are fewer of them.
_MOST_COUNTS = 2_000_000

_LEVELS = (CONFIDENCE, CONFIDENCE_OF_DIFFERENCES)
# Half of an interval of each level of a normal distribution, in standard deviations.
_NORMAL_QUANTILE, WIDE_NORMAL_QUANTILE = (float(ndtri((1 + level) / 2)) for level in _LEVELS)
# A spread below this share of the values themselves is rounding.
_ROUNDING = 1e-6
# Times Student's quantile. A few near-equal items beside an odd one give resamples next to no
# spread; without a limit, their t makes intervals that are absurdly wide and cover no more.
_LARGEST_FACTOR = 2.0


class Estimate(NamedTuple):
    """A value with its intervals; without any if the data cannot say, as with one item.

    Attributes:
        value: The estimate.
        low: Lower end of the 95% interval.
        high: Upper end of the 95% interval.
        standard_error: On the scale of the interval (log for ratios).
        wide_low: Lower end of the 99% interval, which decides about differences.
        wide_high: Upper end of the 99% interval.
    """

    value: float
    low: float | None = None
    high: float | None = None
    standard_error: float | None = None
    wide_low: float | None = None
    wide_high: float | None = None


class ItemTotals(NamedTuple):
    """Seconds and units of output of each item, repeats combined, (items,)."""

    seconds: Floats
    units: Floats


def combine_repeats(seconds: Floats, units: Floats) -> ItemTotals:
    """Combine the repeats of each item.

    Repeats of equal length are combined by their median, since a spike of the machine is not the
    method's doing. Where lengths differ (sampling), both take the mean: the median time and the
    median length could belong to different repeats.

    Args:
        seconds: (items, repeats), NaN where a repeat is missing; each item has at least one.
        units: Units of output, the same shape.
    """
    same_length = np.nanmin(units, axis=1) == np.nanmax(units, axis=1)
    return ItemTotals(
        seconds=np.where(same_length, np.nanmedian(seconds, axis=1), np.nanmean(seconds, axis=1)),
        units=np.nanmean(units, axis=1),
    )


def speed_up(baseline: ItemTotals, method: ItemTotals) -> Estimate:
    """Return baseline seconds per unit of output over the method's, from totals over all items.

    Items are paired: element i of both sides is the same item. The interval is symmetric on the log
    scale, so that exchanging the two sides gives the inverse interval. Its standard error is that
    of the linearised log ratio.

    Returns:
        NaN without an interval if a total is zero.

    Raises:
        ValueError: The sides have different numbers of items, or none.
    """
    return _ratio_of_totals(
        [baseline.seconds, baseline.units, method.seconds, method.units], [1.0, -1.0, -1.0, 1.0]
    )


def speed_up_change(
    base: tuple[ItemTotals, ItemTotals], head: tuple[ItemTotals, ItemTotals]
) -> Estimate:
    """Return the speed-up of one run over that of another, each (baseline, method) of its run.

    Above 1 the second run's speed-up is the larger one. Element i of all four is the same item, so
    what makes an item easy to speed up cancels. The interval is that of `speed_up`.

    It is also the interaction of two methods, S(both) / (S(first) S(second)): the speed-up that the
    second brings where the first is at work, (first, both), over that alone, (neither, second).

    Raises:
        ValueError: The sides have different numbers of items, or none.
    """
    columns, signs = [], []
    for sign, (baseline, method) in ((-1.0, base), (1.0, head)):
        columns += [baseline.seconds, baseline.units, method.seconds, method.units]
        signs += [sign, -sign, -sign, sign]
    return _ratio_of_totals(columns, signs)


def interaction_verdict(estimate: Estimate, margin: float) -> InteractionVerdict:
    """Settle the gain of two methods together over the product of their gains alone.

    The rule is that of `speed_verdict`: MORE: the 99% interval lies above 1 + margin, so each gains
    more with the other. LESS: it lies below 1 / (1 + margin). MULTIPLY: the 95% interval lies
    between the two. INCONCLUSIVE: none of these, or there is no interval.

    Args:
        estimate: The ratio with its intervals; 1 where gains multiply.
        margin: Relative difference that does not matter.
    """
    words: dict[SpeedVerdict, InteractionVerdict] = {
        "FASTER": "MORE",
        "SLOWER": "LESS",
        "SAME": "MULTIPLY",
        "INCONCLUSIVE": "INCONCLUSIVE",
    }
    return words[speed_verdict(estimate, margin)]


def geometric_mean_speed_up(baseline: ItemTotals, method: ItemTotals) -> float:
    """Return the geometric mean of the per-item speed-ups; NaN if no item has output on both sides.

    Each item counts the same here, where in `speed_up` each second does.
    """
    usable = (baseline.units > 0) & (method.units > 0)
    if not usable.any():
        return math.nan
    logs = np.log(baseline.seconds[usable] / baseline.units[usable])
    logs -= np.log(method.seconds[usable] / method.units[usable])
    return math.exp(float(logs.mean()))


def mean(values: Floats) -> Estimate:
    """Return the mean of per-item values with its interval.

    Equal values carry no trace of their spread, so they get no interval: see `fraction_mean`.

    Raises:
        ValueError: There are no values.
    """
    items = len(values)
    if items == 0:
        raise ValueError("a mean needs at least one value, got none.")
    value = float(values.mean())
    if items == 1 or (values == values[0]).all():
        return Estimate(value)
    centred = values - value
    standard_error = math.sqrt(float(centred @ centred) / (items * (items - 1)))
    quantiles = _student_quantiles(items)
    if _is_resampled(items):
        counts = _resample_counts(items)
        shift = counts @ centred / items
        variances = counts @ centred**2 / items - shift**2
        errors = np.sqrt(np.maximum(variances, 0) / (items - 1))
        quantiles = _studentised_quantiles(items, shift, errors, _ROUNDING * standard_error)
    half, wide = (float(quantile) * standard_error for quantile in quantiles)
    return Estimate(value, value - half, value + half, standard_error, value - wide, value + wide)


def fraction_mean(values: Floats) -> Estimate:
    """Return the mean of values in [0, 1]: Wilson's interval where they are 0 or 1, or all equal.

    Of all variables in [0, 1] with a given mean, those of 0 and 1 vary most, so Wilson's interval
    is safe where equal values leave the bootstrap without a spread.
    """
    items = len(values)
    if items and (np.isin(values, (0.0, 1.0)).all() or (values == values[0]).all()):
        return wilson(float(values.sum()), items)
    estimate = mean(values)
    ends = ("low", "high", "wide_low", "wide_high")
    inside = {name: min(1.0, max(0.0, end)) for name in ends if (end := getattr(estimate, name))}
    return estimate._replace(**inside)


def wilson(successes: float, trials: int) -> Estimate:
    """Return the share of successes with Wilson's score interval (Wilson 1927).

    Raises:
        ValueError: There are no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"need 0 <= successes <= trials >= 1, got {successes} of {trials}.")
    share = successes / trials

    def ends(z: float) -> tuple[float, float]:
        centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
        half = z / (1 + z**2 / trials)
        half *= math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
        low = 0.0 if successes == 0 else max(0.0, centre - half)
        return low, 1.0 if successes == trials else min(1.0, centre + half)

    low, high = ends(_NORMAL_QUANTILE)
    return Estimate(
        share, low, high, (high - low) / (2 * _NORMAL_QUANTILE), *ends(WIDE_NORMAL_QUANTILE)
    )


def paired_difference(baseline: Floats, method: Floats, *, is_fraction: bool) -> Estimate:
    """Return the mean of `method - baseline` over paired items, with its interval.

    Values that are all 0 or 1 get Tango's score interval, and so do fractions that do not differ
    anywhere. Differences of an unbounded metric that are all zero get no interval.

    Args:
        baseline: Value of each item, (items,).
        method: The same for the method.
        is_fraction: Whether values lie in [0, 1] by definition.
    """
    if len(baseline) != len(method):
        raise ValueError(f"items must be paired, got {len(baseline)} and {len(method)}.")
    differences = method - baseline
    if is_fraction and len(differences) > 1:
        both = np.concatenate([baseline, method])
        if np.isin(both, (0.0, 1.0)).all() or not differences.any():
            gained = int((differences > 0).sum())
            return tango(gained, int((differences < 0).sum()), len(differences))
    return mean(differences)


def tango(gained: int, lost: int, trials: int) -> Estimate:
    """Return the paired difference of two shares, with the score interval.

    It stays honest where few pairs differ, and with none: 24 pairs without a difference give
    [-0.14, 0.14]. Source: Tango, Statistics in Medicine 17 (1998), pages
    891 to 908, the score interval.

    Args:
        gained: Pairs that only the method solved.
        lost: Pairs that only the baseline solved.
        trials: All pairs.
    """
    if trials < 1 or gained < 0 or lost < 0 or gained + lost > trials:
        raise ValueError(f"need gained + lost <= trials >= 1, got {gained}, {lost}, {trials}.")
    difference = (gained - lost) / trials

    def score(delta: float) -> float:
        """Return the score statistic for the true difference `delta`."""
        # Maximum-likelihood share of lost pairs under the constraint, a root of a quadratic.
        linear = -gained - lost + (2 * trials - gained + lost) * delta
        constant = -lost * delta * (1 - delta)
        root = math.sqrt(max(linear**2 - 8 * trials * constant, 0.0))
        lost_share = (root - linear) / (4 * trials)
        variance = trials * (2 * lost_share + delta * (1 - delta))
        distance = gained - lost - trials * delta
        if abs(distance) < 1e-6:  # with no discordant pair the variance vanishes as well
            return 0.0
        return distance / math.sqrt(max(variance, 1e-12))

    edge = 1 - 1e-9

    def ends(z: float) -> tuple[float, float]:
        low, high = -1.0, 1.0
        if score(-edge) > z:
            low = brentq(lambda delta: score(delta) - z, -edge, min(difference, edge))
        if score(edge) < -z:
            high = brentq(lambda delta: score(delta) + z, max(difference, -edge), edge)
        return low, high

    low, high = ends(_NORMAL_QUANTILE)
    error = (high - low) / (2 * _NORMAL_QUANTILE)
    return Estimate(difference, low, high, error, *ends(WIDE_NORMAL_QUANTILE))


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided exact p-value of equally likely gains and losses; 1 without any."""
    return min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the unbiased estimate that one of k samples of a problem is correct.

    Source: arXiv 2107.03374, equation 1, as 1 - C(samples - correct, k) / C(samples, k).

    Raises:
        ValueError: There are fewer than k samples; a problem with too few has no estimate.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"need 1 <= k <= samples >= correct, got {k=}, {samples=}, {correct=}.")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def corpus_draws(items: int) -> NDArray[np.int64]:
    """Return the items that each resample of a corpus metric draws, (1 + resamples, items).

    Row 0 is every item once; `CORPUS_RESAMPLES` draws with replacement follow, or none where items
    are too few. They depend on the number of items alone, so that all cells of an experiment, and
    experiments of the same items, share them.

    Raises:
        ValueError: There are no items.
    """
    if items < 1:
        raise ValueError(f"a corpus needs at least one item, got {items}.")
    everything = np.arange(items, dtype=np.int64)[None]
    if items < FEWEST_ITEMS_TO_RESAMPLE:
        return everything
    generator = np.random.default_rng([20_250_102, items])
    drawn = generator.integers(items, size=(CORPUS_RESAMPLES, items))
    return np.concatenate([everything, drawn])


def corpus_replicates(value: float | None, resampled: Sequence[float], items: int) -> Floats:
    """Return a stored corpus metric as one array, the metric first and NaN where it is None.

    Raises:
        ValueError: There are not as many numbers as `corpus_draws` makes of so many items.
    """
    expected = CORPUS_RESAMPLES if items >= FEWEST_ITEMS_TO_RESAMPLE else 0
    if len(resampled) != expected:
        raise ValueError(f"{items} items are resampled {expected} times, got {len(resampled)}.")
    return np.array([math.nan if value is None else value, *resampled])


def corpus_metric(replicates: Floats, items: int) -> Estimate:
    """Return a metric of the whole corpus, with an expanded percentile interval.

    Such a metric has no standard error of its own to studentise with, so the percentiles are moved
    outwards to make up for small samples (Hesterberg, The American Statistician 69, 2015). A paired
    difference is the same of the difference of both sides' replicates, row by row.

    A draw without a number could have had any: it counts as the smallest for lower ends and as the
    largest for upper ones, so a metric that is often undefined has no interval rather than one that
    leaves its bad cases out.

    Args:
        replicates: The metric on each row of `corpus_draws`, (rows,); NaN where it has no number.
        items: Number of items.
    """
    value = float(replicates[0])
    if len(replicates) == 1 or not math.isfinite(value):
        return Estimate(value)
    return _expanded_percentiles(value, replicates[1:], items)


def speed_verdict(estimate: Estimate, margin: float) -> SpeedVerdict:
    """Settle a speed-up against the margin.

    FASTER: the 99% interval lies above 1 + margin. SLOWER: it lies below 1 / (1 + margin). SAME:
    the 95% interval lies between the two. INCONCLUSIVE: none of these, or there is no interval.

    Args:
        estimate: A ratio with its intervals.
        margin: Relative difference that does not matter, 0.05 for 5%.
    """
    ends = (estimate.low, estimate.high, estimate.wide_low, estimate.wide_high)
    low, high, wide_low, wide_high = (math.nan if end is None else end for end in ends)
    if wide_low > 1 + margin:
        return "FASTER"
    if wide_high < 1 / (1 + margin):
        return "SLOWER"
    return "SAME" if 1 / (1 + margin) <= low and high <= 1 + margin else "INCONCLUSIVE"


def quality_verdict(
    difference: Estimate, margin: float, *, higher_is_better: bool
) -> QualityVerdict:
    """Settle a difference in quality, method minus baseline, against the margin.

    With the sign turned so that more is better, the first that holds of: BETTER: the 99% interval
    lies above +margin. WORSE: it lies below -margin. SAME (equivalent): the 95% interval lies
    between -margin and +margin. NO LOSS (non-inferior): it lies above -margin, so a loss is
    excluded and a gain is not. INCONCLUSIVE: none of these, or there is no interval.

    Calling a difference takes the 99% interval, since a table holds dozens of them. SAME and NO
    LOSS are tests of a shift by the margin instead; at either end of the 95% interval such a test
    is one-sided at 2.5%, which is the usual level of a non-inferiority test and half of the usual
    one for equivalence (which takes the 90% interval).
    """
    ends = (difference.low, difference.high, difference.wide_low, difference.wide_high)
    low, high, wide_low, wide_high = (math.nan if end is None else end for end in ends)
    if not higher_is_better:
        low, high, wide_low, wide_high = -high, -low, -wide_high, -wide_low
    if wide_low > margin:
        return "BETTER"
    if wide_high < -margin:
        return "WORSE"
    if -margin < low <= high < margin or low == high == 0:
        return "SAME"
    return "NO LOSS" if low > -margin else "INCONCLUSIVE"


def smallest_speed_difference(estimate: Estimate, margin: float, items: int) -> float | None:
    """Return the relative speed-up that would have been called FASTER in 80% of such measurements.

    On the log scale this is the margin, plus the half-width of the 99% interval, plus the distance
    that four of five estimates stay above. None without an interval.
    """
    if estimate.wide_high is None or estimate.standard_error is None:
        return None
    half_width = math.log(estimate.wide_high / estimate.value)
    power = float(stdtrit(items - 1, POWER)) * estimate.standard_error
    return math.expm1(math.log1p(margin) + half_width + power)


def smallest_quality_difference(estimate: Estimate, margin: float) -> float | None:
    """Return the loss that would have been called WORSE in 80% of such measurements.

    The same sum on the metric's own scale. None without an interval.
    """
    if estimate.wide_low is None or estimate.wide_high is None or estimate.standard_error is None:
        return None
    half_width = (estimate.wide_high - estimate.wide_low) / 2
    return margin + half_width + float(ndtri(POWER)) * estimate.standard_error


def _ratio_of_totals(columns: Sequence[Floats], exponents: Sequence[float]) -> Estimate:
    """Return the product of totals over items, each to the power of 1 or -1, with its interval.

    Args:
        columns: Values of each item, each (items,), the items in the same order.
        exponents: 1 or -1 for each column; as many of one as of the other.
    """
    signs = np.array(exponents)
    values = np.stack(columns, axis=1)
    items, width = values.shape
    if items == 0:
        raise ValueError("a speed-up needs at least one item, got none.")
    means = values.mean(axis=0)
    if not (means > 0).all():
        return Estimate(math.nan)
    log_ratio = float(signs @ np.log(means))
    if items == 1:
        return Estimate(math.exp(log_ratio))
    scaled = values / means
    influence = scaled @ signs
    standard_error = math.sqrt(float(influence @ influence) / (items * (items - 1)))
    quantiles = _student_quantiles(items)
    if _is_resampled(items) and standard_error > _ROUNDING:
        counts = _resample_counts(items)
        relative = counts @ scaled / items  # (resamples, width): resampled means over the means
        with np.errstate(divide="ignore", invalid="ignore"):
            shift = np.log(relative) @ signs
            weights = signs / relative
            # Sum over items of (weights . scaled)^2, from the resampled second moments.
            pairs = [(i, j) for i in range(width) for j in range(i, width)]
            products = np.stack([scaled[:, i] * scaled[:, j] for i, j in pairs], axis=1)
            moments = counts @ products
            squares = sum(
                (1 if i == j else 2) * weights[:, i] * weights[:, j] * moments[:, place]
                for place, (i, j) in enumerate(pairs)
            )
            errors = np.sqrt(np.maximum(squares, 0) / (items * (items - 1)))
        quantiles = _studentised_quantiles(items, shift, errors, _ROUNDING)
    half, wide = (float(quantile) * standard_error for quantile in quantiles)
    return Estimate(
        value=math.exp(log_ratio),
        low=math.exp(log_ratio - half),
        high=math.exp(log_ratio + half),
        standard_error=standard_error,
        wide_low=math.exp(log_ratio - wide),
        wide_high=math.exp(log_ratio + wide),
    )


def _student_quantiles(items: int) -> Floats:
    """Return Student's two-sided quantiles at 95% and 99%."""
    return np.array([stdtrit(items - 1, (1 + level) / 2) for level in _LEVELS])


def _studentised_quantiles(items: int, shift: Floats, errors: Floats, smallest: float) -> Floats:
    """Return the quantiles of |shift / error| over resamples with more than the smallest error.

    They are kept between Student's and twice Student's.
    """
    student = _student_quantiles(items)
    usable = np.isfinite(shift) & (errors > smallest)
    if not usable.any():
        return student
    found = np.quantile(np.abs(shift[usable] / errors[usable]), _LEVELS)
    limited: Floats = np.clip(found, student, _LARGEST_FACTOR * student)
    return limited


def _is_resampled(items: int) -> bool:
    return FEWEST_ITEMS_TO_RESAMPLE <= items <= MOST_ITEMS_TO_RESAMPLE


@lru_cache(maxsize=8)
def _resample_counts(items: int) -> Floats:
    """Return how often each resample draws each item, (resamples, items)."""
    generator = np.random.default_rng([20_250_101, items])
    resamples = min(RESAMPLES, _MOST_COUNTS // items)
    return generator.multinomial(items, np.full(items, 1 / items), size=resamples).astype(float)


def _expanded_percentiles(value: float, resampled: Floats, items: int) -> Estimate:
    if (resampled == resampled[0]).all():
        return Estimate(value)
    usable = np.isfinite(resampled)
    lowest, highest = np.where(usable, resampled, -np.inf), np.where(usable, resampled, np.inf)
    ends: list[tuple[float, float] | tuple[None, None]] = []
    for tail in ndtr(-math.sqrt(items / (items - 1)) * _student_quantiles(items)):
        # Not interpolated where a neighbour is infinite: that would be no number.
        with np.errstate(invalid="ignore"):
            low, high = float(np.quantile(lowest, tail)), float(np.quantile(highest, 1 - tail))
        ends.append((low, high) if math.isfinite(low) and math.isfinite(high) else (None, None))
    (low_end, high_end), wide = ends
    if low_end is None or high_end is None:
        return Estimate(value)
    error = (high_end - low_end) / (2 * _NORMAL_QUANTILE)
    return Estimate(value, low_end, high_end, error, *wide)


def pass_rates(scores: Sequence[float | None], groups: Sequence[str], k: int) -> dict[str, float]:
    """Return the estimate of pass@k for each problem with at least k scored samples.

    Args:
        scores: 1 for a correct sample, 0 for a wrong one, None for one without a score.
        groups: Problem of each sample, same length.
        k: Samples that one may draw.
    """
    scored: dict[str, list[float]] = {}
    for score, group in zip(scores, groups, strict=True):
        if score is not None:
            scored.setdefault(group, []).append(score)
    return {
        group: pass_at_k(len(values), round(sum(values)), k)
        for group, values in scored.items()
        if len(values) >= k
    }
