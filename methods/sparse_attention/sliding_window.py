"""Sliding window: the control that keeps the latest tokens and nothing else.

What a method with sinks, votes or scores must beat at the same budget. It is the window attention
that StreamingLLM (arXiv 2309.17453, figure 1b) shows to break down once the first tokens are gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from methods.sparse_attention.common import EndsRule, LatestAttention


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(LatestAttention):
    """The latest tokens only.

    Attributes:
        budget: Tokens whose keys and values stay after each forward.
    """

    role = "control"
    trial = MappingProxyType({"budget": 4})

    def rule(self) -> EndsRule:
        """Return the rule of one text."""
        return EndsRule(self.budget, sinks=0, moves=False, prompt=self.prompt, chunk=self.chunk)
