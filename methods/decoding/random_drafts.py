"""Random drafts: the control that shows what drafting costs when it never helps.

The tree has the shape and size of Token Recycling's, its tokens are drawn blindly. Output must stay
what plain decoding gives, and the speed shows the price of verification.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from torch import Tensor

from hardware.profile import Profile
from methods.checks import require_count
from methods.decoding.common import DecodingMethod
from methods.decoding.common_trees import (
    MOST_RANKS,
    PUBLISHED_NODES,
    check_tree_nodes,
    static_tree,
)
from models.base import TextGenerator
from models.decode import Accepted
from models.draft_tree import DraftTree, Topology


class RandomDrafter:
    """Fills a static tree with random tokens, siblings distinct."""

    wants_prompt_logits = False

    def __init__(self, topology: Topology, vocab_size: int, seed: int) -> None:
        self._topology = topology
        self._vocab_size = vocab_size
        self._random = np.random.default_rng(seed)
        self.max_nodes = len(topology)
        self.notes: Mapping[str, float | int | str] = {"tree_nodes": len(topology) - 1}

    def begin(self, prompt_ids: Sequence[int], logits: Tensor) -> None:
        """Nothing to prepare."""

    def draft(self, token_ids: Sequence[int], budget: int) -> DraftTree:
        """Return the tree with new tokens, no deeper than `budget`."""
        topology = self._topology
        if budget < topology.max_depth:
            topology = topology.part(topology.depths <= budget)
        # A random start and steps of one keep siblings apart: ranks are fewer than tokens.
        starts = self._random.integers(self._vocab_size, size=len(topology))
        tokens = (starts[topology.parents] + topology.ranks) % self._vocab_size
        tokens[0] = token_ids[-1]
        return DraftTree(topology, tokens)

    def update(self, tree: DraftTree, logits: Tensor, accepted: Accepted) -> None:
        """Nothing to learn."""


@dataclass(frozen=True, kw_only=True)
class RandomDrafts(DecodingMethod):
    """Trees of random tokens.

    Attributes:
        tree_nodes: Drafts in the tree, as for `token-recycling`. 0 decodes plainly.
        seed: Seed of the tokens; each text starts from it anew.
    """

    role = "control"
    tree_nodes: int | Literal["auto"] = PUBLISHED_NODES
    seed: int = 0
    neutral = MappingProxyType({"tree_nodes": 0})

    def __post_init__(self) -> None:
        check_tree_nodes(self.tree_nodes, MOST_RANKS)
        require_count("seed", self.seed, 0, 2**32 - 1, "It seeds the random tokens.")

    def drafter(self, model: TextGenerator, hardware: Profile) -> RandomDrafter:
        """Return a drafter at the start of its random sequence."""
        vocab_size = model.facts.vocab_size
        topology = static_tree(self.tree_nodes, hardware, min(MOST_RANKS, vocab_size))
        return RandomDrafter(topology, vocab_size, self.seed)
