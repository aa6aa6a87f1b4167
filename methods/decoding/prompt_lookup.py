"""Prompt lookup: draft what followed the last few tokens where they stood before.

The longest suffix of the text, of at most `max_ngram_size` tokens, is looked up in the text itself;
what followed it there is drafted as a chain. Training-free, no state beyond the text.

Source: apoorvumang/prompt-lookup-decoding; `PromptLookupCandidateGenerator` of transformers 5.23,
whose choices are kept: leftmost occurrence, cut before end-of-text, no second try at another match.
Differs from it: n-grams are indexed as the text grows, so a step does not search the whole text,
and drafts stop where the text would be cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from hardware.profile import Profile
from methods.checks import require_choice, require_count
from methods.decoding.common import DecodingMethod, calibrated_nodes, middle_context
from models.base import TextGenerator
from models.decode import Accepted
from models.draft_tree import DraftTree

MOST_TOKENS = 64

# Chosen for "auto" where no step cost was measured.
PUBLISHED_TOKENS = 10

# What "auto" knows about drafts: the share of steps that find one, and the share of drafts of which
# at least the first n tokens are accepted. Measured with 10 tokens and 2-grams on SmolLM2-135M-
# Instruct, greedy, 96 new tokens after each of the 16 function heads in
# tests/methods/decoding/test_rank_statistics.py: 450 of 956 steps drafted.
MATCH_SHARE = 0.47
SURVIVAL = (0.320, 0.193, 0.156, 0.093, 0.071, 0.060, 0.049, 0.049, 0.047, 0.042)


class NgramIndex:
    """Where each n-gram of a growing text was followed by another token, first or last.

    Args:
        max_size: Longest n-gram, at least 1.
        keep: `first` remembers an n-gram's leftmost occurrence, `last` its latest.
    """

    def __init__(self, max_size: int, keep: Literal["first", "last"]) -> None:
        self._max_size = max_size
        self._keep_first = keep == "first"
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0  # n-grams that end before this position are in the index

    def lookup(self, token_ids: Sequence[int]) -> int | None:
        """Return the position after the found occurrence of the longest known suffix.

        Args:
            token_ids: The whole text; each call's text continues that of the call before.
        """
        # An n-gram that ends the text has no follower yet, so it stays out: no match with itself.
        for end in range(max(1, self._indexed), len(token_ids)):
            for size in range(1, min(self._max_size, end) + 1):
                ngram = tuple(token_ids[end - size : end])
                if self._keep_first:
                    self._ends.setdefault(ngram, end)
                else:
                    self._ends[ngram] = end
        self._indexed = len(token_ids)
        for size in range(min(self._max_size, len(token_ids) - 1), 0, -1):
            if (found := self._ends.get(tuple(token_ids[-size:]))) is not None:
                return found
        return None


class LookupDrafter:
    """Drafts a chain from the text itself."""

    wants_prompt_logits = False

    def __init__(self, index: NgramIndex, num_tokens: int, eos_ids: frozenset[int]) -> None:
        self._index = index
        self._num_tokens = num_tokens
        self._eos_ids = eos_ids
        self.max_nodes = 1 + num_tokens
        self.notes: Mapping[str, float | int | str] = {"num_tokens": num_tokens}

    def begin(self, prompt_ids: Sequence[int], logits: Tensor) -> None:
        """Index the prompt, which belongs to the prefill."""
        self._index.lookup(prompt_ids)

    def draft(self, token_ids: Sequence[int], budget: int) -> DraftTree:
        """Return the chain that followed the suffix before; the root alone if nothing did."""
        found = self._index.lookup(token_ids)
        if found is None:
            return DraftTree.root(token_ids[-1])
        chain = list(token_ids[found : found + min(self._num_tokens, budget)])
        eos = next((at for at, token in enumerate(chain) if token in self._eos_ids), len(chain))
        return DraftTree.chain(token_ids[-1], chain[:eos])

    def update(self, tree: DraftTree, logits: Tensor, accepted: Accepted) -> None:
        """Nothing to learn: the text is the memory."""


@dataclass(frozen=True, kw_only=True)
class PromptLookup(DecodingMethod):
    """Chain drafts copied from the text so far.

    Attributes:
        num_tokens: Drafted tokens; `auto` takes the number that the measured step cost favours. 0
            decodes plainly.
        max_ngram_size: Longest suffix looked up, in tokens.
        occurrence: Which earlier occurrence is copied, `first` or `last`.
    """

    num_tokens: int | Literal["auto"] = PUBLISHED_TOKENS
    max_ngram_size: int = 2
    occurrence: Literal["first", "last"] = "first"
    neutral = MappingProxyType({"num_tokens": 0})

    def __post_init__(self) -> None:
        if self.num_tokens != "auto":
            require_count("num_tokens", self.num_tokens, 0, MOST_TOKENS, "Or 'auto'.")
        require_count("max_ngram_size", self.max_ngram_size, 1, 16, "It is counted in tokens.")
        require_choice("occurrence", self.occurrence, ("first", "last"))

    def drafter(self, model: TextGenerator, hardware: Profile) -> LookupDrafter:
        """Return a drafter with an empty index."""
        index = NgramIndex(self.max_ngram_size, self.occurrence)
        return LookupDrafter(index, self.chosen_tokens(hardware), model.facts.eos_ids)

    def chosen_tokens(self, hardware: Profile) -> int:
        """Return how many tokens are drafted on this hardware."""
        if self.num_tokens != "auto":
            return self.num_tokens
        cost = hardware.step_cost
        if cost is None:
            return PUBLISHED_TOKENS
        most = len(SURVIVAL)
        return calibrated_nodes(
            lambda nodes: 1 + sum(SURVIVAL[:nodes]), cost, middle_context(cost), most, MATCH_SHARE
        )
