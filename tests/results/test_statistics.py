from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal, stats

from results import statistics
from results.statistics import Estimate, ItemTotals

Noise = Callable[[np.random.Generator, int], np.ndarray]


def draw_items(
    random: np.random.Generator, items: int, noise: Noise, speed: float, spread: float
) -> tuple[ItemTotals, ItemTotals]:
    """Draw items as a benchmark has them: lengths vary, drift is shared, speed-ups vary."""
    tokens = random.lognormal(3.8, 0.6, items).round().clip(5, 144)
    steps = random.normal(0, 0.15, items)
    drift = np.exp(signal.lfilter([1], [1, -0.8], steps))
    seconds = (0.3 + 0.05 * tokens) * drift
    gain = random.lognormal(math.log(speed), spread, items)
    baseline = ItemTotals(seconds * noise(random, items), tokens)
    return baseline, ItemTotals(seconds / gain * noise(random, items), tokens)


def lognormal(scale: float) -> Noise:
    return lambda random, items: random.lognormal(0, scale, items)


def spikes(random: np.random.Generator, items: int) -> np.ndarray:
    spiked = random.random(items) < 0.08
    return random.lognormal(0, 0.04, items) * np.where(spiked, 1 + random.exponential(1, items), 1)


totals = st.integers(2, 30).flatmap(
    lambda items: st.tuples(
        *(
            st.lists(st.floats(0.01, 100), min_size=items, max_size=items).map(np.array)
            for _ in range(4)
        )
    ).map(lambda columns: (ItemTotals(*columns[:2]), ItemTotals(*columns[2:])))
)


def test_speed_up_is_the_ratio_of_totals_and_not_of_means() -> None:
    baseline = ItemTotals(np.array([1.0, 9.0]), np.array([10.0, 10.0]))
    method = ItemTotals(np.array([1.0, 3.0]), np.array([10.0, 20.0]))
    assert statistics.speed_up(baseline, method).value == pytest.approx((10 / 20) / (4 / 30))
    assert statistics.geometric_mean_speed_up(baseline, method) == pytest.approx(math.sqrt(6))


def test_one_item_has_no_interval_and_no_verdict() -> None:
    one = ItemTotals(np.array([2.0]), np.array([1.0]))
    other = ItemTotals(np.array([1.0]), np.array([1.0]))
    estimate = statistics.speed_up(one, other)
    assert estimate == Estimate(2.0)
    assert statistics.speed_verdict(estimate, 0.05) == "INCONCLUSIVE"
    assert statistics.smallest_speed_difference(estimate, 0.05, 1) is None


@pytest.mark.parametrize("items", [2, 3])
def test_with_two_or_three_items_the_interval_is_student_s(items: int) -> None:
    random = np.random.default_rng(0)
    baseline, method = draw_items(random, items, lognormal(0.1), 2.0, 0.1)
    estimate = statistics.speed_up(baseline, method)
    assert estimate.low is not None
    assert estimate.standard_error is not None
    half_width = math.log(estimate.value / estimate.low)
    assert half_width == pytest.approx(stats.t.ppf(0.975, items - 1) * estimate.standard_error)


def test_interval_of_a_ratio_equals_a_slow_bootstrap_with_loops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 300)
    statistics._resample_counts.cache_clear()
    baseline, method = draw_items(np.random.default_rng(5), 6, lognormal(0.3), 1.5, 0.4)
    method = method._replace(units=method.units + np.arange(6))
    columns = np.stack([*baseline, *method], axis=1)

    def log_ratio_and_error(rows: np.ndarray) -> tuple[float, float]:
        a, b, c, d = rows.mean(axis=0)
        influence = [row[0] / a - row[1] / b - row[2] / c + row[3] / d for row in rows]
        spread = sum(value**2 for value in influence) / (len(rows) * (len(rows) - 1))
        return math.log(a / b / (c / d)), math.sqrt(spread)

    centre, error = log_ratio_and_error(columns)
    studentised = []
    for counts in statistics._resample_counts(6):
        drawn = np.repeat(columns, counts.astype(int), axis=0)
        value, own_error = log_ratio_and_error(drawn)
        if own_error > 1e-6:
            studentised.append(abs(value - centre) / own_error)
    quantile = float(np.quantile(studentised, 0.95))
    estimate = statistics.speed_up(baseline, method)
    statistics._resample_counts.cache_clear()
    assert 1 < quantile / stats.t.ppf(0.975, 5) < 2  # else the limits would be tested, not this
    assert estimate.low == pytest.approx(math.exp(centre - quantile * error))
    assert estimate.high == pytest.approx(math.exp(centre + quantile * error))


