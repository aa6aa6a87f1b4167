"""What constrained decoding methods share: weighted token draws, particles, and their cache.

Three layers, each usable without the next. *Draws*: one token that a constraint allows, and a
weight that makes it proper. *Particles*: sequential Monte Carlo over texts, which needs only a
function that draws. *The model*: `Branches` gives the next-token distributions of several texts out
of as few caches as pay, and `ConstrainedMethod` is what the methods derive from.

Draws and resampling take probabilities and tokens, not models, so that tests can enumerate them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hardware.profile import Profile
from methods.base import Method, Output
from methods.checks import require_choice, require_count, require_number
from methods.decoding.common import require_text_generator
from models.base import (
    Decoding,
    Forward,
    Generation,
    InvalidOutput,
    Session,
    TextGenerator,
    Trace,
)
from models.constraints import (
    ConstrainedDecoding,
    Constraint,
    TokenChecker,
    TokenState,
    token_bytes,
)
from models.decode import check_fits, count_work, decode
from models.draft_tree import DraftTree, TreeBuilder
from models.regular import regex
from models.stopping import Stopper
from models.wrapper import GeneratorWrapper

Probabilities = npt.NDArray[np.float64]
# A smaller share of the mass is summed up, not found by subtracting: that keeps nine digits.
_DIFFERENCE = 1e-6
Answer = TypeVar("Answer")

# --- one token ------------------------------------------------------------------------------------


class Orders(Protocol):
    """Where the order comes from in which tokens are tried."""

    def __call__(self, probabilities: Probabilities, gone: Sequence[int]) -> Iterator[int]:
        """Draw tokens without replacement, those in `gone` left out, until none has any mass.

        Args:
            probabilities: (vocab,), not necessarily normalised.
            gone: Tokens that are not to come.
        """
        ...


class Draw(NamedTuple, Generic[Answer]):
    """A token with its weight.

    Properly weighted: over all draws, E[weight * 1{token = x}] = p(x) for every allowed x. Where
    nothing was accepted, token and answer are None and the weight is 0.

    Attributes:
        token: The token.
        answer: What the check said to it.
        weight: From 0 to 1; an unbiased estimate of the probability of all allowed tokens.
    """

    token: int | None
    answer: Answer | None
    weight: float


Check = Callable[[int], "Answer | None"]
"""Asks the constraint about a token: an answer if it is allowed, None if it is not."""


@dataclass(frozen=True)
class RandomOrders:
    """Orders by exponential clocks, the same as by Gumbel keys.

    A token's key is log p + G with G = -log(E), E exponential; the largest key is the smallest
    E / p. Sorted so, tokens come as drawn one after the other without replacement.
    """

    random: np.random.Generator

    def __call__(self, probabilities: Probabilities, gone: Sequence[int]) -> Iterator[int]:
        """See `Orders`."""
        clocks = self.random.standard_exponential(len(probabilities))
        with np.errstate(divide="ignore", invalid="ignore"):
            clocks /= probabilities
        clocks[probabilities == 0] = np.inf
        clocks[list(gone)] = np.inf
        return _ascending(clocks)


def likeliest_first(probabilities: Probabilities, gone: Sequence[int]) -> Iterator[int]:
    """Yield tokens by falling probability, the lowest id first among equals: temperature 0."""
    with np.errstate(divide="ignore"):
        clocks = -np.log(probabilities)
    clocks[list(gone)] = np.inf
    return _ascending(clocks)


def _ascending(clocks: Probabilities) -> Iterator[int]:
    """Yield indices by ascending value, infinite ones never; sorts no more than is asked for."""
    start, wanted = 0, 16
    while start < len(clocks):
        wanted = min(wanted, len(clocks))
        nearest = np.argpartition(clocks, wanted - 1)[:wanted] if wanted < len(clocks) else None
        if nearest is not None:
            # Equal values at the edge may fall on either side of it; take all of them or none.
            nearest = np.flatnonzero(clocks <= clocks[nearest].max())
        else:
            nearest = np.arange(len(clocks))
        ranked = nearest[np.argsort(clocks[nearest], kind="stable")]
        for index in ranked[start:]:
            if clocks[index] == np.inf:
                return
            yield int(index)
        start, wanted = len(ranked), wanted * 16


class _Walk(Generic[Answer]):
    """Tokens tried one after the other, with the mass that is left of those not refused."""

    def __init__(self, probabilities: Probabilities, check: Check[Answer], least: float) -> None:
        self.refused: list[int] = []
        self._probabilities = probabilities
        self._remaining: Probabilities | None = None
        self._refused_mass = 0.0
        self._total = float(probabilities.sum())
        self._check = check
        self._least = least
        self._answers: dict[int, Answer] = {}

    @property
    def left(self) -> float:
        """Mass of all tokens that were not refused."""
        left = self._total - self._refused_mass
        if left > _DIFFERENCE * self._total:
            return left
        # A difference of nearly equal numbers has no digits left; a sum has.
        if self._remaining is None:
            self._remaining = self._probabilities.copy()
            self._remaining[self.refused] = 0
        return float(self._remaining.sum())

    @property
    def is_hopeless(self) -> bool:
        """Whether so little mass is left that nothing counts as allowed."""
        return bool(self.refused) and self.left <= self._least * self._total

    def is_allowed(self, token: int) -> bool:
        """Ask about a token; what was accepted before is not asked again."""
        if token in self._answers:
            return True
        answer = self._check(token)
        if answer is None:
            self.refused.append(token)
            self._refused_mass += float(self._probabilities[token])
            if self._remaining is not None:
                self._remaining[token] = 0
            return False
        self._answers[token] = answer
        return True

    def first(self, order: Iterator[int]) -> int | None:
        """Return the first token of `order` that is allowed."""
        for token in order:
            if self.is_allowed(token):
                return token
            if self.is_hopeless:
                return None
        return None

    def draw(self, token: int, weight: float) -> Draw[Answer]:
        return Draw(token, self._answers[token], weight)


NOTHING: Draw[Any] = Draw(None, None, 0.0)


def unweighted_draw(
    probabilities: Probabilities, orders: Orders, check: Check[Answer], *, least: float = 0.0
) -> Draw[Answer]:
    """Draw from the allowed tokens' distribution exactly, with weight 1 (locally constrained).

    Args:
        probabilities: p, (vocab,), of sum 1.
        orders: Source of the order.
        check: The constraint.
        least: Share of the mass at which nothing counts as allowed any more; 0 asks every token.
    """
    walk = _Walk(probabilities, check, least)
    token = walk.first(orders(probabilities, ()))
    return NOTHING if token is None else walk.draw(token, 1.0)


def two_round_draw(
    probabilities: Probabilities, orders: Orders, check: Check[Answer], *, least: float = 0.0
) -> Draw[Answer]:
    """Draw, then walk once more over what was not refused: W = left / (R1 + R2 + 1).

    `left` is the mass that the first round did not refuse. The second round starts a new order in
    which the accepted token may come again and the refused ones may not.

    Source: genlm/awrs-colm-2025. Arguments as in `unweighted_draw`.
    """
    walk = _Walk(probabilities, check, least)
    token = walk.first(orders(probabilities, ()))
    if token is None:
        return NOTHING
    left = walk.left
    walk.first(orders(probabilities, tuple(walk.refused)))
    return walk.draw(token, left / (len(walk.refused) + 1))


def recursive_draw(
    probabilities: Probabilities, orders: Orders, check: Check[Answer], *, least: float = 0.0
) -> Draw[Answer]:
    """Draw, and look at one more token of the order: W = left if it is allowed, else p(token).

    With q the conditional probability of each draw, Z = (1 - q) Z' behind a refused token and
    Z = q + (1 - q) Z' behind the accepted one, Z' replaced by a coin that is 1 if the next token
    is allowed. The factors (1 - q) multiply to `left`, the mass not refused, and left * q is
    p(token). If no token is left after the accepted one, both values are the same.

    Source: genlm-control. Arguments as in `unweighted_draw`.
    """
    walk = _Walk(probabilities, check, least)
    order = orders(probabilities, ())
    token = walk.first(order)
    if token is None:
        return NOTHING
    left = walk.left
    following = next(order, None)
    is_all = following is not None and walk.is_allowed(following)
    return walk.draw(token, left if is_all else float(probabilities[token]))


def geometric_draw(
    probabilities: Probabilities,
    orders: Orders,
    check: Check[Answer],
    random: np.random.Generator,
    *,
    accepts: int = 2,
    most_rejects: int = 0,
    least: float = 0.0,
) -> Draw[Answer]:
    """Draw with replacement, simulated: W = min(r - 1, a) / (a + n - 1).

    Tokens known to be refused are not drawn again; how often they would have been before the next
    other token is geometric, and is drawn as a number. a accepts and n refusals, real and
    simulated, have come when r accepts or the limit of refusals is reached; the weight is the
    Rao-Blackwell estimator of the mass of the allowed tokens under that stopping rule, and unbiased
    with the limit too.

    Source: genlm-control. Further arguments as in `unweighted_draw`.

    Args:
        random: Source of the simulated refusals.
        accepts: r, at least 2; more of them lower the variance and ask more often.
        most_rejects: Limit of refusals; 0 for none.
    """
    walk = _Walk(probabilities, check, least)
    limit = most_rejects or math.inf
    first: int | None = None
    accepted, rejected = 0, 0.0
    order = orders(probabilities, ())
    while accepted < accepts and rejected < limit:
        if walk.refused:
            # Failures before the first success of probability `left`.
            refused_mass = math.log1p(-min(walk.left, 1 - 1e-16))  # log of it
            rejected += float(np.floor(math.log1p(-random.random()) / refused_mass))
            if rejected >= limit:
                break
        token = next(order, None)
        if token is None:
            break
        if walk.is_allowed(token):
            first = token if first is None else first
            accepted += 1
            order = orders(probabilities, tuple(walk.refused))
        else:
            rejected += 1
            if walk.is_hopeless:
                break
    if first is None:
        return NOTHING
    rejected = min(rejected, limit)
    return walk.draw(first, min(accepts - 1, accepted) / (accepted + rejected - 1))


def expected_checks(probabilities: Probabilities, is_allowed: npt.NDArray[np.bool_]) -> float:
    """Return the mean number of checks up to the first accepted token, drawn without replacement.

    A refused token b comes before all allowed ones with probability p_b / (p_b + Z). With
    replacement the number would be 1 / Z = exp(KL(p given allowed, p)), which it never exceeds.
    """
    mass = probabilities[is_allowed].sum()
    refused = probabilities[~is_allowed]
    return float(1 + (refused[refused > 0] / (refused[refused > 0] + mass)).sum())


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


# --- particles ------------------------------------------------------------------------------------

Resampling = Literal["stratified", "systematic", "residual", "multinomial"]


def ancestors(
    weights: Probabilities, scheme: Resampling, random: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Return which particle each new one continues, (particles,).

    Under each scheme particle i is expected N w_i times. `stratified` takes one level out of each
    of N equal parts of [0, 1), `systematic` the same level in all, `residual` takes floor(N w_i)
    copies and draws the rest, `multinomial` draws all.

    Args:
        weights: w, of sum 1, (particles,).
        scheme: How.
        random: Source of the levels.
    """
    count = len(weights)
    if scheme == "multinomial":
        return np.sort(random.choice(count, size=count, p=weights))
    if scheme == "residual":
        copies = np.floor(count * weights + 1e-12).astype(np.int64)
        rest = count - int(copies.sum())
        if rest:
            left = np.maximum(count * weights - copies, 0)
            copies += np.bincount(
                random.choice(count, size=rest, p=left / left.sum()), minlength=count
            )
        return np.repeat(np.arange(count), copies)
    noise = random.random(count) if scheme == "stratified" else random.random()
    levels = (np.arange(count) + noise) / count
    cumulative = np.cumsum(weights)
    chosen = np.searchsorted(cumulative / cumulative[-1], levels, side="right")
    return np.minimum(chosen, int(np.flatnonzero(weights)[-1]))


