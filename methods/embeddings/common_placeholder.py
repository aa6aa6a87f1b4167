"""What methods with a placeholder token share: its noise, its place, and where the vector is read.

The token is a row of numbers, not an entry of the tokenizer: nothing is added to the model, and
nothing has to be taken away again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from methods.checks import require_count
from methods.embeddings.common import PromptMethod, read_by
from models.base import EncoderFacts, Encoding, TextEncoder
from models.encoders import BeforeLayer, CausalEncoder, ReadOut

QuotingPrompt = Literal["plain", "prompteol", "cot", "knowledge", "metaeol"]
Auto = Literal["auto"]

# Of the released settings the one whose layer is not the last but one.
_LLAMA_2_7B: Final = ("llama", 32, 32_000)
_LLAMA_2_7B_PROMPTEOL_LAYER: Final = 27


class ModelKind(NamedTuple):
    """What the defaults of a model depend on."""

    family: str
    num_layers: int
    vocab_size: int


def model_kind(model: CausalEncoder) -> ModelKind:
    """Return the family of a model, as transformers calls it, and its sizes."""
    config = model.module.config.get_text_config()
    return ModelKind(str(config.model_type), model.num_layers, int(config.vocab_size))


def default_layer(kind: ModelKind, prompt: QuotingPrompt) -> int:
    """Return the layer that the released settings read: the last but one, but for one model.

    Source: the settings released with arXiv 2412.11556, which name -2 for all models but
    Llama-2-7B with PromptEOL, and that as transformers counts hidden states.
    """
    return _LLAMA_2_7B_PROMPTEOL_LAYER if (*kind, prompt) == (*_LLAMA_2_7B, "prompteol") else -2


def placeholder_row(dimension: int, seed: int, std: float) -> Tensor:
    """Return the embedding of the placeholder: normal noise, (dimension,), float32.

    The same on every device, and drawn without touching torch's own random state.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dimension, generator=generator) * std


def with_last_token_at(states: Tensor, columns: Tensor) -> Tensor:
    """Return hidden states in which one token of each row has become a copy of its last one.

    Args:
        states: (batch, tokens, dimension); left as they are.
        columns: The token of each row that is overwritten, (batch,), int64.
    """
    changed = states.clone()
    changed[torch.arange(len(states), device=states.device), columns] = states[:, -1]
    return changed


class PlaceholderEncoder:
    """A text encoder whose prompts hold the placeholder; facts are those of what it runs."""

    def __init__(
        self,
        model: CausalEncoder,
        row: Tensor,
        before_layer: BeforeLayer | None,
        notes: dict[str, float | int | str],
    ) -> None:
        """Wrap an encoder.

        Args:
            model: With the read-out that is wanted; not changed.
            row: Embedding of the placeholder, (dimension,).
            before_layer: What happens to the input of each layer; nothing when None.
            notes: What the method settled for this model, noted in every trace.
        """
        self._model = model
        self._row = row
        self._before_layer = before_layer
        self._notes = notes
        self.name = model.name
        self.facts: EncoderFacts = model.facts

    def encode(self, texts: Sequence[str]) -> Encoding:
        """Embed texts, each prompt one token longer than without the placeholder."""
        encoding = self._model.embed(texts, before_layer=self._before_layer, placeholder=self._row)
        encoding.trace.notes.update(self._notes)
        return encoding

    def synchronize(self) -> None:
        """Wait until the device has finished what it was given."""
        self._model.synchronize()


@dataclass(frozen=True, kw_only=True)
class PlaceholderMethod(PromptMethod):
    """A method that puts one token of noise right before the quoted sentence.

    Attributes:
        prompt: Template around the text; `plain` is the bare text, with the placeholder in front.
        layer: Hidden state that is read, as transformers counts them; layers behind it are not
            run. `auto` is the released setting: 27 for PromptEOL on Llama-2-7B, else -2.
        max_tokens: Tokens of the text that are kept; the prompt around it is never cut.
        pst_seed: Seed of the placeholder's noise; results over several show what it decides.
        pst_std: Standard deviation of the noise, above 0.
    """

    prompt: QuotingPrompt = "prompteol"
    layer: int | Auto = "auto"
    max_tokens: int = 128
    pst_seed: int = 3407
    pst_std: float = 1.0

    def __post_init__(self) -> None:
        if self.prompt not in get_args(QuotingPrompt):
            raise ValueError(
                f"prompt must be one of {', '.join(get_args(QuotingPrompt))}, got {self.prompt!r}."
            )
        if self.layer != "auto":
            require_count(
                "layer",
                self.layer,
                None,
                None,
                "It counts hidden states, from the end if negative.",
            )
        require_count("max_tokens", self.max_tokens, 1, None, "It is counted in tokens.")
        require_count("pst_seed", self.pst_seed, 0, None, "It seeds the placeholder's noise.")
        if not 0 < self.pst_std < float("inf"):
            raise ValueError(f"pst_std must be above 0 and finite, got {self.pst_std}.")

    @abstractmethod
    def before_layer(
        self, model: CausalEncoder
    ) -> tuple[BeforeLayer | None, dict[str, float | int | str]]:
        """Return what happens to the input of each layer, and what was settled for this model."""

    def encoder(self, model: CausalEncoder) -> TextEncoder:
        """Return the model with the placeholder in its prompts."""
        layer = (
            default_layer(model_kind(model), self.prompt) if self.layer == "auto" else self.layer
        )
        read_out = ReadOut(prompt=self.prompt, layer=layer, max_tokens=self.max_tokens)
        before_layer, notes = self.before_layer(model)
        return PlaceholderEncoder(
            read_by(self, model, read_out),
            placeholder_row(model.dimension, self.pst_seed, self.pst_std),
            before_layer,
            notes,
        )
