"""Placeholder only: the control that shows what a token of noise does by itself.

The prompt holds the placeholder of Token Prepending and nothing is ever copied into it. A token of
large noise draws attention like any token that begins a text does, which helps models that have
none: what this control gains is no merit of the copying.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.embeddings.common_placeholder import PlaceholderMethod
from models.encoders import BeforeLayer, CausalEncoder


@dataclass(frozen=True, kw_only=True)
class PlaceholderOnly(PlaceholderMethod):
    """The placeholder before the sentence, left as it is."""

    role = "control"

    def before_layer(
        self, model: CausalEncoder
    ) -> tuple[BeforeLayer | None, dict[str, float | int | str]]:
        """Return that no layer's input is changed."""
        return None, {}
