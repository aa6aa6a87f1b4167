"""DySpec: trees that grow where the draft model expects them to be accepted, and stay exact."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from hardware.profile import Profile, StepCost
from methods.decoding.common_drafts import DrawnTree, best_size, draft_for
from methods.decoding.dyspec import (
    CPU_NODES,
    MEASURED,
    PUBLISHED_NODES,
    DynamicDrafter,
    DySpec,
    Filled,
    Mode,
    grow_by_threshold,
    grow_greedily,
)
from methods.decoding.speculative import ChainDrafter
from models.base import Decoding
from models.decode import Draws, decode
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
    first_two,
    wanted_first_two,
)
from tests.methods.decoding.heads import PROMPTS
from tests.methods.decoding.measure_drafts import measure_correlation, measure_trees
from tests.models.toy import TableModel, cycle_table, distribution, random_table, total_variation

CPU = Profile(name="test", kind="cpu", label="test")


def pair(vocab: int, seed: int = 0) -> tuple[TableModel, TableDraft]:
    """Return a target, whose logits depend on two tokens, and a draft that knows only one."""
    target = random_table(vocab, 2, seed=seed)
    draft = target.mean(0) + random_table(vocab, 1, seed=seed + 50, spread=0.7)
    return TableModel(target), TableDraft(draft)


# --- the text keeps its distribution --------------------------------------------------------------


@pytest.mark.parametrize(("vocab", "nodes"), [(3, 1), (5, 1), (3, 2), (4, 2), (3, 4)])
def test_two_tokens_have_the_targets_joint_distribution(vocab: int, nodes: int) -> None:
    target, draft = pair(vocab)
    found = exact_first_two(partial(grow_greedily, nodes=nodes, depth=4), target, draft)
    assert total_variation(found, wanted_first_two(target)) < 1e-6


@pytest.mark.parametrize("threshold", [0.6, 0.3, 0.2])
def test_layered_trees_keep_the_joint_distribution(threshold: float) -> None:
    target, draft = pair(3)
    for most in (3, 30):
        grow = partial(grow_by_threshold, nodes=most, depth=2, threshold=threshold)
        found = exact_first_two(grow, target, draft)
        assert total_variation(found, wanted_first_two(target)) < 1e-6


def test_a_tree_that_is_pruned_after_drawing_does_not() -> None:
    target, draft = pair(3)
    grow = partial(grow_greedily, nodes=3, depth=4)
    pruned = exact_first_two(grow, target, draft, prune=True)
    assert total_variation(pruned, wanted_first_two(target)) > 0.01


def p_value(nodes: int, vocab: int, prune: bool = False, samples: int = 2500) -> float:
    """Return how likely so large a deviation of the first two tokens would be by chance."""
    target, draft = pair(vocab, seed=3)
    random = np.random.default_rng(7)
    draws, counts = Draws(11), np.zeros((vocab, vocab))
    grow = partial(grow_greedily, nodes=nodes, depth=6)
    for _ in range(samples):
        choose = lambda row: row.at(random.random())  # noqa: E731  # one line, used once
        counts[first_two(grow, target, draft, draws, choose, prune)] += 1
    expected = np.zeros_like(counts)
    for tokens, probability in wanted_first_two(target).items():
        expected[tokens] = samples * probability
    return float(chisquare(counts.ravel(), expected.ravel(), sum_check=False).pvalue)


@pytest.mark.parametrize(("nodes", "vocab"), [(6, 4), (12, 5)])
def test_larger_trees_keep_it_as_far_as_samples_can_tell(nodes: int, vocab: int) -> None:
    assert p_value(nodes, vocab) > 0.001


def test_samples_can_tell_a_pruned_tree() -> None:
    assert p_value(6, 4, prune=True) < 1e-4


@pytest.mark.parametrize("mode", ["greedy", "threshold"])
def test_whole_texts_have_the_targets_distribution(mode: str) -> None:
    model, draft = pair(3)
    decoding = Decoding(max_new_tokens=3, temperature=HEAT)

    def run(draws: Draws) -> tuple[int, ...]:
        drafter = dynamic(draft, 3, mode=mode)
        drafter.choose = lambda row: draws.token(torch.from_numpy(row.remaining()))
        return decode(model, [0], decoding, drafter, draws=draws).token_ids

    expected = {
        text: model.probability([0], text, HEAT) for text in itertools.product(range(3), repeat=3)
    }
    assert total_variation(distribution(run), expected) < 1e-6


def dynamic(
    draft: TableDraft, nodes: int, *, mode: str = "greedy", seed: int = 0
) -> DynamicDrafter:
    decoding = Decoding(max_new_tokens=30, temperature=HEAT, seed=seed)
    return DynamicDrafter(
        draft,
        decoding,
        nodes,
        mode=mode,  # type: ignore[arg-type]  # one of the two
        threshold=1 / max(nodes, 1),
        temperature=HEAT,
    )


@pytest.mark.parametrize("mode", ["greedy", "threshold"])
def test_a_draft_equal_to_the_target_has_every_first_child_accepted(mode: str) -> None:
    table = random_table(6, 1, seed=2)
    for seed in range(3):
        watched = Watched(dynamic(TableDraft(table), 8, mode=mode, seed=seed))
        decoding = Decoding(max_new_tokens=40, temperature=HEAT, seed=seed)
        result = decode(TableModel(table), [0], decoding, watched)
        for tree, accepted in watched.steps:
            assert len(accepted.path) - 1 == first_child_depth(tree)
            assert all(tree.topology.ranks[node] == 0 for node in accepted.path[1:])
        assert sum(result.trace.accepted) == sum(first_child_depth(t) for t, _ in watched.steps)


def test_one_node_is_chain_speculative_sampling_of_one_token() -> None:
    model, draft = pair(5, seed=4)
    for seed in range(6):
        decoding = Decoding(max_new_tokens=25, temperature=HEAT, seed=seed)
        tree = decode(model, [0], decoding, dynamic(draft, 1, seed=seed))
        chain = decode(model, [0], decoding, ChainDrafter(draft, decoding, 1, temperature=HEAT))
        assert tree.token_ids == chain.token_ids
        assert tree.trace.accepted == chain.trace.accepted


def test_where_the_draft_is_sure_the_tree_is_a_chain() -> None:
    draft = TableDraft(cycle_table(5) * 4)
    tree = drawn_tree(draft, by_slot)
    grow_greedily(tree, 6, 9)
    assert tree.build().topology.is_chain
    assert tree.tokens == [0, 1, 2, 3, 4, 0, 1]


# --- where it grows -------------------------------------------------------------------------------


def closed_form(tree: DrawnTree, filled: Filled) -> float:
    """Return a slot's worth: draft probability of its path, less that of the siblings before."""
    built = tree.build()
    assert built.draft_probabilities is not None
    topology, tokens = built.topology, built.tokens
    parent = int(topology.parents[filled.child])
    siblings = topology.children[parent]
    before = siblings[: siblings.index(filled.child)]
    worth = 1 - sum(built.draft_probabilities[parent, tokens[each]] for each in before)
    while parent:
        above = int(topology.parents[parent])
        worth *= built.draft_probabilities[above, tokens[parent]]
        parent = above
    return float(worth)


