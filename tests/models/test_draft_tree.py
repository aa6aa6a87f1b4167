"""Draft trees against slow versions of themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.draft_tree import ROOT_ONLY, DraftTree, Topology, TreeBuilder

parents_lists = (
    st.integers(0, 20)
    .flatmap(lambda nodes: st.tuples(*(st.integers(0, node) for node in range(nodes))))
    .map(lambda parents: [-1, *parents])
)
sequences = st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=8)


def slow_ancestors(parents: list[int], node: int) -> set[int]:
    """The node and everything above it, by recursion."""
    return {node} | (slow_ancestors(parents, parents[node]) if node else set())


@given(parents_lists)
def test_ancestors_are_what_recursion_finds(parents: list[int]) -> None:
    matrix = Topology(parents).ancestors
    for node in range(len(parents)):
        assert set(np.flatnonzero(matrix[node])) == slow_ancestors(parents, node)


@given(parents_lists)
def test_a_row_of_ancestors_sums_to_depth_plus_one(parents: list[int]) -> None:
    topology = Topology(parents)
    np.testing.assert_array_equal(topology.ancestors.sum(axis=1), topology.depths + 1)
    assert topology.max_depth == topology.depths.max()


@given(parents_lists)
def test_ranks_number_the_children_of_each_node(parents: list[int]) -> None:
    topology = Topology(parents)
    for node, children in enumerate(topology.children):
        assert list(children) == [n for n in range(len(parents)) if n and parents[n] == node]
        assert topology.ranks[list(children)].tolist() == list(range(len(children)))


@given(parents_lists)
def test_rank_paths_rebuild_the_same_shape(parents: list[int]) -> None:
    topology = Topology(parents)
    rebuilt = Topology.from_rank_paths(topology.rank_paths)
    assert sorted(rebuilt.rank_paths) == sorted(topology.rank_paths)
    assert rebuilt.depths.tolist() == sorted(topology.depths.tolist())


@given(parents_lists)
def test_levels_end_where_depth_grows(parents: list[int]) -> None:
    topology = Topology.from_rank_paths(Topology(parents).rank_paths)
    start = 0
    for depth, end in enumerate(topology.level_ends):
        assert (topology.depths[start:end] == depth).all()
        start = end
    assert start == len(topology)


def test_levels_are_refused_when_nodes_stand_in_another_order() -> None:
    with pytest.raises(ValueError, match="by depth"):
        _ = Topology([-1, 0, 1, 0]).level_ends


@given(sequences)
def test_merging_sequences_gives_the_trie_of_their_prefixes(lists: list[list[int]]) -> None:
    tree = DraftTree.from_sequences(9, lists)
    prefixes = {tuple(tokens[:end]) for tokens in lists for end in range(1, len(tokens) + 1)}
    found = set()
    for node in range(1, len(tree)):
        above = sorted(slow_ancestors(tree.topology.parents.tolist(), node))
        assert above[0] == 0
        found.add(tuple(tree.tokens[above[1:]].tolist()))
    assert found == prefixes
    assert len(tree) == len(prefixes) + 1
    assert tree.tokens[0] == 9


@given(parents_lists, st.data())
def test_a_part_keeps_parents_and_depths(parents: list[int], data: st.DataObject) -> None:
    topology = Topology(parents)
    wanted = data.draw(st.lists(st.booleans(), min_size=len(topology), max_size=len(topology)))
    keep = np.array([True, *wanted[1:]])
    for node in range(1, len(topology)):
        keep[node] &= keep[topology.parents[node]]
    part = topology.part(keep)
    assert part.depths.tolist() == topology.depths[keep].tolist()
    old = np.flatnonzero(keep)
    for new in range(1, len(part)):
        assert old[part.parents[new]] == topology.parents[old[new]]
    assert topology.part(keep) is part


@pytest.mark.parametrize("keep", [[False, True, True], [True, False, True]])
def test_a_part_without_its_root_or_a_parent_is_refused(keep: list[bool]) -> None:
    with pytest.raises(ValueError, match="keeps the root"):
        Topology.chain(2).part(np.array(keep))


@pytest.mark.parametrize("parents", [[], [0], [-1, 1], [-1, 2, 0], [-1, -1]])
def test_parents_out_of_order_are_refused(parents: list[int]) -> None:
    with pytest.raises(ValueError, match="a tree"):
        Topology(parents)


def test_rank_paths_need_parent_and_lower_sibling() -> None:
    with pytest.raises(ValueError, match=r"\(1, 0\) has no parent \(1,\)"):
        Topology.from_rank_paths([(0,), (1, 0)])
    with pytest.raises(ValueError, match="without its sibling of rank 1"):
        Topology.from_rank_paths([(0,), (2,)])


def test_a_chain_knows_that_it_is_one() -> None:
    assert Topology.chain(4).is_chain
    assert ROOT_ONLY.is_chain
    assert not Topology([-1, 0, 0]).is_chain
    assert Topology.chain(4) is Topology.chain(4)


def test_a_tree_needs_a_token_for_every_node() -> None:
    with pytest.raises(ValueError, match="3 nodes"):
        DraftTree(Topology.chain(2), np.array([1, 2]))


def test_a_builder_returns_the_node_that_is_already_there() -> None:
    builder = TreeBuilder(7)
    child = builder.add(0, 3)
    assert builder.add(0, 3) == child
    assert builder.add(child, 3) == child + 1
    assert len(builder) == 3
    tree = builder.build()
    assert tree.tokens.tolist() == [7, 3, 3]
    assert tree.topology.parents.tolist() == [-1, 0, 1]
