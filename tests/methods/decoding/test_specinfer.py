"""Merged samples: what is drawn independently and merged was drawn without replacement."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hardware.profile import Profile, StepCost
from methods.decoding.common_drafts import DraftRow, best_size, draft_for
from methods.decoding.specinfer import (
    MEASURED,
    MEASURED_SEQUENCES,
    USUAL_TOKENS,
    SequencesDrafter,
    SpecInfer,
    grow_sequences,
)
from models.base import Decoding
from models.decode import Draws, decode
from models.draft_tree import DraftTree
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
from tests.methods.decoding.measure_drafts import measure_sequences
from tests.models.toy import (
    TableModel,
    cycle_table,
    distribution,
    random_table,
    total_variation,
)

CPU = Profile(name="test", kind="cpu", label="test")


@pytest.mark.parametrize(
    ("vocab", "sequences", "length"), [(5, 1, 1), (4, 2, 1), (3, 3, 1), (3, 2, 2)]
)
def test_two_tokens_have_the_targets_joint_distribution(
    vocab: int, sequences: int, length: int
) -> None:
    target, draft = TableModel(random_table(vocab, 2)), TableDraft(random_table(vocab, seed=9))
    grow = partial(grow_sequences, sequences=sequences, length=length)
    found = exact_first_two(grow, target, draft)
    assert total_variation(found, wanted_first_two(target)) < 1e-6


def test_whole_texts_have_the_targets_distribution() -> None:
    model, draft = TableModel(random_table(3, 2)), TableDraft(random_table(3, seed=9))
    decoding = Decoding(max_new_tokens=3, temperature=HEAT)

    def run(draws: Draws) -> tuple[int, ...]:
        drafter = SequencesDrafter(draft, decoding, 2, 1, temperature=HEAT)
        drafter.choose = lambda row: draws.token(torch.from_numpy(row.remaining()))
        return decode(model, [0], decoding, drafter, draws=draws).token_ids

    expected = {text: model.probability([0], text, HEAT) for text in np.ndindex(3, 3, 3)}
    assert total_variation(distribution(run), expected) < 1e-6


@given(st.integers(0, 300), st.integers(1, 6), st.integers(1, 4))
def test_the_tree_is_the_trie_of_its_sequences(seed: int, sequences: int, length: int) -> None:
    draft, random = TableDraft(random_table(4, seed=seed)), np.random.default_rng(seed)
    seen: dict[tuple[int, ...], list[int]] = {}

    def choose(row: DraftRow) -> int:
        token = row.at(float(random.random()))
        seen.setdefault(row.path, []).append(token)
        return token

    tree = drawn_tree(draft, choose)
    grow_sequences(tree, sequences, length)
    # Hand each drawn token to one sequence that passes there, level by level.
    texts: list[tuple[int, ...]] = [()] * sequences
    for _ in range(length):
        waiting = {path: list(tokens) for path, tokens in seen.items()}
        texts = [(*text, waiting[text].pop(0)) for text in texts]
    trie = DraftTree.from_sequences(0, texts)

    def paths(found: DraftTree) -> list[tuple[int, ...]]:
        result: list[tuple[int, ...]] = [()]
        for node in range(1, len(found)):
            above = result[int(found.topology.parents[node])]
            result.append((*above, int(found.tokens[node])))
        return result

    assert sorted(paths(tree.build())) == sorted(paths(trie))
    assert sum(len(tokens) for path, tokens in seen.items() if not path) == sequences


def test_levels_are_read_in_one_forward_each() -> None:
    draft = TableDraft(random_table(6, seed=1))
    decoding = Decoding(max_new_tokens=30, temperature=HEAT)
    watched = Watched(SequencesDrafter(draft, decoding, 4, 3, temperature=HEAT))
    decode(TableModel(random_table(6, 2)), [0], decoding, watched)
    forwards = watched.inner.draft_model.forwards
    assert len(forwards) == 1 + sum(tree.topology.max_depth for tree, _ in watched.steps)
    assert max(forward.width for forward in forwards[1:]) > 1


def test_a_draft_equal_to_the_target_has_every_first_child_accepted() -> None:
    table = random_table(6, seed=2)
    decoding = Decoding(max_new_tokens=40, temperature=HEAT)
    watched = Watched(SequencesDrafter(TableDraft(table), decoding, 3, 3, temperature=HEAT))
    decode(TableModel(table), [0], decoding, watched)
    for tree, accepted in watched.steps:
        assert len(accepted.path) - 1 == first_child_depth(tree)


def test_one_sequence_is_a_chain() -> None:
    tree = drawn_tree(TableDraft(random_table(6, seed=2)), by_slot)
    grow_sequences(tree, 1, 5)
    assert tree.build().topology.is_chain
    assert tree.drafts == 5


@pytest.mark.parametrize("sequences", [1, 3])
def test_it_keeps_the_contract(sequences: int) -> None:
    method = SpecInfer(draft="layers:1", sequences=sequences, num_draft_tokens=3)
    assert [check for check in check_method(method, tiny_text_model()) if not check.ok] == []


def test_auto_takes_the_length_with_the_most_tokens_per_second() -> None:
    target, draft = tiny_text_model().facts, TableDraft(cycle_table(4)).facts
    method = SpecInfer(num_draft_tokens="auto")
    decoding = Decoding(max_new_tokens=1)
    lengths = []
    for per_node in (0.0, 0.02, 5.0):
        cost = StepCost((1, 101), (128,), ((1, 1 + 100 * per_node),))
        profile = Profile(name="test", kind="cpu", label="test", step_cost=cost)
        lengths.append(method.chosen_size(profile, target, draft, decoding))
        best = best_size(MEASURED[0.0], profile, target, draft)
        assert best is not None
        assert lengths[-1] == round(best / 4)
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1] == 0
    assert method.chosen_size(CPU, target, draft, decoding) == USUAL_TOKENS


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"sequences": 0}, "sequences must be a whole number from 1 to 64, got 0"),
        ({"sequences": 64, "num_draft_tokens": 5}, "must be a whole number from 0 to 4, got 5"),
        ({"draft_temperature": 11}, r"draft_temperature must lie in \[0.05, 10\], got 11"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SpecInfer(**wrong)  # type: ignore[arg-type]  # what is tested


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("heat", [0.0, 0.8])
def test_what_auto_knows_is_what_is_measured(heat: float) -> None:
    model = load("smollm2-135m", LoadSettings(), offline=True)
    draft = draft_for("tiny-draft", model)
    prompts = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    found = measure_sequences(model, draft, prompts, heat, lengths=(4,))
    known = MEASURED[heat].tokens_at(4 * MEASURED_SEQUENCES)
    assert found.tokens[0] == pytest.approx(known, abs=0.15)
