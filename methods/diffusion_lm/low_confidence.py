"""Low-confidence: the plain decoder of masked-diffusion models, one token a forward.

The surest candidate of the current block is written, all others are masked again ("low-confidence
remasking"). As many forwards as tokens: what every speed-up is taken against.

Source: LLaDA, arXiv 2502.09992, section 2.4 and algorithm 5 (semi-autoregressive blocks);
ML-GSAI/LLaDA, `generate.py`, with as many steps as tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from methods.diffusion_lm.common import DiffusionMethod
from models.base import Decoding, MaskedDiffusionLM
from models.masked_diffusion_decode import BLOCK_LENGTH, OneAtATime


@dataclass(frozen=True, kw_only=True)
class LowConfidence(DiffusionMethod):
    """One token a forward, the surest first."""

    role = "baseline"
    neutral = MappingProxyType(
        {
            "block_length": BLOCK_LENGTH,
            "cache": "none",
            "early_stop": False,
            "confidence": "probability",
            "defer_eos": False,
        }
    )

    def rule(self, model: MaskedDiffusionLM, decoding: Decoding) -> OneAtATime:
        """Return the rule."""
        return OneAtATime()
