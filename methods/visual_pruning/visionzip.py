"""VisionZip: keep the tokens that [CLS] attends to, and merge the rest into a few more.

Dominant tokens are those with the most [CLS] attention, summed over heads. Of the others every few
are a target, and each remaining one is added to the target whose key is most like its own.
Training-free; does not see the question.

Source: arXiv 2412.04467; the authors' code at 3151f6d. Differs from that code: merged tokens stand
in the place of their target, not behind the dominant ones, so that keeping all tokens changes
nothing; [CLS] itself is left out, which the code keeps beyond the budget (`keep_cls`). A tower
without [CLS] is read by the attention that tokens receive from all others. Tiles are treated one by
one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.checks import require_number
from methods.visual_pruning.common import (
    VisualTokenMethod,
    normalised,
    shared_tiles,
    top_k,
)
from models.base import Unsupported
from models.vision_language import Merged, Seen, VisionLanguage, VisualPlan
from models.vision_language_towers import Watch


@dataclass(frozen=True, kw_only=True)
class VisionZip(VisualTokenMethod):
    """Dominant and contextual tokens.

    Attributes:
        contextual_share: Share of the budget that is merged tokens, in [0, 1]; the authors keep
            162 + 30, 108 + 20 and 54 + 10.
        keep_cls: Put [CLS] in front of the tokens, one beyond the budget, as the released code
            does.
    """

    contextual_share: float = 10 / 64
    keep_cls: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(
            "contextual_share", self.contextual_share, 0, 1, "It is a share of the tokens kept."
        )

    def plan(self, model: VisionLanguage) -> VisualPlan:
        """Return a plan that watches the layer which feeds the projector."""
        facts = model.facts
        if self.keep_cls and not facts.has_cls:
            raise Unsupported(f"visionzip:keep_cls needs a [CLS] token; '{model.name}' has none.")
        layer = (facts.feature_layer,)
        watch = Watch(cls=layer, keys=layer) if facts.has_cls else Watch(received=layer, keys=layer)
        return VisualPlan(
            watch=watch,
            wanted=lambda tokens: self.budget(tokens) + self.keep_cls,
            reduce=lambda seen: self._reduce(seen, facts.feature_layer),
            positions=self.positions,
        )

    def _reduce(self, seen: Seen, layer: int) -> Merged:
        layout, encoded = seen.layout, seen.encoded
        # Without [CLS] what a token receives from all others stands in for its attention.
        received = encoded.cls[layer].sum(0) if layer in encoded.cls else encoded.received[layer]
        anchors, features = [], []
        for own, share in shared_tiles(layout, self.budget(seen.num_patches)):
            contextual = round(share * self.contextual_share)
            chosen = merge(
                received[own],
                encoded.keys[layer][own],
                encoded.features[own],
                dominant=share - contextual,
                contextual=contextual,
            )
            anchors.append(own[chosen.anchors])
            features.append(chosen.features)
            seen.count(chosen.flops)
        order = torch.cat(anchors).sort()
        merged = torch.cat(features)[order.indices]
        places = order.values
        if self.keep_cls:
            cls = encoded.cls_features
            assert cls is not None
            if len(cls) > 1:
                raise Unsupported("visionzip:keep_cls is for images of one tile.")
            merged, places = torch.cat([cls, merged]), torch.cat([places.new_tensor([-1]), places])
        return Merged(places, features=merged)


@dataclass(frozen=True)
class Zipped:
    """Kept and merged tokens of one tile.

    Attributes:
        anchors: Their places among the tile's tokens, ascending, (tokens,).
        features: (tokens, width).
        flops: Operations of the comparison.
    """

    anchors: Tensor
    features: Tensor
    flops: float


def merge(
    received: Tensor, keys: Tensor, features: Tensor, *, dominant: int, contextual: int
) -> Zipped:
    """Keep `dominant` tokens and merge the others into `contextual` ones.

    Args:
        received: Attention that each token gets, (tokens,).
        keys: What likeness is judged by, (tokens, head_dim).
        features: What is kept and added, (tokens, width).
        dominant, contextual: How many; together at most all tokens.

    Returns:
        Dominant tokens as they are; a contextual one is its target plus the mean of the tokens
        assigned to it.
    """
    kept = top_k(received, dominant)
    is_rest = torch.ones(len(received), dtype=torch.bool, device=received.device)
    is_rest[kept] = False
    rest = is_rest.nonzero().flatten()
    # As the authors do: every so many of the rest, from its first on.
    step = max(1, len(rest) // contextual) if contextual else 1
    is_target = torch.zeros(len(rest), dtype=torch.bool, device=received.device)
    is_target[::step] = True
    targets, others = rest[is_target][:contextual], rest[~is_target]
    others = torch.cat([others, rest[is_target][contextual:]]).sort().values
    made = features[targets]
    flops = 0.0
    if contextual and len(others):
        likeness = normalised(keys[others]) @ normalised(keys[targets]).T
        flops = 2.0 * likeness.numel() * keys.shape[1]
        belongs = torch.nn.functional.one_hot(likeness.argmax(1), contextual).to(features.dtype)
        flops += 2.0 * belongs.numel() * features.shape[1]
        made = made + belongs.T @ features[others] / belongs.sum(0).clamp(min=1)[:, None]
    order = torch.cat([kept, targets]).sort()
    return Zipped(order.values, torch.cat([features[kept], made])[order.indices], flops)
