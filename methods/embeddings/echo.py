"""Echo embeddings: say the text twice and pool over the second time.

The tokens of the repetition have all of the text before them, which a causal model's tokens have
not otherwise. Training-free; the price is twice the tokens.

Source: arXiv 2402.15449, section 3. Differs from it: the wording is that of its rewriting prompt,
without the chat format that instruction-tuned models have.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.checks import require_count
from methods.embeddings.common import PromptMethod, read_by
from models.base import TextEncoder
from models.encoders import CausalEncoder, Pooling, ReadOut


@dataclass(frozen=True, kw_only=True)
class Echo(PromptMethod):
    """The text twice in a prompt, read from the second time.

    Attributes:
        pooling: `mean` over the tokens of the repetition, or the prompt's `last` one.
        layer: Hidden state that is read, as transformers counts them.
        max_tokens: Tokens of the text that are kept, each time.
    """

    pooling: Pooling = "mean"
    layer: int = -1
    max_tokens: int = 128

    def __post_init__(self) -> None:
        require_count(
            "layer", self.layer, None, None, "It counts hidden states, from the end if negative."
        )
        ReadOut(prompt="echo", pooling=self.pooling, max_tokens=self.max_tokens)

    def encoder(self, model: CausalEncoder) -> TextEncoder:
        """Return the model read from the second time."""
        read_out = ReadOut(
            prompt="echo", layer=self.layer, pooling=self.pooling, max_tokens=self.max_tokens
        )
        return read_by(self, model, read_out)
