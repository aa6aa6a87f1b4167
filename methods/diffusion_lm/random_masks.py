"""Random masks: the control that fills in masks in any order.

As many tokens a forward as asked for, drawn blindly among the masks of the block. What a rule gains
over it is what its choice is worth.

Source: LLaDA, arXiv 2502.09992, section 2.4 ("random remasking").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from methods.checks import require_count
from methods.diffusion_lm.common import DiffusionMethod, FixedNumber
from models.base import Decoding, MaskedDiffusionLM
from models.masked_diffusion_decode import Step


class RandomNumber:
    """Write a number of tokens set beforehand, at random."""

    notes: Mapping[str, float | int | str] = {}

    def __init__(self, tokens_per_step: int, seed: int) -> None:
        self._number = FixedNumber(tokens_per_step)
        self._seed = seed
        self._draws: dict[int, torch.Generator] = {}

    def select(self, step: Step) -> Tensor:
        """See `models.masked_diffusion_decode.Rule.select`."""
        # Each row has draws of its own, so that it does not depend on those beside it.
        for row in step.rows:
            self._draws.setdefault(row, torch.Generator().manual_seed(self._seed))
        width = step.block.is_mask.shape[1]
        blind = torch.stack(
            [torch.rand(width, generator=self._draws[row]).double() for row in step.rows]
        )
        return self._number.select(replace(step, block=step.block._replace(confidence=blind)))


@dataclass(frozen=True, kw_only=True)
class RandomMasks(DiffusionMethod):
    """Blindly chosen masks.

    Attributes:
        tokens_per_step: How many are filled in a forward.
        seed: Of the choice; each text starts from it anew.
    """

    role = "control"
    tokens_per_step: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("tokens_per_step", self.tokens_per_step, 1, None, "It counts tokens written.")
        require_count("seed", self.seed, 0, 2**32 - 1, "It seeds the choice of masks.")

    def rule(self, model: MaskedDiffusionLM, decoding: Decoding) -> RandomNumber:
        """Return the rule at the start of its draws."""
        return RandomNumber(self.tokens_per_step, self.seed)
