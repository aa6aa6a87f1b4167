"""Chains of a draft model: greedy matching, and speculative sampling."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch

from hardware.profile import Profile, StepCost
from methods.decoding.common_drafts import best_size, draft_for
from methods.decoding.speculative import (
    MEASURED,
    USUAL_TOKENS,
    ChainDrafter,
    Speculative,
    grow_chain,
)
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
    wanted_first_two,
)
from tests.methods.decoding.heads import PROMPTS
from tests.methods.decoding.measure_drafts import measure_chains
from tests.models.toy import TableModel, cycle_table, distribution, random_table, total_variation

CPU = Profile(name="test", kind="cpu", label="test")


@pytest.mark.parametrize(("vocab", "length"), [(5, 1), (3, 2), (4, 2), (3, 3)])
def test_two_tokens_have_the_targets_joint_distribution(vocab: int, length: int) -> None:
    target, draft = TableModel(random_table(vocab, 2)), TableDraft(random_table(vocab, seed=9))
    found = exact_first_two(partial(grow_chain, length=length), target, draft)
    assert total_variation(found, wanted_first_two(target)) < 1e-6


@pytest.mark.parametrize("draft_heat", [HEAT, 0.3])
def test_whole_texts_have_the_targets_distribution(draft_heat: float) -> None:
    model, draft = TableModel(random_table(3, 2)), TableDraft(random_table(3, seed=9))
    decoding = Decoding(max_new_tokens=4, temperature=HEAT)

    def run(draws: Draws) -> tuple[int, ...]:
        drafter = ChainDrafter(draft, decoding, 2, temperature=draft_heat)
        drafter.choose = lambda row: draws.token(torch.from_numpy(row.remaining()))
        return decode(model, [0], decoding, drafter, draws=draws).token_ids

    expected = {
        text: model.probability([0], text, HEAT) for text in itertools.product(range(3), repeat=4)
    }
    assert total_variation(distribution(run), expected) < 1e-6


def test_the_measure_sees_drafts_tested_at_another_temperature() -> None:
    # Drawn at 0.35, tested as if drawn at 0.7: the usual slip.
    target, draft = TableModel(random_table(3, 2)), TableDraft(random_table(3, seed=9))
    sharp = torch.softmax(draft.table.double() / 0.35, -1)

    def first(draws: Draws) -> tuple[int, int]:
        from tests.methods.decoding.drafts import first_two

        choose = lambda row: draws.token(sharp[row.path[-1] if row.path else 0])  # noqa: E731
        return first_two(partial(grow_chain, length=2), target, draft, draws, choose)

    assert total_variation(distribution(first), wanted_first_two(target)) > 0.01


def test_greedy_chains_are_the_drafts_own_continuation() -> None:
    target, draft = TableModel(cycle_table(6)), TableDraft(random_table(6, 2, seed=1))
    decoding = Decoding(max_new_tokens=20)
    watched = Watched(ChainDrafter(draft, decoding, 4, temperature=0.0))
    result = decode(target, [0, 1], decoding, watched)
    text = [0, 1, *result.token_ids]
    at = 3
    for tree, accepted in watched.steps:
        plain = decode(draft, text[:at], Decoding(max_new_tokens=max(1, len(tree) - 1)))
        assert tree.tokens[1:].tolist() == list(plain.token_ids)[: len(tree) - 1]
        assert tree.topology.is_chain
        at += len(accepted.path)
    assert len(text) == 22


def test_a_perfect_draft_gives_all_tokens_and_the_bonus() -> None:
    table = cycle_table(6)
    for heat, length in ((0.0, 3), (0.7, 3)):
        decoding = Decoding(max_new_tokens=1 + 4 * (length + 1), temperature=heat)
        drafter = ChainDrafter(TableDraft(table), decoding, length, temperature=heat)
        result = decode(TableModel(table), [0], decoding, drafter)
        assert result.trace.accepted == [length] * 4


def test_a_drawn_chain_reads_all_but_its_last_node() -> None:
    reads: list[int] = []
    tree = drawn_tree(TableDraft(random_table(5)), by_slot)
    inner = tree._read
    tree._read = lambda nodes, *rest: reads.extend(nodes) or inner(nodes, *rest)
    grow_chain(tree, 4)
    assert reads == [1, 2, 3]
    assert tree.build().topology.is_chain


@pytest.mark.parametrize("length", [1, 5])
def test_it_keeps_the_contract(length: int) -> None:
    method = Speculative(draft="layers:1", num_draft_tokens=length)
    assert [check for check in check_method(method, tiny_text_model()) if not check.ok] == []


def test_auto_takes_the_length_with_the_most_tokens_per_second() -> None:
    target, draft = tiny_text_model().facts, TableDraft(cycle_table(4)).facts
    method = Speculative(num_draft_tokens="auto")
    for heat in (0.0, 0.8):
        decoding = Decoding(max_new_tokens=1, temperature=heat)
        lengths = []
        for per_node in (0.0, 0.05, 0.2, 5.0):
            cost = StepCost((1, 101), (128,), ((1, 1 + 100 * per_node),))
            profile = Profile(name="test", kind="cpu", label="test", step_cost=cost)
            lengths.append(method.chosen_size(profile, target, draft, decoding))
            assert lengths[-1] == best_size(MEASURED[heat], profile, target, draft)
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] > lengths[-1] == 0
        assert method.chosen_size(CPU, target, draft, decoding) == USUAL_TOKENS


def test_sampled_drafts_take_the_texts_own_temperature() -> None:
    draft = TableDraft(random_table(5))
    for setting, heat, expected in (("target", 0.9, 0.9), (0.4, 0.9, 0.4), (0.4, 0.0, 0.0)):
        decoding = Decoding(max_new_tokens=5, temperature=heat)
        method = Speculative(draft_temperature=setting)  # type: ignore[arg-type]  # of a tuple
        assert method.model_drafter(draft, 2, decoding).temperature == expected


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"num_draft_tokens": 33}, "num_draft_tokens must be a whole number from 0 to 32, got 33"),
        ({"draft_temperature": 0.0}, r"must lie in \[0.05, 10\] or be target, got 0.0"),
        ({"draft_temperature": "draft"}, "or be target, got 'draft'"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Speculative(**wrong)  # type: ignore[arg-type]  # what is tested


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("heat", [0.0, 0.8])
def test_what_auto_knows_is_what_is_measured(heat: float) -> None:
    model = load("smollm2-135m", LoadSettings(), offline=True)
    draft = draft_for("tiny-draft", model)
    prompts = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    found = measure_chains(model, draft, prompts, heat)
    assert found.drafts == MEASURED[heat].drafts
    np.testing.assert_allclose(found.tokens, MEASURED[heat].tokens, atol=0.1)
