"""SpecInfer: several sampled continuations, merged into one token tree and verified together.

The draft model samples `sequences` continuations independently; equal prefixes become one path.
Sampled texts are verified node by node: children in the order in which they were first drawn, each
accepted with probability min(1, R(y) / D(y)), the residual going to the next one.

Source: arXiv 2305.09781: merged trees (definition 3.2), multi-step speculative sampling (algorithm
2), here with one draft model.
Differs from the paper: a merged tree holds each child once, and the first appearances among
independent draws are draws *without* replacement. D is therefore the draft distribution without the
children tried before, normalised; with the full distribution, as printed, the text would not have
the target's distribution. Children are tried in drawing order, not in random order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from hardware.profile import Profile
from methods.checks import require_count
from methods.decoding.common_drafts import (
    Choose,
    DraftModelMethod,
    DraftRow,
    DrawnTree,
    MeasuredDrafts,
    ModelDrafter,
    best_size,
    nearest_temperature,
    require_draft_temperature,
)
from models.base import Decoding, TextGenerator, TextModelFacts
from models.draft_tree import DraftTree

MOST_NODES = 256
USUAL_TOKENS = 4

# What "auto" knows about 4 merged sequences of tiny-draft, by temperature of the text; sizes count
# the nodes before merging. Measured on SmolLM2-135M's own texts behind 6 prompts
# of tests/methods/decoding/heads.py, 48 tokens each. `python -m
# tests.methods.decoding.measure_drafts smollm2-135m tiny-draft 6` prints them anew.
MEASURED_SEQUENCES = 4
MEASURED: Mapping[float, MeasuredDrafts] = MappingProxyType(
    {
        0.0: MeasuredDrafts(
            drafts=(4, 8, 16, 32),
            tokens=(1.45, 1.59, 1.68, 1.73),
            forwards=(0.98, 1.94, 3.86, 7.25),
        ),
        0.8: MeasuredDrafts(
            drafts=(4, 8, 16, 32),
            tokens=(1.40, 1.75, 1.75, 1.75),
            forwards=(0.98, 1.93, 3.86, 7.11),
        ),
    }
)


class SequencesDrafter(ModelDrafter):
    """Draws several continuations, level by level."""

    def __init__(
        self,
        draft: TextGenerator,
        decoding: Decoding,
        sequences: int,
        length: int,
        *,
        temperature: float,
        choose: Choose | None = None,
    ) -> None:
        super().__init__(
            draft, decoding, sequences * length, temperature=temperature, choose=choose
        )
        self._sequences = sequences
        self._length = length

    def propose(self, token_ids: Sequence[int], depth: int) -> DraftTree:
        """Return the merged continuations."""
        tree = self.drawn_tree(token_ids)
        grow_sequences(tree, self._sequences, min(self._length, depth))
        return tree.build()


def grow_sequences(tree: DrawnTree, sequences: int, length: int) -> None:
    """Draw independent continuations of the root and merge their common prefixes.

    Args:
        tree: The root alone.
        sequences: Continuations.
        length: Tokens of each.
    """
    level = [(0, tree.root_row, sequences)]
    for depth in range(1, length + 1):
        passing: dict[int, int] = {}
        for node, row, count in level:
            for child in _draw_children(tree, node, row, count):
                passing[child] = passing.get(child, 0) + 1
        if depth < length:
            rows = tree.expand(list(passing))
            level = [
                (child, row, count)
                for (child, count), row in zip(passing.items(), rows, strict=True)
            ]


def _draw_children(tree: DrawnTree, node: int, row: DraftRow, count: int) -> list[int]:
    """Return the child that each of `count` independent draws leads to."""
    children: dict[int, int] = {}
    # All draws come before the first child takes its token out of the row: they are independent.
    drawn = [tree.choose(row) for _ in range(count)]
    for token in drawn:
        if token not in children:
            children[token] = tree.add(node, row, token)
    return [children[token] for token in drawn]


@dataclass(frozen=True, kw_only=True)
class SpecInfer(DraftModelMethod):
    """Trees of merged samples.

    Attributes:
        sequences: Continuations sampled in a step.
        num_draft_tokens: Tokens of each; `auto` takes the number that the measured step cost
            favours. 0 decodes plainly.
        draft_temperature: Of the draft distributions.
    """

    sequences: int = MEASURED_SEQUENCES
    num_draft_tokens: int | Literal["auto"] = USUAL_TOKENS
    draft_temperature: float = 0.6
    neutral = MappingProxyType({"num_draft_tokens": 0})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("sequences", self.sequences, 1, 64, "They are merged into one tree.")
        if self.num_draft_tokens != "auto":
            most = MOST_NODES // self.sequences
            require_count("num_draft_tokens", self.num_draft_tokens, 0, most, "Or 'auto'.")
        require_draft_temperature(self.draft_temperature, target_allowed=False)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is drafted."""
        return self.num_draft_tokens == 0

    def chosen_size(
        self, hardware: Profile, target: TextModelFacts, draft: TextModelFacts, decoding: Decoding
    ) -> int:
        """Return the tokens of a sequence."""
        if self.num_draft_tokens != "auto":
            return self.num_draft_tokens
        measured = nearest_temperature(MEASURED, decoding.temperature)
        best = best_size(measured, hardware, target, draft)
        return USUAL_TOKENS if best is None else round(best / self.sequences)

    def model_drafter(
        self, draft: TextGenerator, size: int, decoding: Decoding
    ) -> SequencesDrafter:
        """Return a drafter for one text."""
        return SequencesDrafter(
            draft, decoding, self.sequences, size, temperature=self.draft_temperature
        )
