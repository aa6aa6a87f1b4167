"""Sequoia: the static draft tree that is best for the acceptance rates of one model pair.

The k-th child of an accepted node is accepted with probability b_k, whatever the node and its
depth. A node's chance is then the product of the b of its path, and the tree of a given size and
depth with the largest sum of chances comes out of a dynamic programme. Its tokens are drawn from
the draft model without replacement, and verified so.

Source: arXiv 2402.12374: positional acceptance (section 3.1), tree construction (section 3.2,
proposition 3.4), sampling and verification without replacement (section 3.3, algorithm 1).
Differs from it: `auto` picks the size by the measured lat(N) of the machine at hand, with the draft
model's cost in it, as the paper's hardware-aware optimiser does from its own tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Literal

import numpy as np

from hardware.profile import Profile
from methods.checks import require_count
from methods.decoding.common_drafts import (
    Choose,
    DraftModelMethod,
    DrawnTree,
    MeasuredDrafts,
    ModelDrafter,
    best_size,
    require_draft_temperature,
)
from models.base import Decoding, TextGenerator, TextModelFacts
from models.draft_tree import DraftTree, Topology

MOST_NODES = 128
USUAL_NODES = 16

# Rates of acceptance by sibling order, by temperature of the text: P(k-th child accepted | its
# parent accepted), drawn without replacement at draft temperature 0.6. Calibration: held-out
# prompts (tests/methods/decoding/heads.py) with trees that are wide at the first two levels.
# Measured with tiny-draft on SmolLM2-135M's own texts behind 6 prompts
# of tests/methods/decoding/heads.py, 48 tokens each. `python -m
# tests.methods.decoding.measure_drafts smollm2-135m tiny-draft 6` prints them anew.
RATES: Mapping[float, tuple[float, ...]] = MappingProxyType(
    {
        0.0: (0.32, 0.132, 0.061, 0.036, 0.036, 0.02, 0.005, 0.005),
        0.8: (0.422, 0.115, 0.042, 0.031, 0.031, 0.016, 0.016, 0.016),
    }
)


@cache
def best_tree(rates: tuple[float, ...], nodes: int, depth: int) -> Topology:
    """Return the tree with the most expected accepted drafts.

    Dynamic programme over subtrees: the best subtree of height h with n nodes is its root, worth
    1, and the best split of n - 1 nodes over children of order 1, 2, …; the subtree of the k-th one
    counts b_k times.

    Args:
        rates: b_k, by sibling order.
        nodes: Drafts, the root not counted.
        depth: Largest depth.

    Raises:
        ValueError: So many drafts do not fit.
    """
    return Topology.from_rank_paths(_paths(_Plan(rates, nodes + 1, depth), depth, nodes + 1))


def expected_accepted(rates: Sequence[float], topology: Topology) -> float:
    """Return the drafts of a tree that should be accepted: the sum of its nodes' chances."""
    chances = np.ones(len(topology))
    for node in range(1, len(topology)):
        chances[node] = chances[topology.parents[node]] * rates[topology.ranks[node]]
    return float(chances[1:].sum())


class _Plan:
    """The tables of the dynamic programme.

    Attributes:
        value: `value[h][n]`: worth of the best subtree of height at most h with n nodes, its root
            included; minus infinity where there is none.
        split: `split[h][k][n]`: nodes of the child of order k, where n nodes are left for the
            children from order k on, in a subtree of height h.
    """

    def __init__(self, rates: tuple[float, ...], size: int, depth: int) -> None:
        counts = np.arange(size + 1)
        self.value = [np.where(counts == 1, 1.0, -np.inf)]
        self.split: list[list[list[int]]] = [[]]
        for _ in range(depth):
            below = self.value[-1]
            # Worth of the children from order k on, by the nodes they have: none left, worth 0.
            worth = np.where(counts == 0, 0.0, -np.inf)
            splits: list[list[int]] = []
            for rate in reversed(rates):
                following, chosen = worth, [0]
                worth = np.where(counts == 0, 0.0, -np.inf)
                for total in range(1, size + 1):
                    own = rate * below[1 : total + 1] + following[total - 1 :: -1][:total]
                    best = int(own.argmax())
                    worth[total] = own[best]
                    chosen.append(best + 1)
                splits.insert(0, chosen)
            self.value.append(np.concatenate([[-np.inf], 1.0 + worth[:-1]]))
            self.split.append(splits)


