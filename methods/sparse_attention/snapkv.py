"""SnapKV: let the end of the prompt vote on which tokens before it are worth keeping.

The attention of the last tokens of a prompt, an observation window, to all before it is added up
and smoothed over neighbours; the tokens with most votes and the window itself stay. That happens
once, when the prompt has been read with full attention; what is written or read after it all stays.

Source: arXiv 2404.14469, section 4 and listing 1; FasterDecoding/SnapKV at 395b54d. Defaults are
those of its LongBench example (`ablation_c4096_w32_k7_maxpool`: window 32, max-pooling over 7),
but for the budget; where nothing is configured that code pools by the mean over 5. Differs from
it: it repeats keys and values for each query head before it drops some; here the heads of a
key-value head vote together, so that grouped models keep what they save by grouping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from methods.sparse_attention.common import (
    BudgetedAttention,
    best_and_recent,
    by_kv_head,
    require_tokens,
)
from models.attention import LayerCache, OpenSession, Rule

Pooling = Literal["max", "mean"]


def count_votes(scores: Tensor, kv_heads: int, kernel: int, pooling: Pooling) -> Tensor:
    """Return the votes of a window for the rows before it, (kv_heads, rows before it).

    Args:
        scores: Of the window's queries with all rows, the window's own the last of them,
            (heads, window, rows); -inf behind a query.
        kv_heads: Key-value heads.
        kernel: Rows that are pooled, odd.
        pooling: How.
    """
    window = scores.shape[1]
    attention = torch.softmax(scores, dim=-1)[:, :, :-window].sum(1)
    votes = by_kv_head(attention, kv_heads)
    if pooling == "max":
        return functional.max_pool1d(votes, kernel, stride=1, padding=kernel // 2)
    return functional.avg_pool1d(votes, kernel, stride=1, padding=kernel // 2)


class SnapshotRule(Rule):
    """Compresses a prompt when its last tokens are read."""

    def __init__(self, budget: int, window: int, kernel: int, pooling: Pooling) -> None:
        self.observes = window
        self.chunk = window
        self._budget = budget
        self._kernel = kernel
        self._pooling: Pooling = pooling
        self._is_ending = False
        self._has_ended = False

    def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
        """Attend to all rows held; at the end of a prompt keep what its window votes for."""
        if self._has_ended or not cache.ends_prompt:
            return cache.attend(queries)
        self._is_ending = True
        if cache.length <= self._budget:
            return cache.attend(queries)
        mixed, scores = cache.attend_with_scores(queries)
        votes = count_votes(scores, cache.keys.shape[0], self._kernel, self._pooling)
        window = functional.pad(votes, (0, cache.width))  # it stays without votes
        cache.keep(best_and_recent(window, self._budget, cache.width))
        return mixed

    def after_forward(self, session: OpenSession, new_tokens: Sequence[int]) -> None:
        """Vote no more after the first prompt."""
        self._has_ended |= self._is_ending


@dataclass(frozen=True, kw_only=True)
class SnapKV(BudgetedAttention):
    """A prompt compressed once, by its own end.

    Attributes:
        budget: Tokens of the prompt whose keys and values stay, in each key-value head, the window
            included; new tokens come on top. Shorter prompts stay whole.
        window: Last tokens of the prompt that vote; they stay.
        kernel: Neighbours that votes are pooled over, odd; 1 for none.
        pooling: `max` or `mean`.
    """

    window: int = 32
    kernel: int = 7
    pooling: Pooling = "max"
    trial = MappingProxyType({"budget": 5, "window": 3, "kernel": 3})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_tokens("window", self.window, 1)
        require_tokens("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}: it has a middle.")
        if self.window > self.budget:
            raise ValueError(
                f"window must be at most budget, got {self.window} and {self.budget}: the window "
                "is part of it."
            )
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be max or mean, got {self.pooling!r}.")

    def rule(self) -> SnapshotRule:
        """Return the rule of one text."""
        return SnapshotRule(self.budget, self.window, self.kernel, self.pooling)
