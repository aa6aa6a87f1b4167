"""Token Recycling: draft from the candidates that earlier forwards computed and threw away.

Every forward ranks the likeliest successors of each token it reads. They are kept in a matrix, one
row a token id, and the next draft tree is read out of it: the root's successors, their successors,
and so on down a static tree. Every node of a verified tree, accepted or not, refreshes its row.

Source: arXiv 2408.08696; the authors' code at 1b4c05c. Differs from that code: the root that the
prefill emits has its row written too (there it is verified, here the prefill computes it); a token
that stands at several nodes keeps the row of the deepest accepted one, else of the last (there it
is left to the device); drafts stop at the length limit; sampling draws one token a node.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hardware.profile import Profile
from methods.checks import require_choice, require_count
from methods.decoding.common import StatefulDecodingMethod, top_k
from methods.decoding.common_trees import PUBLISHED_NODES, check_tree_nodes, static_tree
from models.base import TextGenerator
from models.decode import Accepted
from models.draft_tree import DraftTree, Topology

# Rows of prompt logits ranked at a time: a ranking copies what it looks at.
PROMPT_CHUNK = 64

# Share of a tree's drafts that stand under known rows, measured like the statistics of
# `common_trees`, on the first 8 prompts with a cold matrix: of 12 drafts 5.0 without and 6.3 with
# the prompt's rows, of 30 drafts 14.5.
KNOWN_SHARE = 0.45


class SuccessorMatrix:
    """For each token id, the ids that last seemed likeliest to follow it, best first.

    Attributes:
        rows: (vocab, candidates), int32 or int64; a row of zeros has never been written.
    """

    def __init__(self, vocab_size: int, candidates: int, dtype: str) -> None:
        self.rows: npt.NDArray[np.int32 | np.int64] = np.zeros((vocab_size, candidates), dtype)

    def read(self, topology: Topology, root: int) -> npt.NDArray[np.int64]:
        """Return the tokens of a tree under `root`, (nodes,): one gather a level.

        A node of rank r takes the r-th successor of its parent's token.
        """
        tokens = np.empty(len(topology), dtype=np.int64)
        tokens[0] = root
        ends = topology.level_ends
        for start, end in itertools.pairwise(ends):
            parents = tokens[topology.parents[start:end]]
            tokens[start:end] = self.rows[parents, topology.ranks[start:end]]
        return tokens

    def write(
        self, tokens: npt.NDArray[np.int64], logits: Tensor, accepted: Sequence[int] = ()
    ) -> None:
        """Replace the rows of `tokens` by their best successors.

        Where a token stands more than once its deepest accepted place wins, else its last one.

        Args:
            tokens: (nodes,).
            logits: Logits after each of them, (nodes, vocab).
            accepted: Nodes of the accepted path, the deepest last.
        """
        best = top_k(logits, self.rows.shape[1]).cpu().numpy()
        # Of repeated indices NumPy keeps the last assignment.
        self.rows[tokens] = best
        last = list(accepted)
        self.rows[tokens[last]] = best[last]


class RecyclingDrafter:
    """Reads trees out of a matrix and writes what their verification computed back into it."""

    def __init__(
        self,
        matrix: SuccessorMatrix,
        topology: Topology,
        *,
        prompt_update: bool,
        accepted_only: bool,
        skip_unknown: bool,
    ) -> None:
        self._matrix = matrix
        self._topology = topology
        self._accepted_only = accepted_only
        self._skip_unknown = skip_unknown
        self.max_nodes = len(topology)
        self.wants_prompt_logits = prompt_update

    @property
    def notes(self) -> Mapping[str, float | int | str]:
        """Size of the largest tree, and of the matrix."""
        return {"tree_nodes": self.max_nodes - 1, "state_bytes": self._matrix.rows.nbytes}

    def begin(self, prompt_ids: Sequence[int], logits: Tensor) -> None:
        """Recycle the logits of the prompt: all with `prompt_update`, else the last token's."""
        tokens = np.asarray(prompt_ids[-len(logits) :], dtype=np.int64)
        for start in range(0, len(tokens), PROMPT_CHUNK):
            chunk = slice(start, start + PROMPT_CHUNK)
            self._matrix.write(tokens[chunk], logits[chunk])

    def draft(self, token_ids: Sequence[int], budget: int) -> DraftTree:
        """Return the static tree, filled from the matrix and no deeper than `budget`."""
        topology = self._topology
        if budget < topology.max_depth:
            topology = topology.part(topology.depths <= budget)
        tokens = self._matrix.read(topology, token_ids[-1])
        if self._skip_unknown:
            keep = self._below_known(topology, tokens)
            topology, tokens = topology.part(keep), tokens[keep]
        return DraftTree(topology, tokens)

    def update(self, tree: DraftTree, logits: Tensor, accepted: Accepted) -> None:
        """Write the row of every node's token."""
        path = accepted.path
        if self._accepted_only:
            self._matrix.write(tree.tokens[path], logits[path])
        else:
            self._matrix.write(tree.tokens, logits, path)

    def candidates(self, tree: DraftTree, node: int) -> list[int]:
        """Return the successors of a node's token; none if its row was never written."""
        row: list[int] = self._matrix.rows[tree.tokens[node]].tolist()
        return row if any(row) else []

    def _below_known(
        self, topology: Topology, tokens: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Return which nodes were read from rows that have been written, all the way up."""
        known: npt.NDArray[np.bool_] = np.any(self._matrix.rows[tokens], axis=1)
        keep = np.ones(len(topology), dtype=np.bool_)
        ends = topology.level_ends
        for start, end in itertools.pairwise(ends):
            parents = topology.parents[start:end]
            keep[start:end] = keep[parents] & known[parents]
        return keep


@dataclass(frozen=True, kw_only=True)
class TokenRecycling(StatefulDecodingMethod):
    """Draft trees from an adjacency matrix of recycled candidates.

    Attributes:
        tree_nodes: Drafts in the tree: 80 is the published tree, other numbers the best tree of
            that size, `auto` the size that the measured step cost favours. 0 decodes plainly.
        candidates: Successors kept of each token.
        prompt_update: Recycle the logits of the whole prompt too, at the cost of computing them.
        update: Which nodes refresh their rows: `all`, or only the `accepted` ones.
        skip_unknown: Leave out nodes read from rows that were never written, which draft id 0.
            An addition of ours: the tree is smaller while the matrix is still empty.
        dtype: Number format of the matrix, `int32` or `int64`.
    """

    tree_nodes: int | Literal["auto"] = PUBLISHED_NODES
    candidates: int = 8
    prompt_update: bool = False
    update: Literal["all", "accepted"] = "all"
    skip_unknown: bool = False
    dtype: Literal["int32", "int64"] = "int64"
    neutral = MappingProxyType({"tree_nodes": 0})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("candidates", self.candidates, 1, 16, "The published tree uses 8.")
        check_tree_nodes(self.tree_nodes, self.candidates)
        require_choice("update", self.update, ("all", "accepted"))
        require_choice("dtype", self.dtype, ("int32", "int64"))

    def drafter(self, model: TextGenerator, hardware: Profile) -> RecyclingDrafter:
        """Return a drafter on a new matrix, or on the one kept for this model."""
        vocab_size = model.facts.vocab_size
        candidates = min(self.candidates, vocab_size)
        matrix = self.state_for(model, lambda: SuccessorMatrix(vocab_size, candidates, self.dtype))
        return RecyclingDrafter(
            matrix,
            static_tree(
                self.tree_nodes, hardware, candidates, KNOWN_SHARE if self.skip_unknown else 1.0
            ),
            prompt_update=self.prompt_update,
            accepted_only=self.update == "accepted",
            skip_unknown=self.skip_unknown,
        )
