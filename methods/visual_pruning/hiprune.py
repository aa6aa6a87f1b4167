"""HiPrune: keep the image tokens that the vision tower itself attends to.

Anchors are the tokens most attended in a middle layer, where attention lies on objects; buffers are
their neighbours on the grid; registers, the tokens most attended in the layer that feeds the
projector, take the rest of the budget and carry what is global. Training-free; does not see the
question, unless `text_share` gives some places to the tokens that are most like it: HiPrune++ of
the paper's later versions.

Source: arXiv 2508.00553, section 3; the authors' code at 6e83a12. Differs from that code:
neighbours stop at the grid's edge, where it steps into the next row and piles up at the border
(`edges=flat` brings that back); chosen tokens are excluded by -inf, so Qwen2.5-VL keeps as many as
were asked for; there are never more anchors than the budget has room for with their neighbours; in
tiled images the budget counts the patches that are left when padding is cut off, and is met
exactly. HiPrune++ is known to us second-hand, as a few places for the highest cosine between text
and visual tokens; how many, and the cosine with the mean of the text, are our reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor

from methods.checks import require_choice, require_count, require_number
from methods.visual_pruning.common import (
    VisualTokenMethod,
    neighbours,
    normalised,
    shared_tiles,
    top_k,
)
from models.base import Unsupported, VisionLanguageFacts
from models.vision_language import Seen, VisionLanguage, VisualPlan
from models.vision_language_towers import Encoded, Grid, Watch

Neighbourhood = Literal["cross", "square"]
Edges = Literal["grid", "flat"]
Score = Literal["global", "cls"]
Parts = Literal["all", "anchors", "registers", "anchors+registers"]


@dataclass(frozen=True, kw_only=True)
class HiPrune(VisualTokenMethod):
    """Hierarchical attention pruning at the encoder.

    Attributes:
        alpha: Share of the budget for anchors and their neighbours, in [0, 1].
        object_layer: Vision layer that names the anchors, counted from 1; `auto` is the authors'
            choice scaled to the tower: 9 of 24 with [CLS], 16 of 32 without.
        neighbourhood: `cross` for the four neighbours that share a side, `square` for all eight.
        edges: Whether neighbours stop at the grid's edge, see above.
        score: Attention received from all tokens (`global`) or from [CLS] alone.
        parts: What the budget is spent on, for the ablation: `anchors` or `registers` alone, or
            both without neighbours.
        text_share: Share of the budget, in [0, 1], for the tokens most like the text; it is taken
            from the registers.
    """

    # A tiny model's budget of 12 has room for anchors only if they get a larger share.
    trial = MappingProxyType({"alpha": 0.5})

    alpha: float = 0.1
    object_layer: int | Literal["auto"] = "auto"
    neighbourhood: Neighbourhood = "cross"
    edges: Edges = "grid"
    score: Score = "global"
    parts: Parts = "all"
    text_share: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("alpha", self.alpha, 0, 1, "It is a share of the tokens kept.")
        if self.object_layer != "auto":
            require_count("object_layer", self.object_layer, 1, None, "Layers count from 1.")
        require_choice("neighbourhood", self.neighbourhood, get_args(Neighbourhood))
        require_choice("edges", self.edges, get_args(Edges))
        require_choice("score", self.score, get_args(Score))
        require_choice("parts", self.parts, get_args(Parts))
        require_number("text_share", self.text_share, 0, 1, "It is a share of the tokens kept.")

    def plan(self, model: VisionLanguage) -> VisualPlan:
        """Return a plan that watches two layers of the tower."""
        facts = model.facts
        if self.score == "cls" and not facts.has_cls:
            raise Unsupported(f"hiprune:score=cls needs a [CLS] token; '{model.name}' has none.")
        layers = (self.layer(facts), facts.feature_layer)
        watch = Watch(received=layers) if self.score == "global" else Watch(cls=layers)
        return VisualPlan(
            watch=watch,
            wanted=self.budget,
            reduce=lambda seen: self._reduce(seen, *layers),
            positions=self.positions,
        )

    def layer(self, facts: VisionLanguageFacts) -> int:
        """Return the layer that names the anchors."""
        if self.object_layer == "auto":
            return round(facts.vision_layers * (9 / 24 if facts.has_cls else 16 / 32))
        return self.object_layer

    def _reduce(self, seen: Seen, middle_layer: int, last_layer: int) -> Tensor:
        layout = seen.layout
        middle, last = (self._scores(seen.encoded, layer) for layer in (middle_layer, last_layer))
        likeness = self._likeness(seen) if self.text_share else torch.zeros_like(last)
        kept = []
        for own, share in shared_tiles(layout, self.budget(seen.num_patches)):
            places = layout.patch_place[own]
            scores = (middle[own], last[own], likeness[own])
            chosen = self.select(*scores, places, grid=layout.grid, budget=share)
            kept.append(own[chosen])
        return torch.cat(kept).sort().values

    def _scores(self, encoded: Encoded, layer: int) -> Tensor:
        if self.score == "cls":
            return encoded.cls[layer].mean(0)
        return encoded.received[layer]

    def _likeness(self, seen: Seen) -> Tensor:
        """Return the cosine of each token, in the decoder's space, with the text, (tokens,)."""
        seen.count(2.0 * seen.projected.numel())
        return normalised(seen.projected) @ normalised(normalised(seen.text).mean(0))

    def select(
        self,
        middle: Tensor,
        last: Tensor,
        likeness: Tensor,
        places: Tensor,
        *,
        grid: Grid,
        budget: int,
    ) -> Tensor:
        """Choose the tokens of one tile; pure, so it is tested without a model.

        Args:
            middle: Attention each token receives in the object layer, (tokens,).
            last: The same in the layer that feeds the projector, (tokens,).
            likeness: To the text, (tokens,); looked at if `text_share` is above 0.
            places: Where the tokens stand on the grid, ascending, (tokens,).
            grid: Rows and columns of the tile.
            budget: Tokens to keep.

        Returns:
            Numbers of the kept tokens, ascending, (budget,), int64.
        """
        core = self._core(middle, places, grid, budget)
        asked = min(round(budget * self.text_share), budget - len(core))
        named = top_k(likeness.index_fill(0, core, -torch.inf), asked)
        core = torch.cat([core, named])
        rest = top_k(last.index_fill(0, core, -torch.inf), budget - len(core))
        return torch.cat([core, rest]).sort().values

    def _core(self, middle: Tensor, places: Tensor, grid: Grid, budget: int) -> Tensor:
        """Return the anchors and their neighbours, each once."""
        if self.parts in ("anchors", "registers"):
            return top_k(middle, budget if self.parts == "anchors" else 0)
        if self.parts == "anchors+registers":
            return top_k(middle, round(budget * self.alpha))
        # With its neighbours an anchor takes up to five (nine) places of the budget.
        group = 9 if self.neighbourhood == "square" else 5
        anchors = top_k(middle, min(round(budget * self.alpha / group), budget // group))
        beside = neighbours(
            places[anchors],
            grid,
            square=self.neighbourhood == "square",
            stops_at_edge=self.edges == "grid",
        )
        # Neighbours that were cut off with the padding are not there to be kept.
        return torch.cat([anchors, torch.isin(places, beside).nonzero().flatten()]).unique()
