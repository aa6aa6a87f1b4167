"""Speculative Jacobi decoding: guesses of the tokens ahead, judged and redrawn in each forward.

No draft model and no training: a window of guessed tokens rides behind the last one, each forward
judges them by speculative sampling against the distributions that they were drawn from a forward
earlier, and redraws those that are left. The images have the distribution of plain sampling; greedy
ones are the same token for token.

Source: arXiv 2410.01699; the authors' code at b389cfb. `rule="equality"` is deterministic Jacobi
decoding, where a guess stands if a fresh draw is the same token.
Choices of ours: the window is open from the first image token to the last (the code opens it behind
its three structural tokens and closes it before the end); in batches what was cut off keeps the new
distributions, see `common_jacobi`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from hardware.profile import Profile
from methods.base import Output
from methods.checks import require_choice, require_count
from methods.visual_ar.common import VisualARMethod
from methods.visual_ar.common_jacobi import MOST_TOKENS, Initialisation, JacobiLoop
from methods.visual_ar.common_verification import EqualityRule, ExactRule
from models.base import AutoregressiveImageModel


@dataclass(frozen=True, kw_only=True)
class Sjd(VisualARMethod):
    """A window of guesses without a draft model.

    Attributes:
        window: Tokens that a forward reads, the last committed one included; 1 decodes plainly.
        initialisation: Tokens of new places in the window: random ones, the token to the left once
            more, a draw from the distribution to the left or its most likely token (what the
            released code does), the same of the place above. It changes the speed alone.
        rule: `speculative` is the paper's; `equality` that of deterministic Jacobi decoding.
    """

    output = Output.IDENTICAL
    window: int = 16
    initialisation: Initialisation = "random"
    rule: Literal["speculative", "equality"] = "speculative"
    neutral = MappingProxyType({"window": 1})

    def __post_init__(self) -> None:
        require_count("window", self.window, 1, MOST_TOKENS, "It counts the last token too.")
        require_choice("initialisation", self.initialisation, get_args(Initialisation))
        require_choice("rule", self.rule, ("speculative", "equality"))

    def loop(self, model: AutoregressiveImageModel, hardware: Profile) -> JacobiLoop:
        """Return a loop for one batch."""
        return JacobiLoop(
            ExactRule() if self.rule == "speculative" else EqualityRule(),
            window=self.window,
            initialisation=self.initialisation,
        )
