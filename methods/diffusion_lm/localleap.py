"""LocalLeap: beside a token that is certain, less certain ones are safe.

Masks whose confidence reaches a high threshold are anchors. Masks within a fixed distance of an
anchor are written at a relaxed threshold: near what is certain, predictions are settled long before
they look so ("local determinism propagation"), and the less the further away. Training-free, no
further forward, no state; it changes only which candidates of a forward are written.

Source: arXiv 2510.07081; the authors' LLaDA sampler (friedrichor/LocalLeap), read through a copy of
others: its rule, its defaults, `>=` at both thresholds. Dream's variant was not to be seen; here
the rule is the same for both alignments.
Differs from that code: the neighbourhood is a maximum over a window, not a loop over positions, and
it ends at the block's edges: behind them nothing is written at this step anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from methods.checks import require_choice, require_count
from methods.diffusion_lm.common import DiffusionMethod, over_threshold
from models.base import Decoding, MaskedDiffusionLM
from models.masked_diffusion_decode import Step

Neighbourhood = Literal["flat", "decay", "written", "transitive"]


@dataclass(frozen=True, kw_only=True)
class LocalLeap(DiffusionMethod):
    """Anchors at a high threshold, their neighbours at a relaxed one.

    Attributes:
        threshold: Confidence of an anchor, the paper's kappa.
        relaxed_threshold: Confidence that is enough beside an anchor, the paper's tau; at most
            `threshold`.
        radius: Largest distance to an anchor, in tokens, the paper's W; 0 is `threshold`'s rule.
        neighbourhood: `flat` is the paper's. Ours, for comparison: `decay` raises the relaxed
            threshold with the distance, up to `threshold` at `radius`; `written` takes what the
            last step wrote for anchors too; `transitive` lets what is accepted be an anchor in the
            same step.
    """

    threshold: float = 0.9
    relaxed_threshold: float = 0.75
    radius: int = 4
    neighbourhood: Neighbourhood = "flat"
    neutral = MappingProxyType({"threshold": 1.1, "relaxed_threshold": 1.1})
    # A random model is sure of nothing.
    trial = MappingProxyType({"threshold": 0.3, "relaxed_threshold": 0.1})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_threshold("relaxed_threshold", self.relaxed_threshold)
        self.require_threshold("threshold", self.threshold)
        if self.relaxed_threshold > self.threshold:
            raise ValueError(
                f"relaxed_threshold must be at most threshold, got {self.relaxed_threshold} and "
                f"{self.threshold}: beside an anchor less is enough, not more."
            )
        require_count("radius", self.radius, 0, None, "It is a distance in tokens.")
        require_choice("neighbourhood", self.neighbourhood, get_args(Neighbourhood))

    def rule(self, model: MaskedDiffusionLM, decoding: Decoding) -> LocalLeapRule:
        """Return the rule."""
        return LocalLeapRule(self)


class LocalLeapRule:
    """Chooses anchors and their neighbours; remembers the last step for `written`."""

    notes: Mapping[str, float | int | str] = {}

    def __init__(self, settings: LocalLeap) -> None:
        self._settings = settings
        # Answer places that each row wrote in its last step; kept for `written` alone.
        self._last: dict[int, Tensor] = {}

    def select(self, step: Step) -> Tensor:
        """See `models.masked_diffusion_decode.Rule.select`."""
        settings, block = self._settings, step.block
        anchors = block.is_mask & (block.confidence >= settings.threshold)
        if settings.neighbourhood == "written":
            # The last step may have been the last block's: its tokens reach into this one.
            before = min(settings.radius, step.offset)
            around = self._written(step, before)
            around[:, before:] |= anchors
            required = self._required(around)[:, before:]
        else:
            required = self._required(anchors)
        if settings.neighbourhood == "transitive":
            while not torch.equal(
                reached := block.is_mask & (block.confidence >= required), anchors
            ):
                anchors = reached
                required = self._required(anchors)
        chosen = over_threshold(block, required)
        if settings.neighbourhood == "written":
            for row, places in zip(step.rows, chosen, strict=True):
                self._last[row] = places.nonzero()[:, 0] + step.offset
        return chosen

    def _required(self, anchors: Tensor) -> Tensor:
        settings = self._settings
        return required_confidence(
            anchors,
            settings.threshold,
            settings.relaxed_threshold,
            settings.radius,
            decays=settings.neighbourhood == "decay",
        )

    def _written(self, step: Step, before: int) -> Tensor:
        """Return where each row wrote in its last step: so many places before the block, and it."""
        places = torch.arange(step.offset - before, step.offset + step.block.is_mask.shape[1])
        nowhere = torch.empty(0, dtype=torch.int64)
        return torch.stack([torch.isin(places, self._last.get(row, nowhere)) for row in step.rows])


def required_confidence(
    anchors: Tensor,
    threshold: float,
    relaxed_threshold: float,
    radius: int,
    *,
    decays: bool = False,
) -> Tensor:
    """Return the confidence at which each position is written.

    Args:
        anchors: (rows, positions), bool.
        threshold: Away from anchors.
        relaxed_threshold: Within `radius` of one.
        radius: In tokens.
        decays: Raise it with the distance, linearly, from `relaxed_threshold` at the anchor itself
            to `threshold` at `radius`.

    Returns:
        (rows, positions), float64.
    """
    required = torch.full(anchors.shape, threshold, dtype=torch.float64)
    if not decays:
        return required.masked_fill(_within(anchors, radius), relaxed_threshold)
    # From far to near, so that the nearest anchor has the last word.
    for distance in range(radius, -1, -1):
        share = distance / radius if radius else 1.0
        level = relaxed_threshold + (threshold - relaxed_threshold) * share
        required.masked_fill_(_within(anchors, distance), level)
    return required


def _within(anchors: Tensor, radius: int) -> Tensor:
    """Return which positions have an anchor no further away than `radius`."""
    width = anchors.shape[1]
    # Within a block no two positions are further apart, and padding must not be wider than it.
    radius = min(radius, width)
    pooled = F.max_pool1d(anchors[:, None].double(), 2 * radius + 1, stride=1, padding=radius)
    return pooled[:, 0] > 0
