"""Verification kernels: which drafted image tokens stand, and what is emitted in place of the rest.

A rule judges one draft x, drawn from q, against the target's distribution p. It says with which
chance x stands, and from which distribution the token comes that replaces it. Chains and trees of
drafts are verified by any rule; random numbers are arguments, so that rules can be compared on the
same ones. Everything is float64.

The exact rule is speculative sampling (arXiv 2211.17192): accept with min(1, p(x) / q(x)), replace
by a draw from norm(max(p - q, 0)). A proposal that was not drawn has all of q on x.

**What relaxed rules cost.** Whatever a rule does with a refused draft, if it emits x when it
accepts x, then TV(output, p) >= a - (1 - TV(p, q)), where a is its mean acceptance and 1 - TV(p, q)
that of the exact rule: output >= q * acceptance token by token, hence TV(output, q) <= 1 - a, and
the triangle inequality does the rest. So the excess of a over the exact rule's acceptance is a
shift of the output that nothing can undo; a relaxed rule chooses only which tokens it falls on.
`Tally` keeps that excess, `output_law` computes the whole law.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from models.draft_tree import Topology
from models.image_generation import draw_tokens

Clusters = Literal["dynamic", "static", "by-q", "by-p", "partition"]


class Rule(Protocol):
    """Judges drafts. Leading dimensions of all arguments broadcast against each other."""

    def acceptance(
        self, target: Tensor, draft: Tensor, tokens: Tensor, scores: Tensor | None = None
    ) -> Tensor:
        """Return the chance with which each draft stands, in [0, 1], (...), float64.

        Args:
            target: p, (..., vocab), float64.
            draft: q, from which the token was drawn, (..., vocab), float64.
            tokens: The drafts, (...), each of positive probability under q.
            scores: What tokens are ranked by where p ranks nothing, as at temperature 0; p if None.
        """
        ...

    def residual(self, target: Tensor, draft: Tensor, tokens: Tensor) -> Tensor:
        """Return what a refused draft is replaced by, not normalised, (..., vocab), float64."""
        ...


def probability_of(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Return the probability of each token, (...), leading dimensions broadcast."""
    return torch.take_along_dim(probabilities, tokens[..., None], dim=-1)[..., 0]


def _ratio(mass: Tensor, draft: Tensor) -> Tensor:
    return (mass / draft).clamp(max=1.0)


class ExactRule:
    """Speculative sampling: the output has the target's distribution."""

    def acceptance(
        self, target: Tensor, draft: Tensor, tokens: Tensor, scores: Tensor | None = None
    ) -> Tensor:
        """Return min(1, p(x) / q(x))."""
        return _ratio(probability_of(target, tokens), probability_of(draft, tokens))

    def residual(self, target: Tensor, draft: Tensor, tokens: Tensor) -> Tensor:
        """Return max(p - q, 0)."""
        return (target - draft).clamp(min=0)


class EqualityRule:
    """Jacobi decoding: a draft stands if a fresh draw from the target is the same token.

    The token emitted is always that draw, so the output is exact whatever q was; the draft stands
    with probability p(x), and otherwise the draw is one of the other tokens.
    """

    def acceptance(
        self, target: Tensor, draft: Tensor, tokens: Tensor, scores: Tensor | None = None
    ) -> Tensor:
        """Return p(x)."""
        return probability_of(target, tokens).clamp(max=1.0)

    def residual(self, target: Tensor, draft: Tensor, tokens: Tensor) -> Tensor:
        """Return p without x."""
        others = torch.arange(target.shape[-1], device=target.device) != tokens[..., None]
        return target * others


@dataclass(frozen=True)
class AmplifiedRule(ExactRule):
    """The naive relaxation that GSD compares with: accept with min(1, factor * p(x) / q(x))."""

    factor: float

    def acceptance(
        self, target: Tensor, draft: Tensor, tokens: Tensor, scores: Tensor | None = None
    ) -> Tensor:
        """Return min(1, factor * p(x) / q(x))."""
        return _ratio(self.factor * probability_of(target, tokens), probability_of(draft, tokens))


