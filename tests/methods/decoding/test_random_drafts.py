"""The control: random trees change nothing but the work."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.profile import Profile
from methods.decoding.common_trees import published_tree
from methods.decoding.random_drafts import RandomDrafter, RandomDrafts
from models.base import Decoding
from models.decode import decode
from models.draft_tree import DraftTree
from tests.models.toy import TableModel, random_table

CPU = Profile(name="test", kind="cpu", label="test")


@given(st.integers(0, 1000), st.integers(8, 50))
def test_siblings_are_distinct_and_inside_the_vocabulary(seed: int, vocab_size: int) -> None:
    tree = RandomDrafter(published_tree(), vocab_size, seed).draft([3], 6)
    assert tree.tokens[0] == 3
    assert ((tree.tokens >= 0) & (tree.tokens < vocab_size)).all()
    for children in tree.topology.children:
        assert len({int(tree.tokens[child]) for child in children}) == len(children)


def test_the_tree_has_the_shape_of_token_recycling_cut_to_the_budget() -> None:
    drafter = RandomDrafter(published_tree(), 50, 0)
    assert drafter.draft([3], 6).topology is published_tree()
    assert len(drafter.draft([3], 2)) == 1 + 8 + 21


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.8]))
def test_random_drafts_leave_the_text_as_it_is(seed: int, heat: float) -> None:
    model = TableModel(random_table(11, 2, seed=seed))
    decoding = Decoding(max_new_tokens=20, temperature=heat, seed=seed)
    with RandomDrafts(seed=seed).apply(model, CPU) as changed:
        result = changed.generate([1, 2], decoding)
    assert result.token_ids == decode(model, [1, 2], decoding).token_ids
    assert result.trace.notes == {"tree_nodes": 80}


def drafts(seed: int) -> list[int]:
    drafter = RandomDrafter(published_tree(), 5000, seed)
    trees: list[DraftTree] = [drafter.draft([3], 6) for _ in range(2)]
    return [token for tree in trees for token in tree.tokens[1:].tolist()]


def test_the_seed_decides_the_drafts_and_every_step_draws_anew() -> None:
    assert drafts(1) == drafts(1)
    assert drafts(1) != drafts(2)
    assert drafts(1)[:80] != drafts(1)[80:]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(
        ValueError, match="tree_nodes must be a whole number from 0 to 128, got 500"
    ):
        RandomDrafts(tree_nodes=500)
    with pytest.raises(ValueError, match="seed must be a whole number"):
        RandomDrafts(seed=-1)
