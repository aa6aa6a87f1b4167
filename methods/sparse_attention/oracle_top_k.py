"""Oracle top-k: the control that attends to the tokens with the largest true scores.

Each query head of each layer computes its products with all keys, exactly, and attends to the
largest ones: the best that a choice by scores can do at a budget. It drops nothing and reads every
key at every step, so it shows how sparse attention is, never how fast it could be.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from methods.sparse_attention.common import BudgetedAttention, require_tokens
from models.attention import LayerCache, Rule
from models.base import Unsupported


class OracleRule(Rule):
    """Scores all rows for each query head, and attends to the best."""

    def __init__(self, budget: int, dense_layers: int) -> None:
        self._budget = budget
        self._dense_layers = dense_layers

    def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
        """Attend to the rows with the largest products of query and key."""
        if layer < self._dense_layers or cache.length <= self._budget:
            return cache.attend(queries)
        if cache.width > 1:
            raise Unsupported(
                "oracle-top-k chooses for one token at a time; it does not verify drafts."
            )
        best = cache.scores(queries)[:, 0].topk(self._budget, dim=-1).indices
        return cache.attend_rows(queries, best.sort(dim=-1).values)


@dataclass(frozen=True, kw_only=True)
class OracleTopK(BudgetedAttention):
    """The true top-k of every step, layer and query head.

    Attributes:
        budget: Tokens that a query head attends to, itself included where it scores high enough.
            All stay in the cache, and a prompt is read with full attention.
        dense_layers: First layers that attend to everything.
    """

    role = "control"
    dense_layers: int = 0
    trial = MappingProxyType({"budget": 2})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_tokens("dense_layers", self.dense_layers, 0)

    def rule(self) -> OracleRule:
        """Return the rule of one text."""
        return OracleRule(self.budget, self.dense_layers)
