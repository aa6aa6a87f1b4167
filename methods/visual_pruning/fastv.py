"""FastV: after the first layers of the decoder, drop the visual tokens that get little attention.

The tokens are ranked by the attention that the last token of the prompt pays them in layer K; from
layer K+1 on, and in the answer, only the best take part. Training-free; sees the question.

Source: arXiv 2403.06764; the authors' code at d165972, which ranks by the last token alone where
the paper's text speaks of an average over all tokens (`query=average`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from methods.checks import require_choice, require_count
from methods.visual_pruning.common import VisualTokenMethod, kept_count, top_k
from models.base import Unsupported
from models.vision_language import Numbering, VisionLanguage, VisualPlan
from models.vision_language_decoder import Stage, StageView

Query = Literal["last", "average"]
BudgetOf = Literal["stage", "average"]


@dataclass(frozen=True, kw_only=True)
class FastV(VisualTokenMethod):
    """Ranking by attention behind layer K.

    Attributes:
        keep_ratio: Share of the visual tokens that is kept, in (0, 1].
        after: Layers that see all tokens, K; from 1. As many as there are changes nothing.
        query: Whose attention ranks: the `last` token's, or the `average` of all tokens.
        budget_of: What `keep_ratio` is a share of: the tokens behind layer K (`stage`), or, as
            methods that prune in front of the decoder are compared, the `average` over all layers.
    """

    keep_ratio: float = 0.5
    positions: Numbering = "original"
    after: int = 2
    query: Query = "last"
    budget_of: BudgetOf = "stage"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("after", self.after, 1, None, "It counts the decoder's layers.")
        require_choice("query", self.query, get_args(Query))
        require_choice("budget_of", self.budget_of, get_args(BudgetOf))

    def plan(self, model: VisionLanguage) -> VisualPlan:
        """Return a plan with one stage in the decoder."""
        layers = model.facts.text.num_layers

        def wanted(tokens: int) -> int:
            return self.stage_budget(tokens, layers)

        stage = Stage(
            after=self.after,
            choose=lambda view: self._choose(view, wanted(view.num_patches)),
            wanted=wanted,
        )
        return VisualPlan(stages=(stage,), positions=self.positions, separators="rows")

    def stage_budget(self, tokens: int, layers: int) -> int:
        """Return how many of so many tokens stay behind layer K.

        Raises:
            models.base.Unsupported: The first layers alone exceed the average.
        """
        if self.budget_of == "stage" or self.after >= layers:
            return kept_count(self.keep_ratio, tokens)
        left = self.keep_ratio * layers - self.after
        if left <= 0:
            raise Unsupported(
                f"{self.after} of {layers} layers with all tokens exceed an average of "
                f"{self.keep_ratio:g}; choose a smaller `after` or a larger keep_ratio."
            )
        return kept_count(left / (layers - self.after), tokens)

    def _choose(self, view: StageView, budget: int) -> Tensor:
        tokens = len(view.tokens)
        first = 0 if self.query == "average" else tokens - 1
        rows = torch.arange(first, tokens, device=view.tokens.states.device)
        scores = view.attention_from(rows)[view.tokens.patches]
        return top_k(scores, budget).sort().values
