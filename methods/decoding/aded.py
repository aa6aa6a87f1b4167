"""ADED: drafts from a tri-gram table that adapts to the text, found by Monte-Carlo tree search.

A sparse table of tri-grams stands for the model: counted once over a corpus, re-weighted by the
last tokens of the text before every draft. A search walks it from the last two tokens, and the
prefixes that it visits most, each with one greedy token more, become the draft tree.

Source: arXiv 2407.12021; the authors' code at 241dad8. Mode `paper` differs from that code: the
value of a path sums the weights of its own tokens (there, by a slip, the weight of each state's
older token, so that values hardly vary); priors are normalised for each pair; the random numbers
are seeded and ties broken by weight, then id; over the budget the least visited drafts are dropped
(there the longest sequences, counted before they are merged); without tri-grams nothing is drafted
(there one dummy token); sampling draws once a node. `released` keeps all of these but the order of
a hash table, for which ids and weights stand here; its sampling is `reference_compatible`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from hardware.profile import Profile, StepCost
from methods.base import Output
from methods.checks import require_choice, require_count, require_number
from methods.decoding.common import (
    StatefulDecodingMethod,
    calibrated_nodes,
    middle_context,
    require_text_generator,
)
from methods.decoding.common_loops import LoopGenerator
from methods.decoding.common_ngram_search import Mode, Search, SearchSettings, find_draft
from methods.decoding.common_ngrams import MOST_SUCCESSORS, TrigramStore, TrigramTable, corpus_table
from models.base import Decoding, Generation, TextGenerator
from models.decode import Accepted, Draws, NodeProbabilities, decode
from models.draft_tree import DraftTree

PUBLISHED_NODES = 64
# Drafts on a CPU whose step cost was not measured.
CPU_NODES = 8

# The nucleus of the released loop's sampling; it has no other.
RELEASED_TOP_P = 0.8

# Tokens a forward by the size of the tree, for `auto`: with the other settings at their defaults,
# on the greedy texts of SmolLM2-135M-Instruct, float32, 96 new tokens after each of the 16 function
# heads in tests/methods/decoding/test_rank_statistics.py, 1,442 tokens after the first ones.
MEASURED_SIZES = (1, 2, 4, 8, 16, 32, 64)
MEASURED_TOKENS = (1.309, 1.421, 1.557, 1.683, 1.807, 1.900, 1.912)
# Share of the drafts asked for that were made on the average, at 4 to 32: many pairs have few
# successors.
FILLED_SHARE = 0.8


class AdedDrafter:
    """Reads drafts out of a store that it keeps up with the text."""

    wants_prompt_logits = False

    def __init__(
        self,
        store: TrigramStore,
        settings: SearchSettings,
        *,
        window: int,
        adaptive: bool,
        prompt_update: bool,
        seed: int,
    ) -> None:
        self._store = store
        self._settings = settings
        self._window = window
        self._adaptive = adaptive
        self._prompt_update = prompt_update and adaptive
        self._draws = random.Random(seed)
        self._fed = self._steps = 0
        self.max_nodes = 1 + settings.tree_nodes

    @property
    def notes(self) -> Mapping[str, float | int | str]:
        """Size of the largest tree and of the mean one, and of the store."""
        return {
            "tree_nodes": self.max_nodes - 1,
            "mean_drafts": self._fed / max(self._steps, 1),
            "state_bytes": self._store.num_bytes,
            "state_entries": self._store.num_entries,
        }

    def begin(self, prompt_ids: Sequence[int], logits: Tensor) -> None:
        """Learn the prompt, if so set, as if the window had moved over it token by token."""
        if self._prompt_update:
            for end in range(3, len(prompt_ids) + 1):
                self._store.observe(prompt_ids[max(0, end - self._window) : end])

    def draft(self, token_ids: Sequence[int], budget: int) -> DraftTree:
        """Learn the last window, then search from the last two tokens."""
        if self._adaptive:
            self._store.observe(token_ids[-self._window :])
        root = (token_ids[-2], token_ids[-1])
        tree = find_draft(self._store, root, self._settings, self._draws, budget)
        self._fed += len(tree) - 1
        self._steps += 1
        return tree

    def update(self, tree: DraftTree, logits: Tensor, accepted: Accepted) -> None:
        """Nothing to learn: the next draft reads it in the text."""


def accept_by_paths(
    tree: DraftTree, probabilities: NodeProbabilities, draws: Draws, top_p: float = RELEASED_TOP_P
) -> Accepted:
    """Accept as the released loop does when it samples; not the model's distribution.

    Every root-to-leaf path gets a draw of its own at each of its nodes, and the path that agrees
    the longest wins, so a draft of several paths, or one that was missed and drawn again, comes
    out too often. The bonus is a new draw after the accepted node.

    Args:
        tree: Nodes that were verified.
        probabilities: Target distribution after a node.
        draws: Source of randomness.
        top_p: Nucleus to which every distribution is cut.
    """

    @cache
    def nucleus_after(node: int) -> Tensor:
        return nucleus(probabilities(node), top_p)

    longest = [0]
    for path in _leaf_paths(tree):
        agreed = [0]
        is_agreeing = True
        for node, child in itertools.pairwise(path):
            drawn = draws.token(nucleus_after(node))
            is_agreeing = is_agreeing and drawn == tree.tokens[child]
            if is_agreeing:
                agreed.append(child)
        longest = max(longest, agreed, key=len)
    return Accepted(longest, draws.token(nucleus_after(longest[-1])))


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the likeliest tokens that together reach `top_p`, (vocab,)."""
    ordered, ids = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    kept = torch.zeros_like(probabilities)
    return kept.scatter(0, ids, torch.where(before < top_p, ordered, 0.0))


