"""Echo embeddings: say the text twice and pool over the second time.

The tokens of the repetition have all of the text before them, which a causal model's tokens have
not otherwise. Training-free; the price is twice the tokens.

Source: arXiv 2402.15449, section 3. Differs from it: the wording is that of its rewriting prompt,
without the chat format that instruction-tuned models have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hardware.profile import Profile
from methods.base import Method, Output
from methods.embeddings.common import require_causal, require_whole
from models.base import TextEncoder, Unsupported
from models.encoders import Pooling, ReadOut


@dataclass(frozen=True, kw_only=True)
class Echo(Method[TextEncoder]):
    """The text twice in a prompt, read from the second time.

    Attributes:
        pooling: `mean` over the tokens of the repetition, or the prompt's `last` one.
        layer: Hidden state that is read, as transformers counts them.
        max_tokens: Tokens of the text that are kept, each time.
    """

    capability = "TextEncoder"
    output = Output.APPROXIMATE

    pooling: Pooling = "mean"
    layer: int = -1
    max_tokens: int = 128

    def __post_init__(self) -> None:
        require_whole("layer", self.layer, "It counts hidden states, from the end if negative.")
        ReadOut(prompt="echo", pooling=self.pooling, max_tokens=self.max_tokens)

    @contextmanager
    def apply(self, model: TextEncoder, hardware: Profile) -> Iterator[TextEncoder]:
        """Yield an encoder over the same weights; the model itself is not touched.

        Raises:
            models.base.Unsupported: The model is no causal language model that is read through a
                prompt, or has no such layer.
        """
        encoder = require_causal(self, model)
        read_out = ReadOut(
            prompt="echo", layer=self.layer, pooling=self.pooling, max_tokens=self.max_tokens
        )
        try:
            read_out.depth(encoder.num_layers)
        except ValueError as error:
            raise Unsupported(f"'echo' cannot read '{encoder.name}': {error}") from error
        yield encoder.configured(read_out=read_out)
