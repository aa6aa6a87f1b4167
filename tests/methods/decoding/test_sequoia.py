"""Sequoia: the dynamic programme against brute force, and the drawn tree."""

from __future__ import annotations

import itertools
from functools import cache, partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.profile import Profile, StepCost
from methods.decoding.common import best_template
from methods.decoding.common_drafts import best_size, draft_for
from methods.decoding.sequoia import (
    RATES,
    USUAL_NODES,
    Sequoia,
    StaticDrafter,
    best_tree,
    expected_accepted,
    expected_drafts,
    grow_static,
    rates_at,
)
from models.base import Decoding
from models.decode import decode
from models.draft_tree import Topology
from models.loading import LoadSettings, load
from runner.conformance import check_method, tiny_text_model
from tests.methods.decoding.drafts import (
    HEAT,
    TableDraft,
    Watched,
    by_slot,
    drawn_tree,
    exact_first_two,
    first_child_depth,
    wanted_first_two,
)
from tests.methods.decoding.heads import PROMPTS
from tests.methods.decoding.measure_drafts import measure_rates
from tests.models.toy import TableModel, cycle_table, random_table, total_variation

CPU = Profile(name="test", kind="cpu", label="test")
rates = st.lists(st.floats(0.01, 0.9), min_size=3, max_size=3).map(tuple)
SHAPES = {
    "one": Topology.from_rank_paths([(0,)]),
    "wide": Topology.from_rank_paths([(0,), (1,), (2,)]),
    "forked": Topology.from_rank_paths([(0,), (1,), (0, 0), (0, 1)]),
    "all": Topology.from_rank_paths([(0,), (1,), (0, 0), (1, 0)]),
}


@cache
def all_trees(nodes: int, depth: int, ranks: int) -> frozenset[frozenset[tuple[int, ...]]]:
    """Return the rank paths of every tree of that many drafts."""
    if not nodes:
        return frozenset([frozenset()])
    found = set()
    for tree in all_trees(nodes - 1, depth, ranks):
        for path in ((), *tree):
            order = sum(len(p) == len(path) + 1 and p[:-1] == path for p in tree)
            if len(path) < depth and order < ranks:
                found.add(tree | {(*path, order)})
    return frozenset(found)


@settings(max_examples=25, deadline=None)
@given(rates, st.integers(1, 6), st.integers(2, 3))
def test_no_tree_of_that_size_and_depth_expects_more(
    given_rates: tuple[float, ...], nodes: int, depth: int
) -> None:
    found = best_tree(given_rates, nodes, depth)
    assert len(found) == nodes + 1
    assert found.max_depth <= depth
    best = max(
        sum(float(np.prod([given_rates[rank] for rank in path])) for path in tree)
        for tree in all_trees(nodes, depth, 3)
    )
    assert expected_accepted(given_rates, found) == pytest.approx(best)


@given(rates, st.integers(1, 30))
def test_with_falling_rates_the_best_first_tree_is_as_good(
    given_rates: tuple[float, ...], nodes: int
) -> None:
    falling = tuple(sorted(given_rates, reverse=True))
    greedy = best_template(np.array([falling] * 5), nodes)
    assert expected_accepted(falling, best_tree(falling, nodes, 5)) == pytest.approx(
        expected_accepted(falling, greedy)
    )


def test_a_tree_that_does_not_fit_is_refused() -> None:
    assert len(best_tree((0.5, 0.2), 6, 2)) == 7
    with pytest.raises(ValueError, match="no tree of depth 2 has 7 drafts"):
        best_tree((0.5, 0.2), 7, 2)


def test_a_sure_first_child_makes_a_chain_and_even_rates_make_a_bush() -> None:
    assert best_tree((0.9, 0.01, 0.01), 5, 8).is_chain
    assert best_tree((0.3, 0.3, 0.3), 3, 8).max_depth == 1


@pytest.mark.parametrize(("vocab", "shape"), [(5, "one"), (4, "wide"), (3, "forked"), (3, "all")])
def test_two_tokens_have_the_targets_joint_distribution(vocab: int, shape: str) -> None:
    target, draft = TableModel(random_table(vocab, 2)), TableDraft(random_table(vocab, seed=9))
    grow = partial(grow_static, topology=SHAPES[shape], depth=4)
    found = exact_first_two(grow, target, draft)
    assert total_variation(found, wanted_first_two(target)) < 1e-6


