"""Detect: the detector as it is, what grounding methods are compared with.

A vision-language model is asked one phrase a request, greedily, without any help.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from methods.base import Output
from methods.grounding.common import DetectorMethod
from models.base import Detector


@dataclass(frozen=True, kw_only=True)
class Detect(DetectorMethod):
    """The model's own way."""

    output = Output.IDENTICAL
    role = "baseline"
    neutral = MappingProxyType({})

    def changed(self, model: Detector) -> Detector:
        """Return the model as it is."""
        return model
