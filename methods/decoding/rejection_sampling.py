"""Rejection from scratch: sample whole texts from the model until one satisfies the constraint.

The control of the constrained methods, and the plainest exact sampler: what it accepts is drawn
from the model's distribution given the constraint. It takes 1 / P(constraint) texts on the average,
hence many forwards and few checks. A text is given up at its first token that no continuation can
save, which changes no distribution.

Each new attempt reads the prompt again, except where the first token was already refused: then the
prompt's distribution is still at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from methods.checks import require_count
from methods.decoding.common_constraints import (
    Branches,
    ConstrainedMethod,
    Particle,
    Request,
    Usable,
    Written,
)
from models.decode import Draws


@dataclass(frozen=True, kw_only=True)
class RejectionSampling(ConstrainedMethod):
    """Sampling until the constraint is satisfied.

    Attributes:
        max_attempts: Texts begun before it gives up; the last one is then returned as rejected.
    """

    role = "control"
    max_attempts: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("max_attempts", self.max_attempts, 1, 10**6, "They are texts begun.")

    def write(self, request: Request) -> Written:
        """Write texts until one is accepted; the notes hold how many were begun."""
        draws = Draws(request.decoding.seed)
        # The most likely text stays the same, however often it is tried.
        attempts = self.max_attempts if request.decoding.temperature > 0 else 1
        written = Written(Particle((), request.checker.start), False)
        first: Usable | None = None
        branches: Branches | None = None
        attempt = 0
        while attempt < attempts and not written.is_satisfied:
            attempt += 1
            if branches is None or len(written.particle.tokens) > 1:
                limit = request.decoding.max_new_tokens
                branches = Branches(request.model, request.prompt_ids, limit, request.trace)
            if first is None:
                first = self._usable(request, branches, ())
            written = self._attempt(request, branches, first, draws)
        request.trace.notes["attempts"] = attempt
        return written

    def _attempt(
        self, request: Request, branches: Branches, first: Usable, draws: Draws
    ) -> Written:
        """Sample one text; its last token is the refused one if there is one."""
        checker, decoding = request.checker, request.decoding
        particle = Particle((), checker.start)
        usable = first
        while True:
            token = self._token(usable, draws, decoding.temperature)
            is_last = len(particle.tokens) == decoding.max_new_tokens - 1
            is_end = token == checker.eos
            state = None if token is None else checker.after(particle.state, token)
            tokens = particle.tokens if token is None else (*particle.tokens, token)
            if state is None or (is_last and request.closes and not is_end):
                return Written(Particle(tokens, particle.state), False)
            particle = Particle(tokens, state)
            if state.has_ended or is_last:
                return Written(particle, state.has_ended or state.constraint.is_complete)
            usable = self._usable(request, branches, tokens)

    def _usable(self, request: Request, branches: Branches, tokens: tuple[int, ...]) -> Usable:
        (logits,) = branches.logits([tokens])
        return request.vocabulary.usable(logits)

    def _token(self, usable: Usable, draws: Draws, temperature: float) -> int | None:
        """Sample from the whole distribution; None for a token that the constraint cannot read."""
        probabilities = torch.from_numpy(usable.probabilities)
        if temperature == 0:
            return int(probabilities.argmax())
        if not draws.event(float(torch.tensor(usable.log_mass).exp())):
            return None
        return draws.token(probabilities)