@given(st.integers(0, 500), st.integers(1, 12))
def test_filled_values_never_rise_and_telescope(seed: int, nodes: int) -> None:
    tree = drawn_tree(TableDraft(random_table(5, 1, seed=seed)), by_slot)
    filled = grow_greedily(tree, nodes, 5)
    assert len(filled) == nodes == tree.drafts
    values = [each.value for each in filled]
    assert values[0] == 1
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values))
    assert values == pytest.approx([closed_form(tree, each) for each in filled])


def best_expected(
    rows: np.ndarray, slots: tuple[tuple[float, tuple[int, ...], tuple[int, ...]], ...], nodes: int
) -> float:
    """Return the largest expected sum of values of any policy: it picks a slot knowing all draws.

    Args:
        rows: Draft distribution after each token, (vocab, vocab).
        slots: Open ones: worth, path of the node, tokens drawn for it before.
        nodes: Draws left.
    """
    if not nodes or not slots:
        return 0.0
    best = 0.0
    for index, (value, path, drawn) in enumerate(slots):
        row = rows[path[-1] if path else 0].copy()
        row[list(drawn)] = 0
        row /= row.sum()
        expected = value
        for token in np.flatnonzero(row):
            opened = [*slots[:index], *slots[index + 1 :]]
            if len(drawn) + 1 < len(row):
                opened.append((value * (1 - row[token]), path, (*drawn, int(token))))
            if len(path) + 1 < 2:
                opened.append((value * row[token], (*path, int(token)), ()))
            expected += row[token] * best_expected(rows, tuple(opened), nodes - 1)
        best = max(best, expected)
    return best


