"""LANTERN: trees of a feature drafter, judged with the probability of the nearest codes added.

A layer trained to guess the target's next hidden state (EAGLE) grows a tree of drafts, one forward
of the target reads it, and the tree is walked from its root. A draft x is judged by the probability
of x and of its neighbours in the codebook, nearest first, as far as the budget reaches; what was
borrowed is gone from the neighbours. Without a budget this is EAGLE with the exact rules, whose
images have the model's distribution and, when greedy, its tokens.

Source: arXiv 2410.03355 and jadohu/LANTERN at 3a56e45: `neighbours` 1000, `delta` 0.1, EAGLE-2's
dynamic tree of 58 nodes over five levels, ten children of each of the ten best nodes a level. The
relative budget is LANTERN++'s (arXiv 2502.06352). `static` is EAGLE's tree of 25 nodes
(SafeAILab/EAGLE, `mc_sim_7b_63`), `static-57` the one that LANTERN's code takes for static trees
unless told otherwise (`naive_extend_57`), `chain` one branch; their drafts are drawn when the
images are.
Choices of ours: greedy images judge p at temperature 1 without top-k or top-p, as that code does;
images of a batch are drawn one after the other, as a tree's path is one for all rows of a cache.
Behind a caption the drafter reads the feature of the condition's last token alone, as behind a
class; the released drafter of captions, which reads all of them, is not loaded here.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import get_args

from hardware.profile import Profile
from methods.base import Output
from methods.checks import require_choice, require_count, require_number
from methods.visual_ar.common import VisualARMethod
from methods.visual_ar.common_drafts import feature_drafter_for
from methods.visual_ar.common_feature_trees import FeatureTreeLoop, Tree, TreeShape
from methods.visual_ar.common_geometry import Metric, token_neighbours
from methods.visual_ar.common_verification import NeighbourRule
from models.base import AutoregressiveImageModel

MOST_NODES = 256


@dataclass(frozen=True, kw_only=True)
class Lantern(VisualARMethod):
    """Trees of a feature drafter, judged with the nearest codes.

    Attributes:
        neighbours: k, nearest codes that a draft may borrow from; all others if there are fewer.
        delta: Most probability that a draft borrows, in [0, 1]; 0 is exact.
        relative_budget: LANTERN++'s lambda; above 1, a draft borrows at most (lambda - 1) times its
            own probability, and `delta` does not count.
        metric: Distance between codes; `random` is the control.
        tree: `dynamic`, `static`, `static-57` or `chain`.
        tree_nodes: Drafts of the dynamic tree; 0 decodes plainly.
        depth: Most levels of the tree.
        branching: Children of a node, and nodes expanded a level, of the dynamic tree.
        drafter: `own`, the one beside the model's weights; `path:DIR`; `random`, one that was never
            trained.
    """

    output = Output.APPROXIMATE
    neighbours: int = 1000
    delta: float = 0.1
    relative_budget: float = 0.0
    metric: Metric = "l2"
    tree: Tree = "dynamic"
    tree_nodes: int = 58
    depth: int = 5
    branching: int = 10
    drafter: str = "own"
    neutral = MappingProxyType({"tree_nodes": 0, "drafter": "random"})
    trial = MappingProxyType({"drafter": "random"})

    def __post_init__(self) -> None:
        require_count("neighbours", self.neighbours, 0, 10**6, "They are codes of the codebook.")
        require_number("delta", self.delta, 0, 1, "It is probability that a draft borrows.")
        meaning = "It is LANTERN++'s lambda, above 1; 0 takes `delta`."
        require_number("relative_budget", self.relative_budget, 0, float("inf"), meaning)
        if 0 < self.relative_budget <= 1:
            raise ValueError(
                f"relative_budget must be above 1, or 0 for none, got {self.relative_budget}. "
                f"{meaning}"
            )
        require_choice("metric", self.metric, get_args(Metric))
        require_choice("tree", self.tree, get_args(Tree))
        require_count("tree_nodes", self.tree_nodes, 0, MOST_NODES, "The root is not counted.")
        require_count("depth", self.depth, 1, 32, "They are levels of drafts.")
        require_count("branching", self.branching, 1, 64, "They are children of a node.")

    @property
    def is_exact(self) -> bool:
        """Whether nothing is borrowed."""
        budget = self.delta if self.relative_budget <= 1 else self.relative_budget
        return not (self.neighbours and budget) or self.is_plain

    @property
    def is_plain(self) -> bool:
        """Whether nothing is drafted."""
        return self.tree == "dynamic" and self.tree_nodes == 0

    def declared_output(self, temperature: float) -> Output:
        """Return the promise: without a budget it is exact."""
        if not self.is_exact:
            return self.output
        return Output.SAME_DISTRIBUTION if temperature > 0 else Output.IDENTICAL

    def loop(self, model: AutoregressiveImageModel, hardware: Profile) -> FeatureTreeLoop:
        """Return a loop for one batch."""
        return FeatureTreeLoop(
            self.judge(model),
            feature_drafter_for(self.drafter, model),
            TreeShape(self.tree, self.tree_nodes, self.depth, self.branching),
        )

    def judge(self, model: AutoregressiveImageModel) -> NeighbourRule:
        """Return the rule that drafts are judged by."""
        near = token_neighbours(model, self.neighbours, self.metric)
        return NeighbourRule(near, self.delta, self.relative_budget)