def effective_size(weights: Probabilities) -> float:
    """Return the effective number of particles, 1 / sum w², of weights of sum 1."""
    return float(1 / np.square(weights).sum())


class Particle(NamedTuple):
    """A text in progress, and where it stands."""

    tokens: tuple[int, ...]
    state: TokenState


class Extension(NamedTuple):
    """One more token of a particle: what became of it (None: nothing was allowed), log weight."""

    particle: Particle | None
    log_weight: float


Extend = Callable[[Sequence[Particle], bool], Sequence[Extension]]
"""Draws the next token of each unfinished particle; True if it must be the end of the text."""
Critic = Callable[[Particle], float]
"""Log potential of a text; what it says of a finished one multiplies the target distribution."""


@dataclass(frozen=True)
class WeightedTexts:
    """Weighted texts: a sample of what the constraint leaves of the model's distribution.

    Attributes:
        particles: Texts, those that died where they stood.
        log_weights: -inf for the dead, (particles,).
    """

    particles: tuple[Particle, ...]
    log_weights: Probabilities

    @property
    def log_normaliser(self) -> float:
        """Log of the unbiased estimate of the probability that the model satisfies the constraint.

        -inf if no particle lives.
        """
        return _log_mean(self.log_weights)

    @property
    def weights(self) -> Probabilities:
        """Weights of sum 1, (particles,); all 0 if no particle lives."""
        return _normalised(self.log_weights)

    def draw(self, random: np.random.Generator) -> Particle | None:
        """Draw a text by its weight; None if no particle lives."""
        weights = self.weights
        if not weights.any():
            return None
        return self.particles[int(random.choice(len(weights), p=weights))]


