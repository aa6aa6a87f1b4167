"""From a tri-gram table to a draft tree: Monte-Carlo search, best-first expansion, greedy chain.

Source of the search: ADED, arXiv 2407.12021, and the authors' code at 241dad8; `aded.py` says where
the two modes differ. Best-first expansion is its yardstick: no tree of the same size and depth has
a larger modelled expectation.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

from methods.decoding.common_ngrams import TrigramStore
from models.draft_tree import DraftTree, TreeBuilder

Mode = Literal["paper", "released"]
Search = Literal["mcts", "best_first", "greedy_chain"]
Pair = tuple[int, int]


class Node:
    """A place in the search tree: a path from the root, seen through its last two tokens.

    Children are the successors of the pair and lists side by side, in the order in which equals
    are taken; a child gets a node of its own when it is first stepped on.

    Attributes:
        pair: The last two tokens of the path.
        length: Tokens of the path, the root token counted.
        visits: Simulations that came through.
        tokens, weights, priors: Of the children; empty before the node is expanded.
        counts, totals: Visits and summed values of the children.
        children: Their nodes.
    """

    __slots__ = (
        "children",
        "counts",
        "length",
        "means",
        "pair",
        "priors",
        "shares",
        "tokens",
        "totals",
        "visits",
        "weights",
    )

    def __init__(self, pair: Pair, length: int) -> None:
        self.pair = pair
        self.length = length
        self.visits = 0
        self.tokens: Sequence[int] = ()
        self.weights: Sequence[float] = ()
        self.priors: Sequence[float] = ()

    def expand(
        self, tokens: Sequence[int], weights: Sequence[float], priors: Sequence[float]
    ) -> None:
        """Give the node its children, none of them visited."""
        self.tokens, self.weights, self.priors = tokens, weights, priors
        self.counts = [0] * len(tokens)
        self.totals = [0.0] * len(tokens)
        # The two parts of PUCT that change only when a child is visited: its mean value, and what
        # E sqrt(N) is multiplied with. Unvisited children come first.
        self.means = [math.inf] * len(tokens)
        self.shares = list(priors)
        self.children: list[Node | None] = [None] * len(tokens)

    def child(self, index: int) -> Node:
        """Return a child's node."""
        found = self.children[index]
        if found is None:
            pair = (self.pair[1], self.tokens[index])
            found = self.children[index] = Node(pair, self.length + 1)
        return found

    def scores(self, scale: float) -> list[float]:
        """Return the PUCT of every child; `scale` is E sqrt(N) of this node."""
        return [mean + scale * share for mean, share in zip(self.means, self.shares, strict=True)]

    def record(self, index: int, value: float) -> None:
        """Count a visit of a child."""
        count = self.counts[index] = self.counts[index] + 1
        total = self.totals[index] = self.totals[index] + value
        self.means[index] = total / count
        self.shares[index] = self.priors[index] / (1 + count)


class Prefix(NamedTuple):
    """Drafted tokens up to a node of the search tree, and how often it was visited."""

    visits: int
    tokens: tuple[int, ...]
    pair: Pair


def exploration(visits: int, c1: float, c2: float) -> float:
    """Return E = c1 + ln((N + c2 + 1) / c2) at a parent with N visits."""
    return c1 + math.log((visits + c2 + 1) / c2)


