"""Random tokens: the control that keeps the latest tokens and a random choice of the others.

A method that selects by scores must beat it at the same budget. Each token draws a number when it
comes, and those with the largest stay, so that at any time the older tokens that are left are a
random sample of all older ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from methods.checks import require_count
from methods.sparse_attention.common import (
    EvictingRule,
    SharedBudget,
    best_and_recent,
)
from models.attention import LayerCache


def draw(positions: Tensor, layer: int, seed: int) -> Tensor:
    """Return a number for each token, (kv_heads, rows), that depends on nothing but where it is.

    A hash in place of a generator: a row keeps its number when others are dropped, on any device.

    Args:
        positions: Of the tokens, (kv_heads, rows), int64.
        layer: Number of the layer.
        seed: Of the text.
    """
    heads = torch.arange(positions.shape[0], device=positions.device)[:, None]
    state = positions * 0x632BE5AB + heads * 0x9E3779B1 + layer * 0x85EBCA77 + seed * 0xC2B2AE3D
    for shift, factor in ((33, 0x7F4A7C15F39CC061), (29, 0x4CF5AD432745937F), (32, 1)):
        unsigned = (state >> shift) & ((1 << (64 - shift)) - 1)  # torch shifts the sign along
        state = (state ^ unsigned) * factor  # wraps around, as hashes do
    return state


class RandomRule(EvictingRule):
    """Keeps the rows with the largest numbers."""

    def __init__(self, budget: int, recent: int, seed: int) -> None:
        super().__init__(budget)
        self._recent = recent
        self._seed = seed

    def choose(self, layer: int, cache: LayerCache) -> Tensor:
        """Return a random choice and the latest rows."""
        numbers = draw(cache.positions, layer, self._seed)
        return best_and_recent(numbers, self.budget, self._recent)


@dataclass(frozen=True, kw_only=True)
class RandomTokens(SharedBudget):
    """A random sample and a window.

    Attributes:
        budget: Tokens whose keys and values stay after each forward, in each key-value head. A
            prompt is read with full attention and then cut down.
        seed: Seed of the choice; layers and heads choose differently.
    """

    role = "control"
    seed: int = 0
    trial = MappingProxyType({"budget": 4})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("seed", self.seed, None, None, "It seeds the choice.")

    def rule(self) -> RandomRule:
        """Return the rule of one text."""
        return RandomRule(self.budget, self.recent, self.seed)