@dataclass(frozen=True)
class Posterior(WeightedTexts):
    """What sequential Monte Carlo came to.

    Attributes:
        resamplings: How often particles were redistributed.
        least_effective: Smallest effective number of particles at any step.
    """

    resamplings: int
    least_effective: float


def sequential_monte_carlo(
    start: Particle,
    extend: Extend,
    *,
    particles: int,
    limit: int,
    random: np.random.Generator,
    ess_threshold: float = 0.5,
    resampling: Resampling = "stratified",
    critic: Critic | None = None,
    closes: bool = True,
) -> Posterior:
    """Grow texts token by token, weigh them, and put many where the weight is.

    A particle's weight is multiplied by that of each draw. When the effective number of particles
    falls below `ess_threshold` of them, they are resampled, and all get the mean weight. A finished
    particle keeps its weight and may be copied; one with weight 0 is dead.

    Args:
        start: The empty text.
        extend: Draws tokens.
        particles: N.
        limit: Most tokens of a text, its end included.
        random: Source of the resampling.
        ess_threshold: From 0 (never) to 1.
        resampling: Scheme of `ancestors`.
        critic: Twists the weights: after each step it stands in them with its value for the text
            so far, in place of its value before.
        closes: Whether the last token must end the text.
    """
    texts = [start] * particles
    log_weights = np.zeros(particles)
    twists = np.full(particles, critic(start) if critic else 0.0)
    log_weights += twists
    resamplings, least_effective = 0, float(particles)
    for step in range(1, limit + 1):
        live = [
            number
            for number, particle in enumerate(texts)
            if not particle.state.has_ended and log_weights[number] > -math.inf
        ]
        if not live:
            break
        extensions = extend([texts[number] for number in live], closes and step == limit)
        for number, extension in zip(live, extensions, strict=True):
            if extension.particle is None or extension.log_weight == -math.inf:
                log_weights[number] = -math.inf
                continue
            texts[number] = extension.particle
            log_weights[number] += extension.log_weight
            if critic:
                twist = critic(extension.particle)
                log_weights[number] += twist - twists[number]
                twists[number] = twist
        weights = _normalised(log_weights)
        if not weights.any():
            least_effective = 0.0
            break
        effective = effective_size(weights)
        least_effective = min(least_effective, effective)
        # The tolerance keeps equal weights together that differ by rounding.
        if effective < ess_threshold * particles * (1 - 1e-9):
            mean = _log_mean(log_weights)
            chosen = ancestors(weights, resampling, random)
            texts = [texts[number] for number in chosen]
            twists = twists[chosen]
            log_weights = np.full(particles, mean)
            resamplings += 1
    return Posterior(tuple(texts), log_weights, resamplings, least_effective)


