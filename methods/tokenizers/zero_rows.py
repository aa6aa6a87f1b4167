"""Zero rows: tokens that the base model lacks get rows of zeros.

They can be read past and, in a tied model, have logit 0. A benchmark whose answers need shared
tokens only cannot tell this from a good transplant; bits per byte can.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.tokenizers.common import Space, VocabularyTransplant


@dataclass(frozen=True, kw_only=True)
class ZeroRows(VocabularyTransplant):
    """New tokens mean nothing."""

    role = "control"

    def new_rows(self, space: Space, token_ids: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros(len(token_ids), space.base.shape[1])
