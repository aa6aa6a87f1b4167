"""The tri-gram table and what lies over it, against counting by hand and in plain loops."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from methods.decoding import common_ngrams
from methods.decoding.common_ngrams import (
    TrigramStore,
    TrigramTable,
    corpus_table,
    standard_library_files,
)

SEQUENCES = st.lists(st.lists(st.integers(0, 5), max_size=30), max_size=4)


def slow_table(
    sequences: Sequence[Sequence[int]],
) -> dict[tuple[int, int], list[tuple[int, float]]]:
    """Count one tri-gram after the other."""
    counts: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for sequence in sequences:
        for at in range(len(sequence) - 2):
            counts[sequence[at], sequence[at + 1]][sequence[at + 2]] += 1
    return {
        pair: [
            (token, count / found.total())
            for token, count in sorted(found.items(), key=lambda item: (-item[1], item[0]))
        ]
        for pair, found in counts.items()
    }


# --- counting -------------------------------------------------------------------------------------


@given(SEQUENCES, st.integers(1, 4))
def test_a_table_holds_the_shares_of_every_tri_gram(sequences: list[list[int]], most: int) -> None:
    table = TrigramTable.count(sequences, 6, most)
    expected = slow_table(sequences)
    assert len(table.pairs) == len(expected)
    assert len(table.tokens) == sum(min(most, len(found)) for found in expected.values())
    for first in range(6):
        for second in range(6):
            found = table.successors(first * 6 + second, 99)
            wanted = expected.get((first, second), [])[:most]
            assert [token for token, _ in found] == [token for token, _ in wanted]
            assert [share for _, share in found] == pytest.approx([share for _, share in wanted])


def test_the_largest_ids_do_not_overflow() -> None:
    vocab = 2**21
    last = vocab - 1
    table = TrigramTable.count([[last, last, last, last - 1]], vocab)
    assert table.successors(last * vocab + last, 9) == [(last - 1, 0.5), (last, 0.5)]
    with pytest.raises(ValueError, match="a vocabulary of 2097153 is too large"):
        TrigramTable.count([], vocab + 1)


def test_a_saved_table_comes_back(tmp_path: Path) -> None:
    table = TrigramTable.count([[1, 2, 3, 1, 2, 4, 1, 2, 3]], 6)
    table.save(tmp_path / "deep" / "table.npz")
    again = TrigramTable.load(tmp_path / "deep" / "table.npz", 6)
    assert again.successors(1 * 6 + 2, 9) == table.successors(1 * 6 + 2, 9) != []
    assert again.num_bytes == table.num_bytes
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["table.npz"]


# --- learning -------------------------------------------------------------------------------------


def test_every_weight_of_a_context_read_twice_is_as_by_hand() -> None:
    # 20 tokens; 1 2 3 stands three times, 2 3 4 twice, and (5, 6) is followed by two tokens.
    context = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 5, 6, 7, 5, 6, 8, 9, 10, 11]
    store = TrigramStore(TrigramTable.empty(16))
    store.observe(context)
    store.observe(context)
    seen = Counter(zip(context, context[1:], context[2:], strict=False))
    assert seen[1, 2, 3] == 3
    for first in range(16):
        for second in range(16):
            for third in range(16):
                weight = 2 * 0.04 * seen[first, second, third]
                assert store.weight(first, second, third) == pytest.approx(weight)
    assert store.row(5, 6).tokens == [7, 8]  # type: ignore[union-attr]  # it was seen
    assert store.row(11, 1) is None


def test_the_cap_is_reached_exactly() -> None:
    store = TrigramStore(TrigramTable.empty(6))
    weights = []
    for _ in range(100):
        store.observe([1, 2, 3])
        weights.append(store.weight(1, 2, 3))
    assert weights[73] == pytest.approx(2.96)
    assert weights[75:] == [3.0] * 25


def test_what_is_learned_adds_to_the_corpus_and_is_not_normalised() -> None:
    table = TrigramTable.count([[1, 2, 3], [1, 2, 3], [1, 2, 4], [1, 2, 0]], 6)
    store = TrigramStore(table, increment=0.3)
    assert store.row(1, 2).tokens == [3, 0, 4]  # type: ignore[union-attr]  # it is in the corpus
    store.observe([1, 2, 4])
    assert store.weight(1, 2, 4) == pytest.approx(0.55)
    store.observe([1, 2, 5])
    row = store.row(1, 2)
    assert row is not None
    assert dict(zip(row.tokens, row.weights, strict=True)) == pytest.approx(
        {3: 0.5, 4: 0.55, 0: 0.25, 5: 0.3}
    )
    assert row.tokens == [4, 3, 5, 0]
    assert sum(row.priors) == pytest.approx(1)
    assert row.cumulative[-1] == pytest.approx(1.6)
    assert table.successors(1 * 6 + 2, 9) == [(3, 0.5), (0, 0.25), (4, 0.25)]


def test_only_the_top_successors_of_the_corpus_are_taken_and_learning_adds_to_them() -> None:
    store = TrigramStore(TrigramTable.count([[1, 2, w] for w in (0, 3, 3, 4)], 6), top=2)
    assert store.row(1, 2).tokens == [3, 0]  # type: ignore[union-attr]  # it is in the corpus
    store.observe([1, 2, 4])
    assert store.row(1, 2).tokens == [3, 0, 4]  # type: ignore[union-attr]  # as above
    assert store.weight(1, 2, 4) == pytest.approx(0.04)


def test_a_frozen_store_learns_nothing_and_a_reset_one_knows_the_corpus_only() -> None:
    store = TrigramStore(TrigramTable.count([[1, 2, 3]], 6))
    store.observe([2, 3, 4])
    store.freeze()
    store.observe([2, 3, 5])
    assert store.row(2, 3).tokens == [4]  # type: ignore[union-attr]  # learned before
    store.reset()
    assert store.row(2, 3) is None
    assert store.weight(1, 2, 3) == 1


def test_a_snapshot_learns_by_itself() -> None:
    store = TrigramStore(TrigramTable.empty(6))
    store.observe([1, 2, 3])
    copy = store.snapshot()
    copy.observe([1, 2, 3])
    store.observe([1, 2, 4])
    assert copy.weight(1, 2, 3) == pytest.approx(0.08)
    assert copy.weight(1, 2, 4) == 0
    assert store.weight(1, 2, 3) == pytest.approx(0.04)


def test_size_counts_the_corpus_and_what_was_learned() -> None:
    table = TrigramTable.count([[1, 2, 3], [1, 2, 4]], 6)
    assert table.num_bytes == 8 + 2 * 8 + 2 * 4 + 2 * 4
    store = TrigramStore(table)
    assert (store.num_entries, store.num_bytes) == (2, table.num_bytes)
    store.observe([1, 2, 5, 0])  # a third successor of (1, 2), and one of (2, 5)
    assert store.num_entries == 2 + 3 + 1
    assert store.num_bytes == table.num_bytes + 2 * 8 + 4 * 16


# --- the corpus -----------------------------------------------------------------------------------


class Letters:
    """One id a character, with a begin-of-text in front of every text."""

    def __init__(self, front: int | None = 1) -> None:
        self.front = [] if front is None else [front]
        self.texts: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.texts.append(text)
        return [*self.front, *map(ord, text)]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(token) for token in token_ids if token > 1)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Stand in for the standard library, with an empty cache."""
    texts = ["abcabd", "cab"]
    monkeypatch.setattr(common_ngrams, "standard_library", lambda: tuple(texts))
    monkeypatch.setenv("TOKENMARK_CACHE", str(tmp_path))
    return texts


