"""Masking samples exactly the locally constrained distribution, which is not the conditional."""

from __future__ import annotations

import math

import numpy as np
import pytest

from methods.decoding import token_masking
from methods.decoding.token_masking import (
    TokenMasking,
    allowed_by_asking,
    allowed_by_trie,
    vocabulary_trie,
)
from models.base import Decoding
from models.constraints import Stoppable, TokenChecker, TokenState
from models.regular import json_schema, regex
from runner.conformance import check_method, tiny_text_model
from tests.methods.decoding.languages import (
    PROMPT,
    LanguageModel,
    local,
    normaliser,
    request,
    target,
    write,
)
from tests.models.tiny import tiny_model
from tests.models.toy import EnumeratedDraws, LetterTokenizer, distribution, total_variation


@pytest.mark.parametrize("trie", [False, True])
def test_it_keeps_the_contract(trie: bool) -> None:
    method = TokenMasking(**TokenMasking.trial, trie=trie)
    assert [check for check in check_method(method, tiny_text_model()) if not check.ok] == []


def exact(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> dict[tuple, float]:
    """Return the distribution of texts with their weights."""

    def run(draws: EnumeratedDraws) -> tuple:
        monkeypatch.setattr(token_masking, "Draws", lambda seed: draws)
        found = write(TokenMasking(), model, request())
        return found.token_ids, found.trace.notes.get("log_normaliser", -math.inf)

    return distribution(run)


def test_texts_have_the_local_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel()
    found: dict[tuple[int, ...], float] = {}
    for (text, _), probability in exact(model, monkeypatch).items():
        found[text] = found.get(text, 0.0) + probability
    assert total_variation(found, local(model)) < 1e-6
    finished = {text: p for text, p in found.items() if text in target(model)}
    total = sum(finished.values())
    assert total_variation({t: p / total for t, p in finished.items()}, target(model)) > 0.05


def test_its_noted_weight_is_proper(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel()
    mean = sum(p * math.exp(weight) for (_, weight), p in exact(model, monkeypatch).items())
    assert mean == pytest.approx(normaliser(model), rel=1e-5)


def test_mass_of_tokens_without_text_counts_against_the_constraint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Holed(LetterTokenizer):
        def decode(self, token_ids):
            return super().decode([token for token in token_ids if token != 3])

    model = LanguageModel()
    model.tokenizer = Holed()
    mean = sum(p * math.exp(weight) for (_, weight), p in exact(model, monkeypatch).items())
    spoken = [text for text in target(model) if 3 not in text]
    expected = sum(model.probability(PROMPT, text, 1.0) for text in spoken)
    assert mean == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "constraint",
    [regex("[a-c]+d?"), json_schema({"enum": ["ab", "abc", 12]}), Stoppable(regex("a+"), (b"bc",))],
)
def test_the_trie_allows_what_asking_allows(constraint) -> None:
    pieces = (
        b"a",
        b"ab",
        b"abcd",
        None,
        b'"',
        b'"a',
        b'b"',
        b"1",
        b"12",
        b"bcx",
        b"b",
        b"c",
        b"cc",
    )
    rng = np.random.default_rng(0)
    checker = TokenChecker(constraint, pieces, frozenset({3}), Decoding(max_new_tokens=9))
    root = vocabulary_trie(pieces)
    for _ in range(20):
        state: TokenState | None = checker.start
        while state is not None and not state.has_ended:
            asked = allowed_by_asking(checker, state)
            walked = allowed_by_trie(checker, state, root)
            assert asked.keys() == walked.keys()
            assert all(asked[t].has_ended == walked[t].has_ended for t in asked)
            state = asked[rng.choice(sorted(asked))] if asked else None


def test_every_usable_token_is_asked_about_at_every_step() -> None:
    model = tiny_model()
    decoding = request(constraint=regex("(?:[0-9]{1,2} )*"), max_new_tokens=5)
    found = write(TokenMasking(), model, decoding)
    steps = len(found.token_ids)
    last = steps == 5  # the last one can only be the end, which is one question
    assert found.trace.notes["checks"] == 97 * (steps - last) + last
    quick = write(TokenMasking(trie=True), model, decoding)
    assert quick.token_ids == found.token_ids
    assert quick.trace.notes["log_normaliser"] == pytest.approx(found.trace.notes["log_normaliser"])


def test_fixed_length_texts_are_viable_beginnings_of_that_length() -> None:
    decoding = request(constraint=regex("[12 ]*x"), max_new_tokens=6, ignore_eos=True, stop=("1",))
    found = write(TokenMasking(), tiny_model(), decoding)
    assert len(found.token_ids) == 6
    assert found.finish == "length"
    assert set(found.text) <= set("12 ")
