"""Random pauses: the control that shows what AdaDec's entropy is worth.

It looks ahead exactly as AdaDec does and as often, but at positions drawn blindly. A gain of AdaDec
that this control has too comes from looking ahead, not from knowing where.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from hardware.profile import Profile
from methods.base import Method, Output
from methods.checks import require_choice, require_count, require_number
from methods.decoding.common import require_text_generator
from methods.decoding.common_loops import (
    BRANCH_ENDS,
    Lookahead,
    LoopGenerator,
    decode_with_pauses,
)
from models.base import Decoding, Generation, TextGenerator


@dataclass(frozen=True, kw_only=True)
class AdadecRandomPause(Method[TextGenerator]):
    """Lookahead at random positions.

    Attributes:
        pause_rate: Share of positions to pause at. AdaDec at its defaults paused at 17 of 147
            positions with SmolLM2-135M-Instruct, on the first 8 functions of humaneval-mini.
        candidates, length, branch_end, reuse: As for `adadec`.
        seed: Seed of the positions, together with the prompt.
    """

    capability = "TextGenerator"
    owns_loop = True
    output = Output.APPROXIMATE
    role = "control"
    neutral = MappingProxyType({"pause_rate": 0.0})

    pause_rate: float = 0.12
    candidates: int = 3
    length: int = 5
    branch_end: Literal["function-body", "never"] = "function-body"
    reuse: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        require_number(
            "pause_rate",
            self.pause_rate,
            0,
            1,
            "It is a share of the positions: to pause at one in ten, pass 0.1.",
        )
        require_count("candidates", self.candidates, 1, 16, "The paper compares 3.")
        require_count("length", self.length, 0, 32, "The paper extends by 5 tokens.")
        require_choice("branch_end", self.branch_end, BRANCH_ENDS)
        require_count("seed", self.seed, 0, 2**32 - 1, "It seeds the positions.")

    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        """Yield the model with its texts decoded this way; the model itself is not touched."""
        require_text_generator(self, model)
        lookahead = Lookahead(
            candidates=self.candidates,
            length=self.length,
            ends=BRANCH_ENDS[self.branch_end],
            reuse=self.reuse,
        )

        def generate(
            inner: TextGenerator, prompt_ids: Sequence[int], decoding: Decoding
        ) -> Generation:
            # A text's positions depend on its prompt, else all texts would pause at the same ones.
            draws = random.Random(f"{self.seed} {list(prompt_ids)}")

            def pause(logits: Tensor) -> bool:
                return draws.random() < self.pause_rate

            return decode_with_pauses(inner, prompt_ids, decoding, pause, lookahead)

        yield LoopGenerator(model, generate)
