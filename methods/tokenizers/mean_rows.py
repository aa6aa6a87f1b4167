"""Mean row: every token that the base model lacks gets the mean of its rows.

Source: J. Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021, without
the noise.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from methods.tokenizers.common import Space, VocabularyTransplant


@dataclass(frozen=True, kw_only=True)
class MeanRows(VocabularyTransplant):
    """New tokens mean the average of all."""

    role = "control"

    def new_rows(self, space: Space, token_ids: Tensor) -> Tensor:
        """Return the mean over the base's tokens, once for each new one."""
        tokens = space.base_tokens
        return tokens.mean(dim=0).expand(len(token_ids), -1)
