"""Random rows: tokens that the base model lacks get rows drawn like its own.

Source: J. Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021: a normal
distribution with the mean and the covariance of the rows that are there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.checks import require_count
from methods.tokenizers.common import Space, VocabularyTransplant


@dataclass(frozen=True, kw_only=True)
class RandomRows(VocabularyTransplant):
    """New tokens are noise of the right shape.

    Attributes:
        seed: Of the draw; a token's row is the same whichever others are drawn.
    """

    seed: int = 0
    role = "control"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("seed", self.seed, 0, None, "It seeds the draw.")

    def new_rows(self, space: Space, token_ids: Tensor) -> Tensor:
        """Return draws from the normal distribution of the base's rows."""
        tokens = space.base_tokens.double()
        mean = tokens.mean(dim=0)
        # Few tokens span no full space; a root of the covariance by its eigenvectors needs none.
        values, vectors = torch.linalg.eigh(torch.cov(tokens.T))
        root = vectors * values.clamp(min=0).sqrt()
        generator = torch.Generator().manual_seed(self.seed)
        size = len(space.donor_vocabulary)
        draws = torch.randn(size, space.base.shape[1], generator=generator)[token_ids]
        return (mean + draws.double() @ root.T).float()
