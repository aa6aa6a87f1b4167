"""Fixed-k: so many tokens a forward, the surest ones: "just take fewer steps".

What every parallel decoder has to beat: it knows nothing of when several tokens are safe.

Source: LLaDA, arXiv 2502.09992, algorithm 5; ML-GSAI/LLaDA, `generate.py`, `steps` below the
answer's length, which each block spreads evenly with what is left over on its first steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from methods.checks import require_count
from methods.diffusion_lm.common import DiffusionMethod, FixedNumber
from models.base import Decoding, MaskedDiffusionLM


@dataclass(frozen=True, kw_only=True)
class FixedK(DiffusionMethod):
    """So many tokens a forward.

    Attributes:
        tokens_per_step: How many; 1 is the plain decoder.
    """

    tokens_per_step: int = 2
    neutral = MappingProxyType({"tokens_per_step": 1})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("tokens_per_step", self.tokens_per_step, 1, None, "It counts tokens written.")

    def rule(self, model: MaskedDiffusionLM, decoding: Decoding) -> FixedNumber:
        """Return the rule."""
        return FixedNumber(self.tokens_per_step)