def _normalised(log_weights: Probabilities) -> Probabilities:
    top = log_weights.max()
    if top == -math.inf:
        return np.zeros_like(log_weights)
    weights = np.exp(log_weights - top)
    return weights / weights.sum()


def _log_mean(log_weights: Probabilities) -> float:
    top = float(log_weights.max())
    if top == -math.inf:
        return top
    return top + math.log(float(np.exp(log_weights - top).mean()))


# --- the model ------------------------------------------------------------------------------------


class Usable(NamedTuple):
    """A next-token distribution of the tokens that a constraint can speak about.

    Attributes:
        probabilities: Of sum 1, (vocab,); special tokens have none, all end-of-text ids are one.
        log_mass: Log of the probability that these tokens had.
    """

    probabilities: Probabilities
    log_mass: float


class Vocabulary:
    """Turns a model's logits into distributions over usable tokens."""

    def __init__(self, checker: TokenChecker, temperature: float) -> None:
        usable = np.asarray(checker.usable)
        self._unusable = np.flatnonzero(~usable)
        self._eos = checker.eos
        self._merged = list(checker.merged)
        self._temperature = temperature

    def usable(self, logits: Tensor) -> Usable:
        """Return the distribution that logits, (vocab,), give at the temperature.

        At temperature 0 it is that of temperature 1, whose order is all that counts.

        Raises:
            InvalidOutput: A logit is NaN.
        """
        scores = logits.detach().cpu().double() / (self._temperature or 1.0)
        probabilities: Probabilities = torch.softmax(scores, dim=-1).numpy()
        if np.isnan(probabilities[0]):
            raise InvalidOutput("the model returned NaN logits.")
        if self._eos is not None:
            probabilities[self._eos] += probabilities[self._merged].sum()
        probabilities[self._unusable] = 0
        mass = float(probabilities.sum())
        if mass == 0:
            return Usable(probabilities, -math.inf)
        return Usable(probabilities / mass, math.log(mass))


