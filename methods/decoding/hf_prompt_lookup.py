"""Prompt lookup decoding of transformers: its assisted generation with drafts from the text.

Source: `prompt_lookup_num_tokens` of transformers' `generate`; defaults are those of its
`PromptLookupCandidateGenerator`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from hardware.profile import Profile
from methods.base import Method, Output
from methods.checks import require_count
from methods.decoding.common_transformers import transformers_generator
from models.base import TextGenerator


@dataclass(frozen=True, kw_only=True)
class HfPromptLookup(Method[TextGenerator]):
    """Prompt lookup by transformers.

    Attributes:
        num_tokens: Drafted tokens.
        max_ngram_size: Longest suffix looked up, in tokens.
    """

    num_tokens: int = 10
    max_ngram_size: int = 2
    capability = "TextGenerator"
    owns_loop = True
    output = Output.IDENTICAL
    role = "peer"

    def __post_init__(self) -> None:
        require_count("num_tokens", self.num_tokens, 1, 64, "transformers knows no 0 here.")
        require_count("max_ngram_size", self.max_ngram_size, 1, 16, "It is counted in tokens.")

    def apply(
        self, model: TextGenerator, hardware: Profile
    ) -> AbstractContextManager[TextGenerator]:
        """Yield the model with transformers' loop."""
        return transformers_generator(
            self,
            model,
            prompt_lookup_num_tokens=self.num_tokens,
            max_matching_ngram_size=self.max_ngram_size,
        )
