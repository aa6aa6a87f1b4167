"""AWRS: constrained sampling that asks the constraint about a few tokens instead of all.

Tokens are drawn without replacement until the constraint allows one: that is a draw from the
model's distribution over the allowed tokens, and the draws that it took, with one or two more,
estimate without bias how much probability those had. This weight goes into sequential Monte Carlo,
whose weighted texts stand for the model's distribution given that the *whole* text satisfies the
constraint. Without the weights, choosing locally, a text is drawn from another distribution.

Source: arXiv 2504.05410; genlm/genlm-control at 533a36e (recursive and geometric estimator, sampler
and particles), genlm/awrs-colm-2025 at 0a78d03 (two-round estimator).

Differs from that code: mass that is left is summed, not subtracted, where little is left; a limit
of refusals belongs to the geometric estimator alone, since cutting the others short would bias
them; without a request's constraint nothing happens; at temperature 0 there is one particle, which
takes the most likely allowed token, and no weight; particles share caches
(`common_constraints.Branches`). A text must end within `max_new_tokens`, so the last of them is
end-of-text with the weight of its probability, if the text is complete.

The original stands beside it as the peer `genlm-awrs`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from methods.checks import require_choice, require_count, require_number
from methods.decoding.common_constraints import (
    Branches,
    ConstrainedMethod,
    Draw,
    Extension,
    Orders,
    Particle,
    RandomOrders,
    Request,
    Resampling,
    Usable,
    Written,
    geometric_draw,
    likeliest_first,
    recursive_draw,
    require_particles,
    sequential_monte_carlo,
    two_round_draw,
    unweighted_draw,
    write_one_of,
)
from models.constraints import TokenState

Estimator = Literal["auto", "two-round", "recursive", "geometric"]

# From this largest probability on the geometric estimator is expected to ask less than twice.
_PEAKED = 2 / 3


@dataclass(frozen=True, kw_only=True)
class Awrs(ConstrainedMethod):
    """Adaptive weighted rejection sampling in sequential Monte Carlo.

    Attributes:
        estimator: How a draw is weighed: `two-round`, `recursive`, `geometric`, or `auto`, which is
            geometric where a token has 2/3 of the mass or the next two settings ask for it, else
            recursive.
        max_accepts: Accepted tokens after which the geometric estimator stops.
        max_rejects: Refused tokens after which it stops, repetitions included; 0 for no limit.
        proper_weights: False draws locally: exactly from the allowed tokens, all weights 1.
        particles: Texts that grow side by side.
        ess_threshold: Particles are resampled when their effective share falls below it; 0 never.
        resampling: How.
        proposal_temperature: Tokens are proposed from p ** (1 / this), and weighed for it.
        least_mass: Share of the mass under which nothing counts as allowed. Bounds the work at a
            dead end, and the bias with it; 0 asks about every token.
        branch_nodes: Tokens that a forward reads again before texts that have parted get caches of
            their own.
    """

    estimator: Estimator = "auto"
    max_accepts: int = 2
    max_rejects: int = 0
    proper_weights: bool = True
    particles: int = 5
    ess_threshold: float = 0.5
    resampling: Resampling = "stratified"
    proposal_temperature: float = 1.0
    least_mass: float = 1e-5
    branch_nodes: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("estimator", self.estimator, get_args(Estimator))
        require_count("max_accepts", self.max_accepts, 2, 1000, "One accept has no weight.")
        require_count("max_rejects", self.max_rejects, 0, 10**9, "0 sets no limit.")
        require_particles(self.particles, self.ess_threshold, self.resampling, self.branch_nodes)
        if self.max_rejects == 1:
            raise ValueError("max_rejects must be 0 (no limit) or at least 2, got 1.")
        if not self.proposal_temperature > 0:
            raise ValueError(
                f"proposal_temperature must be above 0, got {self.proposal_temperature}."
            )
        require_number("least_mass", self.least_mass, 0, 1, "It is a probability.", below_high=True)
        if self.estimator in ("two-round", "recursive") and (
            self.max_accepts > 2 or self.max_rejects
        ):
            raise ValueError(
                f"max_accepts and max_rejects belong to the geometric estimator, not to "
                f"'{self.estimator}'."
            )

    def write(self, request: Request) -> Written:
        """Write a text; the notes hold the estimate of log P(constraint) and the particles' fate.

        `log_normaliser` is left out where there is none: at temperature 0, with weights off, and
        where no particle lives.
        """
        is_greedy = request.decoding.temperature == 0
        count = 1 if is_greedy else self.particles
        random = np.random.default_rng(request.decoding.seed)
        orders: Orders = likeliest_first if is_greedy else RandomOrders(random)
        branches = Branches(
            request.model,
            request.prompt_ids,
            request.decoding.max_new_tokens,
            request.trace,
            most_nodes=1 if count == 1 else self.branch_nodes,
        )
        where_died: list[Particle] = []

        def extend(particles: Sequence[Particle], is_last: bool) -> list[Extension]:
            where_died[:] = particles
            logits = branches.logits([particle.tokens for particle in particles])
            usable: dict[tuple[int, ...], Usable] = {}
            extensions = []
            for particle, row in zip(particles, logits, strict=True):
                if particle.tokens not in usable:
                    usable[particle.tokens] = request.vocabulary.usable(row)
                found = usable[particle.tokens]
                if is_last:
                    extensions.append(request.ending(found, particle))
                else:
                    extensions.append(self._extended(request, particle, found, orders, random))
            return extensions

        posterior = sequential_monte_carlo(
            Particle((), request.checker.start),
            extend,
            particles=count,
            limit=request.decoding.max_new_tokens,
            random=random,
            ess_threshold=self.ess_threshold,
            resampling=self.resampling,
            closes=request.closes,
        )
        notes = request.trace.notes
        notes["resamplings"] = posterior.resamplings
        notes["least_effective_particles"] = round(posterior.least_effective, 3)
        return write_one_of(
            posterior,
            request,
            random,
            dead=where_died[0],
            is_weighed=self.proper_weights and not is_greedy,
        )

    def _extended(
        self,
        request: Request,
        particle: Particle,
        usable: Usable,
        orders: Orders,
        random: np.random.Generator,
    ) -> Extension:
        """Draw the next token of a particle, weighed."""
        if usable.log_mass == -math.inf:
            return Extension(None, -math.inf)
        target = usable.probabilities
        is_weighed = self.proper_weights and request.decoding.temperature > 0
        proposal = target
        if self.proposal_temperature != 1 and request.decoding.temperature > 0:
            proposal = target ** (1 / self.proposal_temperature)
            proposal /= proposal.sum()

        def check(token: int) -> TokenState | None:
            return request.checker.after(particle.state, token)

        draw: Draw[TokenState]
        if not is_weighed:
            draw = unweighted_draw(proposal, orders, check, least=self.least_mass)
        elif self._is_geometric(proposal):
            draw = geometric_draw(
                proposal,
                orders,
                check,
                random,
                accepts=self.max_accepts,
                most_rejects=self.max_rejects,
                least=self.least_mass,
            )
        else:
            rule = two_round_draw if self.estimator == "two-round" else recursive_draw
            draw = rule(proposal, orders, check, least=self.least_mass)
        if draw.token is None or draw.answer is None or draw.weight == 0:
            return Extension(None, -math.inf)
        log_weight = 0.0
        if is_weighed:
            ratio = target[draw.token] / proposal[draw.token]
            log_weight = math.log(draw.weight) + math.log(ratio) + usable.log_mass
        return Extension(Particle((*particle.tokens, draw.token), draw.answer), log_weight)

    def _is_geometric(self, proposal: np.ndarray) -> bool:
        if self.estimator != "auto":
            return self.estimator == "geometric"
        wants_it = self.max_accepts > 2 or self.max_rejects > 0
        return wants_it or float(proposal.max()) >= _PEAKED
