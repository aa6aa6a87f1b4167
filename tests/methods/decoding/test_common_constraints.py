"""Weighted draws, particles and shared caches, against enumeration and fresh prefills."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from methods.decoding.common_constraints import (
    NOTHING,
    Branches,
    Draw,
    Extension,
    Particle,
    Posterior,
    Probabilities,
    RandomOrders,
    Resampling,
    Vocabulary,
    ancestors,
    effective_size,
    expected_checks,
    geometric_draw,
    likeliest_first,
    recursive_draw,
    sequential_monte_carlo,
    two_round_draw,
    unweighted_draw,
)
from models.base import Decoding, Forward, Trace
from models.constraints import Anything, TokenChecker, TokenState
from tests.models.tiny import tiny_model
from tests.models.toy import EnumeratedDraws, distribution, total_variation

Rule = Callable[..., Draw[bool]]
Mask = npt.NDArray[np.bool_]

P = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
MASKS = [
    np.array(mask, dtype=bool)
    for mask in ([1, 0, 1, 0, 0], [0, 0, 0, 1, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0] * 5)
]


class EnumeratedOrders:
    """Draws without replacement, one after the other, by scripted draws."""

    def __init__(self, draws: EnumeratedDraws) -> None:
        self._draws = draws

    def __call__(self, probabilities: Probabilities, gone: Sequence[int]) -> Iterator[int]:
        left = probabilities.copy()
        left[list(gone)] = 0
        while left.sum() > 0:
            token = self._draws.token(torch.from_numpy(left))
            left[token] = 0
            yield token


def allowed(mask: Mask) -> Callable[[int], bool | None]:
    return lambda token: bool(mask[token]) or None


def exact_mean_weights(rule: Rule, p: Probabilities, mask: Mask) -> npt.NDArray[np.float64]:
    """Return E[W 1{X = x}] over every way that a rule's draws can go."""

    def run(draws: EnumeratedDraws) -> tuple[int | None, float]:
        draw = rule(p, EnumeratedOrders(draws), allowed(mask))
        return draw.token, draw.weight

    found = np.zeros(len(p))
    for (token, weight), probability in distribution(run).items():
        if token is not None:
            found[token] += weight * probability
    return found


