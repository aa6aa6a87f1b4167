"""Grouped speculative decoding: a guess stands if tokens as good as it are likely enough together.

The loop is that of speculative Jacobi decoding. A guess x is judged by the masses that p and q give
to a cluster of tokens around x: its neighbours in probability under p whose probabilities and
embeddings differ little from those of x. Accepted is x itself; a refused guess is replaced as in
exact speculative sampling. The images do not have the model's distribution.

Source: arXiv 2508.07747; the authors' code at 4216c7c (`group_size` 14, `margin` 0.15, `distance`
0.5). The other ways to form clusters, and the naive rules `amplify` and `add`, are those that the
paper compares with; `partition` are the disjoint clusters that its theorem 1 is about, and
`partition-group` also replaces by cluster, which keeps the clusters' masses exact.
Choices of ours: clusters at either end of the ranking are cut there; the filters leave x in its own
cluster; greedy guesses are ranked by the probabilities of temperature 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from hardware.profile import Profile
from methods.base import Output
from methods.checks import require_choice, require_count, require_number
from methods.visual_ar.common import VisualARMethod
from methods.visual_ar.common_geometry import (
    embedding_quantile,
    token_embeddings,
    token_neighbours,
)
from methods.visual_ar.common_jacobi import MOST_TOKENS, Initialisation, JacobiLoop
from methods.visual_ar.common_verification import AddedRule, AmplifiedRule, ClusterRule, Rule
from models.base import AutoregressiveImageModel

Acceptance = Literal[
    "dynamic", "static", "by-q", "by-p", "partition", "partition-group", "amplify", "add"
]


@dataclass(frozen=True, kw_only=True)
class Gsd(VisualARMethod):
    """A window of guesses, judged by clusters of tokens.

    Attributes:
        group_size: G, tokens of a cluster; 1 is exact speculative Jacobi decoding.
        acceptance: How clusters are formed, or one of the naive rules.
        margin: Largest difference of probabilities within a dynamic cluster.
        distance: Largest squared distance of input embeddings within a dynamic cluster.
        distance_quantile: Above 0, `distance` is this quantile of the distances of all pairs of the
            model's own embeddings: the published number fits the model it was published for.
        strength: Factor of `amplify`, or what `add` adds.
        window: As in `sjd`.
        initialisation: As in `sjd`.
    """

    output = Output.APPROXIMATE
    group_size: int = 14
    acceptance: Acceptance = "dynamic"
    margin: float = 0.15
    distance: float = 0.5
    distance_quantile: float = 0.0
    strength: float = 2.0
    window: int = 16
    initialisation: Initialisation = "random"
    neutral = MappingProxyType({"window": 1})

    def __post_init__(self) -> None:
        require_count("group_size", self.group_size, 1, 10**6, "It is the size of a cluster.")
        require_choice("acceptance", self.acceptance, get_args(Acceptance))
        require_number("margin", self.margin, 0, 1, "It is a difference of probabilities.")
        require_number("distance", self.distance, 0, float("inf"), "It is a squared distance.")
        meaning = "It is a share of all pairs of tokens; 0 takes `distance` as it is."
        require_number("distance_quantile", self.distance_quantile, 0, 1, meaning)
        meaning = "It multiplies the ratio, or is added to the probability."
        require_number("strength", self.strength, 0, float("inf"), meaning)
        require_count("window", self.window, 1, MOST_TOKENS, "It counts the last token too.")
        require_choice("initialisation", self.initialisation, get_args(Initialisation))

    def declared_output(self, temperature: float) -> Output:
        """Return the promise: clusters of one token are exact."""
        clusters = self.acceptance not in ("amplify", "add")
        if (clusters and self.group_size == 1) or self.window == 1:
            return Output.SAME_DISTRIBUTION if temperature > 0 else Output.IDENTICAL
        return self.output

    def loop(self, model: AutoregressiveImageModel, hardware: Profile) -> JacobiLoop:
        """Return a loop for one batch."""
        return JacobiLoop(
            self.judge(model),
            window=self.window,
            initialisation=self.initialisation,
            ranks_logits=True,
        )

    def judge(self, model: AutoregressiveImageModel) -> Rule:
        """Return the rule that guesses are judged by."""
        if self.acceptance == "amplify":
            return AmplifiedRule(self.strength)
        if self.acceptance == "add":
            return AddedRule(self.strength)
        if self.acceptance == "dynamic":
            share = self.distance_quantile
            return ClusterRule(
                size=self.group_size,
                margin=self.margin,
                embeddings=token_embeddings(model),
                distance=embedding_quantile(model, share) if share else self.distance,
            )
        if self.acceptance == "static":
            near = token_neighbours(model, self.group_size - 1, space="embeddings")
            return ClusterRule(size=self.group_size, clusters="static", neighbours=near)
        if self.acceptance == "partition-group":
            return ClusterRule(size=self.group_size, clusters="partition", replaces_by_group=True)
        return ClusterRule(size=self.group_size, clusters=self.acceptance)
