"""Draft models for tests: tables that can read a tree as it grows, and exactness of one step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from methods.decoding.common_drafts import Choose, DraftRow, DrawnTree, ModelDrafter
from models.decode import Accepted, Draws, accept_without_replacement
from models.draft_tree import DraftTree, TreeBuilder
from models.text import CausalLM, Kernels
from runner.conformance_base import sharpen
from tests.models.tiny import NumberTokenizer
from tests.models.toy import TableModel, TableSession, distribution, path_to

HEAT = 0.7
Grow = Callable[[DrawnTree], object]


class GrowingTableSession(TableSession):
    """A table's session that runs a tree as it grows, and checks that it does."""

    _left: DraftTree | None = None

    def verify(self, tree: DraftTree) -> Tensor:
        self._left = None
        return super().verify(tree)

    def extend(self, tree: DraftTree, start: int) -> Tensor:
        waiting = self._waiting or self._left
        assert waiting is not None, "nothing waits that could be extended"
        assert len(waiting) == start < len(tree)
        assert waiting.tokens.tolist() == tree.tokens[:start].tolist()
        assert waiting.topology.parents.tolist() == tree.topology.parents[:start].tolist()
        self._waiting = None
        return self.verify(tree)[start:]

    def commit(self, path: Sequence[int]) -> None:
        chain = self._waiting or self._left
        self._waiting = chain
        super().commit(path)
        assert chain is not None
        if chain.topology.is_chain and len(path) == len(chain) - 1:
            self._left = DraftTree.root(int(chain.tokens[-1]))


class TableDraft(TableModel):
    """A table as a draft model."""

    def session(self, capacity: int) -> GrowingTableSession:
        self.sessions.append(GrowingTableSession(self, capacity))
        return self.sessions[-1]


def enumerated(draws: Draws) -> Choose:
    """Return draws that `tests.models.toy.distribution` enumerates."""
    return lambda row: draws.token(torch.from_numpy(row.remaining()))


def by_slot(row: DraftRow) -> int:
    """Draw with a random number that belongs to the slot: its path and the draws before it."""
    return row.at(float(np.random.default_rng([*row.path, 99, len(row.drawn)]).random()))


def drawn_tree(draft: TableModel, choose: Choose, *, nodes: int = 40, root: int = 0) -> DrawnTree:
    """Return the root of a tree over a table of order 1, at draft temperature `HEAT`."""

    def read(nodes: Sequence[int], parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        return torch.stack([draft.logits_after([token]) for token in tokens])

    rows = np.full((nodes + 1, draft.facts.vocab_size), np.nan)
    return DrawnTree(
        root, draft.logits_after([root]), read, temperature=HEAT, choose=choose, rows=rows
    )


def first_two(
    grow: Grow,
    target: TableModel,
    draft: TableModel,
    draws: Draws,
    choose: Choose | None = None,
    prune: bool = False,
) -> tuple[int, int]:
    """Return the first two tokens after token 0 that a drafted step, and sampling on, give."""

    def after(text: Sequence[int]) -> Tensor:
        return torch.softmax(target.logits_after([0, *text]).double() / HEAT, -1)

    tree = drawn_tree(draft, choose or enumerated(draws))
    grow(tree)
    built = without_last_siblings(tree.build()) if prune else tree.build()
    path, bonus = accept_without_replacement(
        built, lambda node: after(built.tokens[path_to(built, node)[1:]].tolist()), draws
    )
    text = [*built.tokens[path[1:]].tolist(), bonus]
    while len(text) < 2:
        text.append(draws.token(after(text)))
    return text[0], text[1]


def exact_first_two(
    grow: Grow, target: TableModel, draft: TableModel, prune: bool = False
) -> dict[tuple[int, int], float]:
    """Return the distribution of `first_two`, all draws enumerated."""
    return distribution(lambda draws: first_two(grow, target, draft, draws, prune=prune))


def wanted_first_two(target: TableModel) -> dict[tuple[int, int], float]:
    """Return the distribution that plain sampling has."""
    pairs = itertools.product(range(target.facts.vocab_size), repeat=2)
    return {pair: target.probability([0], pair, HEAT) for pair in pairs}


def without_last_siblings(tree: DraftTree) -> DraftTree:
    """Drop the less likely of two siblings after drawing, which is what nobody may do."""
    assert tree.draft_probabilities is not None
    dropped: set[int] = set()
    for node, children in enumerate(tree.topology.children):
        if len(children) > 1:
            row = tree.draft_probabilities[node]
            dropped.add(min(children, key=lambda child: row[tree.tokens[child]]))
    builder, places, rows = TreeBuilder(int(tree.tokens[0])), {0: 0}, [0]
    for node in range(1, len(tree)):
        parent = int(tree.topology.parents[node])
        if node not in dropped and parent in places:
            places[node] = builder.add(places[parent], int(tree.tokens[node]))
            rows.append(node)
    return builder.build(tree.draft_probabilities[rows])


def first_child_depth(tree: DraftTree) -> int:
    """Return how deep the chain of first children goes."""
    node = depth = 0
    while children := tree.topology.children[node]:
        node, depth = children[0], depth + 1
    return depth


class Watched:
    """A drafter whose trees and acceptances are kept."""

    def __init__(self, inner: ModelDrafter) -> None:
        self.inner = inner
        self.max_nodes = inner.max_nodes
        self.wants_prompt_logits = inner.wants_prompt_logits
        self.steps: list[tuple[DraftTree, Accepted]] = []

    @property
    def notes(self) -> dict[str, float | int | str]:
        return dict(self.inner.notes)

    def begin(self, prompt_ids: Sequence[int], logits: Tensor) -> None:
        self.inner.begin(prompt_ids, logits)

    def draft(self, token_ids: Sequence[int], budget: int) -> DraftTree:
        return self.inner.draft(token_ids, budget)

    def update(self, tree: DraftTree, logits: Tensor, accepted: Accepted) -> None:
        self.steps.append((tree, accepted))
        self.inner.update(tree, logits, accepted)


_LIKE = {
    # Sizes of a Llama-2 (as many key as query heads), of a grouped-query Llama, of Llama-68m.
    "llama-2": (64, 96, 3, 4, 4),
    "llama-grouped": (64, 96, 3, 4, 2),
    "llama-68m": (32, 64, 2, 2, 2),
}


def tiny_llama(
    like: str, *, kernels: Kernels = "transformers", seed: int = 0, vocab: int = 97
) -> CausalLM:
    """Return a seeded random Llama with decided argmaxes."""
    hidden, inner, layers, heads, kv_heads = _LIKE[like]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = LlamaForCausalLM(config)
        sharpen(module, 6.0)
    return CausalLM(module, NumberTokenizer(), f"tiny-{like}", kernels=kernels)


def noisy_copy(model: CausalLM, noise: float = 0.05) -> CausalLM:
    """Return the model with noise on its weights: a draft that is right now and then."""
    import copy

    module = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = noise * parameter.std() if parameter.ndim > 1 else 0.0
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return CausalLM(module, model.tokenizer, f"{model.name}-noisy", kernels=model.kernels)
