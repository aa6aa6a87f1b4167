"""A tokenizer of transformers, as the two calls that tokenmark needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class HubTokenizer:
    """Wraps a transformers tokenizer; `hub` is the tokenizer itself."""

    def __init__(self, hub: Any) -> None:
        self.hub = hub

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, with the special tokens that the model expects in front."""
        return list(self.hub(text).input_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, special tokens left out, spaces untouched."""
        return str(
            self.hub.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
