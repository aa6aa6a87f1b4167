"""AdaDec: greedy decoding that pauses where the model is unsure, and looks ahead.

Where the entropy of the next token reaches a threshold learned for the model, the likeliest tokens
are each extended greedily by a few tokens, and the one with the best log-probability a token,
extension included, is taken. The extension is thrown away. A quality method: it costs forwards.

Source: arXiv 2506.08980; SYSUSELab/AdaDec at d3c3be1, its fixed-length lookahead. Differs from that
code: the prefix is cached; what a lookahead has computed is used again where the text follows it,
which changes no token; a branch ends at end-of-text too, and its score ends with it (there the
scores of ended branches grow on as long as others do); texts end where the task says; the first
piece of text is no line of its own unless the prompt ends with a line break. Above temperature 0,
which the paper does not know, tokens are drawn, and at a pause one of the candidates by its score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from hardware.profile import Profile
from methods.base import Method, Output
from methods.checks import require_choice, require_count
from methods.decoding.common import require_text_generator
from methods.decoding.common_loops import (
    BRANCH_ENDS,
    Lookahead,
    LoopGenerator,
    decode_with_pauses,
)
from methods.decoding.common_thresholds import entropy, fallback_threshold, learned_threshold
from models.base import Decoding, Generation, TextGenerator


@dataclass(frozen=True, kw_only=True)
class AdaDec(Method[TextGenerator]):
    """Entropy-triggered lookahead.

    Attributes:
        tau: Entropy in nats at which to pause; `learned` is the model's own threshold or, for a
            model without one, the median of the published ones. Infinity is greedy decoding.
        candidates: Likeliest tokens that are compared at a pause, B.
        length: Most tokens that each is extended by, L.
        branch_end: Where an extension ends besides end-of-text: when it leaves the
            `function-body`, or `never`, for prompts that are no functions.
        reuse: Use the forwards of a lookahead again where the text follows its winner. False is
            the published cost; the text is the same.
    """

    capability = "TextGenerator"
    owns_loop = True
    output = Output.APPROXIMATE
    neutral = MappingProxyType({"tau": math.inf})

    tau: float | Literal["learned"] = "learned"
    candidates: int = 3
    length: int = 5
    branch_end: Literal["function-body", "never"] = "function-body"
    reuse: bool = True

    def __post_init__(self) -> None:
        is_number = isinstance(self.tau, (int, float)) and not isinstance(self.tau, bool)
        if self.tau != "learned" and not (is_number and self.tau >= 0):
            raise ValueError(
                f"tau must be 0 or more, or 'learned', got {self.tau!r}. It is counted in nats; "
                f"inf never pauses."
            )
        require_count("candidates", self.candidates, 1, 16, "The paper compares 3.")
        require_count("length", self.length, 0, 32, "The paper extends by 5 tokens.")
        require_choice("branch_end", self.branch_end, BRANCH_ENDS)

    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        """Yield the model with its texts decoded this way; the model itself is not touched."""
        require_text_generator(self, model)
        tau = self.threshold(model)
        lookahead = Lookahead(
            candidates=self.candidates,
            length=self.length,
            ends=BRANCH_ENDS[self.branch_end],
            reuse=self.reuse,
        )

        def pause(logits: Tensor) -> bool:
            return float(entropy(logits)) >= tau

        def generate(
            inner: TextGenerator, prompt_ids: Sequence[int], decoding: Decoding
        ) -> Generation:
            found = decode_with_pauses(inner, prompt_ids, decoding, pause, lookahead)
            found.trace.notes["tau"] = tau
            return found

        yield LoopGenerator(model, generate)

    def threshold(self, model: TextGenerator) -> float:
        """Return the entropy in nats at which texts of this model pause."""
        if self.tau != "learned":
            return float(self.tau)
        learned = learned_threshold(model.name)
        return fallback_threshold() if learned is None else learned