@pytest.mark.parametrize("seed", range(3))
def test_no_other_policy_expects_more(seed: int) -> None:
    table = random_table(3, 1, seed=seed)
    draft = TableDraft(table)
    found = distribution(
        lambda draws: sum(
            each.value
            for each in grow_greedily(
                drawn_tree(draft, lambda row: draws.token(torch.from_numpy(row.remaining()))), 3, 2
            )
        )
    )
    expected = sum(value * probability for value, probability in found.items())
    rows = torch.softmax(table.double() / HEAT, -1).numpy()
    assert expected == pytest.approx(best_expected(rows, ((1.0, (), ()),), 3), abs=1e-6)


def slots_of(tree: DrawnTree, filled: list[Filled]) -> list[tuple[tuple[int, ...], float]]:
    """Return which slots were filled, each by the path of its token, with its value."""
    found = []
    for child, value in filled:
        path, node = [], child
        while node:
            path.append(tree.tokens[node])
            node = tree.parents[node]
        found.append((tuple(path), round(value, 12)))
    return sorted(found)


@settings(max_examples=60)
@given(st.integers(0, 500), st.integers(1, 16))
def test_the_threshold_of_the_least_filled_value_fills_the_same_slots(
    seed: int, nodes: int
) -> None:
    draft = TableDraft(random_table(5, 1, seed=seed))
    one, other = drawn_tree(draft, by_slot), drawn_tree(draft, by_slot)
    greedy = grow_greedily(one, nodes + 1, 6)[:nodes]
    values = [each.value for each in grow_greedily(drawn_tree(draft, by_slot), nodes + 1, 6)]
    assume(values[-2] > values[-1] + 1e-9)  # of two equal slots greedy may fill only one
    least = values[-2] * (1 - 1e-12)  # products in another order round differently
    layered = grow_by_threshold(other, 39, 6, least)
    assert slots_of(one, greedy) == slots_of(other, layered)


def test_a_node_is_read_when_its_first_child_is_worth_it_and_not_before() -> None:
    draft = TableDraft(random_table(5, 1, seed=1))
    watched = Watched(dynamic(draft, 6))
    result = decode(
        TableModel(random_table(5, 2)),
        [0],
        Decoding(max_new_tokens=20, temperature=HEAT),
        watched,
    )
    # The prompt, and then the root and every node with children, each in a forward of its own.
    read = sum(bool(kids) for tree, _ in watched.steps for kids in tree.topology.children)
    forwards = watched.inner.draft_model.forwards
    assert len(forwards) == 1 + read
    full = [len(tree) for tree, _ in watched.steps if tree.topology.max_depth > 1]
    assert set(full) == {7}
    assert read < 0.8 * sum(len(tree) for tree, _ in watched.steps)  # as printed: every node
    assert result.trace.notes["draft_nodes"] == 6