def test_the_corpus_has_no_begin_of_text_and_no_tri_gram_over_two_files(
    library: list[str],
) -> None:
    table = corpus_table(Letters(), 200)
    store = TrigramStore(table)
    assert table.pairs.min() >= 200 * ord("a")
    assert store.weight(*map(ord, "abc")) == store.weight(*map(ord, "abd")) == 0.5
    assert store.row(*map(ord, "bd")) is None
    assert store.weight(*map(ord, "cab")) == 1


def test_the_corpus_is_counted_once_for_each_tokenizer_and_text(
    library: list[str], tmp_path: Path
) -> None:
    first = corpus_table(Letters(), 200)
    files = list(tmp_path.rglob("*.npz"))
    assert len(files) == 1
    long = "x" * 1000 + "abcabd"
    library[0] = long
    reader = Letters()
    second = corpus_table(reader, 200)
    assert len(list(tmp_path.rglob("*.npz"))) == 2
    assert long in reader.texts
    again = Letters()
    assert (corpus_table(again, 200).tokens == second.tokens).all()
    assert long not in again.texts  # it was read from the cache
    corpus_table(Letters(front=None), 200)
    assert len(list(tmp_path.rglob("*.npz"))) == 3
    assert len(first.tokens) < len(second.tokens)


@pytest.mark.parametrize("vocab_size", [100, 200])
def test_a_tokenizer_that_cannot_read_programs_has_an_empty_corpus(
    library: list[str], vocab_size: int
) -> None:
    class Upper(Letters):
        def decode(self, token_ids: Sequence[int]) -> str:
            return super().decode(token_ids).upper()

    # With 100 ids the letters past `c` have none.
    tokenizer = Letters() if vocab_size == 100 else Upper()
    assert len(corpus_table(tokenizer, vocab_size).pairs) == 0


def test_the_standard_library_is_there_without_tests_and_code_pages() -> None:
    names = {"/".join(path.parts[-2:]) for path in standard_library_files()}
    assert {"json/decoder.py", "collections/__init__.py"} <= names
    assert not any(name.startswith(("test/", "encodings/")) for name in names)
