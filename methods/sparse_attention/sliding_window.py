"""Sliding window: the control that keeps the latest tokens and nothing else.

What a method with sinks, votes or scores must beat at the same budget. It is the window attention
that StreamingLLM (arXiv 2309.17453, figure 1b) shows to break down once the first tokens are gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from methods.sparse_attention.common import (
    NOTHING_DROPPED,
    BudgetedAttention,
    EndsRule,
    PromptMode,
    require_prompt_mode,
    require_tokens,
)


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(BudgetedAttention):
    """The latest tokens only.

    Attributes:
        budget: Tokens whose keys and values stay after each forward.
        prompt: `dense` reads a prompt with full attention and then cuts it down; `streamed` reads
            it within the budget too, and texts may be longer than the model's context.
        chunk: Tokens of a streamed prompt that are read at once, on top of the budget.
    """

    role = "control"
    prompt: PromptMode = "dense"
    chunk: int = 16
    trial = MappingProxyType({"budget": 4})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_tokens("chunk", self.chunk, 1)
        require_prompt_mode(self.prompt)

    @property
    def longest_text(self) -> int | None:
        """No limit for streamed texts: no distance ever exceeds the budget."""
        return NOTHING_DROPPED if self.prompt == "streamed" else None

    def rule(self) -> EndsRule:
        """Return the rule of one text."""
        return EndsRule(self.budget, sinks=0, moves=False, prompt=self.prompt, chunk=self.chunk)
