"""ToMe: merge the most alike tokens in every layer of the vision tower.

Between attention and feed-forward of a layer the tokens are divided in turn into two sets; each
token of the first finds the most alike of the second by its key, and the best pairs become one
token, their mean by the number of patches in each. Attention counts a merged token as that many
(proportional attention). Training-free; does not see the question; the only method here that makes
the tower itself cheaper.

Source: arXiv 2210.09461, sections 3 and 4; the authors' code at af95e4b. Settled here: as many
tokens leave in each layer as the budget needs, equally many as far as the halves allow, in the
layers in front of the projector; [CLS] is never merged; for the decoder tokens are put back into
the order of the picture, each in the place of the token that its last partner was merged into.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.visual_pruning.common import VisualTokenMethod, normalised, tile_budgets, top_k
from models.base import Unsupported
from models.vision_language import Merged, Seen, VisionLanguage, VisualPlan
from models.vision_language_towers import InnerMerging, Matching, VisualLayout


@dataclass(frozen=True, kw_only=True)
class ToMe(VisualTokenMethod):
    """Bipartite soft matching inside the tower."""

    def plan(self, model: VisionLanguage) -> VisualPlan:
        """Return a plan that merges inside the tower."""
        return VisualPlan(
            merging=InnerMerging(self._leaving, match, match_flops),
            wanted=self.budget,
            reduce=reduce,
            positions=self.positions,
        )

    def _leaving(self, layout: VisualLayout, layers: int) -> list[list[int]]:
        room = torch.bincount(layout.patch_tile, minlength=layout.num_tiles).tolist()
        budgets = tile_budgets(layout, self.budget(len(layout.patch_tile)))
        return [schedule(tokens, kept, layers) for tokens, kept in zip(room, budgets, strict=True)]


def reduce(seen: Seen) -> Tensor | Merged:
    """Return the tokens that the tower left, in the order of the picture."""
    owner = seen.encoded.owner
    if owner is None:
        return torch.arange(seen.num_patches, device=seen.encoded.features.device)
    anchors = owner.unique()
    return Merged(anchors, features=seen.encoded.features[anchors])


def schedule(tokens: int, kept: int, layers: int) -> list[int]:
    """Return how many tokens leave in each layer, equally many as far as that is possible.

    A layer can merge half of its tokens at most, so where few are to be left the first layers merge
    more.

    Args:
        tokens: Patches in front of the first layer.
        kept: Patches that are to be left.
        layers: How many merge.

    Raises:
        models.base.Unsupported: Halving in every layer leaves more.
    """
    if not kept or kept << layers < tokens:
        raise Unsupported(
            f"tome leaves at least {-(-tokens >> layers)} of {tokens} tokens in {layers} layers "
            f"that halve them; {kept} were asked for."
        )
    counts = []
    for later in reversed(range(layers)):
        # What the layers behind this one can still halve away is all that may be left to them.
        count = max(-(-(tokens - kept) // (later + 1)), tokens - (kept << later))
        counts.append(count)
        tokens -= count
    return counts


def match(keys: Tensor, count: int) -> Matching:
    """Pair tokens by bipartite soft matching.

    Args:
        keys: What likeness is judged by, (tokens, head_dim); the first one is [CLS].
        count: Pairs that become one token; at most half of the tokens without [CLS].

    Returns:
        As the authors order them: the unmerged tokens of the first set, [CLS] in front, then the
        second set.
    """
    tokens = len(keys)
    vectors = normalised(keys)
    likeness = vectors[::2] @ vectors[1::2].T
    likeness[0] = -torch.inf
    best = likeness.max(1)
    ranked = top_k(best.values, len(likeness))
    sources, others = ranked[:count], ranked[count:].sort().values
    first = torch.arange(0, tokens, 2, device=keys.device)
    second = torch.arange(1, tokens, 2, device=keys.device)
    goes_to = torch.empty(tokens, dtype=torch.int64, device=keys.device)
    goes_to[first[others]] = torch.arange(len(others), device=keys.device)
    goes_to[second] = len(others) + torch.arange(len(second), device=keys.device)
    goes_to[first[sources]] = len(others) + best.indices[sources]
    return Matching(goes_to, torch.cat([first[others], second]))


def match_flops(tokens: int, width: int) -> float:
    """Return the operations of `match`: products of all pairs between the sets."""
    return 2.0 * (tokens - tokens // 2) * (tokens // 2) * width
