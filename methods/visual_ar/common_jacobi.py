"""Speculative Jacobi decoding: a window of guesses behind the last token, judged and redrawn.

One forward reads the last token and the guesses behind it. It judges each guess against the
distribution that the guess was drawn from an iteration before, and it redraws those that are left.

**Why it is exact** with an exact rule. A guess that survives an iteration was drawn from a stored
distribution q by random numbers of its own; neither the tokens committed since nor the tests before
it depend on them. So at its place, given what is committed, the guess is a draw from q that is
independent of everything else, and speculative sampling makes it a draw from p. Three things must
hold: guesses are redrawn in every iteration, q is what they were drawn from after all warpers, and
the residual uses the same q. New places begin with a token of probability one under its q, which is
exact whatever the token.

**Batches** stay in step: all rows commit as many tokens as the row with the fewest. What other rows
know beyond that (accepted, replaced and redrawn tokens) stays in their windows as guesses with the
*new* p as their q. Each of them is a draw from that p, so the ratio is 1 where its context holds.

Source: arXiv 2410.01699; tyshiwo1/Accelerating-T2I-AR-with-SJD at b389cfb. That code keeps the old
q for accepted tokens that the batch cuts off, which is not exact; batches of one are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from methods.visual_ar.common_verification import Rule, Tally, verify_chain
from models.base import AutoregressiveImageModel, Condition, ImageSession
from models.image_generation import ImageDraws, TokenPipeline, begin_images, draw_tokens

Initialisation = Literal[
    "random", "repeat-left", "sample-left", "top-left", "repeat-above", "sample-above"
]

MOST_TOKENS = 96


class JacobiLoop:
    """Draws images with a window of guesses.

    Attributes:
        headroom: None: the window ends with the image.
        tally: The guesses judged so far, by place in the window and by age.
        notes: Acceptance, its excess over the exact rule's, and commits.
    """

    headroom = 0

    def __init__(
        self,
        rule: Rule,
        *,
        window: int,
        initialisation: Initialisation = "random",
        ranks_logits: bool = False,
    ) -> None:
        """Set up a loop for one batch.

        Args:
            rule: Judges the guesses.
            window: Tokens that a forward reads, the last committed one included.
            initialisation: Tokens of new places: `random` ones, the token to the left again, a draw
                from the distribution to the left or its most likely token, and the same of the
                place above.
            ranks_logits: Whether the rule ranks tokens, so that it needs a ranking where the
                distributions have none, at temperature 0.
        """
        self._rule = rule
        self._window = window
        self._initialisation = initialisation
        self._ranks_logits = ranks_logits
        self.tally = Tally()
        self._most = 0

    @property
    def notes(self) -> Mapping[str, float | int | str]:
        """What became of the guesses."""
        return {**self.tally.notes, "most_committed": self._most}

    def run(
        self,
        model: AutoregressiveImageModel,
        session: ImageSession,
        pipeline: TokenPipeline,
        draws: ImageDraws,
        conditions: Sequence[Condition],
    ) -> Tensor:
        """See `models.image_generation.TokenLoop.run`."""
        total, rows = model.facts.image_tokens, session.rows
        device = model.device
        # What judges must not depend on what guesses, so each has a stream of its own. The tokens
        # emitted take one number a forward: without guesses they are those of plain decoding.
        tests, redraws = draws.stream("tests"), draws.stream("guesses")
        ranking = replace(pipeline, sampling=replace(pipeline.sampling, temperature=1.0))
        tokens, first = begin_images(model, session, pipeline, draws)
        known = 1
        filler = _Filler(model, pipeline, draws.stream("new places"), self._initialisation)
        filler.see(first, 0)
        guesses = tokens[:, :0]
        laws = first[:, :0]
        ages: list[int] = []  # forwards that have redrawn each guess; the same in all rows
        # Guesses at the head of each row's window that were judged already, in a longer commit.
        settled = torch.zeros(rows, dtype=torch.int64, device=device)
        while known < total:
            count = min(self._window - 1, total - known - 1)
            guesses, laws = filler.fill(tokens[:, :known], guesses, laws, count)
            ages = (ages + [0] * count)[:count]
            output = session.forward(torch.cat([tokens[:, known - 1 : known], guesses], dim=1))
            places = range(known, known + count + 1)
            found = pipeline.probabilities(output, places)
            filler.see(found, known)
            scores = None
            if self._ranks_logits and pipeline.sampling.temperature == 0:
                scores = ranking.probabilities(output, places)[:, :-1]
            numbers = torch.cat([tests.uniforms(count), draws.uniforms(1)], dim=1).to(device)
            verified = verify_chain(self._rule, found, laws, guesses, numbers, scores=scores)
            slots = torch.arange(count + 1, device=device)
            accepted = verified.accepted[:, None]
            judged = (slots[:-1] <= accepted) & (slots[:-1] >= settled[:, None])
            self.tally.add_chain(verified, found, laws, judged, ages=ages)
            fresh = draw_tokens(found, redraws.uniforms(count + 1).to(device))
            here = torch.where(slots < accepted, F.pad(guesses, (0, 1)), fresh)
            here = torch.where(slots == accepted, verified.tokens[:, None], here)
            commit = int(verified.accepted.min()) + 1
            tokens[:, known : known + commit] = here[:, :commit]
            settled = verified.accepted + 1 - commit
            guesses, laws = here[:, commit:], found[:, commit:]
            # Behind the last guess stands one more, of a place that was not in the window yet.
            ages = [age + 1 for age in [*ages, 0][commit:]]
            session.crop(known - 1 + commit)
            session.trace.accepted += [commit - 1] * rows
            self._most = max(self._most, commit)
            known += commit
        return tokens


class _Filler:
    """Puts tokens on new places of the window; what they are can only change the speed."""

    def __init__(
        self,
        model: AutoregressiveImageModel,
        pipeline: TokenPipeline,
        draws: ImageDraws,
        initialisation: Initialisation,
    ) -> None:
        facts = model.facts
        self._draws = draws
        self._constraints = pipeline.constraints
        self._way, _, self._from = initialisation.partition("-")
        self._columns = facts.image_tokens // facts.grid[0]
        self._vocab = facts.vocab_size
        self._device = model.device
        self._laws: Tensor | None = None
        self._total = facts.image_tokens

    def see(self, laws: Tensor, place: int) -> None:
        """Keep distributions, of places from `place` on, for those that look at them later."""
        if self._way not in ("sample", "top"):
            return
        if self._laws is None:
            self._laws = laws.new_zeros(len(laws), self._total, self._vocab)
        self._laws[:, place : place + laws.shape[1]] = laws

    def fill(
        self, tokens: Tensor, guesses: Tensor, laws: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Return `count` guesses and what they were drawn from, those at hand first.

        Args:
            tokens: Committed, (rows, known).
            guesses: At hand, (rows, some); one that the image has no room for is dropped.
            laws: What they were drawn from, (rows, some, vocab).
            count: Guesses wanted.
        """
        new = count - guesses.shape[1]
        if new <= 0:
            return guesses[:, :count], laws[:, :count]
        before = torch.cat([tokens, guesses], dim=1)
        places = torch.arange(before.shape[1], before.shape[1] + new, device=self._device)
        allowed = torch.ones(new, self._vocab, device=self._device)
        forbidden = self._constraints.forbidden(places)
        if forbidden is not None:
            allowed = allowed.masked_fill(forbidden.to(self._device), 0.0)
        numbers = self._draws.uniforms(new).to(self._device)
        anything = draw_tokens(allowed.expand(len(before), -1, -1), numbers)
        wanted = self._wanted(before, new, numbers)
        fits = wanted >= 0
        index = torch.arange(new, device=self._device)
        fits &= allowed[index, wanted.clamp(min=0)] > 0
        drawn = torch.where(fits, wanted, anything)
        certain = F.one_hot(drawn, self._vocab).to(laws.dtype)
        return torch.cat([guesses, drawn], dim=1), torch.cat([laws, certain], dim=1)

    def _wanted(self, before: Tensor, new: int, numbers: Tensor) -> Tensor:
        """Return the token that the scheme wants at each new place, -1 where it has none."""
        rows, known = before.shape
        missing = torch.full((rows, new), -1, dtype=torch.int64, device=before.device)
        if self._way == "random":
            return missing
        sources = torch.full((new,), known - 1, device=before.device)
        if self._from == "above":
            sources = torch.arange(known, known + new, device=before.device) - self._columns
        # A source that is itself new has nothing to copy yet.
        usable = (sources >= 0) & (sources < known)
        at = sources.clamp(0, known - 1)
        if self._way == "repeat":
            wanted = before[:, at]
        else:
            assert self._laws is not None  # the first place was seen before any is filled
            laws = self._laws[:, at]
            # The released code takes the most likely token; the paper draws.
            wanted = laws.argmax(-1) if self._way == "top" else draw_tokens(laws, numbers)
            usable = usable & (laws.sum(-1) > 0)
        return torch.where(usable, wanted, missing)
