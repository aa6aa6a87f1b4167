"""The `generate` of transformers: what most people measure against, as a second baseline.

It decodes plainly, with transformers' own cache, processors and stopping criteria. The harness
takes speed-ups against its own faster loop, and shows this one beside it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from hardware.profile import Profile
from methods.base import Method, Output
from methods.decoding.common_transformers import transformers_generator
from models.base import TextGenerator


@dataclass(frozen=True, kw_only=True)
class HfGenerate(Method[TextGenerator]):
    """Plain decoding by transformers."""

    capability = "TextGenerator"
    owns_loop = True
    output = Output.IDENTICAL
    role = "peer"

    def apply(
        self, model: TextGenerator, hardware: Profile
    ) -> AbstractContextManager[TextGenerator]:
        """Yield the model with transformers' loop."""
        return transformers_generator(self, model)