def monte_carlo_search(
    store: TrigramStore,
    root: Pair,
    draws: random.Random,
    *,
    iterations: int = 150,
    length: int = 4,
    c1: float = 32.0,
    c2: float = 8.0,
    mode: Mode = "paper",
) -> Node:
    """Search the table from a pair of tokens.

    Each simulation goes down to the child with the largest PUCT,
    W/N + E P sqrt(N_parent) / (1 + N), expands the node that has no children, steps to one, draws
    tokens by their weights to the full length, and adds the path's value, 1 plus its weights, to
    every node that it went through.

    Args:
        store: The table.
        root: The last two tokens of the text.
        draws: Randomness of the roll-outs.
        iterations: Simulations.
        length: Tokens of the longest path, the root token counted.
        c1, c2: Constants of `exploration`.
        mode: `released` takes the weights themselves as priors, and for each step of a path the
            weight of the state's older token; among equals it takes the last.

    Returns:
        The root of the search tree; its visits are the iterations.
    """
    released = mode == "released"
    tree = Node(root, 1)
    # E sqrt(N) of a parent with N visits.
    scales = _scales(iterations, c1, c2)
    uniform, row_of = draws.random, store.row

    def expand(node: Node) -> bool:
        row = row_of(*node.pair)
        if row is None:
            return False
        if released:
            node.expand(row.tokens[::-1], row.weights[::-1], row.weights[::-1])
        else:
            node.expand(row.tokens, row.weights, row.priors)
        return True

    def gain(node: Node, index: int) -> float:
        if released:
            return store.weight(*node.pair, node.pair[1])
        return node.weights[index]

    for _ in range(iterations):
        node, value = tree, 1.0
        steps: list[tuple[Node, int]] = []
        while node.tokens and node.length < length:
            scores = node.scores(scales[node.visits])
            index = scores.index(max(scores))
            value += gain(node, index)
            steps.append((node, index))
            node = node.children[index] or node.child(index)
        if node.length < length and expand(node):
            value += gain(node, 0)
            steps.append((node, 0))
            node = node.child(0)
            first, second = node.pair
            for _ in range(length - node.length):
                row = row_of(first, second)
                if row is None:
                    break
                drawn = bisect_left(row.cumulative, uniform() * row.cumulative[-1])
                value += store.weight(first, second, second) if released else row.weights[drawn]
                first, second = second, row.tokens[drawn]
        tree.visits += 1
        for parent, index in steps:
            parent.record(index, value)
            child = parent.children[index]
            assert child is not None  # it was stepped on
            child.visits += 1
    return tree


def most_visited(tree: Node, count: int) -> list[Prefix]:
    """Return the most visited prefixes of a search tree, the root's (no draft) first.

    Equals go by depth, then by the order of the children from the root down, so that a prefix
    never comes before a part of itself: a child is visited no more often than its parent.
    """
    found: list[Prefix] = []
    # Visits (negative), depth, places from the root, and what is there.
    waiting: list[tuple[int, int, tuple[int, ...], tuple[int, ...], Node | None, Pair]] = [
        (-tree.visits, 0, (), (), tree, tree.pair)
    ]
    while waiting and len(found) < count:
        negative, depth, places, tokens, node, pair = heapq.heappop(waiting)
        found.append(Prefix(-negative, tokens, pair))
        if node is None:
            continue
        for index, token in enumerate(node.tokens):
            heapq.heappush(
                waiting,
                (
                    -node.counts[index],
                    depth + 1,
                    (*places, index),
                    (*tokens, token),
                    node.children[index],
                    (node.pair[1], token),
                ),
            )
    return found


def drafted_sequences(store: TrigramStore, prefixes: Sequence[Prefix]) -> list[tuple[int, ...]]:
    """Return the prefixes, each with the heaviest next token; empty ones are left out."""
    sequences = []
    for prefix in prefixes:
        row = store.row(*prefix.pair)
        sequences.append(prefix.tokens if row is None else (*prefix.tokens, row.tokens[0]))
    return [sequence for sequence in sequences if sequence]


def trie_within_budget(root: int, sequences: Sequence[Sequence[int]], nodes: int) -> DraftTree:
    """Merge sequences into a tree of at most `nodes` drafts; the last ones are dropped first."""
    builder = TreeBuilder(root)
    for sequence in sequences:
        node = 0
        for token in sequence:
            if len(builder) > nodes:
                return builder.build()
            node = builder.add(node, token)
    return builder.build()


def released_trie(root: int, sequences: Sequence[Sequence[int]], nodes: int) -> DraftTree:
    """Merge sequences as the released code does.

    Sequences with the most distinct tokens go first, until the distinct tokens of those left,
    summed over sequences, are at most `nodes`; the trie is then cut in breadth-first order.
    """
    distinct = list(dict.fromkeys(tuple(sequence) for sequence in sequences))
    sizes = [len(set(sequence)) for sequence in distinct]
    total = sum(sizes)
    removed = set()
    for index in sorted(range(len(distinct)), key=lambda index: -sizes[index]):
        if total <= nodes:
            break
        removed.add(index)
        total -= sizes[index]
    builder = TreeBuilder(root)
    level = [(0, s) for index, s in enumerate(distinct) if index not in removed]
    depth = 0
    while level:
        below = []
        for node, sequence in level:
            if depth < len(sequence):
                if len(builder) > nodes:
                    return builder.build()
                below.append((builder.add(node, sequence[depth]), sequence))
        level, depth = below, depth + 1
    return builder.build()


