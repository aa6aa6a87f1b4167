"""The decode loop on a table model, where every answer can be worked out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from models.base import Decoding, Generation, InvalidOutput, Unsupported
from models.decode import (
    Accepted,
    Draws,
    NoDraft,
    accept_greedy,
    accept_sampled,
    accept_without_replacement,
    decode,
    greedy_choices,
    next_token_probabilities,
)
from models.draft_tree import DraftTree, Topology, TreeBuilder
from tests.models.toy import (
    TableModel,
    cycle_table,
    distribution,
    path_to,
    random_table,
    total_variation,
)


class Scripted(NoDraft):
    """Drafts what a function of the text says, cut to the budget, and notes what it was told."""

    def __init__(
        self, propose: Callable[[list[int]], DraftTree], max_nodes: int = 50, prompt: bool = False
    ) -> None:
        self.propose = propose
        self.max_nodes = max_nodes
        self.wants_prompt_logits = prompt
        self.prompt_logits: Tensor | None = None
        self.updates: list[tuple[DraftTree, Tensor, Accepted]] = []
        self.notes = {"scripted": 1}

    def begin(self, prompt_ids: Sequence[int], logits: Tensor) -> None:
        self.prompt_logits = logits

    def draft(self, token_ids: Sequence[int], budget: int) -> DraftTree:
        tree = self.propose(list(token_ids))
        keep = tree.topology.depths <= budget
        return DraftTree(tree.topology.part(keep), tree.tokens[keep])

    def update(self, tree: DraftTree, logits: Tensor, accepted: Accepted) -> None:
        self.updates.append((tree, logits, accepted))


def oracle(model: TableModel, prompt: Sequence[int], length: int, depth: int) -> Scripted:
    """A drafter that knows the greedy continuation, and hides it among wrong siblings."""
    text = [*prompt, *decode(model, prompt, Decoding(max_new_tokens=length)).token_ids]
    vocab = model.facts.vocab_size

    def propose(token_ids: list[int]) -> DraftTree:
        right = text[len(token_ids) : len(token_ids) + depth]
        wrong = [[*right[:at], (right[at] + 1) % vocab] for at in range(len(right))]
        return DraftTree.from_sequences(token_ids[-1], [*wrong, right])

    return Scripted(propose)


def random_trees(vocab: int, seed: int) -> Scripted:
    """A drafter of trees of any shape with any tokens."""
    random = np.random.default_rng(seed)

    def propose(token_ids: list[int]) -> DraftTree:
        builder = TreeBuilder(token_ids[-1])
        for _ in range(random.integers(0, 12)):
            builder.add(int(random.integers(len(builder))), int(random.integers(vocab)))
        return builder.build()

    return Scripted(propose)


# --- greedy ---------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 2))
def test_no_draft_changes_a_greedy_text(seed: int, order: int) -> None:
    model = TableModel(random_table(6, order, seed=seed))
    decoding = Decoding(max_new_tokens=15)
    plain = decode(model, [1, 2], decoding)
    drafted = decode(model, [1, 2], decoding, random_trees(6, seed))
    assert drafted.token_ids == plain.token_ids
    assert len(plain.token_ids) == 15


def test_plain_decoding_takes_one_forward_a_token() -> None:
    model = TableModel(cycle_table(4))
    result = decode(model, [0, 1, 2], Decoding(max_new_tokens=6))
    assert result.token_ids == (3, 0, 1, 2, 3, 0)
    assert result.text == "dabcda"
    assert [(f.width, f.context) for f in result.trace.prefill] == [(3, 0)]
    assert [(f.width, f.context) for f in result.trace.forwards] == [(1, 3 + n) for n in range(5)]
    assert result.trace.accepted == [0] * 5
    assert list(result.trace.marks) == ["prefill", "decode"]


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_oracle_drafts_give_depth_plus_one_tokens_a_forward(depth: int) -> None:
    model = TableModel(random_table(9, 2, seed=3))
    steps = 5
    length = 1 + steps * (depth + 1)
    drafter = oracle(model, [1, 2], length, depth)
    result = decode(model, [1, 2], Decoding(max_new_tokens=length), drafter)
    assert result.token_ids == decode(model, [1, 2], Decoding(max_new_tokens=length)).token_ids
    assert result.trace.accepted == [depth] * steps


def test_the_cache_holds_the_text_but_its_last_token() -> None:
    model = TableModel(random_table(9, 2, seed=3))
    result = decode(model, [1, 2], Decoding(max_new_tokens=13), oracle(model, [1, 2], 13, 3))
    assert model.sessions[-1].cached == [1, 2, *result.token_ids[:-1]]


def test_a_prompt_of_one_token_is_enough() -> None:
    model = TableModel(cycle_table(3))
    assert decode(model, [1], Decoding(max_new_tokens=4)).token_ids == (2, 0, 1, 2)
    drafted = decode(model, [1], Decoding(max_new_tokens=4), oracle(model, [1], 4, 2))
    assert drafted.token_ids == (2, 0, 1, 2)


def test_one_new_token_needs_no_forward_after_the_prefill() -> None:
    result = decode(TableModel(cycle_table(3)), [1], Decoding(max_new_tokens=1))
    assert (result.token_ids, result.finish, result.trace.forwards) == ((2,), "length", [])


def test_end_of_text_inside_an_accepted_path_ends_the_text() -> None:
    model = TableModel(cycle_table(8), eos_ids=frozenset({4}))
    drafter = Scripted(lambda ids: DraftTree.chain(ids[-1], [2, 3, 4, 5, 6]))
    result = decode(model, [0], Decoding(max_new_tokens=30), drafter)
    assert result.token_ids == (1, 2, 3, 4)
    assert result.finish == "eos"
    assert result.text == "bcd"  # the end-of-text token says nothing
    assert result.trace.accepted == [3]  # of five that matched: the others stood past the end


def test_a_stop_string_inside_an_accepted_path_ends_the_text() -> None:
    model = TableModel(cycle_table(8))
    drafter = Scripted(lambda ids: DraftTree.chain(ids[-1], [2, 3, 4, 5, 6]))
    result = decode(model, [0], Decoding(max_new_tokens=30, stop=("de",)), drafter)
    assert (result.token_ids, result.text, result.finish) == ((1, 2, 3, 4), "bc", "stop")


@pytest.mark.parametrize("limit", range(1, 9))
def test_the_length_limit_holds_inside_an_accepted_path(limit: int) -> None:
    model = TableModel(cycle_table(10))
    drafter = oracle(model, [0], 20, 3)
    result = decode(model, [0], Decoding(max_new_tokens=limit), drafter)
    assert result.token_ids == tuple(range(1, limit + 1))
    assert result.finish == "length"
    # Drafts are no deeper than the limit, so no accepted draft is thrown away.
    assert 1 + sum(result.trace.accepted) + len(result.trace.forwards) == limit


def test_a_text_may_fill_the_whole_context() -> None:
    model = TableModel(cycle_table(10), max_positions=12)
    for drafter in (None, oracle(TableModel(cycle_table(10)), [0, 1], 20, 4)):
        result = decode(model, [0, 1], Decoding(max_new_tokens=10), drafter)
        assert len(result.token_ids) == 10
    with pytest.raises(
        Unsupported, match="2 prompt tokens and 11 new ones exceed the context of 12"
    ):
        decode(model, [0, 1], Decoding(max_new_tokens=11))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        decode(TableModel(cycle_table(3)), [], Decoding(max_new_tokens=3))


@pytest.mark.parametrize("column", [0, 2])
def test_a_nan_anywhere_in_the_logits_is_an_invalid_output(column: int) -> None:
    table = cycle_table(4)
    table[2, column] = np.nan
    for heat in (0.0, 1.0):
        with pytest.raises(InvalidOutput, match="NaN"):
            decode(TableModel(table), [2], Decoding(max_new_tokens=3, temperature=heat))


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (DraftTree.chain(7, [1]), "root is token 7, the text ends in 1"),
        (DraftTree.chain(1, [2] * 5), "depth 5 exceeds the budget 4"),
        (DraftTree.from_sequences(1, [[1], [2], [3], [4]]), "5 nodes exceeds the drafter's own 4"),
    ],
)
def test_a_drafter_that_breaks_its_contract_is_refused(tree: DraftTree, reason: str) -> None:
    class Broken(NoDraft):
        max_nodes = 4

        def draft(self, token_ids: Sequence[int], budget: int) -> DraftTree:
            return tree

    with pytest.raises(ValueError, match=reason):
        decode(TableModel(cycle_table(8)), [0], Decoding(max_new_tokens=6), Broken())


def test_a_drafter_sees_the_prompts_logits_if_it_asks() -> None:
    model = TableModel(random_table(5, 2))
    for asks, rows in ((False, 1), (True, 4)):
        drafter = Scripted(lambda ids: DraftTree.root(ids[-1]), prompt=asks)
        decode(model, [1, 2, 3, 4], Decoding(max_new_tokens=2), drafter)
        expected = torch.stack([model.logits_after([1, 2, 3, 4][:end]) for end in range(1, 5)])
        assert drafter.prompt_logits is not None
        assert torch.equal(drafter.prompt_logits, expected[-rows:])


def test_a_drafter_learns_each_tree_with_its_logits_and_what_was_accepted() -> None:
    model = TableModel(cycle_table(6))
    drafter = Scripted(lambda ids: DraftTree.from_sequences(ids[-1], [[0, 1], [(ids[-1] + 1) % 6]]))
    result = decode(model, [2], Decoding(max_new_tokens=6), drafter)
    assert result.trace.notes == {"scripted": 1}
    tree, logits, accepted = drafter.updates[0]
    assert tree.tokens.tolist() == [3, 0, 1, 4]
    assert logits.argmax(-1).tolist() == [4, 1, 2, 5]
    assert accepted == Accepted([0, 3], 5)


@given(st.integers(0, 10_000))
def test_the_greedy_path_is_the_longest_that_enumeration_finds(seed: int) -> None:
    random = np.random.default_rng(seed)
    tree = random_trees(4, seed).propose([int(random.integers(4))])
    logits = torch.from_numpy(random.normal(size=(len(tree), 4)).astype(np.float32))
    best = logits.argmax(-1).tolist()
    matching = [
        path
        for path in (path_to(tree, node) for node in range(len(tree)))
        if all(tree.tokens[child] == best[parent] for parent, child in itertools.pairwise(path))
    ]
    accepted = accept_greedy(tree, logits)
    assert accepted.path == max(matching, key=len)
    assert accepted.bonus == best[accepted.path[-1]]


def test_the_lowest_of_equal_logits_is_chosen_whatever_the_number_format() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [1.0, 1.0, 0.0]])
    assert greedy_choices(logits) == greedy_choices(logits.double()) == [1, 0]


# --- sampling -------------------------------------------------------------------------------------

HEAT = 0.7


def sampled_texts(
    model: TableModel, length: int, drafter: Callable[[Draws], NoDraft | None]
) -> dict[tuple[int, ...], float]:
    """Return the exact distribution of texts of that length after token 0."""
    decoding = Decoding(max_new_tokens=length, temperature=HEAT)

    def run(draws: Draws) -> tuple[int, ...]:
        return decode(model, [0], decoding, drafter(draws), draws=draws).token_ids

    return distribution(run)


def target_texts(model: TableModel, length: int) -> dict[tuple[int, ...], float]:
    """Return the distribution that sampling must have, from the table itself."""
    texts = itertools.product(range(model.facts.vocab_size), repeat=length)
    return {text: model.probability([0], text, HEAT) for text in texts}


class SampledTrees(NoDraft):
    """Draws children without replacement from a draft table, to a shape decided as it draws.

    With `adaptive` a node gets children only if the token drawn for it is even, so size and shape
    depend on what was drawn.
    """

    def __init__(
        self,
        table: Tensor,
        draws: Draws,
        *,
        children: int = 2,
        depth: int = 2,
        adaptive: bool = False,
        prune: bool = False,
    ) -> None:
        self._probabilities = torch.softmax(table.double(), dim=-1)
        self._draws = draws
        self._children = children
        self._depth = depth
        self._adaptive = adaptive
        self._prune = prune
        self.max_nodes = 1 + sum(children**level for level in range(1, depth + 1))

    def draft(self, token_ids: Sequence[int], budget: int) -> DraftTree:
        builder = TreeBuilder(token_ids[-1])
        rows = [self._probabilities[token_ids[-1]]]
        level = [(0, token_ids[-1])]
        for _ in range(min(self._depth, budget)):
            following: list[tuple[int, int]] = []
            for node, token in level:
                if self._adaptive and node and token % 2:
                    continue
                left = self._probabilities[token].clone()
                drawn = []
                for _ in range(self._children):
                    drawn.append(self._draws.token(left))
                    left[drawn[-1]] = 0
                if self._prune:
                    drawn = [max(drawn, key=lambda each: float(self._probabilities[token][each]))]
                for each in drawn:
                    following.append((builder.add(node, each), each))
                    rows.append(self._probabilities[each])
            level = following
        return builder.build(torch.stack(rows).numpy())


def test_plain_sampling_has_the_models_distribution() -> None:
    model = TableModel(random_table(5, 2))
    assert (
        total_variation(sampled_texts(model, 3, lambda draws: None), target_texts(model, 3)) < 1e-6
    )


@pytest.mark.parametrize("seed", range(4))
def test_sample_and_match_is_exact_for_trees_of_any_shape(seed: int) -> None:
    model = TableModel(random_table(5, 2, seed=seed))
    found = sampled_texts(model, 3, lambda draws: random_trees(5, seed))
    assert total_variation(found, target_texts(model, 3)) < 1e-6


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("children", "depth"), [(1, 2), (2, 2), (3, 1)])
def test_sampling_without_replacement_is_exact(children: int, depth: int, adaptive: bool) -> None:
    model, draft = TableModel(random_table(3, 2)), random_table(3, seed=9)
    found = sampled_texts(
        model,
        3,
        lambda draws: SampledTrees(draft, draws, children=children, depth=depth, adaptive=adaptive),
    )
    assert total_variation(found, target_texts(model, 3)) < 1e-6


@pytest.mark.parametrize("children", range(1, 5))
def test_each_number_of_candidates_leaves_the_first_token_exact(children: int) -> None:
    model, draft = TableModel(random_table(4)), random_table(4, seed=4)

    def first(draws: Draws) -> int:
        tree = SampledTrees(draft, draws, children=children, depth=1).draft([0], 1)
        target = torch.softmax(model.table.double() / HEAT, -1)
        path, bonus = accept_without_replacement(
            tree, lambda node: target[tree.tokens[node]], draws
        )
        return int(tree.tokens[path[1]]) if len(path) > 1 else bonus

    expected = {token: model.probability([0], [token], HEAT) for token in range(4)}
    assert total_variation(distribution(first), expected) < 1e-12


def test_a_draft_equal_to_the_target_is_always_accepted() -> None:
    model = TableModel(random_table(4))
    found = sampled_texts(
        model, 2, lambda draws: SampledTrees(model.table / HEAT, draws, children=1, depth=1)
    )
    assert total_variation(found, target_texts(model, 2)) < 1e-6


def test_sampled_trees_need_the_distributions_they_were_drawn_from() -> None:
    tree, even = DraftTree.chain(0, [1]), torch.full((3,), 1 / 3)
    with pytest.raises(ValueError, match="needs the distributions"):
        accept_without_replacement(tree, lambda node: even, Draws(0))
    impossible = DraftTree(tree.topology, tree.tokens, np.array([[1.0, 0, 0], [1, 0, 0]]))
    with pytest.raises(ValueError, match="token 1 cannot have been drawn"):
        accept_without_replacement(impossible, lambda node: even, Draws(0))


# The next tests hold rules that released code uses against the same measure: it must see them.


def test_the_measure_sees_an_independent_draw_for_every_path() -> None:
    model = TableModel(random_table(5))
    target = torch.softmax(model.table[0].double() / HEAT, -1)

    def first(draws: Draws) -> int:
        tree = DraftTree.from_sequences(0, [[1], [2]])
        wins = [node for node in (1, 2) if draws.token(target) == tree.tokens[node]]
        return int(tree.tokens[wins[0]]) if wins else draws.token(target)

    expected = {token: float(target[token]) for token in range(5)}
    assert total_variation(distribution(first), expected) > 0.01


def test_the_measure_sees_top_k_children_tested_as_if_they_were_drawn() -> None:
    model, draft = TableModel(random_table(5)), random_table(5, seed=4)
    rows = torch.softmax(draft.double(), -1)
    target = torch.softmax(model.table[0].double() / HEAT, -1)

    def first(draws: Draws) -> int:
        best = rows[0].topk(2).indices.tolist()
        tree = DraftTree(Topology([-1, 0, 0]), np.array([0, *best]), rows[[0, *best]].numpy())
        path, bonus = accept_without_replacement(tree, lambda node: target, draws)
        return int(tree.tokens[path[1]]) if len(path) > 1 else bonus

    expected = {token: float(target[token]) for token in range(5)}
    assert total_variation(distribution(first), expected) > 0.05


def test_the_measure_sees_pruning_after_drawing() -> None:
    model, draft = TableModel(random_table(3, 2)), random_table(3, seed=9)
    found = sampled_texts(model, 3, lambda draws: SampledTrees(draft, draws, prune=True))
    assert total_variation(found, target_texts(model, 3)) > 0.01


def test_with_equal_seeds_sampled_texts_are_equal_whatever_was_drafted() -> None:
    model = TableModel(random_table(8, 2, seed=2))
    for seed in range(5):
        decoding = Decoding(max_new_tokens=30, temperature=1.0, seed=seed)
        plain = decode(model, [0], decoding)
        assert decode(model, [0], decoding, random_trees(8, seed)).token_ids == plain.token_ids
    other = Decoding(max_new_tokens=30, temperature=1.0, seed=99)
    assert decode(model, [0], other).token_ids != plain.token_ids


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.3])
    draws = Draws(3)
    counts = np.bincount([draws.token(probabilities) for _ in range(4000)], minlength=5)
    assert counts[2] == 0
    kept = [0, 1, 3, 4]
    assert chisquare(counts[kept], 4000 * probabilities[kept].numpy()).pvalue > 0.01
    events = sum(draws.event(0.3) for _ in range(4000))
    assert chisquare([events, 4000 - events], [1200, 2800]).pvalue > 0.01


def test_a_draw_never_lands_on_a_token_that_cannot_come(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = Draws(0)
    for uniform, drawn in ((0.0, 1), (0.5, 3), (1 - 2**-53, 3), (1.0, 3)):
        monkeypatch.setattr(
            draws, "_uniform", lambda uniform=uniform: torch.tensor(uniform, dtype=torch.float64)
        )
        assert draws.token(torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])) == drawn


def test_temperature_sharpens_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    decoding = Decoding(max_new_tokens=1, temperature=0.5)
    expected = torch.softmax(torch.tensor([[0.0, 2.0], [4.0, 0.0]]), -1)
    assert torch.allclose(next_token_probabilities(logits, decoding), expected)


def test_only_visited_nodes_are_turned_into_distributions() -> None:
    visited = []

    def probabilities(node: int) -> Tensor:
        visited.append(node)
        return torch.tensor([0.0, 1.0, 0.0])

    tree = DraftTree.from_sequences(0, [[2, 1], [1, 2]])
    assert accept_sampled(tree, probabilities, Draws(0)) == Accepted([0, 3], 1)
    assert visited == [0, 3]


def test_a_generation_counts_its_work() -> None:
    model = TableModel(cycle_table(4))
    result: Generation = decode(model, [0, 1], Decoding(max_new_tokens=3))
    facts = model.facts
    forwards = [*result.trace.prefill, *result.trace.forwards]
    assert result.trace.flops == sum(facts.flops(forward) for forward in forwards)
    assert result.trace.kv_bytes == sum(facts.kv_read(forward) for forward in forwards)
