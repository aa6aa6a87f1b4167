"""Autoregressive decoding: one token a forward, what every speed-up is taken against.

It is the shared loop with a tree of one node, so it runs the same kernels, cache and bookkeeping
as the methods that draft.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from hardware.profile import Profile
from methods.decoding.common import DecodingMethod
from models.base import TextGenerator
from models.decode import NoDraft


@dataclass(frozen=True, kw_only=True)
class Autoregressive(DecodingMethod):
    """Plain decoding."""

    role = "baseline"
    neutral = MappingProxyType({})

    def drafter(self, model: TextGenerator, hardware: Profile) -> NoDraft:
        """Return the drafter that proposes nothing."""
        return NoDraft()