@dataclass
class _Cache:
    """A session, the tokens that it stands for, and the nodes that its last forward left behind.

    Attributes:
        session: Holds all of `base` but its last token, which is the root of the next tree.
        base: Prompt and output so far that all texts of this cache share.
        nodes: Node of each path under the root in the last forward, not yet committed.
    """

    session: Session
    base: tuple[int, ...]
    nodes: dict[tuple[int, ...], int] = field(default_factory=dict)


class Branches:
    """Next-token logits of several texts that continue one prompt, from as few caches as pay.

    What texts share is in a cache once; where they part, the rest of each is read again with every
    forward, as a tree, equal texts once. That costs little while the tree is narrow. When it grows
    beyond `most_nodes`, all but the first branch move to caches of their own, which read prompt and
    text once more. A lone text is decoded as usual, one token a forward.

    The trace records each forward as it was: prompts read (again) under `prefill`, trees under
    `forwards`, one or more a step.
    """

    def __init__(
        self,
        model: TextGenerator,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        trace: Trace,
        *,
        most_nodes: int = 1,
    ) -> None:
        """Prepare; the prompt is read with the first call of `logits`.

        Args:
            model: Opens the sessions.
            prompt_ids: At least one token.
            max_new_tokens: Longest text.
            trace: Filled in.
            most_nodes: Widest tree of more than one branch; 1 for a lone text.
        """
        self._model = model
        self._prompt = tuple(prompt_ids)
        self._trace = trace
        self._most_nodes = most_nodes
        self._capacity = len(prompt_ids) + max_new_tokens + most_nodes
        self._caches: list[_Cache] = []

    @torch.inference_mode()
    def logits(self, texts: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Return the logits after each text, (vocab,) each, float32.

        Args:
            texts: Output tokens; each is a text of the call before and one token more, or in the
                first call empty or a single token.
        """
        if not self._caches:
            logits = self._begin()
            if not any(texts):
                return [logits] * len(texts)
        found: dict[tuple[int, ...], Tensor] = {}
        for cache, members in self._assign(texts):
            self._advance(cache, members)
            found |= self._forward(cache, members)
        return [found[self._prompt + text] for text in texts]

    def _begin(self) -> Tensor:
        """Read the prompt; the root of many branches is its last token, that of one comes later."""
        is_lone = self._most_nodes == 1
        read = self._prompt if is_lone else self._prompt[:-1]
        cache = _Cache(self._model.session(self._capacity), self._prompt)
        self._caches = [cache]
        logits = self._read(cache.session, read) if read else None
        if not is_lone:
            context = cache.session.length
            logits = cache.session.verify(DraftTree.root(self._prompt[-1]))
            cache.nodes[()] = 0
            self._trace.prefill.append(Forward(1, context))
        assert logits is not None
        if "prefill" not in self._trace.marks:
            self._trace.mark("prefill", self._model.synchronize)
        return logits[-1].clone()

    def _read(self, session: Session, tokens: Sequence[int]) -> Tensor:
        self._trace.prefill.append(Forward(len(tokens), session.length))
        return session.prefill(tokens)

    def _assign(
        self, texts: Sequence[tuple[int, ...]]
    ) -> list[tuple[_Cache, list[tuple[int, ...]]]]:
        """Return the caches with the distinct texts that each will read; opens and drops caches."""
        members: dict[int, list[tuple[int, ...]]] = {}
        for text in dict.fromkeys(self._prompt + text for text in texts):
            fitting = (
                number
                for number, cache in enumerate(self._caches)
                if text[: len(cache.base)] == cache.base
            )
            best = max(fitting, key=lambda number: len(self._caches[number].base))
            members.setdefault(best, []).append(text)
        assigned = []
        for number, group in members.items():
            assigned += self._split(self._caches[number], group)
        self._caches = [cache for cache, _ in assigned]
        return assigned

    def _split(
        self, cache: _Cache | None, members: list[tuple[int, ...]]
    ) -> list[tuple[_Cache, list[tuple[int, ...]]]]:
        """Return the members in caches whose trees are narrow enough; None is a new cache."""
        shared = len(_common(members))
        width = 1 + len(
            {text[:end] for text in members for end in range(shared + 1, len(text) + 1)}
        )
        if width <= self._most_nodes or len(members) == 1:
            if cache is None:
                base = _common(members)
                cache = _Cache(self._model.session(self._capacity), base)
                self._read(cache.session, base[:-1])
            return [(cache, members)]
        branches: dict[int, list[tuple[int, ...]]] = {}
        for text in members:
            branches.setdefault(text[shared], []).append(text)
        first, *others = branches.values()
        parts = self._split(cache, first)
        for branch in others:
            parts += self._split(None, branch)
        return parts

    def _advance(self, cache: _Cache, members: list[tuple[int, ...]]) -> None:
        """Commit what all members share, up to the token that becomes the root."""
        shared = _common(members)[len(cache.base) :]
        if cache.session.length == len(cache.base):  # a lone prompt: its text's first token is root
            cache.base += shared[:1]
            return
        # The root itself is not committed; its parent must have been read.
        while shared and shared[:-1] not in cache.nodes:
            shared = shared[:-1]
        if shared:
            cache.session.commit([cache.nodes[shared[:end]] for end in range(len(shared))])
            cache.base += shared

    def _forward(
        self, cache: _Cache, members: list[tuple[int, ...]]
    ) -> dict[tuple[int, ...], Tensor]:
        """Read the tree of the members and return the logits after each."""
        builder = TreeBuilder(cache.base[-1])
        cache.nodes = {(): 0}
        for text in members:
            path = text[len(cache.base) :]
            for end in range(1, len(path) + 1):
                parent = cache.nodes[path[: end - 1]]
                cache.nodes[path[:end]] = builder.add(parent, path[end - 1])
        tree = builder.build()
        self._trace.forwards.append(Forward(len(tree), cache.session.length))
        self._trace.accepted.append(0)
        logits = cache.session.verify(tree)
        # The next forward may overwrite the logits.
        return {text: logits[cache.nodes[text[len(cache.base) :]]].clone() for text in members}


def _common(texts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the longest beginning that all texts share."""
    low, high = min(texts), max(texts)
    ends = (at for at, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1])
    return low[: next(ends, min(len(low), len(high)))]