@dataclass(frozen=True, kw_only=True)
class Aded(StatefulDecodingMethod):
    """Draft trees from an adaptive tri-gram table.

    Attributes:
        tree_nodes: Most drafts in a tree; 64 is the paper's, `auto` the number that the measured
            step cost favours. 0 decodes plainly.
        search: How the tree is found: by Monte-Carlo search (`mcts`), `best_first` (the tree with
            the largest modelled expectation), or as `greedy_chain`.
        mode: `paper`, or `released` for the slips of the released code.
        reference_compatible: Sample as the released code does, which changes the distribution.
        corpus: What the table counts to begin with: Python's standard library (`stdlib`) or `none`.
        successors: Successors of a pair taken from the corpus.
        window: Last tokens of the text that are learned before each draft.
        increment: Weight that a tri-gram gains each time.
        cap: Largest weight.
        adaptive: Learn from the text at all; False is a frozen store.
        prompt_update: Learn the whole prompt, not only its last window. An addition of ours.
        iterations: Simulations of the search.
        length: Tokens of the longest path searched, the last token of the text counted; with the
            greedy one the most drafts in a row.
        top_k: Prefixes of the search tree that become drafts.
        c1, c2: Constants of the exploration.
        seed: Of the roll-outs; each text starts from it anew.
    """

    tree_nodes: int | Literal["auto"] = PUBLISHED_NODES
    search: Search = "mcts"
    mode: Mode = "paper"
    reference_compatible: bool = False
    corpus: Literal["stdlib", "none"] = "stdlib"
    successors: int = 12
    window: int = 16
    increment: float = 0.04
    cap: float = 3.0
    adaptive: bool = True
    prompt_update: bool = False
    iterations: int = 150
    length: int = 4
    top_k: int = 24
    c1: float = 32.0
    c2: float = 8.0
    seed: int = 0
    neutral = MappingProxyType({"tree_nodes": 0, "reference_compatible": False})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tree_nodes != "auto":
            meaning = "The root is not counted; or 'auto'."
            require_count("tree_nodes", self.tree_nodes, 0, PUBLISHED_NODES, meaning)
        require_choice("search", self.search, get_args(Search))
        require_choice("mode", self.mode, get_args(Mode))
        require_choice("corpus", self.corpus, ("stdlib", "none"))
        require_count("successors", self.successors, 1, MOST_SUCCESSORS, "The paper keeps 12.")
        require_count("window", self.window, 3, 1024, "It is counted in tokens.")
        require_count("iterations", self.iterations, 1, 10_000, "The paper runs 150.")
        require_count("length", self.length, 2, 8, "It is counted in tokens.")
        require_count("top_k", self.top_k, 1, 1024, "The paper takes 24.")
        require_count("seed", self.seed, 0, 2**32 - 1, "It seeds the roll-outs.")
        require_number("increment", self.increment, 0.0, 1.0, "The paper adds 0.04.")
        require_number("cap", self.cap, 0.0, 100.0, "The paper stops at 3.")
        require_number("c1", self.c1, 0.0, 1e12, "The paper takes 32.")
        require_number("c2", self.c2, 1e-6, 1e12, "The paper takes 8.")

    def declared_output(self, temperature: float) -> Output:
        """Return the promise: the released sampling keeps none."""
        if temperature > 0 and self.reference_compatible:
            return Output.APPROXIMATE
        return super().declared_output(temperature)

    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        """Yield the model with its texts drafted; the corpus is counted before, if need be."""
        require_text_generator(self, model)
        self.table(model)
        rule = accept_by_paths if self.reference_compatible else None

        def generate(
            inner: TextGenerator, prompt_ids: Sequence[int], decoding: Decoding
        ) -> Generation:
            return decode(inner, prompt_ids, decoding, self.drafter(model, hardware), rule=rule)

        yield LoopGenerator(model, generate)

    def table(self, model: TextGenerator) -> TrigramTable:
        """Return the tri-grams of the corpus for a model's tokenizer."""
        vocab_size = model.facts.vocab_size
        if self.corpus == "none":
            return TrigramTable.empty(vocab_size)
        return corpus_table(model.tokenizer, vocab_size)

    def drafter(self, model: TextGenerator, hardware: Profile) -> AdedDrafter:
        """Return a drafter on a new store, or on the one kept for this model."""
        store = self.state_for(
            model,
            lambda: TrigramStore(
                self.table(model),
                top=self.successors,
                increment=self.increment,
                cap=self.cap,
            ),
        )
        return AdedDrafter(
            store,
            self.search_settings(hardware),
            window=self.window,
            adaptive=self.adaptive,
            prompt_update=self.prompt_update,
            seed=self.seed,
        )

    def search_settings(self, hardware: Profile) -> SearchSettings:
        """Return the settings of the search on this hardware."""
        return SearchSettings(
            search=self.search,
            mode=self.mode,
            tree_nodes=self.chosen_nodes(hardware),
            iterations=self.iterations,
            length=self.length,
            top_k=self.top_k,
            c1=self.c1,
            c2=self.c2,
        )

    def chosen_nodes(self, hardware: Profile) -> int:
        """Return the most drafts of a tree on this hardware.

        Without a measured step cost `auto` takes the paper's number on a GPU, and 8 on a CPU.
        """
        if self.tree_nodes != "auto":
            return self.tree_nodes
        if hardware.step_cost is None:
            return PUBLISHED_NODES if hardware.kind == "cuda" else CPU_NODES
        return _best_size(hardware.step_cost)


@cache
def _best_size(cost: StepCost) -> int:
    return calibrated_nodes(
        expected_tokens_with, cost, middle_context(cost), PUBLISHED_NODES, filled=FILLED_SHARE
    )


def expected_tokens_with(nodes: int) -> float:
    """Return the tokens that a step with at most `nodes` drafts should emit."""
    sizes = np.log([0.5, *MEASURED_SIZES])
    return float(np.interp(math.log(nodes), sizes, (1.0, *MEASURED_TOKENS))) if nodes else 1.0


def _leaf_paths(tree: DraftTree) -> Iterator[list[int]]:
    """Yield the nodes from the root to each leaf."""
    parents = tree.topology.parents
    for leaf, children in enumerate(tree.topology.children):
        if not children:
            path = [leaf]
            while path[0]:
                path.insert(0, int(parents[path[0]]))
            yield path
