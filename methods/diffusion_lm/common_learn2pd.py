"""A learned filter on a block's confidences, the oracle that it imitates, and where texts end.

The filter is two small layers: it reads how sure the model is at every position of the block and
says for each with what probability the candidate there is already the token that one-at-a-time
decoding will end with. What it was trained on is in `common_learn2pd_training`.

Source: arXiv 2509.25188; ims-kdks/Learning-to-Parallel-Decoding at 342293c (LLaDA's sampler).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from methods.diffusion_lm.common import RuledModel
from models.base import Decoding, Generation
from models.masked_diffusion_decode import (
    Ending,
    Step,
    View,
    decode,
    decode_rows,
    surest,
)

DATA = Path(__file__).parent / "data"

FilterKind = Literal["block", "shared"]
EndPrediction = Literal["none", "filter", "shrink"]

# What a position counts as that is behind the block's or the text's end: nothing left to settle.
SETTLED = 1.0


class Filter(Protocol):
    """Says of every position of a block whether what the model would write there is final."""

    def probabilities(self, confidence: Tensor) -> Tensor:
        """Return the probability that each candidate is final.

        Args:
            confidence: Of the candidates, written positions included, (rows, positions), in [0, 1].

        Returns:
            The same shape.
        """
        ...


class ConfidenceFilter:
    """Takes the model's own confidence for that probability: a threshold, nothing learned."""

    def probabilities(self, confidence: Tensor) -> Tensor:
        """See `Filter.probabilities`."""
        return confidence


class LearnedFilter(NamedTuple):
    """Two linear layers with a ReLU between them.

    Of kind `block` they read all positions of a block at once, so that each is judged by its
    neighbours too; of kind `shared` the same small network reads every position by itself.

    Attributes:
        hidden_weight: (hidden, inputs), float32; inputs is the block's length, or 1 if shared.
        hidden_bias: (hidden,).
        output_weight: (inputs, hidden).
        output_bias: (inputs,).
    """

    hidden_weight: Tensor
    hidden_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor

    @property
    def width(self) -> int | None:
        """Positions that are read at once; None where each is read by itself."""
        inputs = self.hidden_weight.shape[1]
        return None if inputs == 1 else inputs

    @property
    def kind(self) -> FilterKind:
        """Whether a position's neighbours are read too."""
        return "shared" if self.width is None else "block"

    def logits(self, confidence: Tensor) -> Tensor:
        """Return log-odds that each candidate is final, (rows, positions), float32.

        Raises:
            ValueError: There are more positions than the filter was trained for.
        """
        values = confidence.float()
        positions = values.shape[1]
        if self.width is None:
            values = values[..., None]
        elif positions > self.width:
            raise ValueError(
                f"the filter reads blocks of {self.width} positions, got {positions}: one for "
                "another length has to be trained for it."
            )
        else:
            values = F.pad(values, (0, self.width - positions), value=SETTLED)
        hidden = F.relu(F.linear(values, self.hidden_weight, self.hidden_bias))
        found = F.linear(hidden, self.output_weight, self.output_bias)
        return found[..., 0] if self.width is None else found[:, :positions]

    def probabilities(self, confidence: Tensor) -> Tensor:
        """See `Filter.probabilities`."""
        return self.logits(confidence).sigmoid()


def new_filter(kind: FilterKind, block_length: int, hidden: int, seed: int) -> LearnedFilter:
    """Return a filter with random weights, as torch's linear layers begin."""
    inputs = 1 if kind == "shared" else block_length
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, fan_in: int) -> Tensor:
        return (2 * torch.rand(*shape, generator=generator) - 1) / fan_in**0.5

    return LearnedFilter(
        uniform(hidden, inputs, fan_in=inputs),
        uniform(hidden, fan_in=inputs),
        uniform(inputs, hidden, fan_in=hidden),
        uniform(inputs, fan_in=hidden),
    )


def filter_path(model_name: str, kind: FilterKind, folder: Path = DATA) -> Path:
    """Return where the filter of a model lies that comes with the project."""
    slug = re.sub(r"[^a-z0-9]+", "_", model_name.lower()).strip("_")
    return folder / f"learn2pd_{slug}_{kind}.safetensors"


