"""WECHSEL-like: a new token is a softmax average of its nearest shared tokens.

Source: WECHSEL, arXiv 2112.06598, with its 10 neighbours and temperature 0.1. `-like`, because
WECHSEL measures likeness in aligned static word vectors of two languages; here both tokenizers are
of one language and the donor's own embedding measures it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from methods.checks import require_count
from methods.tokenizers.common import Space, VocabularyTransplant
from models.base import Unsupported

_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class WechselLike(VocabularyTransplant):
    """New tokens are averages of their nearest neighbours.

    Attributes:
        neighbours: Shared tokens that are averaged.
        temperature: Of the softmax over their cosines, above 0.
    """

    neighbours: int = 10
    temperature: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(
            "neighbours", self.neighbours, 1, None, "It is the number of averaged tokens."
        )
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}.")

    def new_rows(self, space: Space, token_ids: Tensor) -> Tensor:
        """Return the averages."""
        if self.neighbours > len(space.shared_donor):
            raise Unsupported(
                f"{self.neighbours} neighbours are more than the {len(space.shared_donor)} shared "
                f"tokens."
            )
        shared = functional.normalize(space.donor[space.shared_donor])
        rows = space.base[space.shared_base]
        parts = []
        for part in functional.normalize(space.donor[token_ids]).split(_BATCH):
            nearest = (part @ shared.T).topk(self.neighbours, dim=1)
            weights = (nearest.values / self.temperature).softmax(dim=1)
            parts.append(torch.einsum("vk,vkd->vd", weights, rows[nearest.indices]))
        return torch.cat(parts)