@dataclass(frozen=True)
class AddedRule(ExactRule):
    """The other naive relaxation: accept with min(1, (p(x) + amount) / q(x))."""

    amount: float

    def acceptance(
        self, target: Tensor, draft: Tensor, tokens: Tensor, scores: Tensor | None = None
    ) -> Tensor:
        """Return min(1, (p(x) + amount) / q(x))."""
        return _ratio(probability_of(target, tokens) + self.amount, probability_of(draft, tokens))


@dataclass(frozen=True, eq=False)
class ClusterRule(ExactRule):
    """GSD: compare the masses that p and q give to tokens as good as x; emit x itself.

    Source: arXiv 2508.07747 and junhyukso/GSD at 4216c7c. A window of ranks that leaves the ranking
    at either end is cut there; the released code falls back to the exact ratio near one end only.

    Exactness. With disjoint clusters (`partition`) the acceptance is 1 - TV of the cluster masses,
    never below the exact rule's (the paper's theorem 1). Only with `replaces_by_group` are the
    cluster masses of the output those of p; within a cluster accepted tokens follow q. Dynamic
    clusters overlap, so neither statement covers them: the acceptance can even be below the exact
    rule's.

    Attributes:
        size: G, tokens of a cluster, x among them.
        clusters: `dynamic`: the ranks around that of x under p, filtered; `by-p`: unfiltered;
            `by-q`: ranks under q, x alone where q has all its mass on x; `static`: x and its
            neighbours; `partition`: disjoint blocks of ranks under p.
        margin: Largest difference of probabilities under p, of `dynamic`.
        embeddings: Of all tokens, (vocab, size), for `dynamic`; None filters nothing.
        distance: Largest squared distance of embeddings, of `dynamic`.
        neighbours: Nearest tokens of each, for `static`, (vocab, at least G - 1), -1 for none.
        replaces_by_group: For `partition`: draw the cluster of the replacement from the residual
            of the cluster masses and the token in it from p.
    """

    size: int
    clusters: Clusters = "dynamic"
    margin: float = torch.inf
    embeddings: Tensor | None = None
    distance: float = torch.inf
    neighbours: Tensor | None = None
    replaces_by_group: bool = False

    def acceptance(
        self, target: Tensor, draft: Tensor, tokens: Tensor, scores: Tensor | None = None
    ) -> Tensor:
        """Return min(1, P / Q), the masses of the cluster of x."""
        members, kept = self.members(target, draft, tokens, scores)
        masses = [
            (torch.take_along_dim(law, members, dim=-1) * kept).sum(-1) for law in (target, draft)
        ]
        return _ratio(*masses)

    def members(
        self, target: Tensor, draft: Tensor, tokens: Tensor, scores: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return candidates of the clusters of some tokens, (..., G), and which of them belong."""
        own = tokens[..., None]
        if self.clusters == "static":
            assert self.neighbours is not None  # whoever asks for them brings them
            near = self.neighbours[:, : self.size - 1][tokens]
            members = torch.cat([own, near.clamp(min=0)], dim=-1)
            return members, torch.cat([torch.ones_like(own, dtype=torch.bool), near >= 0], dim=-1)
        ranking = draft if self.clusters == "by-q" else target if scores is None else scores
        order = ranking.argsort(dim=-1, descending=True, stable=True)
        places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        ranks = torch.empty_like(order).scatter_(-1, order, places)
        rank = torch.take_along_dim(ranks, own, dim=-1)
        if self.clusters == "partition":
            start = rank - rank % self.size
        else:
            # G // 2 tokens below x in probability, the others above it, as in the released code.
            start = rank - (self.size - 1 - self.size // 2)
        places = start + torch.arange(self.size, device=rank.device)
        inside = (places >= 0) & (places < order.shape[-1])
        kept = inside
        members = torch.take_along_dim(order, places.clamp(0, order.shape[-1] - 1), dim=-1)
        if self.clusters == "by-q":
            kept = kept & (probability_of(draft, tokens)[..., None] < 1)
        if self.clusters == "dynamic":
            gap = (
                torch.take_along_dim(ranking, members, -1)
                - probability_of(ranking, tokens)[..., None]
            )
            kept = kept & (gap.abs() < self.margin)
            if self.embeddings is not None:
                apart = self.embeddings[members].double() - self.embeddings[own].double()
                kept = kept & (apart.square().sum(-1) < self.distance)
        # Candidates outside the ranking repeat the one at its end, which may be the token itself.
        return members, kept | (inside & (members == own))

    def residual(self, target: Tensor, draft: Tensor, tokens: Tensor) -> Tensor:
        """Return max(p - q, 0), or the same of the clusters, spread in each as p is."""
        if not self.replaces_by_group:
            return super().residual(target, draft, tokens)
        everything = torch.arange(target.shape[-1], device=target.device).expand_as(target)
        members, kept = self.members(target[..., None, :], draft[..., None, :], everything)
        ours, theirs = (
            (torch.take_along_dim(law[..., None, :], members, dim=-1) * kept).sum(-1)
            for law in (target, draft)
        )
        share = torch.where(ours > 0, target / ours.clamp(min=torch.finfo(ours.dtype).tiny), 0.0)
        return (ours - theirs).clamp(min=0) * share


@dataclass(frozen=True, eq=False)
class NeighbourRule:
    """LANTERN: x may borrow the probability of its nearest codes, up to a budget.

    Walking through the neighbours of x in order, those are taken whose probabilities add up to no
    more than the budget; p_x is p with their mass moved to x. x is judged, and replaced, as if p_x
    were the target. No budget is the exact rule.

    Source: arXiv 2410.03355, section 4 (jadohu/LANTERN at 3a56e45); the relative budget is that of
    LANTERN++ (arXiv 2502.06352).
    Differs from that code: a replacement is drawn without the neighbours that were taken, where the
    code leaves out all k of them, and in its static tree takes them out of q.

    The budget bounds TV(p_x, p) for one draft, not the shift of the output, because p_x is another
    one for each x: see `output_law`.

    Attributes:
        neighbours: Other tokens by distance, nearest first, (vocab, k), -1 where there are no more.
        delta: Most probability borrowed, in [0, 1].
        growth: LANTERN++'s lambda; above 1 the budget is (lambda - 1) * p(x) in place of delta.
    """

    neighbours: Tensor
    delta: float
    growth: float = 0.0

    def acceptance(
        self, target: Tensor, draft: Tensor, tokens: Tensor, scores: Tensor | None = None
    ) -> Tensor:
        """Return min(1, p_x(x) / q(x))."""
        borrowed, _, _ = self.borrowed(target, tokens)
        return _ratio(probability_of(target, tokens) + borrowed, probability_of(draft, tokens))

    def borrowed(self, target: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mass that each token borrows, (...), its neighbours, and which are taken."""
        near = self.neighbours[tokens]
        masses = torch.take_along_dim(target, near.clamp(min=0), dim=-1)
        masses = torch.where(near >= 0, masses, torch.inf)
        own = probability_of(target, tokens)
        budget = (self.growth - 1) * own if self.growth > 1 else torch.full_like(own, self.delta)
        # Sums only grow along the walk, so what fits is a prefix.
        taken = masses.cumsum(-1) <= budget[..., None]
        return torch.where(taken, masses, 0.0).sum(-1), near, taken

    def relaxed(self, target: Tensor, tokens: Tensor) -> Tensor:
        """Return p_x, (..., vocab)."""
        borrowed, near, taken = self.borrowed(target, tokens)
        shape = torch.broadcast_shapes(target.shape[:-1], tokens.shape)
        moved = target.expand(*shape, -1).clone()
        # What is not taken is written over itself; tokens without neighbours point at themselves.
        index = torch.where(taken, near, tokens[..., None]).expand(*shape, -1)
        moved.scatter_(-1, index, torch.zeros_like(index, dtype=moved.dtype))
        return moved.scatter_(
            -1,
            tokens.expand(shape)[..., None],
            (probability_of(target, tokens) + borrowed)[..., None],
        )

    def residual(self, target: Tensor, draft: Tensor, tokens: Tensor) -> Tensor:
        """Return max(p_x - q, 0)."""
        return (self.relaxed(target, tokens) - draft).clamp(min=0)


# --------------------------------------------------------------------------------------- kernels


class Replacement(NamedTuple):
    """A distribution to draw from, (..., vocab), and where it had to be p itself, (...)."""

    law: Tensor
    fell_back: Tensor


def replacement(rule: Rule, target: Tensor, draft: Tensor, tokens: Tensor) -> Replacement:
    """Return the normalised residual of a rule; p where nothing is left of it.

    Nothing is left where p and q agree up to rounding; a draft is then refused only by rounding.
    """
    residual = rule.residual(target, draft, tokens)
    left = residual.sum(-1, keepdim=True)
    empty = ~(left > 0)
    law = torch.where(empty, target, residual / left.clamp(min=torch.finfo(left.dtype).tiny))
    return Replacement(law, empty[..., 0])


class VerifiedChain(NamedTuple):
    """What became of chains of drafts.

    Attributes:
        accepted: Drafts that stand, (...), int64.
        tokens: What is emitted behind them: in place of the first draft that does not stand, or
            after the last one, (...).
        chances: Chance with which each draft stood, (..., drafts).
        fell_back: Whether the replacement came from p because nothing was left of the residual.
    """

    accepted: Tensor
    tokens: Tensor
    chances: Tensor
    fell_back: Tensor


def verify_chain(
    rule: Rule,
    target: Tensor,
    draft: Tensor,
    tokens: Tensor,
    uniforms: Tensor,
    *,
    scores: Tensor | None = None,
) -> VerifiedChain:
    """Judge drafts in a row; each counts only if those before it stand.

    Args:
        rule: How.
        target: p at the place of each draft and behind the last, (..., drafts + 1, vocab).
        draft: q of each draft, (..., drafts, vocab).
        tokens: The drafts, (..., drafts), int64.
        uniforms: In [0, 1), independent of how the drafts came about; one for each test, and the
            last one for the token emitted, (..., drafts + 1).
        scores: As `Rule.acceptance` takes them, (..., drafts, vocab).
    """
    count = tokens.shape[-1]
    p, q = target.double(), draft.double()
    numbers = uniforms.to(p)
    if not count:
        emitted = draw_tokens(p[..., 0, :], numbers[..., 0])
        nothing = torch.zeros_like(emitted)
        return VerifiedChain(nothing, emitted, numbers[..., :0], nothing.bool())
    chances = rule.acceptance(
        p[..., :-1, :], q, tokens, None if scores is None else scores.double()
    )
    stands = numbers[..., :-1] < chances
    accepted = stands.long().cumprod(-1).sum(-1)
    at = accepted[..., None, None].expand(*accepted.shape, 1, p.shape[-1])
    here = p.gather(-2, at)[..., 0, :]
    last = accepted.clamp(max=count - 1)
    refused = q.gather(-2, last[..., None, None].expand_as(at))[..., 0, :]
    found = replacement(rule, here, refused, tokens.gather(-1, last[..., None])[..., 0])
    complete = accepted == count
    law = torch.where(complete[..., None], here, found.law)
    emitted = draw_tokens(law, numbers[..., -1])
    return VerifiedChain(accepted, emitted, chances, found.fell_back & ~complete)


class VerifiedTree(NamedTuple):
    """What became of a tree of drafts.

    Attributes:
        path: Nodes from the root to the last draft that stands, root included.
        token: What is emitted behind it.
        fallbacks: Residuals of which nothing was left.
    """

    path: list[int]
    token: int
    fallbacks: int


def verify_tree(
    rule: Rule,
    topology: Topology,
    tokens: Sequence[int],
    target: Tensor,
    uniforms: Tensor,
    *,
    draft: Tensor | None = None,
) -> VerifiedTree:
    """Walk down a tree: siblings are tried in order, each against what its elder ones left of p.

    Children that were chosen, not drawn, are judged with q = 1: accepted with their probability,
    else taken out of p. Children drawn without replacement are judged by q without their elder
    siblings, normalised. Both are exact with the exact rule.

    Args:
        rule: How.
        topology: The shape.
        tokens: Of each node, the root's unused.
        target: p after each node, (nodes, vocab).
        uniforms: In [0, 1), (nodes + 1,): one for the test of each node, the root's unused, and the
            last one for the token emitted.
        draft: q that the children of each node were drawn from, (nodes, vocab); None for children
            that were chosen.

    Raises:
        ValueError: A child's probability under q is 0.
    """
    numbers = uniforms.tolist()
    path, fallbacks = [0], 0
    while True:
        law = target[path[-1]].double()
        proposal = None if draft is None else draft[path[-1]].double()
        for child in topology.children[path[-1]]:
            token = torch.tensor(tokens[child], device=law.device)
            if proposal is None:
                q = torch.zeros_like(law)
                q[token] = 1.0
            else:
                if not proposal[token] > 0:
                    raise ValueError(f"token {int(token)} cannot have been drawn: its q is 0.")
                q = proposal / proposal.sum()
            if numbers[child] < float(rule.acceptance(law, q, token)):
                path.append(child)
                break
            law, fell_back = replacement(rule, law, q, token)
            fallbacks += int(fell_back)
            if proposal is not None:
                proposal = proposal.clone()
                proposal[token] = 0.0
        else:
            return VerifiedTree(path, int(draw_tokens(law, uniforms[-1])), fallbacks)


# ------------------------------------------------------------------------------------- two laws


class OutputLaw(NamedTuple):
    """What a rule makes of a draft from q, computed over all tokens.

    Attributes:
        law: Of the emitted token, (vocab,), float64.
        acceptance: Mean chance that the draft stands.
        exact_acceptance: The same of the exact rule, 1 - TV(p, q).
        distance: TV(law, p).
    """

    law: Tensor
    acceptance: float
    exact_acceptance: float
    distance: float

    @property
    def excess_acceptance(self) -> float:
        """Acceptance above the exact rule's: a lower bound of `distance`."""
        return self.acceptance - self.exact_acceptance


def output_law(
    rule: Rule, target: Tensor, draft: Tensor, *, scores: Tensor | None = None
) -> OutputLaw:
    """Return the law of the token emitted where one draft from q is judged.

    Args:
        rule: How.
        target: p, (vocab,).
        draft: q, (vocab,).
        scores: As `Rule.acceptance` takes them, (vocab,).
    """
    p, q = target.double(), draft.double()
    drawn = q.nonzero()[:, 0]
    chances = rule.acceptance(p[None], q[None], drawn, None if scores is None else scores[None])
    weights = q[drawn]
    law = torch.zeros_like(p).index_add_(0, drawn, weights * chances)
    # In parts, because a rule may bring one residual for each token.
    for part in torch.arange(len(drawn), device=p.device).split(256):
        found = replacement(rule, p[None], q[None], drawn[part]).law
        refused = weights[part] * (1 - chances[part])
        law += refused @ found if len(found) == len(part) else refused.sum() * found[0]
    distance = 0.5 * float((law - p).abs().sum())
    overlap = float(torch.minimum(p, q).sum())
    return OutputLaw(law, float((weights * chances).sum()), overlap, distance)


class Tested(NamedTuple):
    """Sums over some tests of drafts.

    Attributes:
        tests: Places at which a draft was judged.
        chance: Sum of the chances with which drafts stood.
        exact_chance: Sum of the exact rule's mean chances there, 1 - TV(p, q).
    """

    tests: float = 0.0
    chance: float = 0.0
    exact_chance: float = 0.0

    def plus(self, other: Sequence[float]) -> Tested:
        """Return the sums over both."""
        return Tested(*(ours + theirs for ours, theirs in zip(self, other, strict=True)))


class Tally:
    """Sums over the tests of a run, and over parts of them.

    Attributes:
        total: Over all tests.
        by_depth: By the place of the draft behind the last token, from 1.
        by_age: By the forwards that have redrawn the draft since its place was new, from 0; empty
            where drafts are not redrawn.
        fallbacks: Residuals of which nothing was left.
        walks, taken: Drafts that might borrow, and the neighbours from which they did.
    """

    def __init__(self) -> None:
        """Begin with no tests."""
        self.walks = self.taken = 0
        self.total = Tested()
        self.by_depth: dict[int, Tested] = {}
        self.by_age: dict[int, Tested] = {}
        self.fallbacks = 0

    def add(
        self,
        chances: Tensor,
        overlaps: Tensor,
        counted: Tensor,
        *,
        first_depth: int = 1,
        ages: Sequence[int] = (),
    ) -> None:
        """Count tests.

        Args:
            chances: With which drafts stood, (rows, drafts).
            overlaps: Sums of min(p, q) at their places, (rows, drafts).
            counted: Which of them were tests, (rows, drafts), bool.
            first_depth: Of the first column.
            ages: Of each column; empty if drafts are not redrawn.
        """
        weights = counted.double()
        sums = torch.stack([weights, chances * weights, overlaps * weights]).sum(1)
        for column, found in enumerate(sums.T.tolist()):
            if not found[0]:
                continue
            self.total = self.total.plus(found)
            depth = first_depth + column
            self.by_depth[depth] = self.by_depth.get(depth, Tested()).plus(found)
            if ages:
                age = ages[column]
                self.by_age[age] = self.by_age.get(age, Tested()).plus(found)

    def add_chain(
        self,
        verified: VerifiedChain,
        target: Tensor,
        draft: Tensor,
        judged: Tensor,
        *,
        ages: Sequence[int] = (),
    ) -> None:
        """Count the tests of chains.

        Args:
            verified: What became of them.
            target, draft: As `verify_chain` took them, of (rows, drafts).
            judged: Drafts whose tests count, (rows, drafts), bool.
            ages: As in `add`.
        """
        if not draft.shape[-2]:
            return
        self.add(verified.chances, overlap(target[..., :-1, :], draft), judged, ages=ages)
        self.fallbacks += int(verified.fell_back.sum())

    def add_borrowed(self, taken: Tensor) -> None:
        """Count neighbours.

        Args:
            taken: Which neighbours of a draft were taken, (drafts, neighbours), bool.
        """
        self.walks += len(taken)
        self.taken += int(taken.sum())

    @property
    def notes(self) -> Mapping[str, float | int | str]:
        """Means for the trace; `excess_acceptance` is the guaranteed shift of a token's law."""
        tests, chance, exact_chance = self.total
        if not tests:
            return {}
        found: dict[str, float | int | str] = {
            "tested_drafts": int(tests),
            "draft_acceptance": chance / tests,
            "exact_acceptance": exact_chance / tests,
            "excess_acceptance": (chance - exact_chance) / tests,
            "residual_fallbacks": self.fallbacks,
        }
        if self.walks:
            found["mean_neighbours"] = self.taken / self.walks
        for name, parts in (("depth", self.by_depth), ("age", self.by_age)):
            if parts:
                found[f"acceptance_by_{name}"] = " ".join(
                    f"{key}:{part.chance / part.tests:.3f}" for key, part in sorted(parts.items())
                )
        return found


def overlap(target: Tensor, draft: Tensor) -> Tensor:
    """Return 1 - TV(p, q), (...), float64: what the exact rule accepts on the average."""
    return torch.minimum(target, draft).double().sum(-1)
