"""Token Recycling: its tree, its matrix, and what they give on targets that can be worked out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hardware.profile import Profile, StepCost
from methods.decoding.common import expected_tokens
from methods.decoding.common_trees import (
    CPU_NODES,
    MOST_NODES,
    PUBLISHED_NODES,
    expected_tokens_with,
    published_tree,
    rank_probabilities,
    static_tree,
)
from methods.decoding.token_recycling import RecyclingDrafter, SuccessorMatrix, TokenRecycling
from models.base import Decoding, Generation, TextGenerator
from models.decode import Accepted, decode
from models.draft_tree import DraftTree, Topology
from tests.models.toy import TableModel, cycle_table, distribution, random_table, total_variation

CPU = Profile(name="test", kind="cpu", label="test")
GPU = Profile(name="test", kind="cuda", label="test")


def generate(
    method: TokenRecycling, model: TextGenerator, prompt: Sequence[int], length: int
) -> Generation:
    with method.apply(model, CPU) as changed:
        return changed.generate(prompt, Decoding(max_new_tokens=length))


def drafter_over(matrix: SuccessorMatrix, topology: Topology, **options: bool) -> RecyclingDrafter:
    settings = {"prompt_update": False, "accepted_only": False, "skip_unknown": False, **options}
    return RecyclingDrafter(matrix, topology, **settings)


# --- the tree -------------------------------------------------------------------------------------


def test_the_published_tree_has_80_drafts_on_six_levels() -> None:
    topology = published_tree()
    assert len(topology) == 81
    assert np.bincount(topology.depths).tolist() == [1, 8, 21, 25, 15, 8, 3]
    paths = set(topology.rank_paths)
    assert all(path[:-1] in paths for path in paths if path)
    assert (topology.ancestors.sum(axis=1) == topology.depths + 1).all()
    assert {(0, 0, 0, 0, 0, 1), (0, 0, 0, 1, 0, 0), (7, 0), (0, 7, 0), (3, 0, 0, 0)} < paths
    assert not {(8,), (7, 1), (2, 3), (1, 1, 1), (6, 0, 0)} & paths


def test_fewer_candidates_leave_the_lower_ranks_of_the_published_tree() -> None:
    kept = published_tree(2)
    assert set(kept.rank_paths) == {p for p in published_tree().rank_paths if max(p, default=0) < 2}


def test_a_number_of_nodes_is_met_exactly() -> None:
    for nodes in (0, 1, 2, 7, 15, 79, 81, MOST_NODES):
        assert len(static_tree(nodes, CPU)) == nodes + 1


def test_without_a_measured_cost_auto_knows_only_the_kind_of_device() -> None:
    assert len(static_tree("auto", GPU)) == PUBLISHED_NODES + 1
    assert len(static_tree("auto", CPU)) == CPU_NODES + 1


def test_skipping_unknown_rows_makes_auto_take_a_larger_tree() -> None:
    cost = StepCost((1, 101), (128,), ((1, 3.0),))
    profile = Profile(name="test", kind="cpu", label="test", step_cost=cost)
    model = TableModel(random_table(30))
    whole, skipping = (
        TokenRecycling(tree_nodes="auto", skip_unknown=skip).drafter(model, profile).max_nodes
        for skip in (False, True)
    )
    assert whole == len(static_tree("auto", profile))
    assert skipping > whole


def test_auto_takes_the_size_with_the_most_tokens_per_second() -> None:
    sizes = {}
    for per_node in (0.0, 0.002, 0.02, 0.1, 2.0):
        cost = StepCost((1, 101), (128,), ((1, 1 + 100 * per_node),))
        profile = Profile(name="test", kind="cpu", label="test", step_cost=cost)
        sizes[per_node] = len(static_tree("auto", profile)) - 1
        rates = [
            expected_tokens_with(nodes) / cost.at(nodes + 1, 128) for nodes in range(MOST_NODES + 1)
        ]
        assert sizes[per_node] == int(np.argmax(rates))
    assert sizes[0.0] == MOST_NODES
    assert sizes[2.0] == 0
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)


@pytest.mark.parametrize("nodes", [0, 1, 12, 13, 40, 80, 128])
def test_measured_ranks_are_probabilities_in_falling_order(nodes: int) -> None:
    probabilities = rank_probabilities(nodes)
    assert probabilities.shape == (6, 8)
    assert (probabilities > 0).all()
    assert (probabilities.sum(axis=1) < 1).all()
    assert (np.diff(probabilities, axis=1) <= 0).all()


def test_the_statistics_predict_what_was_measured_at_both_sizes() -> None:
    # Tokens a forward in the runs that the statistics come from: 1442 / 911 and 1442 / 671.
    assert expected_tokens_with(12) == pytest.approx(1442 / 911, rel=0.02)
    published = expected_tokens(rank_probabilities(80), published_tree())
    assert published == pytest.approx(1442 / 671, rel=0.02)


def test_a_larger_tree_is_expected_to_emit_more() -> None:
    expected = [expected_tokens_with(nodes) for nodes in range(MOST_NODES + 1)]
    assert expected[0] == 1
    assert (np.diff(expected) > 0).all()


# --- the matrix -----------------------------------------------------------------------------------


def slow_read(
    rows: npt.NDArray[np.int64], paths: Sequence[tuple[int, ...]], root: int
) -> list[int]:
    """Follow each rank path by itself, down from the root."""

    def token_at(path: tuple[int, ...]) -> int:
        return root if not path else int(rows[token_at(path[:-1]), path[-1]])

    return [token_at(path) for path in paths]


@given(st.integers(0, 10_000), st.integers(0, 9), st.integers(0, MOST_NODES))
def test_reading_a_tree_follows_every_rank_path(seed: int, root: int, nodes: int) -> None:
    topology = static_tree(nodes, CPU)
    matrix = SuccessorMatrix(10, 8, "int32")
    matrix.rows[:] = np.random.default_rng(seed).integers(0, 10, size=(10, 8))
    expected = slow_read(matrix.rows, topology.rank_paths, root)
    assert matrix.read(topology, root).tolist() == expected


def test_after_a_step_each_nodes_row_holds_its_own_best_successors() -> None:
    random = np.random.default_rng(0)
    matrix = SuccessorMatrix(20, 3, "int64")
    matrix.rows[:] = before = random.integers(0, 20, size=(20, 3))
    tree = DraftTree(Topology([-1, 0, 0, 1]), np.array([4, 9, 2, 11]))
    logits = torch.from_numpy(random.normal(size=(4, 20)).astype(np.float32))
    drafter_over(matrix, tree.topology).update(tree, logits, Accepted([0, 1], 7))
    best = logits.argsort(dim=-1, descending=True)[:, :3].numpy()
    np.testing.assert_array_equal(matrix.rows[tree.tokens], best)
    untouched = np.setdiff1d(np.arange(20), tree.tokens)
    np.testing.assert_array_equal(matrix.rows[untouched], before[untouched])


@pytest.mark.parametrize(("path", "winner"), [([0, 1, 2], 2), ([0, 1], 0), ([0], 0), ([0, 3], 3)])
def test_of_equal_tokens_the_deepest_accepted_node_wins(path: list[int], winner: int) -> None:
    tree = DraftTree(Topology([-1, 0, 1, 0, 0]), np.array([5, 8, 5, 5, 6]))
    logits = torch.eye(5, 20)  # node n likes token n best
    matrix = SuccessorMatrix(20, 1, "int64")
    drafter_over(matrix, tree.topology).update(tree, logits, Accepted(path, 7))
    assert matrix.rows[5, 0] == winner


def test_of_equal_rejected_tokens_the_last_node_wins() -> None:
    tree = DraftTree(Topology([-1, 0, 0, 0]), np.array([1, 8, 8, 3]))
    matrix = SuccessorMatrix(20, 1, "int64")
    drafter_over(matrix, tree.topology).update(tree, torch.eye(4, 20), Accepted([0], 7))
    assert matrix.rows[8, 0] == 2


def test_only_accepted_nodes_are_recycled_if_so_set() -> None:
    tree = DraftTree(Topology([-1, 0, 0, 1]), np.array([4, 9, 2, 11]))
    logits = torch.eye(4, 20) + 1
    matrix = SuccessorMatrix(20, 2, "int64")
    drafter_over(matrix, tree.topology, accepted_only=True).update(
        tree, logits, Accepted([0, 2], 7)
    )
    assert matrix.rows[4, 0] == 0
    assert matrix.rows[2, 0] == 2
    assert not matrix.rows[[9, 11]].any()


@pytest.mark.parametrize("prompt_update", [False, True])
def test_the_prompt_fills_the_matrix_if_so_set(prompt_update: bool) -> None:
    model = TableModel(random_table(30, seed=5))
    prompt = [7, 3, 9, 3, 12] * 30  # longer than a chunk
    method = TokenRecycling(prompt_update=prompt_update, state="session")
    generate(method, model, prompt, 1)
    rows = method.state_for(model, lambda: pytest.fail("the state was not kept")).rows
    written = sorted(set(prompt)) if prompt_update else [12]
    assert np.flatnonzero(rows.any(axis=1)).tolist() == written
    best = model.table.argsort(dim=-1, descending=True)[:, :8].numpy()
    np.testing.assert_array_equal(rows[written], best[written])


def test_skipping_unknown_rows_drops_only_what_was_read_from_them() -> None:
    matrix = SuccessorMatrix(10, 2, "int64")
    matrix.rows[1] = [2, 3]
    matrix.rows[3] = [0, 4]  # token 0 as a real successor stays
    topology = Topology.from_rank_paths([(0,), (1,), (0, 0), (1, 0), (1, 1), (1, 1, 0)])
    tree = drafter_over(matrix, topology, skip_unknown=True).draft([1], 5)
    assert tree.tokens.tolist() == [1, 2, 3, 0, 4]
    assert tree.topology.parents.tolist() == [-1, 0, 0, 2, 2]
    assert len(drafter_over(matrix, topology, skip_unknown=True).draft([8], 5)) == 1


@pytest.mark.parametrize(("dtype", "size"), [("int32", 1_024_000), ("int64", 2_048_000)])
def test_the_matrix_of_a_vicuna_takes_less_than_2_mebibytes(dtype: str, size: int) -> None:
    matrix = SuccessorMatrix(32_000, 8, dtype)
    notes = drafter_over(matrix, published_tree()).notes
    assert notes == {"tree_nodes": 80, "state_bytes": size}
    assert size < 2 * 2**20


# --- on targets that can be worked out ------------------------------------------------------------


def accepted_after_warm_up(model: TableModel, prompt: Sequence[int], warm: int) -> list[int]:
    """Return the accepted drafts of every step but the last, from the first root `warm` ids on."""
    result = generate(TokenRecycling(), model, prompt, warm + 71)
    starts = np.cumsum([1] + [1 + accepted for accepted in result.trace.accepted[:-1]])
    return [a for a, s in zip(result.trace.accepted, starts, strict=True) if s > warm][:-1]


@pytest.mark.parametrize("length", [2, 5, 11])
def test_a_periodic_text_is_accepted_to_full_depth_after_one_period(length: int) -> None:
    accepted = accepted_after_warm_up(TableModel(cycle_table(length, 12)), [0], length)
    assert accepted
    assert set(accepted) == {6}  # seven tokens a forward


def test_a_bigram_model_is_accepted_to_full_depth_once_every_token_was_seen() -> None:
    # A random permutation with one cycle: each token has one successor, whatever stands before.
    order = np.random.default_rng(1).permutation(40)
    table = np.random.default_rng(2).normal(size=(40, 40)).astype(np.float32)
    table[order, np.roll(order, -1)] = 9
    accepted = accepted_after_warm_up(TableModel(table), [int(order[0])], 40)
    assert accepted
    assert set(accepted) == {6}


def texts(method: TokenRecycling, order: Sequence[int]) -> dict[int, Generation]:
    model = TableModel(random_table(30, 2, seed=8, spread=3))
    return {prompt: generate(method, model, [prompt, prompt + 1], 40) for prompt in order}


def test_cold_texts_do_not_depend_on_those_before() -> None:
    forward, backward = texts(TokenRecycling(), [1, 5, 9]), texts(TokenRecycling(), [9, 5, 1])
    for prompt in (1, 5, 9):
        assert forward[prompt].trace.accepted == backward[prompt].trace.accepted


def test_kept_state_makes_texts_depend_on_those_before_but_not_their_tokens() -> None:
    forward = texts(TokenRecycling(state="session"), [1, 5, 9])
    backward = texts(TokenRecycling(state="session"), [9, 5, 1])
    cold = texts(TokenRecycling(), [1, 5, 9])
    assert any(
        forward[prompt].trace.accepted != backward[prompt].trace.accepted for prompt in (1, 5, 9)
    )
    for prompt in (1, 5, 9):
        assert forward[prompt].token_ids == backward[prompt].token_ids == cold[prompt].token_ids
    assert sum(forward[9].trace.accepted) > sum(cold[9].trace.accepted)


@pytest.mark.parametrize("fill", ["zeros", "random"])
def test_a_matrix_full_of_nonsense_leaves_the_text_as_it_is(fill: str) -> None:
    model = TableModel(random_table(12, 2, seed=4))
    plain = decode(model, [3, 1], Decoding(max_new_tokens=40))

    class Nonsense(RecyclingDrafter):
        def update(self, tree: DraftTree, logits: torch.Tensor, accepted: Accepted) -> None:
            """Never learns."""

    matrix = SuccessorMatrix(12, 8, "int64")
    if fill == "random":
        matrix.rows[:] = np.random.default_rng(0).integers(0, 12, size=(12, 8))
    drafter = Nonsense(
        matrix, published_tree(), prompt_update=False, accepted_only=False, skip_unknown=False
    )
    assert decode(model, [3, 1], Decoding(max_new_tokens=40), drafter).token_ids == plain.token_ids


@pytest.mark.parametrize("skip_unknown", [False, True])
def test_sampling_keeps_the_models_distribution(skip_unknown: bool) -> None:
    model = TableModel(random_table(5, 2, seed=6))
    method = TokenRecycling(tree_nodes=6, candidates=2, skip_unknown=skip_unknown)
    decoding = Decoding(max_new_tokens=3, temperature=0.8)
    found = distribution(
        lambda draws: (
            decode(model, [0], decoding, method.drafter(model, CPU), draws=draws).token_ids
        )
    )
    expected = {text: model.probability([0], text, 0.8) for text in np.ndindex(5, 5, 5)}
    assert total_variation(found, expected) < 1e-6


def test_a_vocabulary_smaller_than_the_candidates_narrows_the_tree() -> None:
    model = TableModel(cycle_table(3))
    result = generate(TokenRecycling(), model, [0], 9)
    assert result.token_ids == (1, 2, 0, 1, 2, 0, 1, 2, 0)
    assert result.trace.notes["tree_nodes"] == len(published_tree(3)) - 1


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tree_nodes": 129}, "tree_nodes must be a whole number from 0 to 128, got 129"),
        ({"tree_nodes": -1}, "from 0 to 128, got -1"),
        ({"tree_nodes": "all"}, "from 0 to 128, got 'all'. The root is not counted; or 'auto'"),
        ({"candidates": 1, "tree_nodes": 7}, "7 drafts does not fit into 6 levels of 1 ranks"),
        ({"candidates": 0}, "candidates must be a whole number from 1 to 16"),
        ({"update": "some"}, "update must be one of all, accepted, got 'some'"),
        ({"dtype": "int8"}, "dtype must be one of int32, int64"),
        ({"state": "warm"}, "state must be one of cold, session, hot"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TokenRecycling(**settings)  # type: ignore[arg-type]  # what is tested