class Request(NamedTuple):
    """A constrained text to be written.

    Attributes:
        model: The plain model.
        prompt_ids: What to continue.
        decoding: How; the constraint in it may be missing, since it is in `checker`.
        checker: The constraint on tokens.
        vocabulary: From logits to usable distributions.
        trace: To be filled in.
    """

    model: TextGenerator
    prompt_ids: Sequence[int]
    decoding: Decoding
    checker: TokenChecker
    vocabulary: Vocabulary
    trace: Trace

    @property
    def closes(self) -> bool:
        """Whether the text must end with its last token."""
        return self.checker.eos is not None

    def ending(self, usable: Usable, particle: Particle) -> Extension:
        """Return the particle ended by end-of-text: certain if it is complete, impossible if not.

        Its log weight is that of the token: at the length limit nothing else can come.
        """
        assert self.checker.eos is not None
        state = self.checker.end(particle.state)
        log_probability = _log(float(usable.probabilities[self.checker.eos])) + usable.log_mass
        if state is None or log_probability == -math.inf:
            return Extension(None, -math.inf)
        return Extension(Particle((*particle.tokens, self.checker.eos), state), log_probability)


class Written(NamedTuple):
    """What a method wrote: the text, and whether it satisfies the constraint."""

    particle: Particle
    is_satisfied: bool


