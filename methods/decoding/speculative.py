"""Speculative decoding: a small model writes a few tokens ahead, the target checks them at once.

The draft model continues the text by a chain of tokens; one forward of the target reads them all.
Greedy texts keep the drafts that are the target's own choice. Sampled texts keep a draft y with
probability min(1, p(y) / q(y)) and replace the first refused one by a draw from
norm(max(p - q, 0)), so they have the target's distribution whatever the draft model says.

Source: arXiv 2211.17192, algorithm 1; the same rule in arXiv 2302.01318.
Choice of ours: a greedy text is drafted greedily (the papers' rule at temperature 0); `auto` takes
the number of drafts that the measured step cost favours (the paper's section 3.5 with lat(N) in
place of a constant target step).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from hardware.profile import Profile
from methods.checks import require_count
from methods.decoding.common_drafts import (
    DraftModelMethod,
    DrawnTree,
    MeasuredDrafts,
    ModelDrafter,
    best_size,
    draft_temperature_of,
    nearest_temperature,
    require_draft_temperature,
)
from models.base import Decoding, TextGenerator, TextModelFacts
from models.decode import greedy_choices
from models.draft_tree import DraftTree

MOST_TOKENS = 32

# Chosen for "auto" where no step cost was measured.
USUAL_TOKENS = 5

# What "auto" knows about chains of tiny-draft, by temperature of the text: measured on
# SmolLM2-135M's own texts behind 6 prompts of tests/methods/decoding/heads.py, 48 tokens each.
# `python -m tests.methods.decoding.measure_drafts smollm2-135m tiny-draft 6` prints them anew.
MEASURED: Mapping[float, MeasuredDrafts] = MappingProxyType(
    {
        0.0: MeasuredDrafts(
            drafts=(1, 2, 3, 4, 6, 8),
            tokens=(1.39, 1.52, 1.57, 1.6, 1.61, 1.61),
            forwards=(1.0, 2.0, 3.0, 4.0, 6.0, 8.0),
        ),
        0.8: MeasuredDrafts(
            drafts=(1, 2, 3, 4, 6, 8),
            tokens=(1.31, 1.42, 1.48, 1.5, 1.52, 1.52),
            forwards=(1.0, 2.0, 3.0, 4.0, 6.0, 8.0),
        ),
    }
)


class ChainDrafter(ModelDrafter):
    """Drafts a chain, token by token."""

    def propose(self, token_ids: Sequence[int], depth: int) -> DraftTree:
        """Return the draft model's own continuation of the text."""
        length = min(self.max_nodes - 1, depth)
        if self.temperature == 0:
            return DraftTree.chain(token_ids[-1], self._likeliest(token_ids, length))
        tree = self.drawn_tree(token_ids)
        grow_chain(tree, length)
        return tree.build()

    def _likeliest(self, token_ids: Sequence[int], length: int) -> list[int]:
        logits = self.draft_model.root(token_ids)[None]
        chain = greedy_choices(logits)
        while len(chain) < length:
            node = len(chain)
            logits = self.draft_model.expand([node], [node - 1], chain[-1:])
            chain += greedy_choices(logits)
        return chain


def grow_chain(tree: DrawnTree, length: int) -> None:
    """Draw a chain under the root; its last node is not read, as nothing comes after it."""
    node, row = 0, tree.root_row
    while True:
        node = tree.draw(node, row)
        if tree.drafts == length:
            return
        [row] = tree.expand([node])


@dataclass(frozen=True, kw_only=True)
class Speculative(DraftModelMethod):
    """Chains of a draft model.

    Attributes:
        num_draft_tokens: Drafted tokens in a step; `auto` takes the number that the measured step
            cost favours. 0 decodes plainly.
        draft_temperature: Of the draft distributions when the text is sampled; `target` takes the
            text's own. Greedy texts are drafted greedily.
    """

    num_draft_tokens: int | Literal["auto"] = USUAL_TOKENS
    draft_temperature: float | Literal["target"] = "target"
    neutral = MappingProxyType({"num_draft_tokens": 0})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_draft_tokens != "auto":
            require_count("num_draft_tokens", self.num_draft_tokens, 0, MOST_TOKENS, "Or 'auto'.")
        require_draft_temperature(self.draft_temperature, target_allowed=True)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is drafted."""
        return self.num_draft_tokens == 0

    def chosen_size(
        self, hardware: Profile, target: TextModelFacts, draft: TextModelFacts, decoding: Decoding
    ) -> int:
        """Return how many tokens are drafted in a step."""
        if self.num_draft_tokens != "auto":
            return self.num_draft_tokens
        measured = nearest_temperature(MEASURED, decoding.temperature)
        best = best_size(measured, hardware, target, draft)
        return USUAL_TOKENS if best is None else best

    def model_drafter(self, draft: TextGenerator, size: int, decoding: Decoding) -> ChainDrafter:
        """Return a drafter for one text."""
        temperature = draft_temperature_of(self.draft_temperature, decoding)
        if decoding.temperature == 0:
            temperature = 0.0
        return ChainDrafter(draft, decoding, size, temperature=temperature)
