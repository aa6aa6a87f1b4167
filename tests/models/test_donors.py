"""The donors' recipe: numbers are split as said, and vectors are those of the definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from models.embedded.donors.train import (
    DIGITS,
    REACH,
    SMOOTHING,
    counts_of,
    library_texts,
    sum_texts,
    train_tokenizer,
    vectors_of,
)
from tasks.bits_per_byte import BitsPerByte


@pytest.mark.parametrize("digits", DIGITS.values())
def test_numbers_are_split_as_said_and_every_text_comes_back(digits: int) -> None:
    texts = ["x = 12345 + 678\nself.y(7)", *itertools.islice(sum_texts(), 5)]
    tokenizer = train_tokenizer(texts, digits)
    text = "self.y = 123 + 4567 # na\u00efve\n"
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids) == text
    longest = max(len(token) for token in encoded.tokens if token.isdigit())
    assert longest <= digits
    assert digits == 1 or longest > 1


def test_sums_are_right() -> None:
    for text in itertools.islice(sum_texts(seed=1), 3):
        for line in text.splitlines():
            left, right = line.split(" = ")
            assert sum(map(int, left.split(" + "))) == int(right)


def test_counts_and_vectors_are_those_of_the_definition() -> None:
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 9, 400)
    counts = np.zeros((10, 10))  # token 9 never occurs
    for first, second in itertools.combinations(range(len(ids)), 2):
        if second - first <= REACH:
            counts[ids[first], ids[second]] += 1
            counts[ids[second], ids[first]] += 1
    found = counts_of(ids, 10)
    np.testing.assert_array_equal(found.toarray(), counts)
    contexts = counts.sum(0) ** SMOOTHING
    contexts /= contexts.sum()
    information = np.zeros((10, 10))
    for one, other in itertools.product(range(10), repeat=2):
        if counts[one, other]:
            ratio = counts[one, other] / (counts[one].sum() * contexts[other])
            information[one, other] = max(0.0, math.log(ratio))
    vectors = vectors_of(found, 9)
    values = np.linalg.svd(information, compute_uv=False)[:9]
    # U sqrt(S): the columns are orthogonal, their squared lengths the singular values.
    np.testing.assert_allclose(vectors.T @ vectors, np.diag(values), atol=1e-4)
    projected = vectors @ np.linalg.pinv(vectors) @ information
    np.testing.assert_allclose(projected, information, atol=1e-4)
    assert not vectors[9].any()


def test_what_is_evaluated_on_is_not_in_the_sources_that_are_trained_on() -> None:
    sources = " ".join(" ".join(library_texts()).split())
    for item in BitsPerByte().items():
        middle = " ".join(item.fields["text"].split())
        assert middle[100:180] not in sources, item.id
