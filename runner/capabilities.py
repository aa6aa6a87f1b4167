"""What the runner must know of each capability: baseline, unit, whether calls have steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """How experiments with models of one capability are measured.

    Attributes:
        baseline: Method that joins where a request names no baseline.
        output_unit: What times are divided by: the output `token`, or the whole item, named here.
        has_steps: Whether a call is a sequence of forwards over a cache, whose cost by width is
            measured before the items.
    """

    baseline: str
    output_unit: str
    has_steps: bool = False


CONVENTIONS: Mapping[str, Conventions] = {
    "TextGenerator": Conventions(baseline="autoregressive", output_unit="token", has_steps=True),
    "TextEncoder": Conventions(baseline="encode", output_unit="text"),
    "TokenizedLM": Conventions(baseline="native-tokenizer", output_unit="text"),
}