def write_one_of(
    texts: WeightedTexts,
    request: Request,
    random: np.random.Generator,
    *,
    dead: Particle,
    is_weighed: bool,
) -> Written:
    """Draw one of some weighted texts, and note how many live and what their weights estimate.

    The note `log_normaliser`, the estimate of log P(constraint), is left out where there is none.

    Args:
        texts: To draw from.
        request: Whose trace is noted in.
        random: Source of the draw.
        dead: What is written where no particle lives.
        is_weighed: Whether the weights are proper, so that their mean means something.
    """
    notes = request.trace.notes
    notes["living_particles"] = int((texts.log_weights > -math.inf).sum())
    if is_weighed and texts.log_normaliser > -math.inf:
        notes["log_normaliser"] = texts.log_normaliser
    chosen = texts.draw(random)
    if chosen is None:
        return Written(dead, False)
    return Written(chosen, chosen.state.has_ended or chosen.state.constraint.is_complete)


def require_particles(
    particles: int, ess_threshold: float, resampling: str, branch_nodes: int
) -> None:
    """Raise ValueError for settings of sequential Monte Carlo that are out of range."""
    require_count("particles", particles, 1, 1024, "They are texts side by side.")
    require_count("branch_nodes", branch_nodes, 2, 4096, "They are read at once.")
    require_choice("resampling", resampling, get_args(Resampling))
    require_number(
        "ess_threshold",
        ess_threshold,
        0,
        1,
        "It is the effective share of the particles under which they are resampled.",
    )


@dataclass(frozen=True, kw_only=True)
class ConstrainedMethod(Method[TextGenerator]):
    """A method that writes texts of a language; other requests are decoded plainly.

    Its output is approximate: what a constraint leaves is not the plain model's distribution.

    Attributes:
        pattern: Regular expression that a text must match where the request has no constraint of
            its own; empty for none.

    Class attributes:
        trial: Settings under which a request without a constraint shows what the method does.
    """

    pattern: str = ""
    capability = "TextGenerator"
    owns_loop = True
    output = Output.APPROXIMATE
    neutral = MappingProxyType({"pattern": ""})
    trial: ClassVar = MappingProxyType({"pattern": "[0-8 ]*"})

    def __post_init__(self) -> None:
        regex(self.pattern)

    @abstractmethod
    def write(self, request: Request) -> Written:
        """Write a text; notes and forwards go into the request's trace."""

    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        """Yield the model with constrained texts; the model itself is not touched."""
        require_text_generator(self, model)
        yield ConstrainedGenerator(model, self)


class ConstrainedGenerator(GeneratorWrapper):
    """A text generator that keeps to the request's constraint; the rest is the wrapped model's."""

    def __init__(self, model: TextGenerator, method: ConstrainedMethod) -> None:
        super().__init__(model)
        self._method = method
        self._pattern = regex(method.pattern) if method.pattern else None
        self._pieces = token_bytes(model.tokenizer, model.facts.vocab_size)

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        """Continue `prompt_ids`.

        Notes of the trace: `checks` of the constraint, `checks_per_token` of the text, and
        `is_satisfied`. Where no text could be finished, the text is what stood there when the
        method gave up, and its finish is empty if neither length nor end-of-text ended it.

        Raises:
            Unsupported: Prompt and output do not fit the model's context.
            ValueError: The prompt is empty.
        """
        constraint: Constraint | None = self._pattern
        if isinstance(decoding, ConstrainedDecoding):
            constraint = decoding.constraint
        if constraint is None:
            return decode(self._model, prompt_ids, decoding)
        check_fits(self._model, prompt_ids, decoding)
        checker = TokenChecker(constraint, self._pieces, self.facts.eos_ids, decoding)
        vocabulary = Vocabulary(checker, decoding.temperature)
        trace = Trace()
        written = self._method.write(
            Request(self._model, prompt_ids, decoding, checker, vocabulary, trace)
        )
        trace.mark("decode", self.synchronize)
        count_work(trace, self._model)
        tokens = written.particle.tokens
        trace.notes["checks"] = checker.checks
        trace.notes["checks_per_token"] = checker.checks / max(1, len(tokens))
        trace.notes["is_satisfied"] = int(written.is_satisfied)
        stopper = Stopper(self.tokenizer, decoding, self.facts.eos_ids)
        return Generation(tokens, stopper.text(tokens), stopper.find(tokens).finish, trace)
