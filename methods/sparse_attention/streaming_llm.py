"""StreamingLLM: keep the first few tokens, where attention sinks, and the latest ones.

Full attention needs all tokens, a plain window breaks down once the first tokens leave it; four of
these beside a window keep a model stable on endless text. Positions are those within the cache: a
token's distance to the next is never more than the budget.

Source: arXiv 2309.17453, section 3.2; mit-han-lab/streaming-llm, whose cache holds `start_size` and
`recent_size` tokens after each forward and whose example reads a prompt with full attention first.
Differs from that code: `streamed` reads a prompt in chunks, each after room for the last was made.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from methods.sparse_attention.common import (
    EndsRule,
    LatestAttention,
    require_tokens,
)


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(LatestAttention):
    """Attention sinks and a window.

    Attributes:
        budget: Tokens whose keys and values stay after each forward, sinks included.
        sinks: First tokens of the text that stay for good.
    """

    sinks: int = 4
    trial = MappingProxyType({"budget": 6, "sinks": 2})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_tokens("sinks", self.sinks, 0)
        if self.sinks >= self.budget:
            raise ValueError(
                f"sinks must be fewer than budget, got {self.sinks} and {self.budget}: the latest "
                "tokens are part of the budget."
            )

    def rule(self) -> EndsRule:
        """Return the rule of one text."""
        return EndsRule(
            self.budget, sinks=self.sinks, moves=True, prompt=self.prompt, chunk=self.chunk
        )
