"""H2O: keep the tokens that have received most attention so far, and the latest ones.

Each token's score is the attention that it got from all queries since it came, those of the prompt
included. After each forward the heads drop what scores least, apart from the latest tokens, whose
scores have had no time to grow.

Source: arXiv 2306.14048, algorithm 1; FMInference/H2O, `H2OKVCache_LayerWise`. Differs from that
code, which knows one key-value head for each query head: where several query heads share one, their
scores are added, for there is one row to keep or drop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from methods.sparse_attention.common import (
    EvictingRule,
    SharedBudget,
    best_and_recent,
    by_kv_head,
    require_tokens,
)
from models.attention import LayerCache, OpenSession


class HeavyHitterRule(EvictingRule):
    """Adds up the attention that each row receives, layer by layer, and keeps the best rows."""

    observes: int | None = None

    def __init__(self, budget: int, recent: int, *, chunk: int) -> None:
        super().__init__(budget, chunk=chunk)
        self._recent = recent
        self._received: dict[int, Tensor] = {}
        # What the running forward adds and drops counts once its tokens are committed.
        self._coming: dict[int, Tensor] = {}

    def mix(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
        """Attend to all rows held and note what each receives."""
        mixed, scores = cache.attend_with_scores(queries)
        received = by_kv_head(torch.softmax(scores, dim=-1).sum(1), cache.keys.shape[0])
        if layer in self._received:
            before = self._received[layer]
            received[:, : before.shape[1]] += before
        self._coming[layer] = received
        return mixed

    def choose(self, layer: int, cache: LayerCache) -> Tensor:
        """Return the heavy hitters and the latest rows of each key-value head."""
        received = self._coming[layer]
        rows = best_and_recent(received, self.budget, self._recent)
        self._coming[layer] = received.gather(1, rows)
        return rows

    def after_forward(self, session: OpenSession, new_tokens: Sequence[int]) -> None:
        """Settle what the forward has added."""
        self._received.update(self._coming)


@dataclass(frozen=True, kw_only=True)
class H2O(SharedBudget):
    """Heavy hitters and a window.

    Attributes:
        budget: Tokens whose keys and values stay after each forward, in each key-value head.
        recent_share: Share of them that are the latest; the others are heavy hitters. The paper
            halves.
        chunk: Tokens of a prompt whose scores are held at once; it changes memory, not the result.
    """

    chunk: int = 128
    trial = MappingProxyType({"budget": 6})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_tokens("chunk", self.chunk, 1)

    def rule(self) -> HeavyHitterRule:
        """Return the rule of one text."""
        return HeavyHitterRule(self.budget, self.recent, chunk=self.chunk)
