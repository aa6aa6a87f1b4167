"""Static trees of ranked candidates, and which of them a machine should run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Literal, cast

import numpy as np

from hardware.profile import Profile, StepCost
from methods.checks import require_count
from methods.decoding.common import (
    RankProbabilities,
    best_template,
    calibrated_nodes,
    expected_tokens,
    middle_context,
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

# P(the true next token is a node's candidate of rank j | the node was accepted), a row for each
# depth 0, 1, 2 and 3 or more, for Token Recycling (cold, prompt not recycled) with trees of two
# sizes: a larger tree refreshes more rows, so its own candidates are better. Measured with
# `measure_rank_statistics` on SmolLM2-135M-Instruct, float32, greedy, 96 new tokens after each of
# the 16 function heads in tests/methods/decoding/test_rank_statistics.py (no benchmark's items),
# 1,442 tokens in 911 and 671 forwards; ranks of equal or wrong order averaged, nothing below 0.002.
MEASURED_SIZES = (12, 80)
_MEASURED_SMALL = (
    (0.246, 0.057, 0.027, 0.015, 0.015, 0.011, 0.009, 0.009),
    (0.369, 0.107, 0.061, 0.036, 0.019, 0.014, 0.014, 0.014),
    (0.390, 0.116, 0.075, 0.034, 0.034, 0.014, 0.014, 0.002),
    (0.707, 0.085, 0.024, 0.012, 0.012, 0.012, 0.012, 0.002),
)
_MEASURED_LARGE = (
    (0.323, 0.086, 0.034, 0.022, 0.015, 0.010, 0.010, 0.010),
    (0.403, 0.079, 0.059, 0.047, 0.024, 0.024, 0.018, 0.018),
    (0.420, 0.151, 0.052, 0.047, 0.042, 0.014, 0.009, 0.002),
    (0.559, 0.083, 0.054, 0.025, 0.022, 0.022, 0.010, 0.010),
)
_LEVELS = 6


def rank_probabilities(nodes: int) -> RankProbabilities:
    """Return the rank statistics to expect with a tree of `nodes` drafts, (6, 8).

    Between the two measured sizes they go linearly with the logarithm of the size; outside, the
    nearer measurement holds.
    """
    small, large = np.log(MEASURED_SIZES)
    weight = float(np.clip((np.log(max(nodes, 1)) - small) / (large - small), 0, 1))
    rows = (1 - weight) * np.array(_MEASURED_SMALL) + weight * np.array(_MEASURED_LARGE)
    return np.concatenate([rows, np.repeat(rows[-1:], _LEVELS - len(rows), axis=0)])


def check_tree_nodes(tree_nodes: object, ranks: int) -> None:
    """Raise ValueError unless there is a tree of that size with `ranks` candidates a node."""
    if isinstance(tree_nodes, str) and tree_nodes == "auto":
        return
    require_count("tree_nodes", tree_nodes, 0, MOST_NODES, "The root is not counted; or 'auto'.")
    if tree_nodes != PUBLISHED_NODES:
        _best_tree(cast(int, tree_nodes), ranks)


def static_tree(
    tree_nodes: int | Literal["auto"],
    hardware: Profile,
    ranks: int = MOST_RANKS,
    filled: float = 1.0,
) -> Topology:
    """Return the tree that a setting asks for.

    Args:
        tree_nodes: Drafts: 80 is the published tree, other numbers the best tree of that size by
            `rank_probabilities`, and `auto` the size that the measured step cost favours.
        hardware: Where it will run. Without a measured step cost `auto` takes the published tree
            on a GPU, where 80 drafts are nearly free, and 12 drafts on a CPU, where they are not.
        ranks: Candidates a node has; nodes of higher rank are left out of the published tree.
        filled: Share of the tree's drafts that are made on the average, for `auto`.
    """
    if tree_nodes == "auto":
        cost = hardware.step_cost
        if cost is not None:
            return _best_tree(_best_size(cost, ranks, filled), ranks)
        tree_nodes = PUBLISHED_NODES if hardware.kind == "cuda" else CPU_NODES
    if tree_nodes == PUBLISHED_NODES:
        return published_tree(ranks)
    return _best_tree(tree_nodes, ranks)


@cache
def published_tree(ranks: int = MOST_RANKS) -> Topology:
    """Return Token Recycling's tree of 80 drafts, six levels deep, less what exceeds `ranks`."""
    return Topology.from_rank_paths(path for path in _published_paths() if max(path) < ranks)


def expected_tokens_with(nodes: int, ranks: int = MOST_RANKS) -> float:
    """Return the tokens that a step with the best tree of that size should emit."""
    return expected_tokens(rank_probabilities(nodes), _best_tree(nodes, ranks))


@cache
def _best_tree(nodes: int, ranks: int) -> Topology:
    return best_template(rank_probabilities(nodes)[:, :ranks], nodes)


@cache
def _best_size(cost: StepCost, ranks: int, filled: float) -> int:
    most = min(MOST_NODES, sum(ranks**depth for depth in range(1, _LEVELS + 1)))
    return calibrated_nodes(
        lambda nodes: expected_tokens_with(nodes, ranks),
        cost,
        middle_context(cost),
        most,
        filled=filled,
    )


def _published_paths() -> Iterator[tuple[int, ...]]:
    for parent, count in _PUBLISHED_CHILDREN.items():
        for rank in range(count):
            yield (*map(int, parent), rank)
