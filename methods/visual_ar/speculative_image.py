"""Speculative decoding of images: a small model writes a few tokens ahead, the target checks them.

The draft model, trained on the same codes, continues the image by a chain of tokens; one forward of
the target reads them all. A draft y stands with probability min(1, p(y) / q(y)); the first refused
one is replaced by a draw from norm(max(p - q, 0)), so the images have the target's distribution.
Guidance merges the logits of both models before p and q are formed.

Source: arXiv 2211.17192, algorithm 1, as `speculative` does it for text.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from hardware.profile import Profile
from methods.base import Output
from methods.checks import require_count
from methods.visual_ar.common import VisualARMethod
from methods.visual_ar.common_drafts import ChainLoop, draft_for
from models.base import AutoregressiveImageModel

MOST_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class SpeculativeImage(VisualARMethod):
    """Chains of a draft model.

    Attributes:
        draft: Id of the draft model; `layers:2` for the target's own first two layers.
        num_draft_tokens: Drafted tokens in a step; 0 decodes plainly.
    """

    output = Output.IDENTICAL
    draft: str = "tiny-ar-image-draft"
    num_draft_tokens: int = 4
    neutral = MappingProxyType({"num_draft_tokens": 0, "draft": "layers:1"})
    trial = MappingProxyType({"draft": "layers:1"})

    def __post_init__(self) -> None:
        if not self.draft:
            raise ValueError("draft must name a model, got ''. An example: 'layers:2'.")
        require_count("num_draft_tokens", self.num_draft_tokens, 0, MOST_TOKENS, "0 drafts none.")

    def loop(self, model: AutoregressiveImageModel, hardware: Profile) -> ChainLoop:
        """Return a loop for one batch."""
        return ChainLoop(draft_for(self.draft, model), self.num_draft_tokens)
