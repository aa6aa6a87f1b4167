"""Raster: one image token a forward, in the order of the sequence.

The baseline of every decoding method of autoregressive image models: KV cache, classifier-free
guidance as a doubled batch, no Python work that the methods would not have too. At guidance 1 the
unconditional half is not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from hardware.profile import Profile
from methods.base import Output
from methods.visual_ar.common import VisualARMethod
from models.base import AutoregressiveImageModel
from models.image_generation import RasterLoop


@dataclass(frozen=True, kw_only=True)
class Raster(VisualARMethod):
    """Plain decoding."""

    output = Output.IDENTICAL
    role = "baseline"
    neutral = MappingProxyType({})

    def loop(self, model: AutoregressiveImageModel, hardware: Profile) -> RasterLoop:
        """Return the plain loop."""
        return RasterLoop()
