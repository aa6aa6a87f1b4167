"""Rejection from scratch is exact, and counts what it costs."""

from __future__ import annotations

import pytest

from methods.decoding import rejection_sampling
from methods.decoding.rejection_sampling import RejectionSampling
from models.base import Forward
from models.regular import regex
from runner.conformance import check_method, tiny_text_model
from tests.methods.decoding.languages import (
    PROMPT,
    LanguageModel,
    normaliser,
    request,
    target,
    write,
)
from tests.models.toy import EnumeratedDraws, distribution, total_variation


def test_it_keeps_the_contract() -> None:
    method = RejectionSampling(**RejectionSampling.trial)
    assert [check for check in check_method(method, tiny_text_model()) if not check.ok] == []


@pytest.mark.parametrize("attempts", [1, 2])
def test_accepted_texts_have_the_true_conditional_distribution(
    attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LanguageModel()

    def run(draws: EnumeratedDraws) -> tuple[int, ...] | None:
        monkeypatch.setattr(rejection_sampling, "Draws", lambda seed: draws)
        found = write(RejectionSampling(max_attempts=attempts), model, request(max_new_tokens=3))
        return found.token_ids if found.trace.notes["is_satisfied"] else None

    monkeypatch.setattr("tests.methods.decoding.languages.LIMIT", 3)
    found = distribution(run)
    refused = found.pop(None)
    assert refused == pytest.approx((1 - normaliser(model)) ** attempts, rel=1e-5)
    accepted = {text: p / (1 - refused) for text, p in found.items()}
    assert total_variation(accepted, target(model)) < 1e-6


def test_every_attempt_beyond_the_first_token_reads_the_prompt_again() -> None:
    model = LanguageModel()
    for seed in range(20):
        found = write(RejectionSampling(), model, request(seed))
        attempts = int(found.trace.notes["attempts"])
        assert found.trace.notes["is_satisfied"] == 1
        assert set(found.trace.prefill) == {Forward(len(PROMPT), 0)}
        assert 1 <= len(found.trace.prefill) <= attempts
        # Each check is of a token, and each token but the first of an attempt cost a forward.
        assert found.trace.notes["checks"] == len(found.trace.forwards) + attempts


def test_it_gives_up_after_its_attempts_and_says_so() -> None:
    found = write(
        RejectionSampling(max_attempts=3), LanguageModel(), request(constraint=regex("aaaaaaaaaa"))
    )
    assert found.trace.notes["attempts"] == 3
    assert found.trace.notes["is_satisfied"] == 0
    greedy = write(RejectionSampling(), LanguageModel(), request(temperature=0.0))
    assert greedy.trace.notes["attempts"] == 1
    with pytest.raises(ValueError, match="max_attempts must be a whole number from 1"):
        RejectionSampling(max_attempts=0)
