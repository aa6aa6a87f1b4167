"""Encode: the encoder as it is, what every gain and every second is taken against.

A sentence encoder pools in its own way. A causal language model has none: by default it is asked
for one word (PromptEOL) and read at its last token behind the last layer. Other prompts, layers and
poolings are the rivals that a method has to beat: `prompt=plain,pooling=mean` is mean pooling.

Source of the prompts: arXiv 2307.16645 (PromptEOL), 2404.03921 (Pretended-CoT, Knowledge),
2402.18458 (MetaEOL).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from hardware.profile import Profile
from methods.base import Method, Output
from methods.checks import require_count
from methods.embeddings.common import read_by
from models.base import TextEncoder, Unsupported
from models.encoders import Batching, CausalEncoder, Pooling, PromptName, ReadOut, SentenceEncoder

Prompt = PromptName | Literal["auto"]
PoolingChoice = Pooling | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class Encode(Method[TextEncoder]):
    """The encoder itself, with its read-out spelled out.

    Attributes:
        prompt: Template around the text for a causal language model; `plain` is the bare text,
            `auto` is PromptEOL.
        layer: Hidden state that is read, as transformers counts them; layers behind it are not
            run. -1 is the output of the model.
        pooling: `last` token, `mean` over the text's tokens; `auto` is `last`.
        max_tokens: Tokens of the text that are kept, in a sentence encoder with its special ones.
        batch_size: Prompts of one forward.
        sort_by_length: Longest first, so that little is padded.
    """

    capability = "TextEncoder"
    role = "baseline"
    # Two read-outs of one model are two embeddings.
    output = Output.APPROXIMATE
    neutral = MappingProxyType({})

    prompt: Prompt = "auto"
    layer: int = -1
    pooling: PoolingChoice = "auto"
    max_tokens: int = 128
    batch_size: int = 16
    sort_by_length: bool = True

    def __post_init__(self) -> None:
        prompts, poolings = ("auto", *get_args(PromptName)), ("auto", *get_args(Pooling))
        if self.prompt not in prompts:
            raise ValueError(f"prompt must be one of {', '.join(prompts)}, got {self.prompt!r}.")
        if self.pooling not in poolings:
            raise ValueError(f"pooling must be one of {', '.join(poolings)}, got {self.pooling!r}.")
        require_count(
            "layer", self.layer, None, None, "It counts hidden states, from the end if negative."
        )
        require_count("max_tokens", self.max_tokens, 1, None, "It is counted in tokens.")
        require_count("batch_size", self.batch_size, 1, None, "It is counted in prompts.")

    @contextmanager
    def apply(self, model: TextEncoder, hardware: Profile) -> Iterator[TextEncoder]:
        """Yield an encoder over the same weights; the model itself is not touched.

        Raises:
            models.base.Unsupported: The model is no encoder, has a pooling of its own where another
                one is asked for, or lacks the layer.
        """
        batching = Batching(batch_size=self.batch_size, sort_by_length=self.sort_by_length)
        if isinstance(model, CausalEncoder):
            read_out = ReadOut(
                prompt="prompteol" if self.prompt == "auto" else self.prompt,
                layer=self.layer,
                pooling="last" if self.pooling == "auto" else self.pooling,
                max_tokens=self.max_tokens,
            )
            yield read_by(self, model, read_out).configured(batching=batching)
            return
        name = getattr(model, "name", type(model).__name__)
        if not isinstance(model, TextEncoder):
            raise Unsupported(
                f"'encode' needs a text encoder; '{name}' is a {type(model).__name__}."
            )
        if (self.prompt, self.layer, self.pooling) != ("auto", -1, "auto"):
            raise Unsupported(
                f"'{name}' has a pooling of its own: prompt, layer and pooling are settings of "
                f"causal language models."
            )
        if isinstance(model, SentenceEncoder):
            yield model.configured(max_tokens=self.max_tokens, batching=batching)
        else:
            yield model