def _paths(plan: _Plan, height: int, size: int) -> list[tuple[int, ...]]:
    """Return the rank paths of the best subtree, its root's empty path left out."""
    if not np.isfinite(plan.value[height][size]):
        raise ValueError(f"no tree of depth {height} has {size - 1} drafts at these rates.")
    paths: list[tuple[int, ...]] = []
    left, order = size - 1, 0
    while left:
        own = plan.split[height][order][left]
        paths.append((order,))
        paths += [(order, *path) for path in _paths(plan, height - 1, own)]
        left -= own
        order += 1
    return paths


class StaticDrafter(ModelDrafter):
    """Draws the tokens of a fixed tree, level by level."""

    def __init__(
        self,
        draft: TextGenerator,
        decoding: Decoding,
        topology: Topology,
        *,
        temperature: float,
        choose: Choose | None = None,
    ) -> None:
        super().__init__(draft, decoding, len(topology) - 1, temperature=temperature, choose=choose)
        self._topology = topology

    def propose(self, token_ids: Sequence[int], depth: int) -> DraftTree:
        """Return the tree, cut to the depth."""
        tree = self.drawn_tree(token_ids)
        grow_static(tree, self._topology, depth)
        return tree.build()


def grow_static(tree: DrawnTree, topology: Topology, depth: int) -> None:
    """Draw the tokens of a static tree; where a distribution is spent, its branch ends.

    Args:
        tree: The root alone.
        topology: The shape, ordered by levels.
        depth: Nodes deeper than this are left out.
    """
    level = [(0, 0, tree.root_row)]
    for _ in range(min(depth, topology.max_depth)):
        grown: list[tuple[int, int]] = []
        for place, node, row in level:
            for child in topology.children[place]:
                if row.is_spent:
                    break
                grown.append((child, tree.draw(node, row)))
        parents = [
            (place, node)
            for place, node in grown
            if topology.children[place] and tree.depths[node] < depth
        ]
        rows = tree.expand([node for _, node in parents])
        level = [(*pair, row) for pair, row in zip(parents, rows, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Sequoia(DraftModelMethod):
    """Static optimal trees.

    Attributes:
        tree_nodes: Drafts; `auto` takes the number that the measured step cost favours. 0 decodes
            plainly.
        depth: Largest depth of the tree.
        draft_temperature: Of the draft distributions.
    """

    tree_nodes: int | Literal["auto"] = USUAL_NODES
    depth: int = 8
    draft_temperature: float = 0.6
    neutral = MappingProxyType({"tree_nodes": 0})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("depth", self.depth, 1, 32, "It is counted in drafts.")
        if self.tree_nodes != "auto":
            most = largest_tree(len(rates_at(0.0)), self.depth)
            meaning = f"Depth {self.depth} holds no more; or 'auto'."
            require_count("tree_nodes", self.tree_nodes, 0, most, meaning)
        require_draft_temperature(self.draft_temperature, target_allowed=False)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is drafted."""
        return self.tree_nodes == 0

    def chosen_size(
        self, hardware: Profile, target: TextModelFacts, draft: TextModelFacts, decoding: Decoding
    ) -> int:
        """Return the drafts of the tree."""
        if self.tree_nodes != "auto":
            return self.tree_nodes
        best = best_size(
            expected_drafts(rates_at(decoding.temperature), self.depth), hardware, target, draft
        )
        return USUAL_NODES if best is None else best

    def model_drafter(self, draft: TextGenerator, size: int, decoding: Decoding) -> StaticDrafter:
        """Return a drafter for one text."""
        # A vocabulary may be smaller than the number of orders.
        rates = rates_at(decoding.temperature)[: draft.facts.vocab_size]
        topology = best_tree(rates, min(size, largest_tree(len(rates), self.depth)), self.depth)
        return StaticDrafter(draft, decoding, topology, temperature=self.draft_temperature)


def rates_at(temperature: float) -> tuple[float, ...]:
    """Return the rates measured at the temperature nearest to that of a text."""
    return RATES[min(RATES, key=lambda known: abs(known - temperature))]


def largest_tree(orders: int, depth: int) -> int:
    """Return the drafts of the largest tree that is considered at all."""
    return min(MOST_NODES, sum(orders**level for level in range(1, depth + 1)))


@cache
def expected_drafts(rates: tuple[float, ...], depth: int) -> MeasuredDrafts:
    """Return what the best trees of several sizes should give at these rates."""
    most = largest_tree(len(rates), depth)
    sizes = tuple(n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if n <= most)
    trees = [best_tree(rates, size, depth) for size in sizes]
    return MeasuredDrafts(
        sizes,
        tuple(1 + expected_accepted(rates, tree) for tree in trees),
        tuple(float(tree.max_depth) for tree in trees),
    )
