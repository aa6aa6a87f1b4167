"""Draft trees: what a verification forward runs over.

Index 0 is the root (the last committed token, not yet cached); parents stand before children. A
chain is a tree, and a tree of one node is plain decoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt


class Topology:
    """The shape of a draft tree, without its tokens; never changed once built.

    Sessions may keep what they derive from a shape (masks, position offsets) beside it, so drafters
    hand out the same object for the same shape where they can.

    Attributes:
        parents: Index of each node's parent, (nodes,), int64; -1 at the root.
        depths: Distance from the root, (nodes,), int64.
        ranks: Sibling order: 0 for the first child of a node, (nodes,), int64.
        max_depth: Depth of the deepest node; 0 for a root alone.
    """

    def __init__(self, parents: Sequence[int]) -> None:
        if not len(parents) or parents[0] != -1:
            raise ValueError("a tree starts with its root, whose parent is -1.")
        if any(not 0 <= parent < node for node, parent in enumerate(parents) if node):
            raise ValueError("a tree lists parents before their children.")
        self.parents: npt.NDArray[np.int64] = np.asarray(parents, dtype=np.int64)
        depths, ranks, children = [0], [0], [0] * len(parents)
        for parent in parents[1:]:
            depths.append(depths[parent] + 1)
            ranks.append(children[parent])
            children[parent] += 1
        self.depths: npt.NDArray[np.int64] = np.asarray(depths, dtype=np.int64)
        self.ranks: npt.NDArray[np.int64] = np.asarray(ranks, dtype=np.int64)
        self.max_depth: int = max(depths)
        self._parts: dict[bytes, Topology] = {}

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def ancestors(self) -> npt.NDArray[np.bool_]:
        """True where the column's node is the row's or one of its ancestors, (nodes, nodes)."""
        matrix = np.eye(len(self), dtype=np.bool_)
        for node in range(1, len(self)):
            matrix[node] |= matrix[self.parents[node]]
        return matrix

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of each node in sibling order."""
        lists: list[list[int]] = [[] for _ in range(len(self))]
        for node in range(1, len(self)):
            lists[self.parents[node]].append(node)
        return tuple(tuple(nodes) for nodes in lists)

    @cached_property
    def is_chain(self) -> bool:
        """Whether no node has two children."""
        return bool((self.parents == np.arange(-1, len(self) - 1)).all())

    @cached_property
    def level_ends(self) -> tuple[int, ...]:
        """Where each level ends: nodes of depth d are `level_ends[d - 1]` to `level_ends[d]`.

        Raises:
            ValueError: The nodes are not ordered by depth.
        """
        if (np.diff(self.depths) < 0).any():
            raise ValueError("levels are contiguous only in a tree whose nodes stand by depth.")
        return tuple(np.cumsum(np.bincount(self.depths)).tolist())

    @cached_property
    def rank_paths(self) -> tuple[tuple[int, ...], ...]:
        """Ranks from the root down to each node: the inverse of `from_rank_paths`."""
        paths: list[tuple[int, ...]] = [()]
        for node in range(1, len(self)):
            paths.append((*paths[self.parents[node]], int(self.ranks[node])))
        return tuple(paths)

    def part(self, keep: npt.NDArray[np.bool_]) -> Topology:
        """Return the shape of the nodes in `keep`, (nodes,), in their order; the same object again.

        Raises:
            ValueError: The root, or the parent of a kept node, is not kept.
        """
        if keep.all():
            return self
        key = keep.tobytes()
        if key not in self._parts:
            if not keep[0] or not keep[self.parents[keep][1:]].all():
                raise ValueError("a part of a tree keeps the root and every kept node's parent.")
            index = np.cumsum(keep) - 1
            self._parts[key] = Topology([-1, *index[self.parents[keep][1:]].tolist()])
        return self._parts[key]

    @staticmethod
    @cache
    def chain(length: int) -> Topology:
        """Return a root with `length` nodes in a row under it."""
        return Topology(range(-1, length))

    @classmethod
    def from_rank_paths(cls, paths: Iterable[tuple[int, ...]]) -> Topology:
        """Build a static tree from rank paths: (0, 2) is the first child's third child.

        Nodes are ordered by depth, then by path, so levels are contiguous.

        Raises:
            ValueError: A path's parent or its lower-ranked sibling is missing.
        """
        ordered = sorted(set(paths) - {()}, key=lambda path: (len(path), path))
        index: dict[tuple[int, ...], int] = {(): 0}
        parents = [-1]
        for path in ordered:
            if path[:-1] not in index:
                raise ValueError(f"path {path} has no parent {path[:-1]} in the template.")
            if path[-1] and (*path[:-1], path[-1] - 1) not in index:
                raise ValueError(f"path {path} comes without its sibling of rank {path[-1] - 1}.")
            index[path] = len(parents)
            parents.append(index[path[:-1]])
        return cls(parents)


ROOT_ONLY = Topology.chain(0)


@dataclass(frozen=True, eq=False)
class DraftTree:
    """A topology with tokens, and with draft distributions where the tokens were sampled.

    Attributes:
        topology: The shape.
        tokens: Token of each node, (nodes,), int64.
        draft_probabilities: For sampled trees: the distribution that the children of each node
            were drawn from, without replacement in sibling order; (nodes, vocab), float64, rows of
            leaves unused. None for deterministic trees.
    """

    topology: Topology
    tokens: npt.NDArray[np.int64]
    draft_probabilities: npt.NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        if self.tokens.shape != (len(self.topology),):
            raise ValueError(
                f"a tree of {len(self.topology)} nodes needs as many tokens, got shape "
                f"{self.tokens.shape}."
            )

    def __len__(self) -> int:
        return len(self.topology)

    @classmethod
    def root(cls, token: int) -> DraftTree:
        """Return the root alone: a step of plain decoding."""
        return cls(ROOT_ONLY, np.array([token], dtype=np.int64))

    @classmethod
    def chain(cls, root: int, tokens: Sequence[int]) -> DraftTree:
        """Return the root with `tokens` in a row under it."""
        return cls(Topology.chain(len(tokens)), np.array([root, *tokens], dtype=np.int64))

    @classmethod
    def from_sequences(cls, root: int, sequences: Iterable[Sequence[int]]) -> DraftTree:
        """Merge continuations into a trie: a shared prefix becomes one path."""
        builder = TreeBuilder(root)
        for sequence in sequences:
            node = 0
            for token in sequence:
                node = builder.add(node, token)
        return builder.build()


class TreeBuilder:
    """A tree that grows node by node, for drafters that decide as they go."""

    def __init__(self, root: int) -> None:
        self._parents, self._tokens = [-1], [root]
        self._seen: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, parent: int, token: int) -> int:
        """Return the child of `parent` with `token`, which is new unless it was added before."""
        node = self._seen.setdefault((parent, token), len(self._tokens))
        if node == len(self._tokens):
            self._parents.append(parent)
            self._tokens.append(token)
        return node

    def build(self, draft_probabilities: npt.NDArray[np.float64] | None = None) -> DraftTree:
        """Return the tree as it stands; `draft_probabilities` as in `DraftTree`."""
        tokens = np.array(self._tokens, dtype=np.int64)
        return DraftTree(Topology(self._parents), tokens, draft_probabilities)
