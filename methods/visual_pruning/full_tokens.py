"""Full tokens: the vision-language model as it is, what reductions are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

from hardware.profile import Profile
from methods.base import Method, Output
from methods.checks import unsuited
from models.base import VisionLanguageModel


@dataclass(frozen=True, kw_only=True)
class FullTokens(Method[VisionLanguageModel]):
    """Nothing is left out."""

    capability = "VisionLanguageModel"
    output = Output.IDENTICAL
    role = "baseline"
    neutral = MappingProxyType({})

    @contextmanager
    def apply(self, model: VisionLanguageModel, hardware: Profile) -> Iterator[VisionLanguageModel]:
        """Yield the model as it is."""
        if not isinstance(model, VisionLanguageModel):
            raise unsuited(self, model, "a vision-language model")
        yield model
