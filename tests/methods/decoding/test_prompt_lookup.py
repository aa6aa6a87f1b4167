"""Prompt lookup: the drafts of transformers, found faster."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from hardware.profile import Profile, StepCost
from methods.decoding.prompt_lookup import (
    MATCH_SHARE,
    PUBLISHED_TOKENS,
    SURVIVAL,
    LookupDrafter,
    NgramIndex,
    PromptLookup,
)
from models.base import Decoding
from models.decode import decode
from tests.models.toy import TableModel, cycle_table, distribution, random_table, total_variation

CPU = Profile(name="test", kind="cpu", label="test")
EOS = 3
texts = st.lists(st.integers(0, 4), min_size=1, max_size=30)


def draft(text: list[int], num_tokens: int, size: int, budget: int = 99) -> list[int]:
    drafter = LookupDrafter(NgramIndex(size, "first"), num_tokens, frozenset({EOS}))
    return drafter.draft(text, budget).tokens[1:].tolist()


@given(texts, st.integers(1, 12), st.integers(1, 4))
def test_drafts_are_those_of_transformers(text: list[int], num_tokens: int, size: int) -> None:
    peer = PromptLookupCandidateGenerator(
        eos_token_id=torch.tensor([EOS]),
        num_output_tokens=num_tokens,
        max_matching_ngram_size=size,
        max_length=1000,
    )
    candidates, _ = peer.get_candidates(torch.tensor([text]))
    assert draft(text, num_tokens, size) == candidates[0, len(text) :].tolist()


def slow_lookup(text: list[int], size: int, keep: str) -> int | None:
    """Search the whole text for each length of suffix."""
    for length in range(min(size, len(text) - 1), 0, -1):
        found = [
            end for end in range(length, len(text)) if text[end - length : end] == text[-length:]
        ]
        if found:
            return found[0] if keep == "first" else found[-1]
    return None


@given(
    texts,
    st.lists(st.integers(1, 5), max_size=12),
    st.integers(1, 4),
    st.sampled_from(["first", "last"]),
)
def test_an_index_that_grows_finds_what_a_search_of_the_whole_text_finds(
    text: list[int], steps: list[int], size: int, keep: str
) -> None:
    index, end = NgramIndex(size, keep), 1
    for step in [0, *steps]:
        end = min(end + step, len(text))
        assert index.lookup(text[:end]) == slow_lookup(text[:end], size, keep)


def test_a_suffix_does_not_match_itself() -> None:
    assert draft([0, 1, 2], 5, 2) == []
    assert draft([7], 5, 2) == []


def test_the_longest_suffix_decides_and_then_the_leftmost_place() -> None:
    assert draft([1, 9, 5, 1, 2, 7, 1, 2], 2, 1) == [7, 1]
    assert draft([2, 9, 5, 1, 2, 7, 1, 2], 2, 1) == [9, 5]
    assert draft([2, 9, 5, 1, 2, 7, 1, 2], 2, 2) == [7, 1]


def test_drafts_stop_before_the_end_of_text_and_at_the_budget() -> None:
    assert draft([1, 4, EOS, 5, 1], 5, 1) == [4]
    assert draft([1, EOS, 5, 1], 5, 1) == []
    assert draft([1, 4, 6, 5, 1], 5, 1, budget=2) == [4, 6]
    assert draft([1, 4, 6, 5, 1], 5, 1, budget=0) == []


def test_a_periodic_text_is_copied_whole() -> None:
    model = TableModel(cycle_table(5))
    with PromptLookup(num_tokens=4).apply(model, CPU) as changed:
        result = changed.generate([0, 1, 2, 3, 4], Decoding(max_new_tokens=31))
    assert result.trace.accepted == [4] * 6
    assert result.trace.notes == {"num_tokens": 4}


@settings(max_examples=30)
@given(st.integers(0, 1000), st.sampled_from(["first", "last"]))
def test_lookup_leaves_greedy_and_sampled_texts_as_they_are(seed: int, keep: str) -> None:
    model = TableModel(random_table(5, 2, seed=seed), eos_ids=frozenset({EOS}))
    for heat in (0.0, 0.9):
        decoding = Decoding(max_new_tokens=25, temperature=heat, seed=seed)
        with PromptLookup(occurrence=keep).apply(model, CPU) as changed:
            assert (
                changed.generate([0, 1], decoding).token_ids
                == decode(model, [0, 1], decoding).token_ids
            )


def test_sampling_keeps_the_models_distribution() -> None:
    model = TableModel(random_table(5, 2, seed=6))
    method = PromptLookup(num_tokens=3)
    decoding = Decoding(max_new_tokens=4, temperature=0.8)
    prompt = [0, 1, 2, 0]
    found = distribution(
        lambda draws: (
            decode(model, prompt, decoding, method.drafter(model, CPU), draws=draws).token_ids
        )
    )
    expected = {text: model.probability(prompt, text, 0.8) for text in np.ndindex(5, 5, 5, 5)}
    assert total_variation(found, expected) < 1e-6


def test_auto_takes_the_length_with_the_most_tokens_per_second() -> None:
    lengths = []
    for per_node in (0.0, 0.01, 0.05, 0.3, 5.0):
        cost = StepCost((1, 101), (128,), ((1, 1 + 100 * per_node),))
        profile = Profile(name="test", kind="cpu", label="test", step_cost=cost)
        lengths.append(PromptLookup(num_tokens="auto").chosen_tokens(profile))
        rates = [
            (1 - MATCH_SHARE + MATCH_SHARE * (1 + sum(SURVIVAL[:n])))
            / (1 - MATCH_SHARE + MATCH_SHARE * cost.at(n + 1, 128))
            for n in range(len(SURVIVAL) + 1)
        ]
        assert lengths[-1] == int(np.argmax(rates))
    assert lengths[0] == len(SURVIVAL)
    assert lengths[-1] == 0
    assert lengths == sorted(lengths, reverse=True)
    assert PromptLookup(num_tokens="auto").chosen_tokens(CPU) == PUBLISHED_TOKENS


def test_survival_falls_with_depth() -> None:
    assert 0 < MATCH_SHARE < 1
    assert all(1 > a >= b > 0 for a, b in itertools.pairwise(SURVIVAL))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"num_tokens": 65}, "num_tokens must be a whole number from 0 to 64, got 65. Or 'auto'"),
        ({"num_tokens": True}, "got True"),
        ({"max_ngram_size": 0}, "max_ngram_size must be a whole number from 1 to 16, got 0"),
        ({"occurrence": "middle"}, "occurrence must be one of first, last, got 'middle'"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PromptLookup(**wrong)  # type: ignore[arg-type]  # what is tested
