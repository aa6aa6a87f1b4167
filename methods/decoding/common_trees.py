"""Static trees of ranked candidates, and which of them a machine should run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Literal, cast

import numpy as np

from hardware.profile import Profile, StepCost
from methods.decoding.common import (
    RankProbabilities,
    best_template,
    calibrated_nodes,
    expected_tokens,
    middle_context,
    require_count,
)
from models.draft_tree import Topology

PUBLISHED_NODES = 80
MOST_NODES = 128
MOST_RANKS = 8
CPU_NODES = 12

# Token Recycling's tree "2.2.2": how many children, always the lowest ranks, the nodes at a rank
# path have. Source: Luowaterbi/TokenRecycling at 1b4c05c.
_PUBLISHED_CHILDREN: Mapping[str, int] = {
    "": 8,
    **{"0": 8, "1": 4, "2": 3, "3": 2, "4": 1, "5": 1, "6": 1, "7": 1},
    **{"00": 8, "01": 3, "02": 2, "03": 1, "04": 1, "05": 1, "06": 1, "07": 1},
    **{"10": 2, "11": 1, "20": 1, "30": 1, "40": 1, "50": 1},
    **{"000": 5, "001": 2, "002": 1, "003": 1, "004": 1, "010": 1, "020": 1},
    **{"100": 1, "200": 1, "300": 1},
    **{"0000": 3, "0001": 1, "0002": 1, "0010": 1, "0100": 1, "1000": 1},
    **{"00000": 2, "00010": 1},
}

RANK_PROBABILITIES: RankProbabilities = np.zeros((6, 8))


def check_tree_nodes(tree_nodes: object, ranks: int) -> None:
    """Raise ValueError unless there is a tree of that size with `ranks` candidates a node."""
    if isinstance(tree_nodes, str) and tree_nodes == "auto":
        return
    require_count("tree_nodes", tree_nodes, 0, MOST_NODES, "The root is not counted; or 'auto'.")
    if tree_nodes != PUBLISHED_NODES:
        _best_tree(cast(int, tree_nodes), ranks)


def static_tree(
    tree_nodes: int | Literal["auto"], hardware: Profile, ranks: int = MOST_RANKS
) -> Topology:
    """Return the tree that a setting asks for.

    Args:
        tree_nodes: Drafts: 80 is the published tree, other numbers the best tree of that size by
            `RANK_PROBABILITIES`, and `auto` the size that the measured step cost favours.
        hardware: Where it will run. Without a measured step cost `auto` takes the published tree
            on a GPU, where 80 drafts are nearly free, and 12 drafts on a CPU, where they are not.
        ranks: Candidates a node has; nodes of higher rank are left out of the published tree.
    """
    if tree_nodes == "auto":
        cost = hardware.step_cost
        if cost is not None:
            return _best_tree(_best_size(cost, ranks), ranks)
        tree_nodes = PUBLISHED_NODES if hardware.kind == "cuda" else CPU_NODES
    if tree_nodes == PUBLISHED_NODES:
        return published_tree(ranks)
    return _best_tree(tree_nodes, ranks)


@cache
def published_tree(ranks: int = MOST_RANKS) -> Topology:
    """Return Token Recycling's tree of 80 drafts, six levels deep, less what exceeds `ranks`."""
    return Topology.from_rank_paths(path for path in _published_paths() if max(path) < ranks)


@cache
def _best_tree(nodes: int, ranks: int) -> Topology:
    return best_template(RANK_PROBABILITIES[:, :ranks], nodes)


@cache
def _best_size(cost: StepCost, ranks: int) -> int:
    most = min(MOST_NODES, sum(ranks**depth for depth in range(1, len(RANK_PROBABILITIES) + 1)))
    return calibrated_nodes(
        lambda nodes: expected_tokens(RANK_PROBABILITIES, _best_tree(nodes, ranks)),
        cost,
        middle_context(cost),
        most,
    )


def _published_paths() -> Iterator[tuple[int, ...]]:
    for parent, count in _PUBLISHED_CHILDREN.items():
        for rank in range(count):
            yield (*map(int, parent), rank)