def test_pruning_after_drawing_is_seen() -> None:
    target, draft = TableModel(random_table(3, 2)), TableDraft(random_table(3, seed=9))
    grow = partial(grow_static, topology=SHAPES["all"], depth=4)
    found = exact_first_two(grow, target, draft, prune=True)
    assert total_variation(found, wanted_first_two(target)) > 0.01


@given(st.integers(0, 300), st.integers(1, 20), st.integers(1, 5))
def test_the_drawn_tree_has_the_shape_cut_to_the_depth(seed: int, nodes: int, depth: int) -> None:
    shape = best_tree((0.5, 0.3, 0.1), nodes, 4)
    tree = drawn_tree(TableDraft(random_table(6, seed=seed)), by_slot)
    grow_static(tree, shape, depth)
    cut = shape.part(shape.depths <= depth)
    assert sorted(tree.build().topology.rank_paths) == sorted(cut.rank_paths)


def test_a_spent_distribution_ends_its_branch() -> None:
    table = np.full((4, 4), -np.inf, dtype=np.float32)
    table[0, [1, 2]] = 0
    table[1:, 3] = 0
    tree = drawn_tree(TableDraft(table), by_slot)
    grow_static(tree, Topology.from_rank_paths([(0,), (1,), (2,), (0, 0), (0, 1), (2, 0)]), 5)
    assert sorted(tree.build().topology.rank_paths) == [(), (0,), (0, 0), (1,)]


def test_a_draft_equal_to_the_target_has_every_first_child_accepted() -> None:
    table = random_table(6, seed=2)
    decoding = Decoding(max_new_tokens=40, temperature=HEAT)
    drafter = StaticDrafter(TableDraft(table), decoding, SHAPES["all"], temperature=HEAT)
    watched = Watched(drafter)
    decode(TableModel(table), [0], decoding, watched)
    for tree, accepted in watched.steps:
        assert len(accepted.path) - 1 == first_child_depth(tree)


@pytest.mark.parametrize("nodes", [3, 16])
def test_it_keeps_the_contract(nodes: int) -> None:
    method = Sequoia(draft="layers:1", tree_nodes=nodes)
    assert [check for check in check_method(method, tiny_text_model()) if not check.ok] == []


def test_auto_takes_the_size_with_the_most_tokens_per_second() -> None:
    target, draft = tiny_text_model().facts, TableDraft(cycle_table(4)).facts
    method, decoding = Sequoia(tree_nodes="auto"), Decoding(max_new_tokens=1)
    sizes = []
    for per_node in (0.0, 0.05, 8.0):
        cost = StepCost((1, 101), (128,), ((1, 1 + 100 * per_node),))
        profile = Profile(name="test", kind="cpu", label="test", step_cost=cost)
        sizes.append(method.chosen_size(profile, target, draft, decoding))
        expected = expected_drafts(rates_at(0.0), 8)
        assert sizes[-1] == best_size(expected, profile, target, draft)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1] == 0
    assert method.chosen_size(CPU, target, draft, decoding) == USUAL_NODES


def test_rates_fall_with_the_order_of_siblings() -> None:
    for known in RATES.values():
        assert all(1 > a >= b > 0 for a, b in itertools.pairwise(known))
        assert sum(known) < 1
    assert rates_at(0.7) == RATES[0.8]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"tree_nodes": 129}, "tree_nodes must be a whole number from 0 to 128, got 129"),
        ({"tree_nodes": 9, "depth": 1}, "from 0 to 8, got 9. Depth 1 holds no more"),
        ({"depth": 0}, "depth must be a whole number from 1 to 32, got 0"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Sequoia(**wrong)  # type: ignore[arg-type]  # what is tested


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("heat", [0.0, 0.8])
def test_the_rates_are_what_is_measured(heat: float) -> None:
    model = load("smollm2-135m", LoadSettings(), offline=True)
    draft = draft_for("tiny-draft", model)
    prompts = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    found = measure_rates(model, draft, prompts, heat)
    np.testing.assert_allclose(found, RATES[heat], atol=0.06)
