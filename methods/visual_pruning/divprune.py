"""DivPrune: keep the visual tokens that are least like one another.

The choice maximises the smallest distance between two kept tokens, greedily: it begins with the
token that is farthest from its nearest neighbour and goes on with the one that is farthest from all
chosen. Training-free; sees neither attention nor question.

Source: arXiv 2503.02175; the authors' code at 799e2d9. Differs from that code: LLaVA-NeXT's
separators are no candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from methods.visual_pruning.common import (
    VisualTokenMethod,
    greedy_flops,
    greedy_maxmin,
    normalised,
)
from models.vision_language import Seen, VisionLanguage, VisualPlan


@dataclass(frozen=True, kw_only=True)
class DivPrune(VisualTokenMethod):
    """Max-min diversity of the projected tokens, by 1 - cosine."""

    def plan(self, model: VisionLanguage) -> VisualPlan:
        """Return a plan that looks at the projected tokens."""
        return VisualPlan(wanted=self.budget, reduce=self._reduce, positions=self.positions)

    def _reduce(self, seen: Seen) -> Tensor:
        tokens, width = seen.projected.shape
        budget = self.budget(tokens)
        seen.count(2.0 * tokens * tokens * width + greedy_flops(tokens, width, budget))
        return select(seen.projected, budget)


def select(embeddings: Tensor, budget: int) -> Tensor:
    """Choose tokens far from one another.

    Args:
        embeddings: (tokens, width).
        budget: How many.

    Returns:
        Their numbers, ascending, (budget,).
    """
    vectors = normalised(embeddings)
    return greedy_maxmin(vectors, most_isolated(vectors), budget).sort().values


def most_isolated(vectors: Tensor) -> Tensor:
    """Return the number of the vector whose nearest other one is farthest, without axes.

    Args:
        vectors: Of length 1, (tokens, width).
    """
    similarity = vectors @ vectors.T
    similarity.fill_diagonal_(-float("inf"))
    return similarity.max(1).values.argmin()
