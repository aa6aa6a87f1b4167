"""The model with its own tokenizer: what a transplant is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

from hardware.profile import Profile
from methods.base import Output
from methods.checks import unsuited
from methods.tokenizers.common import TokenizerMethod
from models.base import TokenizedLM


@dataclass(frozen=True, kw_only=True)
class NativeTokenizer(TokenizerMethod):
    """Nothing is changed."""

    output = Output.IDENTICAL
    role = "baseline"
    neutral = MappingProxyType({})

    @contextmanager
    def apply(self, model: TokenizedLM, hardware: Profile) -> Iterator[TokenizedLM]:
        """Yield the model as it is."""
        if not isinstance(model, TokenizedLM):
            raise unsuited(
                self, model, "a model with its tokenizer", "cannot score or continue a text"
            )
        yield model
