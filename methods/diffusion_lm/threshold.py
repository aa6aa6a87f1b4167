"""Threshold: write every token that is sure enough, in any case the surest.

Where n chosen candidates each have a probability above 1 - e and (n + 1) e <= 1, they are also the
likeliest together (theorem 1 of the paper), which is why a high threshold costs little.

Source: Fast-dLLM, arXiv 2505.22618, section 3.3; NVlabs/Fast-dLLM at 24cc59e, whose `threshold` it
is, with its prefix and dual caches as settings.
Differs from that code: no forward is run on a block that is complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from methods.diffusion_lm.common import DiffusionMethod, OverThreshold
from models.base import Decoding, MaskedDiffusionLM


@dataclass(frozen=True, kw_only=True)
class Threshold(DiffusionMethod):
    """Confidence-aware parallel decoding.

    Attributes:
        threshold: Confidence at which a token is written; above 1 the plain decoder.
    """

    threshold: float = 0.9
    neutral = MappingProxyType({"threshold": 1.1})
    # A random model is sure of nothing.
    trial = MappingProxyType({"threshold": 0.3})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_threshold("threshold", self.threshold)

    def rule(self, model: MaskedDiffusionLM, decoding: Decoding) -> OverThreshold:
        """Return the rule."""
        return OverThreshold(self.threshold)