def save_filter(found: LearnedFilter, path: Path, facts: Mapping[str, Any]) -> None:
    """Write a filter, and beside it as JSON what is known about it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().contiguous() for name, value in found._asdict().items()}
    save_file(tensors, path, metadata={"format": "pt", "kind": found.kind})
    text = json.dumps(facts, indent=2, sort_keys=True) + "\n"
    path.with_suffix(".json").write_text(text, encoding="utf-8")


def load_filter(path: Path) -> LearnedFilter:
    """Read a filter; one that was read before and has not changed since is in memory.

    Raises:
        ValueError: The file is not one.
    """
    return _read_filter(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _read_filter(path: Path, modified: int) -> LearnedFilter:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in LearnedFilter._fields}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} holds no filter: {error}") from error
    found = LearnedFilter(**{name: value.float() for name, value in tensors.items()})
    hidden, inputs = found.hidden_weight.shape
    shapes = [tuple(value.shape) for value in found]
    if shapes != [(hidden, inputs), (hidden,), (inputs, hidden), (inputs,)]:
        raise ValueError(f"{path} holds no filter of two layers: its shapes are {shapes}.")
    return found


# --- deciding -------------------------------------------------------------------------------------


class FilterRule:
    """Write what the filter accepts, and in any case the surest mask, so that the loop goes on."""

    def __init__(self, judge: Filter, threshold: float) -> None:
        """Take a filter.

        Args:
            judge: The filter.
            threshold: Probability above which a candidate is accepted.
        """
        self._judge = judge
        self._threshold = threshold
        self._accepted = self._forced = 0

    @property
    def notes(self) -> Mapping[str, float | int | str]:
        """Tokens that the filter accepted, and those written although it did not."""
        return {"filter_accepted": self._accepted, "forced": self._forced}

    def accepted(self, block: View) -> Tensor:
        """Return the masks that the filter accepts, (rows, positions), bool."""
        return block.is_mask & (self._judge.probabilities(block.confidence) > self._threshold)

    def select(self, step: Step) -> Tensor:
        """See `models.masked_diffusion_decode.Rule.select`."""
        accepted = self.accepted(step.block)
        chosen = accepted | surest(step.block, 1)
        self._accepted += int(accepted.sum())
        self._forced += int((chosen & ~accepted).sum())
        return chosen


class PredictedEnd:
    """Cut the answer where its end is predicted (the paper's EoTP), after every step.

    The first end of text that the filter accepts ends the row. Else, with `shrink`, the surest end
    of text does among all that the forward saw as masks, whether it was written or is a mask still:
    far away at first, nearer step by step. The canvas that is left may be of a length on which the
    model was never trained. Nothing that was written is cut off but ends of text: the authors' code
    would drop tokens behind an accepted end, which no text shows, here the row is kept up to them.
    """

    def __init__(
        self, rule: FilterRule, eos_ids: frozenset[int], *, shrinks: bool, otherwise: Ending
    ) -> None:
        """Watch a rule.

        Args:
            rule: Whose acceptance counts.
            eos_ids: Ends of text.
            shrinks: Also cut at the surest predicted end.
            otherwise: Says whether the text is over with a finished block.
        """
        self._rule = rule
        self._eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.int64)
        self.looks_ahead = shrinks
        self._otherwise = otherwise
        # Answer tokens of each row up to the last written one that is no end.
        self._written: dict[int, int] = {}

    def cut(self, step: Step, chosen: Tensor) -> Tensor | None:
        """See `models.masked_diffusion_decode.Ending.cut`."""
        ends = torch.isin(step.block.candidates, self._eos_ids)
        for row, fresh in zip(step.rows, chosen & ~ends, strict=True):
            places = fresh.nonzero()
            if len(places):
                last = step.offset + int(places[-1]) + 1
                self._written[row] = max(last, self._written.get(row, 0))
        predicted = first_true(self._rule.accepted(step.block) & ends)
        if step.ahead is not None:
            surest_end = likeliest_end(step.ahead, self._eos_ids)
            predicted = torch.where(predicted < 0, surest_end, predicted)
        if bool((predicted < 0).all()):
            return None
        written = torch.tensor([self._written.get(row, 0) for row in step.rows])
        kept = torch.maximum(step.offset + predicted + 1, written)
        return torch.where(predicted < 0, NOT_CUT, kept)

    def is_over(self, block: Tensor) -> Tensor:
        """See `models.masked_diffusion_decode.Ending.is_over`."""
        return self._otherwise.is_over(block)


NOT_CUT = 2**40
"""Tokens that a row keeps which is not cut: more than any has."""


def first_true(values: Tensor) -> Tensor:
    """Return the first true column of each row, -1 where there is none, (rows,), int64."""
    return torch.where(values.any(dim=1), values.int().argmax(dim=1), -1)


def likeliest_end(ahead: View, eos_ids: Tensor) -> Tensor:
    """Return where the surest end of text among the masks stands, -1 where there is none.

    Args:
        ahead: The current block and what follows it.
        eos_ids: Ends of text.

    Returns:
        Places in `ahead`, the first among equals, (rows,), int64.
    """
    is_end = ahead.is_mask & torch.isin(ahead.candidates, eos_ids)
    confidence = ahead.confidence.masked_fill(~is_end, -torch.inf)
    return torch.where(is_end.any(dim=1), confidence.argmax(dim=1), -1)


# --- knowing --------------------------------------------------------------------------------------


@dataclass
class Records:
    """What the oracle saw: one row for each forward of each text.

    Attributes:
        confidence: Of all positions of the block, (records, positions), float32; 1 behind its end.
        label: Whether the candidate was the final token, (records, positions), bool.
        text: Which text it was, (records,), int64.
    """

    confidence: list[Tensor] = field(default_factory=list)
    label: list[Tensor] = field(default_factory=list)
    text: list[int] = field(default_factory=list)


class OracleRule:
    """Write every candidate that is already the final token (Extremely Greedy Parallel).

    Where none is, no later forward of the block would find one either, because nothing has
    changed: the rest of the block is then written as it ends up, and the next block begins. The
    authors' code sees that one forward later, by candidates that have not changed.
    """

    def __init__(self, finals: Sequence[Sequence[int]], records: Records | None = None) -> None:
        """Take what is to come.

        Args:
            finals: The answer of each row of the batch by another decoder, all of one length.
            records: Where to keep what is seen; nowhere when None.
        """
        self._finals = torch.tensor(finals, dtype=torch.int64)
        self._records = records
        self._deadlocks = 0

    @property
    def notes(self) -> Mapping[str, float | int | str]:
        """Blocks that were given up and written as they end up."""
        return {"deadlocks": self._deadlocks}

    def select(self, step: Step) -> Tensor:
        """See `models.masked_diffusion_decode.Rule.select`."""
        block = step.block
        width = block.is_mask.shape[1]
        finals = self._finals[list(step.rows), step.offset : step.offset + width]
        right = block.candidates == finals
        if self._records is not None:
            self._records.confidence += list(block.confidence.float())
            self._records.label += list(right)
            self._records.text += step.rows
        stuck = ~(right & block.is_mask).any(dim=1, keepdim=True)
        self._deadlocks += int(stuck.sum())
        # What is written in a row that is stuck are its final tokens, whatever the candidates.
        block.candidates.copy_(torch.where(stuck, finals, block.candidates))
        return block.is_mask & (right | stuck)


class ForesightModel(RuledModel):
    """A masked-diffusion model that decodes every text twice, the second time knowing it.

    What no filter can beat: the text is the plain decoder's by construction, and the forwards are
    those that it took at least. Time is that of both decodings, so only counts mean anything; those
    of the first decoding stand apart, as draft forwards. Its rule is the first decoding's.
    """

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        """Continue `prompt_ids`."""
        rule, ending = self._make_parts(decoding)
        (final,) = decode_rows(
            self._model,
            [prompt_ids],
            decoding,
            rule=rule,
            ending=ending,
            procedure=self._procedure,
        )
        _, ending = self._make_parts(decoding)
        found = decode(
            self._model,
            prompt_ids,
            decoding,
            rule=OracleRule([final.answer]),
            ending=ending,
            procedure=self._procedure,
        )
        found.trace.draft_forwards = len(final.forwards)
        return found
