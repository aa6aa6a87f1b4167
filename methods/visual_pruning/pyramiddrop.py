"""PyramidDrop: drop visual tokens in steps, more the deeper in the decoder.

Behind a quarter, half and three quarters of the layers a fixed share of the tokens that are left
stays: those that the last word of the instruction attends to most, by the queries and keys of the
layer that comes next. Training-free; sees the question.

Source: arXiv 2410.17247; the authors' code at 6444f30, which numbers the tokens anew at each step.
There the share is a setting (0.5); here `keep_ratio` is the average over all layers, which is how
methods are compared, and the share follows from it: 0.46875 is 0.5 of the tokens at each step.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from methods.visual_pruning.common import VisualTokenMethod, top_k
from models.base import Unsupported
from models.vision_language import Numbering, VisionLanguage, VisualPlan
from models.vision_language_decoder import Stage, StageView


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(VisualTokenMethod):
    """Three drops in the decoder.

    Attributes:
        keep_ratio: Share of the visual tokens that a layer sees, averaged over layers, in (0, 1].
        positions: `compact` numbers the tokens anew behind each drop, as the authors do.
    """

    trial = MappingProxyType({"keep_ratio": 0.6})

    keep_ratio: float = 15 / 32
    positions: Numbering = "compact"

    def plan(self, model: VisionLanguage) -> VisualPlan:
        """Return a plan with a stage behind each quarter of the decoder."""
        layers = model.facts.text.num_layers
        if layers < 4:
            raise Unsupported(
                f"pyramiddrop needs a decoder of 4 layers; '{model.name}' has {layers}."
            )
        after = [quarter * layers // 4 for quarter in (1, 2, 3)]
        share = stage_share(self.keep_ratio, after, layers)
        return VisualPlan(
            stages=tuple(
                self._stage(number, layer, share) for number, layer in enumerate(after, start=1)
            ),
            positions=self.positions,
            separators="rows",
        )

    def _stage(self, number: int, after: int, share: float) -> Stage:
        def wanted(tokens: int) -> int:
            # A rounding below a whole number must not cost a token.
            return max(1, int(tokens * share**number + 1e-6))

        return Stage(
            after=after, choose=lambda view: choose(view, wanted(view.num_patches)), wanted=wanted
        )


def stage_share(keep_ratio: float, after: list[int], layers: int) -> float:
    """Return the share of the tokens that stays at each step, for an average over the layers.

    Args:
        keep_ratio: The average.
        after: Layers in front of each step.
        layers: Of the decoder.

    Raises:
        models.base.Unsupported: The layers in front of the first step alone exceed the average.
    """
    starts = [0, *after, layers]
    widths = [end - start for start, end in itertools.pairwise(starts)]
    if keep_ratio * layers <= widths[0]:
        raise Unsupported(
            f"{widths[0]} of {layers} layers see all tokens, which exceeds an average of "
            f"{keep_ratio:g}: keep_ratio must be above {widths[0] / layers:g}."
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        average = sum(width * middle**step for step, width in enumerate(widths)) / layers
        low, high = (middle, high) if average < keep_ratio else (low, middle)
    return high


def choose(view: StageView, budget: int) -> Tensor:
    """Return the patches that the last token will attend to most in the next layer, ascending."""
    last = torch.tensor([len(view.tokens) - 1], device=view.tokens.states.device)
    scores = view.attention_from(last, layer="next")[view.tokens.patches]
    return top_k(scores, budget).sort().values