def best_first_tree(store: TrigramStore, root: Pair, nodes: int, depth: int) -> DraftTree:
    """Return the tree with the largest modelled expectation, see `modelled_tokens`.

    The likeliest path is taken again and again. A child is never likelier than its parent, so no
    other tree of that size and depth expects more.
    """
    builder = TreeBuilder(root[1])
    order = itertools.count()  # among equals, the one that was offered first
    waiting: list[tuple[float, int, int, Pair, int, int, float]] = []

    def offer(parent: int, pair: Pair, level: int, rank: int, share: float) -> None:
        row = store.row(*pair) if level <= depth else None
        if row is not None and rank < len(row.tokens):
            probability = share * row.priors[rank]
            entry = (-probability, next(order), parent, pair, level, rank, share)
            heapq.heappush(waiting, entry)

    offer(0, root, 1, 0, 1.0)
    while waiting and len(builder) <= nodes:
        negative, _, parent, pair, level, rank, share = heapq.heappop(waiting)
        if len(builder) > nodes:
            break
        row = store.row(*pair)
        assert row is not None  # it was offered
        token = row.tokens[rank]
        node = builder.add(parent, token)
        offer(node, (pair[1], token), level + 1, 0, -negative)
        offer(parent, pair, level, rank + 1, share)
    return builder.build()


def greedy_chain(store: TrigramStore, root: Pair, depth: int) -> DraftTree:
    """Return the chain of heaviest successors."""
    (first, second), tokens = root, []
    for _ in range(depth):
        row = store.row(first, second)
        if row is None:
            break
        first, second = second, row.tokens[0]
        tokens.append(second)
    return DraftTree.chain(root[1], tokens)


def modelled_tokens(store: TrigramStore, root: Pair, tree: DraftTree) -> float:
    """Return the tokens a step would emit with this tree if the table were the model.

    One, plus for each draft the product of the normalised weights from the root down to it.
    """
    pairs, shares = [root], [1.0]
    for parent, token in zip(tree.topology.parents[1:], tree.tokens[1:].tolist(), strict=True):
        first, second = pairs[parent]
        row = store.row(first, second)
        rank = None if row is None else row.rank.get(token)
        shares.append(0.0 if row is None or rank is None else shares[parent] * row.priors[rank])
        pairs.append((second, token))
    return sum(shares)


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How a draft is found in the table; fields as in `Aded`."""

    search: Search
    mode: Mode
    tree_nodes: int
    iterations: int
    length: int
    top_k: int
    c1: float
    c2: float


def find_draft(
    store: TrigramStore, root: Pair, settings: SearchSettings, draws: random.Random, depth: int
) -> DraftTree:
    """Return a draft tree under the second token of `root`, no deeper than `depth`."""
    depth = min(depth, settings.length)
    if depth <= 0 or not settings.tree_nodes:
        return DraftTree.root(root[1])
    if settings.search == "best_first":
        return best_first_tree(store, root, settings.tree_nodes, depth)
    if settings.search == "greedy_chain":
        return greedy_chain(store, root, min(depth, settings.tree_nodes))
    searched = monte_carlo_search(
        store,
        root,
        draws,
        iterations=settings.iterations,
        length=settings.length,
        c1=settings.c1,
        c2=settings.c2,
        mode=settings.mode,
    )
    sequences = drafted_sequences(store, most_visited(searched, settings.top_k))
    sequences = [sequence[:depth] for sequence in sequences]
    if settings.mode == "paper":
        return trie_within_budget(root[1], sequences, settings.tree_nodes)
    return released_trie(root[1], sequences or [(0,)], settings.tree_nodes)


@cache
def _scales(iterations: int, c1: float, c2: float) -> tuple[float, ...]:
    return tuple(exploration(n, c1, c2) * math.sqrt(n) for n in range(iterations + 1))
