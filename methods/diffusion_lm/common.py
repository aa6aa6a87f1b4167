"""What decoders of masked-diffusion models share: settings, selection rules, the early stop.

The loop itself is `models.masked_diffusion_decode.decode`; a method brings a rule.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from hardware.profile import Profile
from methods.base import Method, Output
from methods.checks import method_name, require_choice, require_count
from models.base import (
    Canvas,
    Decoding,
    Generation,
    MaskedDiffusionFacts,
    MaskedDiffusionLM,
    Unsupported,
)
from models.masked_diffusion_decode import (
    BLOCK_LENGTH,
    Cache,
    Confidence,
    Ending,
    NeverOver,
    Procedure,
    Rule,
    Step,
    View,
    decode,
    surest,
)
from models.wrapper import Wrapper


class RuledModel(Wrapper):
    """A masked-diffusion model whose texts are filled in by a rule; all else is its own."""

    facts: MaskedDiffusionFacts

    def __init__(
        self,
        model: MaskedDiffusionLM,
        make_parts: Callable[[Decoding], tuple[Rule, Ending]],
        procedure: Procedure,
    ) -> None:
        super().__init__(model)
        self._make_parts = make_parts
        self._procedure = procedure

    def canvas(self, padding: Sequence[int], length: int, *, keeps: bool) -> Canvas:
        """Open a batch of rows of the wrapped model."""
        canvas: Canvas = self._model.canvas(padding, length, keeps=keeps)
        return canvas

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        """Continue `prompt_ids` with a fresh rule and ending."""
        rule, ending = self._make_parts(decoding)
        return decode(
            self._model,
            prompt_ids,
            decoding,
            rule=rule,
            ending=ending,
            procedure=self._procedure,
        )


@dataclass(frozen=True, kw_only=True)
class DiffusionMethod(Method[MaskedDiffusionLM]):
    """A method that is a selection rule on the shared loop.

    Attributes:
        block_length: Masks of a block. It changes the quality of the plain decoder too: methods
            are compared at the same one.
        cache: What is run at a step but the first of a block: everything (`none`), all but what is
            before the block (`prefix`), or the block (`dual`).
        early_stop: Fill in nothing behind a finished block that holds an end of text.
        confidence: What says how sure the model is: `probability`, `margin` or `entropy`.
        defer_eos: End the text only where no other candidate is left.
    """

    capability = "MaskedDiffusionLM"
    owns_loop = True
    output = Output.APPROXIMATE

    block_length: int = BLOCK_LENGTH
    cache: Cache = "none"
    early_stop: bool = False
    confidence: Confidence = "probability"
    defer_eos: bool = False

    def __post_init__(self) -> None:
        require_count("block_length", self.block_length, 1, None, "It is counted in tokens.")
        require_choice("cache", self.cache, get_args(Cache))
        require_choice("confidence", self.confidence, get_args(Confidence))

    def require_threshold(self, name: str, value: float) -> None:
        """Raise ValueError unless `value` can be compared with the confidence in use."""
        low = -math.inf if self.confidence == "entropy" else 0.0
        if not value >= low:
            raise ValueError(
                f"{name} must be at least {low:g}, got {value!r}. It is compared with the "
                f"confidence, here the {self.confidence}; one that none reaches writes one token a "
                f"step."
            )

    @abstractmethod
    def rule(self, model: MaskedDiffusionLM, decoding: Decoding) -> Rule:
        """Return a rule for one batch of texts.

        Raises:
            models.base.Unsupported: The model lacks what the rule needs.
        """

    def ending(self, model: MaskedDiffusionLM) -> Ending:
        """Return what says where a text is over, for one batch of texts."""
        return StopBehindEos(model.facts.eos_ids) if self.early_stop else NeverOver()

    def procedure(self) -> Procedure:
        """Return how the loop runs."""
        return Procedure(
            block_length=self.block_length,
            cache=self.cache,
            confidence=self.confidence,
            defers_eos=self.defer_eos,
        )

    @contextmanager
    def apply(self, model: MaskedDiffusionLM, hardware: Profile) -> Iterator[MaskedDiffusionLM]:
        """Yield the model with its texts filled in by the rule; it is not touched itself."""
        require_masked_diffusion(self, model)
        yield RuledModel(
            model,
            lambda decoding: (self.rule(model, decoding), self.ending(model)),
            self.procedure(),
        )


def require_masked_diffusion(method: Method[MaskedDiffusionLM], model: object) -> None:
    """Raise `Unsupported` unless the model fills in masks."""
    if not isinstance(model, MaskedDiffusionLM):
        name = getattr(model, "name", type(model).__name__)
        raise Unsupported(
            f"'{method_name(method)}' needs a masked-diffusion language model; '{name}' is a "
            f"{type(model).__name__}."
        )


class FixedNumber:
    """Write a number of tokens set beforehand, the surest ones (LLaDA's `steps`).

    A block of n masks takes ceil(n / tokens_per_step) steps. Each writes n over that number,
    rounded down, and what is left over goes to the first steps, one each.
    """

    notes: Mapping[str, float | int | str] = {}

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step

    def select(self, step: Step) -> Tensor:
        """See `models.masked_diffusion_decode.Rule.select`."""
        masks = step.block.is_mask.sum(dim=1)
        return surest(step.block, self.count(masks, step.block.is_mask.shape[1], step.number))

    def count(self, masks: Tensor, block: int, number: int) -> Tensor:
        """Return how many tokens a step writes.

        Args:
            masks: Masks left in each row's block, (rows,).
            block: Masks that it began with.
            number: Steps that were before.
        """
        steps = -(-block // self._tokens_per_step)
        share = block // steps + (number < block % steps)
        # A row that was cut short in the block may have fewer left.
        return masks.clamp(max=share)


class OverThreshold:
    """Write every token that is sure enough, and in any case the surest (Fast-dLLM)."""

    notes: Mapping[str, float | int | str] = {}

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def select(self, step: Step) -> Tensor:
        """See `models.masked_diffusion_decode.Rule.select`."""
        return over_threshold(step.block, self._threshold)


def over_threshold(view: View, threshold: float | Tensor) -> Tensor:
    """Choose masks whose confidence reaches a threshold, and the surest of each row.

    Args:
        view: Positions to choose from.
        threshold: One for all, or one a position, (rows, positions). Equal reaches it.

    Returns:
        (rows, positions), bool.
    """
    return (view.is_mask & (view.confidence >= threshold)) | surest(view, 1)


class StopBehindEos:
    """The text is over with the first finished block that holds an end of text."""

    looks_ahead = False

    def __init__(self, eos_ids: frozenset[int]) -> None:
        self._eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.int64)

    def cut(self, step: Step, chosen: Tensor) -> None:
        """Cut nothing inside a block."""

    def is_over(self, block: Tensor) -> Tensor:
        """Return which rows hold an end of text."""
        return torch.isin(block, self._eos_ids).any(dim=1)
