"""The wrapper around a model, and how trees get their size."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.profile import Profile, StepCost
from methods.decoding.autoregressive import Autoregressive
from methods.decoding.common import (
    DraftedGenerator,
    RankProbabilities,
    StatefulDecodingMethod,
    best_template,
    calibrated_nodes,
    expected_tokens,
    measure_rank_statistics,
    middle_context,
    top_k,
)
from models.base import Decoding, TextGenerator, Unsupported
from models.decode import NoDraft
from models.draft_tree import DraftTree, Topology
from tests.models.toy import TableModel, cycle_table, random_table

CPU = Profile(name="test", kind="cpu", label="test")

falling_ranks = st.lists(
    st.lists(st.floats(0.01, 0.5), min_size=3, max_size=3).map(lambda row: sorted(row)[::-1]),
    min_size=3,
    max_size=3,
).map(np.array)


# --- the wrapper ----------------------------------------------------------------------------------


def test_the_wrapper_is_a_text_generator_and_passes_the_rest_on() -> None:
    model = TableModel(cycle_table(4))
    wrapper = DraftedGenerator(model, NoDraft)
    assert isinstance(wrapper, TextGenerator)
    assert (wrapper.name, wrapper.tokenizer, wrapper.facts) == (
        model.name,
        model.tokenizer,
        model.facts,
    )
    assert wrapper.table is model.table
    assert wrapper.session(5).capacity == 5
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = wrapper.no_such_thing
    assert copy.copy(wrapper).table is model.table


def test_every_text_gets_a_drafter_of_its_own() -> None:
    made: list[NoDraft] = []

    def make() -> NoDraft:
        made.append(NoDraft())
        return made[-1]

    wrapper = DraftedGenerator(TableModel(cycle_table(4)), make)
    for _ in range(2):
        wrapper.generate([0], Decoding(max_new_tokens=3))
    assert len(made) == 2


def test_what_is_no_text_generator_is_refused_with_what_it_lacks() -> None:
    class Detector:
        name = "tiny-detector"
        facts = None

    with (
        pytest.raises(
            Unsupported, match="'autoregressive' needs a text generator; 'tiny-detector'"
        ),
        Autoregressive().apply(Detector(), CPU),  # type: ignore[arg-type]  # what is tested
    ):
        pass


# --- state ----------------------------------------------------------------------------------------


class Remembering(StatefulDecodingMethod):
    def drafter(self, model: TextGenerator, hardware: Profile) -> NoDraft:
        self.state_for(model, list).append(1)
        return NoDraft()


def seen(method: Remembering, model: TextGenerator) -> int:
    method.drafter(model, CPU)
    return len(method.state_for(model, list))


def test_cold_state_lasts_for_one_text() -> None:
    method, model = Remembering(), TableModel(cycle_table(3))
    assert [seen(method, model) for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("policy", ["session", "hot"])
def test_kept_state_lasts_until_it_is_reset_or_the_model_changes(policy: str) -> None:
    method, model = Remembering(state=policy), TableModel(cycle_table(3))
    assert [seen(method, model) for _ in range(3)] == [1, 2, 3]
    method.reset_state()
    assert [seen(method, model) for _ in range(2)] == [1, 2]
    other = TableModel(cycle_table(3))
    assert seen(method, other) == 1
    assert seen(method, model) == 1
    assert Remembering(state=policy) == method  # state is no setting


def test_an_unknown_state_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="state must be one of cold, session, hot, got 'warm'"):
        Remembering(state="warm")


# --- ranking --------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(0, 1000), st.integers(1, 9), st.sampled_from([40, 64, 1000, 1024, 2600]))
def test_the_k_best_are_those_of_a_full_sort(seed: int, k: int, vocab: int) -> None:
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed))
    expected = logits.argsort(dim=-1, descending=True)[:, :k]
    assert torch.equal(top_k(logits, k, block=16), expected)


def test_ties_among_the_best_still_give_distinct_ids() -> None:
    logits = torch.zeros(1, 2000)
    assert len(set(top_k(logits, 8, block=16)[0].tolist())) == 8


# --- templates ------------------------------------------------------------------------------------


def all_paths(depths: int, ranks: int) -> list[tuple[int, ...]]:
    return [
        path
        for depth in range(1, depths + 1)
        for path in itertools.product(range(ranks), repeat=depth)
    ]


def score(probabilities: RankProbabilities, path: tuple[int, ...]) -> float:
    return float(np.prod([probabilities[depth, rank] for depth, rank in enumerate(path)]))


@given(falling_ranks, st.integers(0, 39))
def test_the_best_template_holds_the_likeliest_paths(
    probabilities: RankProbabilities, nodes: int
) -> None:
    topology = best_template(probabilities, nodes)
    assert len(topology) == nodes + 1
    scores = sorted((score(probabilities, path) for path in all_paths(3, 3)), reverse=True)
    assert expected_tokens(probabilities, topology) == pytest.approx(1 + sum(scores[:nodes]))


@given(falling_ranks, st.integers(0, 38))
def test_a_smaller_template_is_part_of_a_larger_one(
    probabilities: RankProbabilities, nodes: int
) -> None:
    smaller = set(best_template(probabilities, nodes).rank_paths)
    assert smaller < set(best_template(probabilities, nodes + 1).rank_paths)


def test_ranks_out_of_order_still_give_a_closed_tree() -> None:
    probabilities = np.array([[0.1, 0.6], [0.2, 0.1]])
    assert sorted(best_template(probabilities, 2).rank_paths) == [(), (0,), (1,)]


def test_a_template_larger_than_all_ranks_is_refused() -> None:
    assert len(best_template(np.full((2, 2), 0.5), 6)) == 7
    with pytest.raises(ValueError, match="7 drafts does not fit into 2 levels of 2 ranks"):
        best_template(np.full((2, 2), 0.5), 7)


def test_expected_tokens_of_a_chain_are_a_geometric_sum() -> None:
    chain = Topology.chain(3)
    assert expected_tokens(np.full((3, 1), 0.6), chain) == pytest.approx((1 - 0.6**4) / (1 - 0.6))


# --- calibration ----------------------------------------------------------------------------------


def linear_cost(per_node: float) -> StepCost:
    return StepCost((1, 101), (100, 1000), ((1, 1 + 100 * per_node),) * 2)


def test_the_size_maximises_tokens_per_second() -> None:
    def expected(nodes: int) -> float:
        return 1 + 1.5 * (1 - 0.8**nodes)

    for per_node in (0.001, 0.03, 0.1):
        cost = linear_cost(per_node)
        rates = [expected(nodes) / cost.at(nodes + 1, 500) for nodes in range(65)]
        assert calibrated_nodes(expected, cost, 500, 64) == int(np.argmax(rates))


def test_drafts_that_cost_too_much_are_not_made() -> None:
    assert calibrated_nodes(lambda nodes: 1 + 0.1 * nodes, linear_cost(1.0), 500, 64) == 0


def test_free_drafts_are_all_made() -> None:
    assert calibrated_nodes(lambda nodes: 1 + 0.1 * nodes, linear_cost(0.0), 500, 64) == 64


def test_rare_drafts_may_be_longer_the_costlier_a_plain_step_is() -> None:
    # Steps without a draft take their time whatever is chosen, so the share moves the optimum.
    def expected(nodes: int) -> float:
        return 1 + 2 * (1 - 0.7**nodes)

    cost = linear_cost(0.1)
    always = calibrated_nodes(expected, cost, 500, 64)
    rarely = calibrated_nodes(expected, cost, 500, 64, share=0.2)
    slow = [
        (0.8 + 0.2 * expected(nodes)) / (0.8 + 0.2 * cost.at(nodes + 1, 500)) for nodes in range(65)
    ]
    assert rarely == int(np.argmax(slow))
    assert rarely > always


def test_trees_that_are_not_filled_cost_what_is_made_of_them() -> None:
    def expected(nodes: int) -> float:
        return 1 + 2 * (1 - 0.9**nodes)

    cost = linear_cost(0.1)
    rates = [expected(nodes) / cost.at(1 + round(0.5 * nodes), 500) for nodes in range(65)]
    half = calibrated_nodes(expected, cost, 500, 64, filled=0.5)
    assert half == int(np.argmax(rates))
    assert half > calibrated_nodes(expected, cost, 500, 64)


def test_the_middle_of_the_measured_contexts_stands_for_a_text() -> None:
    assert middle_context(StepCost((1,), (100, 300, 1000), ((1,), (1,), (1,)))) == 550


# --- rank statistics ------------------------------------------------------------------------------


class ThreeGuesses(NoDraft):
    """Guesses the ids after the last one, and drafts the best guess twice deep."""

    max_nodes = 3

    def candidates(self, tree: DraftTree, node: int) -> list[int]:
        token = int(tree.tokens[node])
        return [(token + step) % 12 for step in (1, 2, 3)]

    def draft(self, token_ids: Sequence[int], budget: int) -> DraftTree:
        chain = [(token_ids[-1] + step) % 12 for step in range(1, 1 + min(2, budget))]
        return DraftTree.chain(token_ids[-1], chain)


def test_rank_statistics_count_where_the_true_token_stood() -> None:
    # From 0 to 3 the next id is one further, then two, then three, then the text is at its end.
    table = np.zeros((12, 12), dtype=np.float32)
    for token, following in {0: 1, 1: 2, 2: 3, 3: 5, 5: 8, 8: 4}.items():
        table[token, following] = 5
    model = TableModel(table)
    found = measure_rank_statistics(
        model, [[0]], Decoding(max_new_tokens=6), ThreeGuesses, depths=3, ranks=3
    )
    # Prefill emits 1. Step 1 drafts 2 3, both right, then 5: rank 1 after node 3, at depth 2.
    # Step 2 drafts 6 7 under 5: 8 has rank 2 at depth 0. Step 3 drafts 9 under 8: 4 has no rank.
    assert found.tolist() == [[1 / 3, 0, 1 / 3], [1, 0, 0], [0, 1, 0]]


def test_rank_statistics_of_depths_never_reached_are_zero() -> None:
    model = TableModel(random_table(12, seed=1))
    found = measure_rank_statistics(
        model, [[0]], Decoding(max_new_tokens=2), ThreeGuesses, depths=4, ranks=3
    )
    assert found[2:].sum() == 0
