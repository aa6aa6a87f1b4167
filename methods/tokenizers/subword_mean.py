"""Subword mean: a new token gets the mean of the rows of its pieces in the old tokenizer.

Source: Fast Vocabulary Transfer, arXiv 2402.09977 (EMNLP 2022, industry track), without its
fine-tuning. Needs no embedding of the donor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from methods.tokenizers.common import Space, VocabularyTransplant, key_text
from models.tokenized import TokenKey


@dataclass(frozen=True, kw_only=True)
class SubwordMean(VocabularyTransplant):
    """New tokens mean what their pieces mean on average."""

    def new_rows(self, space: Space, token_ids: Tensor) -> Tensor:
        """Return means over pieces; the mean over all tokens where there are no pieces."""
        mean = space.base_tokens.mean(dim=0)
        speller = Speller(space)
        rows = [
            space.base[ids].mean(dim=0) if (ids := speller.pieces(token)) else mean
            for token in token_ids.tolist()
        ]
        return torch.stack(rows) if rows else mean.new_empty(0, len(mean))


class Speller:
    """Spells tokens of the donor in tokens of the base."""

    def __init__(self, space: Space) -> None:
        self._space = space

    def pieces(self, token: int) -> list[int]:
        """Return the base tokens that spell a donor token; none for special ones.

        The base's own tokenizer splits the token's text, a space before it where it begins a word.
        What is no whole character, or would need hidden tokens, is spelled by the longest tokens
        that fit.
        """
        key = self._space.donor_vocabulary.keys[token]
        if key is None or key.kind == "special":
            return []
        text = key_text(key)
        if text is not None:
            found = self._space.base_tokenizer.encode(text)
            if not self._space.hidden.intersection(found):
                return found
        return self._longest_first(key)

    @cached_property
    def _ids(self) -> dict[TokenKey, int]:
        return {
            key: number
            for number, key in enumerate(self._space.base_vocabulary.keys)
            if key is not None and number not in self._space.hidden
        }

    def _longest_first(self, key: TokenKey) -> list[int]:
        found, kind, rest = [], key.kind, key.content
        while rest or kind == "word":
            # A word's space alone is a token too; within a word a piece has a byte at least.
            for end in range(len(rest), -1 if kind == "word" else 0, -1):
                number = self._ids.get(TokenKey(kind, rest[:end]))
                if number is None and end == 1:
                    number = self._ids.get(TokenKey("byte", rest[:end]))
                if number is not None:
                    found.append(number)
                    break
            else:
                end = 0 if kind == "word" else 1  # nothing fits: it is left out
            kind, rest = "inner", rest[end:]
        return found
