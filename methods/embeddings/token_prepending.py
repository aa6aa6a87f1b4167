"""Token Prepending: let the tokens of a sentence see its end, by one token in front of it.

In a causal model the first words of a sentence know nothing of the last ones. A placeholder is put
right before the sentence, and before each of the first few layers it becomes a copy of the
prompt's last token, so that all words behind it attend to a summary of the whole. Training-free;
the price is one token a prompt.

Source: arXiv 2412.11556; the authors' code at ab3081d. Differs from that code: the placeholder
stands at a token boundary of the plain prompt, so the prompt is one token longer and otherwise the
same, where adding a token to the tokenizer also sets the space before it apart; positions count
from each prompt's first token, where there the padding counts too; layers behind the one that is
read are not run; no model needs a token that begins a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from methods.checks import require_count
from methods.embeddings.common_placeholder import (
    Auto,
    ModelKind,
    PlaceholderMethod,
    model_kind,
    with_last_token_at,
)
from models.encoders import BeforeLayer, CausalEncoder, PromptBatch

# The released settings: the first layer that is not overwritten any more, by family and depth.
# The two Llamas of 32 layers differ by their vocabulary.
_LARGE_VOCABULARY: Final = 100_000
_RELEASED_EXITS: Final[Mapping[tuple[str, int, bool], int]] = {
    ("llama", 32, False): 7,
    ("llama", 40, False): 7,
    ("llama", 32, True): 3,
    ("qwen2", 28, True): 6,
    ("gemma2", 42, True): 6,
}
# For other models: the share of the layers that it is for Llama-2-7B.
_EXIT_SHARE: Final = 7 / 32


@dataclass(frozen=True, kw_only=True)
class TokenPrepending(PlaceholderMethod):
    """The placeholder before the sentence, overwritten with the last token in the first layers.

    Attributes:
        start: First layer whose input is overwritten, counted from 0. The input of layer 0 is only
            an embedding, so 1 is the first with something to say.
        exit: First layer that is not overwritten any more; up to `start` none is. `auto` is the
            released setting of the model, or 7/32 of the layers of one that has none.
    """

    start: int = 1
    exit: int | Auto = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("start", self.start, 0, None, "It counts layers from 0.")
        if self.exit != "auto":
            require_count("exit", self.exit, 0, None, "It counts layers from 0.")

    def before_layer(
        self, model: CausalEncoder
    ) -> tuple[BeforeLayer | None, dict[str, float | int | str]]:
        """Return the overwriting of the placeholder in the layers from `start` to `exit`."""
        if self.exit == "auto":
            stop = max(default_exit(model_kind(model)), self.start + 1)
        else:
            stop = self.exit

        def overwrite(layer: int, states: Tensor, batch: PromptBatch) -> Tensor | None:
            if not self.start <= layer < stop:
                return None
            assert batch.placeholder is not None
            return with_last_token_at(states, batch.placeholder)

        return overwrite, {"start": self.start, "exit": stop}


def default_exit(kind: ModelKind) -> int:
    """Return the released exit layer of a model, or for others 7/32 of its layers, rounded."""
    released = _RELEASED_EXITS.get(
        (kind.family, kind.num_layers, kind.vocab_size >= _LARGE_VOCABULARY)
    )
    return round(_EXIT_SHARE * kind.num_layers) if released is None else released