def sampled_weights(
    rule: Rule, p: Probabilities, mask: Mask, runs: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return weights by token, (runs, vocab), counts of tokens, and checks of each run."""
    random = np.random.default_rng(3)
    orders = RandomOrders(random)
    weights, counts = np.zeros((runs, len(p))), np.zeros(len(p), dtype=np.int64)
    checks = np.zeros(runs, dtype=np.int64)
    for run in range(runs):

        def check(token: int, run: int = run) -> bool | None:
            checks[run] += 1
            return bool(mask[token]) or None

        draw = rule(p, orders, check, *([random] if rule_is_geometric(rule) else []))
        if draw.token is not None:
            weights[run, draw.token] = draw.weight
            counts[draw.token] += 1
    return weights, counts, checks


def rule_is_geometric(rule: Rule) -> bool:
    return getattr(rule, "func", rule) is geometric_draw


def geometric(accepts: int, most_rejects: int = 0) -> Rule:
    import functools

    return functools.partial(geometric_draw, accepts=accepts, most_rejects=most_rejects)


GEOMETRIC = [geometric(2), geometric(4), geometric(2, 10), geometric(3, 2)]

# --- draws ----------------------------------------------------------------------------------------


@st.composite
def distributions(draw: st.DrawFn) -> tuple[Probabilities, Mask]:
    size = draw(st.integers(2, 5))
    raw = draw(st.lists(st.floats(0.01, 1), min_size=size, max_size=size))
    mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return np.array(raw) / sum(raw), np.array(mask)


@pytest.mark.parametrize("rule", [two_round_draw, recursive_draw])
@given(case=distributions())
@settings(max_examples=25, deadline=None)
def test_mean_weights_are_exactly_the_allowed_probabilities(
    rule: Rule, case: tuple[Probabilities, Mask]
) -> None:
    p, mask = case
    assert exact_mean_weights(rule, p, mask) == pytest.approx(p * mask, abs=1e-12)


def slips() -> dict[str, Rule]:
    """Return estimators with the slips that the card warns of."""

    def walk(
        p: Probabilities, order: Iterator[int], check: Any
    ) -> tuple[int | None, list[int], float]:
        refused: list[int] = []
        for token in order:
            if check(token):
                return token, refused, 1 - float(p[refused].sum())
            refused.append(token)
        return None, refused, 0.0

    def one(p: Probabilities, orders: Any, check: Any) -> Draw[bool]:
        token, _, _ = walk(p, orders(p, ()), check)
        return Draw(token, True, 1.0) if token is not None else NOTHING

    def by_draws(p: Probabilities, orders: Any, check: Any) -> Draw[bool]:
        token, refused, _ = walk(p, orders(p, ()), check)
        return Draw(token, True, 1 / (1 + len(refused))) if token is not None else NOTHING

    def two_rounds(gone_too: str, counted: str) -> Rule:
        def rule(p: Probabilities, orders: Any, check: Any) -> Draw[bool]:
            token, refused, left = walk(p, orders(p, ()), check)
            if token is None:
                return NOTHING
            gone = {"none": (), "both": (*refused, token)}.get(gone_too, tuple(refused))
            _, again, _ = walk(p, orders(p, gone), check)
            number = len(again) + (0 if counted == "second" else len(refused))
            return Draw(token, True, left / (number + 1))

        return rule

    return {
        "weight 1": one,
        "one over the draws": by_draws,
        "second round over all tokens": two_rounds("none", "all"),
        "second round without the accepted token": two_rounds("both", "all"),
        "only second refusals counted": two_rounds("refused", "second"),
    }


@pytest.mark.parametrize("name", slips())
def test_the_enumeration_finds_the_known_slips(name: str) -> None:
    found = exact_mean_weights(slips()[name], P, MASKS[0])
    assert np.abs(found - P * MASKS[0]).max() > 1e-3


@pytest.mark.parametrize("rule", GEOMETRIC, ids=["r=2", "r=4", "r=2, R=10", "r=3, R=2"])
def test_geometric_weights_have_the_allowed_probabilities_as_their_mean(rule: Rule) -> None:
    weights, _, _ = sampled_weights(rule, P, MASKS[0], 12_000)
    error = weights.std(0) / math.sqrt(len(weights))
    assert (np.abs(weights.mean(0) - P * MASKS[0]) <= 4 * error + 1e-12).all()
    assert (error < 0.005).all()


def test_more_accepts_lower_the_variance() -> None:
    few, many = (
        sampled_weights(geometric(accepts), P, MASKS[0], 4000)[0].sum(1).var() for accepts in (2, 8)
    )
    assert many < 0.6 * few


@pytest.mark.parametrize("rule", [unweighted_draw, two_round_draw, recursive_draw, geometric(3)])
@pytest.mark.parametrize("mask", MASKS[:3], ids=["two", "rare", "one"])
def test_tokens_are_drawn_from_the_allowed_ones_by_their_probability(
    rule: Rule, mask: Mask
) -> None:
    _, counts, _ = sampled_weights(rule, P, mask, 5000)
    assert not counts[~mask].any()
    expected = P[mask] / P[mask].sum() * counts.sum()
    assert counts.sum() == 5000
    assert mask.sum() == 1 or chisquare(counts[mask], expected).pvalue > 1e-3


@pytest.mark.parametrize(
    "rule", [unweighted_draw, two_round_draw, recursive_draw, geometric(2), geometric(2, 5)]
)
def test_all_allowed_none_allowed(rule: Rule) -> None:
    weights, _, checks = sampled_weights(rule, P, MASKS[3], 200)
    assert weights.sum(1) == pytest.approx(1.0)
    assert set(checks) <= {1, 2}
    weights, counts, _ = sampled_weights(rule, P, MASKS[4], 200)
    assert not weights.any()
    assert not counts.any()


@pytest.mark.parametrize("rule", [two_round_draw, recursive_draw, geometric(2)])
def test_a_single_allowed_token_of_a_millionth_is_found_and_weighed(rule: Rule) -> None:
    p = np.array([0.5, 0.3, 0.2 - 1e-6, 1e-6])
    mask = np.array([False, False, False, True])
    weights, counts, _ = sampled_weights(rule, p, mask, 300)
    assert np.isfinite(weights).all()
    assert counts[3] == 300
    assert (weights[:, 3] > 0).all()
    # The mass that three refusals leave, without cancellation, and a quarter of it.
    if rule is recursive_draw:
        assert weights[:, 3] == pytest.approx(1e-6, rel=1e-9)
    if rule is two_round_draw:
        assert weights[:, 3] == pytest.approx(2.5e-7, rel=1e-9)


def test_less_mass_than_the_least_counts_as_nothing() -> None:
    p = np.array([0.5, 0.3, 0.2 - 1e-6, 1e-6])
    draw = unweighted_draw(p, likeliest_first, lambda token: token == 3 or None, least=1e-5)
    assert draw == NOTHING
    draw = unweighted_draw(p, likeliest_first, lambda token: token == 3 or None, least=1e-7)
    assert draw.token == 3


def test_mean_checks_up_to_the_first_accept_have_the_closed_form() -> None:
    for mask in MASKS[:3]:
        checks = 0.0

        def run(draws: EnumeratedDraws, mask: Mask = mask) -> int:
            asked = []
            unweighted_draw(
                P, EnumeratedOrders(draws), lambda t: asked.append(t) or mask[t] or None
            )
            return len(asked)

        for number, probability in distribution(run).items():
            checks += number * probability
        assert checks == pytest.approx(expected_checks(P, mask), rel=1e-9)
        assert checks <= 1 / P[mask].sum() + 1e-9
    p = np.array([0.3, *[0.7 / 4] * 4])
    assert expected_checks(p, np.array([True] + [False] * 4)) == pytest.approx(2.473684, abs=1e-6)


def test_random_orders_are_draws_without_replacement() -> None:
    p = np.array([0.5, 0.3, 0.2, 0.0])
    orders = RandomOrders(np.random.default_rng(0))
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(6000):
        order = tuple(orders(p, ()))
        counts[order] = counts.get(order, 0) + 1
    exact = distribution(lambda draws: tuple(EnumeratedOrders(draws)(p, ())))
    assert counts.keys() == exact.keys()
    expected = [exact[order] * 6000 for order in counts]
    assert chisquare(list(counts.values()), expected).pvalue > 1e-3
    assert set(orders(p, (0,))) == {1, 2}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=400))
@settings(max_examples=50, deadline=None)
def test_tokens_come_likeliest_first_and_impossible_ones_never(raw: list[float]) -> None:
    p = np.array(raw)
    with np.errstate(divide="ignore"):
        expected = [i for i in np.argsort(-np.log(p), kind="stable") if p[i] > 0]
    assert list(likeliest_first(p, ())) == expected


# --- particles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["stratified", "systematic", "residual", "multinomial"])
def test_resampling_expects_n_times_the_weight_of_each(scheme: Resampling) -> None:
    weights = np.array([0.05, 0.4, 0.0, 0.25, 0.3])
    random = np.random.default_rng(1)
    counts = np.array(
        [np.bincount(ancestors(weights, scheme, random), minlength=5) for _ in range(3000)]
    )
    assert (counts.sum(1) == 5).all()
    assert not counts[:, 2].any()
    error = counts.std(0) / math.sqrt(len(counts))
    assert (np.abs(counts.mean(0) - 5 * weights) <= 4 * error + 1e-12).all()
    if scheme in ("systematic", "residual"):  # at most one copy more or fewer
        assert (counts >= np.floor(5 * weights + 1e-9)).all()


@pytest.mark.parametrize("scheme", ["stratified", "systematic", "residual", "multinomial"])
def test_a_lone_weight_takes_every_place(scheme: Resampling) -> None:
    weights = np.array([0.0, 1.0, 0.0])
    assert list(ancestors(weights, scheme, np.random.default_rng(0))) == [1, 1, 1]
    assert effective_size(weights) == 1
    assert effective_size(np.full(4, 0.25)) == pytest.approx(4)


# A language model over a, b, c and end (3), by the last token; texts of at most four tokens.
TABLE = np.array(
    [[0.1, 0.5, 0.2, 0.2], [0.55, 0.15, 0.1, 0.2], [0.3, 0.3, 0.1, 0.3], [0.6, 0.3, 0.05, 0.05]]
)
LIMIT, END = 4, 3


def conditional(text: tuple[int, ...]) -> Probabilities:
    return TABLE[text[-1] if text else END]


def is_language(text: tuple[int, ...]) -> bool:
    """Texts with as many a as b, or with a c at the end that follows an a: full of dead ends."""
    return text.count(0) == text.count(1) or text[-2:] == (0, 2)


TEXTS = [
    text
    for length in range(LIMIT)
    for text in itertools.product(range(3), repeat=length)
    if is_language(text)
]
# A beginning may be completed beyond the limit, so that some particles reach it in vain.
BEGINNINGS = {
    text[:end]
    for length in range(LIMIT + 2)
    for text in itertools.product(range(3), repeat=length)
    if is_language(text)
    for end in range(length + 1)
}


def joint(text: tuple[int, ...]) -> float:
    steps = [conditional(text[:at])[token] for at, token in enumerate((*text, END))]
    return float(np.prod(steps))


NORMALISER = sum(map(joint, TEXTS))
TARGET = {text: joint(text) / NORMALISER for text in TEXTS}


def extend_with(rule: Rule, random: np.random.Generator) -> Any:
    orders = RandomOrders(random)
    is_geometric = rule_is_geometric(rule)

    def extended(particle: Particle, is_last: bool) -> Extension:
        text = particle.tokens
        p = conditional(text)

        def check(token: int) -> bool | None:
            return (is_language(text) if token == END else (*text, token) in BEGINNINGS) or None

        if is_last:
            weight = float(p[END]) if check(END) else 0.0
            draw: Draw[bool] = Draw(END, True, weight)
        else:
            draw = rule(p, orders, check, *([random] if is_geometric else []))
        if draw.token is None or not draw.weight:
            return Extension(None, -math.inf)
        state = TokenState(Anything(), draw.token == END)
        return Extension(Particle((*text, draw.token), state), math.log(draw.weight))

    return lambda particles, is_last: [extended(particle, is_last) for particle in particles]


def run_particles(
    rule: Rule, particles: int, random: np.random.Generator, **settings: Any
) -> Posterior:
    return sequential_monte_carlo(
        Particle((), TokenState(Anything())),
        extend_with(rule, random),
        particles=particles,
        limit=LIMIT,
        random=random,
        **settings,
    )


def mean_posterior(
    rule: Rule, particles: int, runs: int, **settings: Any
) -> dict[tuple[int, ...], float]:
    """Return how often each text is drawn in the end, over runs with a living particle."""
    random = np.random.default_rng(5)
    found: dict[tuple[int, ...], float] = {}
    for _ in range(runs):
        posterior = run_particles(rule, particles, random, **settings)
        for particle, weight in zip(posterior.particles, posterior.weights, strict=True):
            if weight:
                text = particle.tokens[:-1]
                found[text] = found.get(text, 0.0) + weight
    total = sum(found.values())
    return {text: weight / total for text, weight in found.items()}


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (recursive_draw, {}),
        (two_round_draw, {"resampling": "systematic"}),
        (geometric(2), {"resampling": "residual", "ess_threshold": 1.0}),
        (recursive_draw, {"resampling": "multinomial", "ess_threshold": 0.9}),
        (recursive_draw, {"ess_threshold": 0.0}),
    ],
    ids=["recursive", "two-round", "geometric", "multinomial", "never"],
)
def test_the_mean_estimate_of_the_normaliser_is_the_normaliser(
    rule: Rule, options: dict[str, Any]
) -> None:
    random = np.random.default_rng(0)
    posteriors = [run_particles(rule, 4, random, **options) for _ in range(1000)]
    found = np.exp([posterior.log_normaliser for posterior in posteriors])
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean() - NORMALISER) <= 4 * error
    assert error < 0.04 * NORMALISER
    resampled = [posterior.resamplings > 0 for posterior in posteriors]
    assert any(resampled) == (options.get("ess_threshold") != 0.0)


def test_weights_that_are_not_proper_do_not_estimate_the_normaliser() -> None:
    random = np.random.default_rng(0)
    found = np.exp([run_particles(unweighted_draw, 4, random).log_normaliser for _ in range(1500)])
    assert found.mean() - NORMALISER > 4 * found.std() / math.sqrt(len(found))


def test_the_posterior_nears_the_true_conditional_and_local_choice_does_not() -> None:
    by_size = {
        size: total_variation(mean_posterior(recursive_draw, size, 3200 // size), TARGET)
        for size in (1, 4, 32)
    }
    local = total_variation(mean_posterior(unweighted_draw, 32, 100, ess_threshold=0), TARGET)
    assert by_size[32] < by_size[4] < by_size[1]
    assert by_size[32] < 0.05
    assert local > 0.05


def test_a_critic_multiplies_the_target_by_what_it_says_of_whole_texts() -> None:
    def potential(text: tuple[int, ...]) -> float:
        return 1.0 + 2.0 * text.count(2) + len(text)

    def critic(particle: Particle) -> float:
        return math.log(potential(tuple(t for t in particle.tokens if t != END)))

    random = np.random.default_rng(2)
    found = np.exp(
        [
            run_particles(recursive_draw, 4, random, critic=critic).log_normaliser
            for _ in range(1500)
        ]
    )
    expected = sum(joint(text) * potential(text) for text in TEXTS)
    assert abs(found.mean() - expected) <= 4 * found.std() / math.sqrt(len(found))
    assert abs(expected - NORMALISER) > 0.2  # it does make a difference


def test_no_text_outside_the_language_has_weight_and_the_dead_stay_dead() -> None:
    random = np.random.default_rng(4)
    died = 0
    for _ in range(200):
        posterior = run_particles(recursive_draw, 4, random, ess_threshold=0)
        for particle, log_weight in zip(posterior.particles, posterior.log_weights, strict=True):
            if log_weight > -math.inf:
                assert particle.tokens[-1] == END
                assert is_language(particle.tokens[:-1])
            else:
                died += 1
        if posterior.log_normaliser == -math.inf:
            assert posterior.draw(random) is None
    assert died


def test_special_tokens_lose_their_mass_and_all_ends_are_one() -> None:
    pieces = (b"a", None, b"b", b"x", None, b"y")
    checker = TokenChecker(
        Anything(), pieces, frozenset({4, 5}), Decoding(max_new_tokens=3, temperature=0.5)
    )
    logits = torch.tensor([0.3, 1.0, -0.2, 0.0, 0.5, -1.0])
    p = torch.softmax(logits.double() / 0.5, -1).numpy()
    found = Vocabulary(checker, 0.5).usable(logits)
    expected = np.array([p[0], 0, p[2], p[3], p[4] + p[5], 0])
    assert found.probabilities == pytest.approx(expected / expected.sum())
    assert found.log_mass == pytest.approx(math.log(1 - p[1]))
    greedy = Vocabulary(checker, 0.0).usable(logits)
    assert greedy.probabilities[0] < found.probabilities[0]  # that of temperature 1


# --- caches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [[5, 17, 3, 88], [7]])
@pytest.mark.parametrize("most_nodes", [2, 5, 64])
@pytest.mark.parametrize("architecture", ["llama", "mistral-sliding-window"])
def test_branches_give_the_logits_of_a_fresh_prefill(
    architecture: str, most_nodes: int, prompt: list[int]
) -> None:
    model = tiny_model(architecture)
    trace = Trace()
    branches = Branches(model, prompt, 12, trace, most_nodes=most_nodes)
    random = np.random.default_rng(most_nodes)
    texts: list[tuple[int, ...]] = [()] * 4
    for step in range(12):
        found = branches.logits(texts)
        for text, logits in zip(texts, found, strict=True):
            fresh = model.session(32).prefill([*prompt, *text])[-1]
            assert torch.allclose(logits, fresh, atol=2e-4), (step, text)
        if step in (4, 8):  # as resampling does: some die, others are copied
            texts = [texts[0], texts[0], texts[2], texts[2]]
        if step == 10:
            texts = texts[:1]
        # Few tokens, so that some texts stay equal for a while.
        texts = [(*text, int(random.choice([4, 9, 4, 4]))) for text in texts]
    assert max(forward.width for forward in trace.forwards) <= max(most_nodes, 2)
    assert trace.prefill[0] == Forward(len(prompt) - 1, 0) or len(prompt) == 1
    splits = len(trace.prefill) - (2 if len(prompt) > 1 else 1)
    assert (splits > 0) == (most_nodes < 64)


def test_a_lone_text_costs_what_plain_decoding_costs() -> None:
    model = tiny_model()
    trace = Trace()
    branches = Branches(model, [5, 17, 3], 5, trace)
    for text in [(), (4,), (4, 8), (4, 8, 15)]:
        (logits,) = branches.logits([text])
        fresh = model.session(32).prefill([5, 17, 3, *text])[-1]
        assert torch.allclose(logits, fresh, atol=2e-4)
    assert trace.prefill == [Forward(3, 0)]
    assert trace.forwards == [Forward(1, 3), Forward(1, 4), Forward(1, 5)]


def test_equal_texts_are_read_once_and_what_all_share_is_committed() -> None:
    trace = Trace()
    branches = Branches(tiny_model(), [5, 17, 3], 8, trace, most_nodes=64)
    for texts in [
        [(), (), ()],
        [(1,), (1,), (1,)],
        [(1, 2), (1, 2), (1, 3)],
        [(1, 2, 4), (1, 2, 5), (1, 3, 4)],
        [(1, 2, 4, 6), (1, 2, 4, 7)],
    ]:
        branches.logits(texts)
    # Root alone; root and two; root, two and three; what is shared has gone, two are new.
    assert [forward.width for forward in trace.forwards] == [1, 3, 6, 3]
    assert [forward.context for forward in trace.forwards] == [3, 3, 3, 5]
