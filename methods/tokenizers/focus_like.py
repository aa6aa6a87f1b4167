"""FOCUS-like: a new token is a sparse average of the shared tokens that are most like it.

Cosines to all shared tokens in an auxiliary embedding of the new tokenizer, put through sparsemax,
weigh the base model's rows.

Source: FOCUS, arXiv 2305.14481. `-like`, because FOCUS trains its auxiliary embedding (fastText)
on a corpus in the new tokens; here the donor's own embedding is the auxiliary one, as in
mergekit's comparison of initialisations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from methods.tokenizers.common import Space, VocabularyTransplant
from methods.tokenizers.common_pursuit import sparsemax

_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class FocusLike(VocabularyTransplant):
    """New tokens are averages of their likes, as many as sparsemax keeps."""

    def new_rows(self, space: Space, token_ids: Tensor) -> Tensor:
        """Return the averages."""
        shared = functional.normalize(space.donor[space.shared_donor])
        rows = space.base[space.shared_base]
        new = functional.normalize(space.donor[token_ids])
        return torch.cat([sparsemax(part @ shared.T) @ rows for part in new.split(_BATCH)])