def test_standard_error_and_interval_agree_with_scipy_on_many_items() -> None:
    baseline, method = draw_items(np.random.default_rng(3), 400, lognormal(0.2), 1.5, 0.3)

    def log_ratio(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> float:
        return math.log(a.sum() / b.sum() / (c.sum() / d.sum()))

    expected = stats.bootstrap(
        (*baseline, *method),
        log_ratio,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="BCa",
        rng=np.random.default_rng(0),
    )
    estimate = statistics.speed_up(baseline, method)
    assert estimate.standard_error == pytest.approx(expected.standard_error, rel=0.06)
    assert estimate.low is not None
    assert estimate.high is not None
    low, high = expected.confidence_interval
    width = high - low
    assert math.log(estimate.low) == pytest.approx(low, abs=0.08 * width)
    assert math.log(estimate.high) == pytest.approx(high, abs=0.08 * width)


@pytest.mark.parametrize(
    ("items", "noise"),
    [(8, lognormal(0.3)), (16, spikes), (24, lognormal(0.3))],
    ids=["8 items, lognormal", "16 items, spikes", "24 items, lognormal"],
)
def test_ratio_interval_covers_the_truth_also_with_few_items(items: int, noise: Noise) -> None:
    random = np.random.default_rng(0)
    truth = statistics.speed_up(*draw_items(random, 200_000, noise, 1.6, 0.35)).value
    covered = 0
    for _ in range(400):
        estimate = statistics.speed_up(*draw_items(random, items, noise, 1.6, 0.35))
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= truth <= estimate.high
    # 0.95 less nearly three standard errors of 400 trials; percentile intervals reach 0.83 to 0.92.
    assert covered / 400 >= 0.92


@pytest.mark.parametrize("items", [8, 16, 24])
@pytest.mark.parametrize(
    "noise", [lognormal(0.1), lognormal(0.2), spikes], ids=["10 %", "20 %", "spikes"]
)
def test_a_method_against_itself_is_never_called_different(items: int, noise: Noise) -> None:
    random = np.random.default_rng(2)
    verdicts = {
        statistics.speed_verdict(
            statistics.speed_up(*draw_items(random, items, noise, 1.0, 0.0)), 0.05
        )
        for _ in range(20)
    }
    assert verdicts <= {"SAME", "INCONCLUSIVE"}


def test_a_method_against_itself_is_rarely_called_different_at_any_noise() -> None:
    random = np.random.default_rng(4)
    verdicts = [
        statistics.speed_verdict(
            statistics.speed_up(*draw_items(random, 16, lognormal(scale), 1.0, 0.0)), 0.05
        )
        for scale in (0.05, 0.1, 0.3, 1.0)
        for _ in range(100)
    ]
    assert sum(verdict in ("FASTER", "SLOWER") for verdict in verdicts) <= 0.01 * len(verdicts)


def test_a_quiet_method_against_itself_is_called_the_same() -> None:
    baseline, method = draw_items(np.random.default_rng(0), 24, lognormal(0.02), 1.0, 0.0)
    assert statistics.speed_verdict(statistics.speed_up(baseline, method), 0.05) == "SAME"


@given(totals)
@settings(max_examples=20, deadline=None)
def test_exchanging_the_sides_inverts_the_ratio_and_its_interval(
    sides: tuple[ItemTotals, ItemTotals],
) -> None:
    forth, back = statistics.speed_up(*sides), statistics.speed_up(*reversed(sides))
    assert forth.value * back.value == pytest.approx(1)
    assert None not in (forth.low, forth.high, back.low, back.high)
    assert forth.low * back.high == pytest.approx(1, rel=1e-6)  # type: ignore[operator]  # above
    assert forth.high * back.low == pytest.approx(1, rel=1e-6)  # type: ignore[operator]  # above
    assert forth.low <= forth.value <= forth.high  # type: ignore[operator]  # above


@given(totals, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_a_slower_clock_and_longer_tokens_scale_the_ratio(
    sides: tuple[ItemTotals, ItemTotals], clock: float, length: float
) -> None:
    baseline, method = sides
    slower = ItemTotals(baseline.seconds * clock, baseline.units * length)
    before, after = statistics.speed_up(baseline, method), statistics.speed_up(slower, method)
    for name in ("value", "low", "high"):
        assert getattr(after, name) == pytest.approx(
            getattr(before, name) * clock / length, rel=1e-6
        )


@given(totals, st.randoms(use_true_random=False))
@settings(max_examples=15, deadline=None)
def test_the_order_of_items_does_not_matter(
    sides: tuple[ItemTotals, ItemTotals], random: object
) -> None:
    baseline, method = sides
    order = list(range(len(baseline.seconds)))
    random.shuffle(order)  # type: ignore[attr-defined]  # a random.Random
    moved = [ItemTotals(side.seconds[order], side.units[order]) for side in sides]
    before, after = statistics.speed_up(baseline, method), statistics.speed_up(*moved)
    assert after.value == pytest.approx(before.value)
    assert before.standard_error is not None
    assert after.standard_error == pytest.approx(before.standard_error, rel=1e-6, abs=1e-12)
    assert statistics.geometric_mean_speed_up(*moved) == pytest.approx(
        statistics.geometric_mean_speed_up(baseline, method)
    )


def test_the_same_data_give_the_same_interval_to_the_bit() -> None:
    sides = draw_items(np.random.default_rng(0), 24, lognormal(0.2), 1.3, 0.2)
    before = statistics.speed_up(*sides)
    statistics._resample_counts.cache_clear()
    assert statistics.speed_up(*sides) == before


@pytest.mark.parametrize("items", [999, 1001])
def test_many_items_need_no_resamples(items: int) -> None:
    sides = draw_items(np.random.default_rng(0), items, lognormal(0.3), 1.5, 0.3)
    estimate = statistics.speed_up(*sides)
    assert estimate.low is not None
    assert estimate.standard_error is not None
    quantile = math.log(estimate.value / estimate.low) / estimate.standard_error
    assert quantile == pytest.approx(1.96, abs=0.1)
    assert len(statistics._resample_counts(999)) == 2_002


def test_resamples_draw_as_many_items_as_there_are() -> None:
    counts = statistics._resample_counts(7)
    assert counts.shape == (statistics.RESAMPLES, 7)
    assert (counts.sum(axis=1) == 7).all()


def test_one_odd_item_among_equal_ones_does_not_blow_the_interval_up() -> None:
    # A resample without the odd item has next to no spread and a huge t.
    ones = np.ones(6)
    method = ItemTotals(np.array([1.0, 1.001, 1.002, 1.003, 1.004, 3.0]), ones)
    estimate = statistics.speed_up(ItemTotals(ones, ones), method)
    assert estimate.low is not None
    assert estimate.standard_error is not None
    half_width = math.log(estimate.value / estimate.low)
    assert half_width == pytest.approx(2 * stats.t.ppf(0.975, 5) * estimate.standard_error)


def test_a_constant_ratio_has_an_interval_without_width() -> None:
    seconds = np.arange(1.0, 9.0)
    estimate = statistics.speed_up(ItemTotals(seconds, seconds), ItemTotals(seconds / 2, seconds))
    assert (estimate.low, estimate.high) == pytest.approx((2, 2))
    assert statistics.speed_verdict(estimate, 0.05) == "FASTER"


def test_a_total_of_zero_has_no_ratio() -> None:
    nothing = ItemTotals(np.array([1.0, 1.0]), np.array([0.0, 0.0]))
    assert math.isnan(statistics.speed_up(nothing, nothing).value)
    assert math.isnan(statistics.geometric_mean_speed_up(nothing, nothing))
    with pytest.raises(ValueError, match="at least one item"):
        statistics.speed_up(*[ItemTotals(np.array([]), np.array([]))] * 2)


def test_repeats_of_one_length_take_the_median_and_others_the_mean() -> None:
    combined = statistics.combine_repeats(
        np.array([[1.0, 9.0, 2.0], [1.0, 2.0, 9.0], [3.0, np.nan, np.nan]]),
        np.array([[5.0, 5.0, 5.0], [1.0, 2.0, 6.0], [4.0, np.nan, np.nan]]),
    )
    assert combined.seconds.tolist() == [2.0, 4.0, 3.0]
    assert combined.units.tolist() == [5.0, 3.0, 4.0]


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_agrees_with_scipy(counts: tuple[int, int]) -> None:
    successes, trials = counts
    expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    found = statistics.wilson(successes, trials)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        statistics.wilson(successes, trials)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_agrees_with_scipy(gained: int, lost: int) -> None:
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert statistics.mcnemar(gained, lost) == pytest.approx(expected)


def score_by_search(gained: int, lost: int, trials: int, delta: float) -> float:
    """Return the score statistic, its constrained likelihood maximised by trying every share."""
    low, high = max(0.0, -delta), (1 - delta) / 2
    shares = np.linspace(low, high, 200_001)
    likelihood = (
        gained * np.log(np.maximum(shares + delta, 1e-300))
        + lost * np.log(np.maximum(shares, 1e-300))
        + (trials - gained - lost) * np.log(np.maximum(1 - 2 * shares - delta, 1e-300))
    )
    share = shares[int(np.argmax(likelihood))]
    return float(
        (gained - lost - trials * delta) / math.sqrt(trials * (2 * share + delta - delta**2))
    )


@pytest.mark.parametrize(
    ("gained", "lost", "trials"), [(3, 1, 24), (0, 1, 44), (5, 0, 16), (9, 7, 164), (1, 6, 20)]
)
def test_ends_of_tango_s_interval_are_rejected_at_five_percent(
    gained: int, lost: int, trials: int
) -> None:
    estimate = statistics.tango(gained, lost, trials)
    assert estimate.value == pytest.approx((gained - lost) / trials)
    for end, sign in ((estimate.low, 1), (estimate.high, -1)):
        assert end is not None
        assert score_by_search(gained, lost, trials, end) == pytest.approx(
            sign * stats.norm.ppf(0.975), abs=2e-3
        )


def test_tango_without_a_discordant_pair_is_not_certain() -> None:
    z_squared = stats.norm.ppf(0.975) ** 2
    expected = z_squared / (24 + z_squared)  # the closed form of this case
    estimate = statistics.tango(0, 0, 24)
    assert (estimate.low, estimate.high) == pytest.approx((-expected, expected))


@given(
    st.integers(1, 80).flatmap(
        lambda n: st.integers(0, n).flatmap(
            lambda gained: st.tuples(st.just(gained), st.integers(0, n - gained), st.just(n))
        )
    )
)
@settings(max_examples=40, deadline=None)
def test_tango_turns_its_sign_with_the_sides_and_stays_in_range(
    counts: tuple[int, int, int],
) -> None:
    gained, lost, trials = counts
    forth, back = statistics.tango(gained, lost, trials), statistics.tango(lost, gained, trials)
    assert forth.low is not None
    assert forth.high is not None
    assert (back.low, back.high) == pytest.approx((-forth.high, -forth.low), abs=1e-9)
    assert -1 <= forth.low <= forth.value <= forth.high <= 1
    assert forth.low < forth.high


@pytest.mark.parametrize(("samples", "correct", "k"), [(6, 2, 1), (6, 2, 3), (5, 0, 2), (4, 4, 4)])
def test_pass_at_k_equals_enumeration(samples: int, correct: int, k: int) -> None:
    outcomes = [1] * correct + [0] * (samples - correct)
    draws = list(itertools.combinations(outcomes, k))
    assert statistics.pass_at_k(samples, correct, k) == pytest.approx(
        sum(any(draw) for draw in draws) / len(draws)
    )


def test_pass_at_k_needs_k_samples() -> None:
    with pytest.raises(ValueError, match="k <= samples"):
        statistics.pass_at_k(2, 1, 3)


def test_pass_rates_leave_out_problems_with_too_few_scored_samples() -> None:
    rates = statistics.pass_rates([1, 0, 1, None, 1, None], ["a", "a", "b", "b", "c", "d"], k=2)
    assert rates == {"a": 1.0}
    assert statistics.pass_rates([1, 0, None], ["a", "a", "b"], k=1) == {"a": 0.5}


def test_mean_agrees_with_scipy_on_many_values() -> None:
    values = np.random.default_rng(0).gamma(2, 1, 500)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=5000, rng=np.random.default_rng(1)
    ).confidence_interval
    found = statistics.mean(values)
    assert found.low == pytest.approx(expected.low, abs=0.1 * (expected.high - expected.low))
    assert found.high == pytest.approx(expected.high, abs=0.1 * (expected.high - expected.low))


def test_equal_values_have_a_mean_without_interval_unless_they_are_fractions() -> None:
    assert statistics.mean(np.full(9, 3.0)) == Estimate(3.0)
    assert statistics.fraction_mean(np.full(9, 0.5)) == statistics.wilson(4.5, 9)
    assert statistics.fraction_mean(np.zeros(9)) == statistics.wilson(0, 9)
    with pytest.raises(ValueError, match="at least one value"):
        statistics.mean(np.array([]))


def test_intervals_of_fractions_stay_between_zero_and_one() -> None:
    found = statistics.fraction_mean(np.array([0.0, 0.0, 0.0, 0.0, 0.9]))
    assert (found.low, found.high is not None and found.high <= 1) == (0.0, True)


def test_binary_differences_use_tango_and_others_the_bootstrap() -> None:
    baseline, method = np.array([0.0, 1, 1, 0, 1]), np.array([1.0, 1, 0, 1, 1])
    assert statistics.paired_difference(baseline, method, is_fraction=True) == statistics.tango(
        2, 1, 5
    )
    halves = statistics.paired_difference(baseline / 2, method / 3, is_fraction=True)
    assert halves == statistics.mean(method / 3 - baseline / 2)
    with pytest.raises(ValueError, match="paired"):
        statistics.paired_difference(baseline, method[1:], is_fraction=True)


def test_unbounded_values_without_any_difference_say_nothing_about_other_items() -> None:
    values = np.array([1.0, 5.0, 2.0])
    assert statistics.paired_difference(values, values, is_fraction=False) == Estimate(0.0)
    as_fractions = statistics.paired_difference(values / 10, values / 10, is_fraction=True)
    assert as_fractions == statistics.tango(0, 0, 3)


def test_corpus_interval_agrees_with_scipy_and_pairs_its_sides() -> None:
    values = np.random.default_rng(0).gamma(2, 1, 60)
    tail = stats.norm.cdf(math.sqrt(60 / 59) * stats.t.ppf(0.025, 59))
    expected = stats.bootstrap(
        (values,),
        np.median,
        confidence_level=1 - 2 * tail,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    draws = statistics.corpus_draws(60)
    medians = np.median(values[draws], axis=1)
    found = statistics.corpus_metric(medians, 60)
    width = expected.high - expected.low
    assert found.value == np.median(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.1 * width)
    # Exactly one more for every item: with the same resamples on both sides nothing varies.
    largest = values[draws].max(axis=1)
    difference = statistics.corpus_metric((largest + 1) - largest, 60)
    assert difference.value == pytest.approx(1)
    assert difference.low is None or (difference.low, difference.high) == pytest.approx((1, 1))


def test_draws_begin_with_every_item_once_and_depend_on_their_number_alone() -> None:
    draws = statistics.corpus_draws(12)
    assert draws.shape == (1 + statistics.CORPUS_RESAMPLES, 12)
    assert draws.dtype == np.int64
    assert draws[0].tolist() == list(range(12))
    assert (draws == statistics.corpus_draws(12)).all()
    assert (draws.min(), draws.max()) == (0, 11)
    # With replacement: the share of items that a draw misses is (1 - 1/12)^12.
    missed = np.mean([1 - len(set(row)) / 12 for row in draws[1:].tolist()])
    assert missed == pytest.approx((11 / 12) ** 12, abs=0.01)
    assert len(np.unique(draws[1:], axis=0)) > 990
    assert statistics.corpus_draws(3).tolist() == [[0, 1, 2]]
    with pytest.raises(ValueError, match="at least one item, got 0"):
        statistics.corpus_draws(0)


def test_a_stored_corpus_metric_has_the_number_of_its_draws() -> None:
    resampled = [float(row) for row in range(statistics.CORPUS_RESAMPLES)]
    assert statistics.corpus_replicates(7.0, resampled, 4).tolist() == [7.0, *resampled]
    assert statistics.corpus_replicates(7.0, [], 3).tolist() == [7.0]
    assert math.isnan(statistics.corpus_replicates(None, [], 3)[0])
    with pytest.raises(ValueError, match="4 items are resampled 999 times, got 998"):
        statistics.corpus_replicates(7.0, resampled[1:], 4)
    with pytest.raises(ValueError, match="3 items are resampled 0 times, got 999"):
        statistics.corpus_replicates(7.0, resampled, 3)


def test_draws_without_a_number_count_as_any_number() -> None:
    replicates = np.concatenate([[0.5], np.linspace(0, 1, statistics.CORPUS_RESAMPLES)])
    whole = statistics.corpus_metric(replicates, 40)
    assert None not in whole
    # Two lost ones out of 999 could have been the two largest: every end moves by two places.
    lost = replicates.copy()
    lost[[400, 600]] = math.nan
    found = statistics.corpus_metric(lost, 40)
    assert found.low == pytest.approx(whole.low - 2 / 998, abs=1e-6)  # type: ignore[operator]  # above
    assert found.high == pytest.approx(whole.high + 2 / 998, abs=1e-6)  # type: ignore[operator]  # above
    # More of them than an end leaves outside: that end is nowhere, the wide one first.
    lost[400:408] = math.nan
    found = statistics.corpus_metric(lost, 40)
    assert found.wide_low is None
    assert found.low is not None
    assert found.low < whole.low  # type: ignore[operator]  # above
    lost[400:500] = math.inf
    assert statistics.corpus_metric(lost, 40) == Estimate(0.5)
    # Better it cannot be called without the 99% end; the 95% end still excludes a loss.
    assert statistics.quality_verdict(found, 0.001, higher_is_better=True) == "NO LOSS"


def test_a_corpus_metric_without_a_number_or_of_few_items_has_no_interval() -> None:
    assert statistics.corpus_metric(np.array([2.0]), 3) == Estimate(2.0)
    nothing = statistics.corpus_metric(np.array([math.nan, 1.0, 2.0]), 5)
    assert math.isnan(nothing.value)
    assert nothing.low is None


@pytest.mark.parametrize(
    ("low", "high", "widening", "expected"),
    [
        (1.06, 1.5, 0.0, "FASTER"),
        (1.06, 1.5, 0.02, "INCONCLUSIVE"),
        (1.05, 1.5, 0.0, "INCONCLUSIVE"),
        (0.96, 1.04, 0.0, "SAME"),
        (0.96, 1.04, 0.1, "SAME"),
        (1.01, 1.04, 0.0, "SAME"),
        (0.94, 1.04, 0.0, "INCONCLUSIVE"),
        (0.5, 0.95, 0.0, "SLOWER"),
        (0.5, 0.95, 0.01, "INCONCLUSIVE"),
        (0.5, 0.96, 0.0, "INCONCLUSIVE"),
        (0.5, 2.0, 0.1, "INCONCLUSIVE"),
    ],
)
def test_speed_verdicts_follow_the_margin(
    low: float, high: float, widening: float, expected: str
) -> None:
    estimate = Estimate(1.0, low, high, 0.1, low - widening, high + widening)
    assert statistics.speed_verdict(estimate, 0.05) == expected


@pytest.mark.parametrize(
    ("low", "high", "widening", "expected"),
    [
        (0.03, 0.2, 0.0, "BETTER"),
        (0.03, 0.2, 0.02, "NO LOSS"),
        (0.11, 0.49, 0.12, "NO LOSS"),
        (0.01, 0.2, 0.0, "NO LOSS"),
        (-0.01, 0.2, 0.1, "NO LOSS"),
        (-0.019, 0.02, 0.0, "NO LOSS"),
        (-0.019, 0.019, 0.0, "SAME"),
        (-0.019, 0.019, 0.1, "SAME"),
        (-0.02, 0.01, 0.0, "INCONCLUSIVE"),
        (0.01, 0.019, 0.0, "SAME"),
        (-0.03, 0.2, 0.0, "INCONCLUSIVE"),
        (-0.2, -0.01, 0.0, "INCONCLUSIVE"),
        (-0.2, -0.03, 0.0, "WORSE"),
        (-0.2, -0.03, 0.02, "INCONCLUSIVE"),
        (-0.015, -0.01, 0.0, "SAME"),
    ],
)
def test_quality_verdicts_follow_the_margin_in_both_directions(
    low: float, high: float, widening: float, expected: str
) -> None:
    estimate = Estimate(0.0, low, high, 0.1, low - widening, high + widening)
    assert statistics.quality_verdict(estimate, 0.02, higher_is_better=True) == expected
    turned = Estimate(0.0, -high, -low, 0.1, -high - widening, -low + widening)
    assert statistics.quality_verdict(turned, 0.02, higher_is_better=False) == expected


def test_without_an_interval_nothing_is_settled() -> None:
    assert statistics.speed_verdict(Estimate(9.0), 0.05) == "INCONCLUSIVE"
    assert statistics.quality_verdict(Estimate(9.0), 0.0, higher_is_better=True) == "INCONCLUSIVE"


def test_equal_outputs_are_no_loss_even_without_a_margin() -> None:
    estimate = Estimate(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert statistics.quality_verdict(estimate, 0.0, higher_is_better=True) == "SAME"


@given(totals)
@settings(max_examples=20, deadline=None)
def test_the_wide_interval_holds_the_printed_one(sides: tuple[ItemTotals, ItemTotals]) -> None:
    shares = np.minimum(sides[0].seconds, 1.0)
    for estimate in (
        statistics.speed_up(*sides),
        statistics.mean(sides[0].seconds),
        statistics.fraction_mean(shares),
        statistics.wilson(len(shares) // 3, len(shares)),
        statistics.tango(len(shares) // 3, 1, len(shares)),
    ):
        if estimate.wide_low is not None:
            assert None not in estimate
            assert estimate.wide_low <= estimate.low <= estimate.value  # type: ignore[operator]  # above
            assert estimate.value <= estimate.high <= estimate.wide_high  # type: ignore[operator]  # above


def test_a_speed_up_of_the_smallest_visible_size_is_seen_four_times_in_five() -> None:
    random = np.random.default_rng(8)
    noise = lognormal(0.15)
    visible = [
        statistics.smallest_speed_difference(
            statistics.speed_up(*draw_items(random, 24, noise, 1.0, 0.0)), 0.05, 24
        )
        for _ in range(100)
    ]
    speed = 1 + float(np.median(np.array(visible, dtype=float)))
    seen = sum(
        statistics.speed_verdict(
            statistics.speed_up(*draw_items(random, 24, noise, speed, 0.0)), 0.05
        )
        == "FASTER"
        for _ in range(300)
    )
    assert 0.72 <= seen / 300 <= 0.88


def test_smallest_visible_loss_shrinks_with_the_number_of_items() -> None:
    few = statistics.smallest_quality_difference(statistics.tango(2, 2, 24), 0.02)
    many = statistics.smallest_quality_difference(statistics.tango(20, 20, 240), 0.02)
    assert few is not None
    assert many is not None
    assert 0.02 < many < few
    assert statistics.smallest_quality_difference(Estimate(0.0), 0.02) is None