def test_layers_are_read_in_one_forward_each() -> None:
    draft = TableDraft(random_table(5, 1, seed=1))
    watched = Watched(dynamic(draft, 12, mode="threshold"))
    decode(
        TableModel(random_table(5, 2)), [0], Decoding(max_new_tokens=30, temperature=HEAT), watched
    )
    forwards = watched.inner.draft_model.forwards
    depths = sum(tree.topology.max_depth for tree, _ in watched.steps)
    assert max(forward.width for forward in forwards[1:]) > 1
    assert len(forwards) <= 1 + depths + len(watched.steps)


def test_trees_stop_at_the_depth_and_at_the_most_nodes() -> None:
    draft = TableDraft(random_table(5, 1, seed=1))
    tree = drawn_tree(draft, by_slot)
    assert len(grow_greedily(tree, 30, 1)) == 5  # the vocabulary is all that depth 1 can hold
    assert max(tree.depths) == 1
    tree = drawn_tree(draft, by_slot)
    assert len(grow_by_threshold(tree, 7, 9, 0.001)) == 7
    tree = drawn_tree(draft, by_slot)
    grow_by_threshold(tree, 39, 2, 0.01)
    assert max(tree.depths) == 2


# --- the method -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["greedy", "threshold"])
def test_it_keeps_the_contract(mode: str) -> None:
    method = DySpec(draft="layers:1", tree_nodes=9, mode=mode)  # type: ignore[arg-type]
    assert [check for check in check_method(method, tiny_text_model()) if not check.ok] == []


def test_auto_takes_the_size_with_the_most_tokens_per_second() -> None:
    target, draft = tiny_text_model().facts, TableDraft(cycle_table(4)).facts
    sizes = []
    for per_node in (0.0, 0.02, 0.1, 0.4, 8.0):
        cost = StepCost((1, 101), (128,), ((1, 1 + 100 * per_node),))
        profile = Profile(name="test", kind="cpu", label="test", step_cost=cost)
        method = DySpec(tree_nodes="auto")
        sizes.append(method.chosen_size(profile, target, draft, Decoding(max_new_tokens=1)))
        assert sizes[-1] == best_size(MEASURED["greedy"][0.0], profile, target, draft)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[2] > sizes[-1] == 0
    unknown = DySpec(tree_nodes="auto").chosen_size(CPU, target, draft, Decoding(max_new_tokens=1))
    gpu = Profile(name="test", kind="cuda", label="test")
    assert unknown == CPU_NODES
    assert (
        DySpec(tree_nodes="auto").chosen_size(gpu, target, draft, Decoding(max_new_tokens=1))
        == PUBLISHED_NODES
    )


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"tree_nodes": 769}, "tree_nodes must be a whole number from 0 to 768, got 769"),
        ({"mode": "layers"}, "mode must be one of greedy, threshold, got 'layers'"),
        ({"threshold": 0.0}, r"threshold must lie in \(0, 1\] or be auto, got 0.0"),
        ({"draft_temperature": 0.0}, r"draft_temperature must lie in \[0.05, 10\], got 0.0"),
        ({"draft": ""}, "draft must be the id of a model, got ''"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        DySpec(**wrong)  # type: ignore[arg-type]  # what is tested


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", ["greedy", "threshold"])
@pytest.mark.parametrize("heat", [0.0, 0.8])
def test_what_auto_knows_is_what_is_measured(mode: Mode, heat: float) -> None:
    model = load("smollm2-135m", LoadSettings(), offline=True)
    draft = draft_for("tiny-draft", model)
    prompts = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    found = measure_trees(model, draft, prompts, heat, mode, sizes=(16,))
    known = MEASURED[mode][heat]
    assert found.tokens_at(16) == pytest.approx(known.tokens_at(16), abs=0.2)
    assert found.forwards_at(16) == pytest.approx(known.forwards_at(16), rel=0.2)


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_drafts_probability_predicts_acceptance() -> None:
    model = load("smollm2-135m", LoadSettings(), offline=True)
    draft = draft_for("tiny-draft", model)
    prompts = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    assert measure_correlation(model, draft, prompts, 0.0) > 0.8  # DS-8
