"""Tri-grams: what followed each pair of tokens, in a corpus and in the text so far.

The corpus part is counted once, kept in the user's cache and never changed; what a text teaches
lies over it. Corpus: the sources of Python's standard library, which every machine has.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import sys
import sysconfig
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from models.base import Tokenizer
from models.cache import cache_dir

# Successors of a pair that a table holds; the largest number that a store may ask for.
MOST_SUCCESSORS = 32

# Raise it when the same sources would give another table.
_FORMAT = 1

# Tests repeat themselves, and code pages are tables of numbers.
_LEFT_OUT = frozenset({"test", "tests", "idle_test", "encodings", "site-packages", "__pycache__"})

# Rows of the corpus table that are kept unpacked, some 500 bytes each.
_MOST_CACHED_ROWS = 100_000

# Characters of each file that tell one tokenizer from another.
_PROBE_CHARACTERS = 300


class Row:
    """What may follow a pair of tokens, the heaviest first, equal weights by token id.

    Attributes:
        tokens: Successors.
        weights: Their weights; they need not sum to one.
        priors: Weights divided by their sum.
        cumulative: Running sums of the weights, for drawing.
        rank: Place of each successor.
    """

    __slots__ = ("cumulative", "priors", "rank", "tokens", "weights")

    def __init__(self, successors: Iterable[tuple[int, float]]) -> None:
        ordered = sorted(successors, key=lambda pair: (-pair[1], pair[0]))
        self.tokens = [token for token, _ in ordered]
        self.weights = [weight for _, weight in ordered]
        self.cumulative = list(itertools.accumulate(self.weights))
        total = self.cumulative[-1]
        self.priors = [weight / total for weight in self.weights]
        self.rank = {token: rank for rank, token in enumerate(self.tokens)}


@dataclass(frozen=True, eq=False)
class TrigramTable:
    """Relative frequencies of a corpus's tri-grams, a few successors a pair.

    Attributes:
        pairs: `first * vocab_size + second`, ascending, (pairs,), int64.
        starts: Where a pair's successors begin; one more at the end, (pairs + 1,), int64.
        tokens: Successors, the most frequent first, equal counts by token id, (entries,), int32.
        weights: Share of the pair's occurrences that each followed, (entries,), float32.
        vocab_size: Token ids.
    """

    pairs: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    vocab_size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rows", {})

    @classmethod
    def empty(cls, vocab_size: int) -> TrigramTable:
        """Return the table of no corpus."""
        return cls.count([], vocab_size)

    @classmethod
    def count(
        cls, sequences: Iterable[Sequence[int]], vocab_size: int, most: int = MOST_SUCCESSORS
    ) -> TrigramTable:
        """Count the tri-grams of token sequences; none spans two of them.

        Shares are taken before the successors past the `most` most frequent are dropped.

        Raises:
            ValueError: The vocabulary is so large that three ids do not fit into 63 bits.
        """
        if vocab_size > 2**21:
            raise ValueError(f"a vocabulary of {vocab_size} is too large, at most {2**21}.")
        keys = [np.empty(0, dtype=np.int64)]
        for sequence in sequences:
            ids = np.asarray(sequence, dtype=np.int64)
            keys.append((ids[:-2] * vocab_size + ids[1:-1]) * vocab_size + ids[2:])
        trigrams, counts = np.unique(np.concatenate(keys), return_counts=True)
        of_pair, tokens = np.divmod(trigrams, vocab_size)
        pairs, first, entries = np.unique(of_pair, return_index=True, return_counts=True)
        shares = (
            counts / np.repeat(np.add.reduceat(counts, first), entries) if len(pairs) else counts
        )
        order = np.lexsort((tokens, -counts, of_pair))
        rank = np.arange(len(trigrams)) - np.repeat(first, entries)
        kept = order[rank < most]
        starts = np.concatenate([[0], np.cumsum(np.minimum(entries, most))])
        return cls(
            pairs,
            starts.astype(np.int64),
            tokens[kept].astype(np.int32),
            shares[kept].astype(np.float32),
            vocab_size,
        )

    @property
    def num_bytes(self) -> int:
        """Size of the arrays."""
        return sum(a.nbytes for a in (self.pairs, self.starts, self.tokens, self.weights))

    def row(self, pair: int, top: int) -> Row | None:
        """Return the `top` successors of a pair's key; None if the corpus does not hold it."""
        rows: dict[tuple[int, int], Row | None] = self._rows  # type: ignore[attr-defined]  # set above
        key = (pair, top)
        if key not in rows:
            if len(rows) >= _MOST_CACHED_ROWS:
                rows.clear()
            successors = self.successors(pair, top)
            rows[key] = Row(successors) if successors else None
        return rows[key]

    def successors(self, pair: int, top: int) -> list[tuple[int, float]]:
        """Return the `top` successors of a pair's key with their weights; none if unknown."""
        at = int(np.searchsorted(self.pairs, pair))
        if at == len(self.pairs) or self.pairs[at] != pair:
            return []
        start, end = self.starts[at : at + 2].tolist()
        chosen = slice(start, min(end, start + top))
        return list(zip(self.tokens[chosen].tolist(), self.weights[chosen].tolist(), strict=True))

    def save(self, path: Path) -> None:
        """Write the table; the file appears complete or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".npz")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(
                    file,
                    pairs=self.pairs,
                    starts=self.starts,
                    tokens=self.tokens,
                    weights=self.weights,
                )
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, vocab_size: int) -> TrigramTable:
        """Read a table that `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(file["pairs"], file["starts"], file["tokens"], file["weights"], vocab_size)


class TrigramStore:
    """A corpus table and, over it, what texts have taught.

    A tri-gram that is seen gains `increment`, starting from its weight in the corpus or from 0, up
    to `cap`; nothing is normalised again, so what was read lately outweighs the corpus.

    Args:
        table: The corpus; it is shared and never changed.
        top: Successors taken from the corpus for each pair. What is learned comes on top.
        increment: Weight added at each sight of a tri-gram.
        cap: Largest weight.
    """

    def __init__(
        self, table: TrigramTable, *, top: int = 12, increment: float = 0.04, cap: float = 3.0
    ) -> None:
        self._table = table
        self._vocab_size = table.vocab_size
        self._top = top
        self._increment = increment
        self._cap = cap
        self._learned: dict[int, dict[int, float]] = {}
        self._rows: dict[int, Row] = {}
        self.is_frozen = False

    def row(self, first: int, second: int) -> Row | None:
        """Return what may follow two tokens; None if they were never seen."""
        pair = first * self._vocab_size + second
        found = self._rows.get(pair)
        if found is not None:
            return found
        if learned := self._learned.get(pair):
            found = self._rows[pair] = Row(learned.items())
            return found
        return self._table.row(pair, self._top)

    def weight(self, first: int, second: int, third: int) -> float:
        """Return the weight of a tri-gram, 0 if it was never seen."""
        row = self.row(first, second)
        rank = None if row is None else row.rank.get(third)
        return 0.0 if row is None or rank is None else row.weights[rank]

    def observe(self, token_ids: Sequence[int]) -> None:
        """Add the increment to every tri-gram of `token_ids`; does nothing when frozen."""
        if self.is_frozen:
            return
        for first, second, third in zip(token_ids, token_ids[1:], token_ids[2:], strict=False):
            pair = first * self._vocab_size + second
            learned = self._learned.get(pair)
            if learned is None:
                learned = self._learned[pair] = dict(self._table.successors(pair, self._top))
            learned[third] = min(learned.get(third, 0.0) + self._increment, self._cap)
            self._rows.pop(pair, None)

    def freeze(self) -> None:
        """Learn nothing from now on."""
        self.is_frozen = True

    def reset(self) -> None:
        """Forget all that was learned; the corpus stays."""
        self._learned.clear()
        self._rows.clear()

    def snapshot(self) -> TrigramStore:
        """Return a copy that learns by itself."""
        copy = TrigramStore(self._table, top=self._top, increment=self._increment, cap=self._cap)
        copy._learned = {pair: dict(successors) for pair, successors in self._learned.items()}
        copy.is_frozen = self.is_frozen
        return copy

    @property
    def num_entries(self) -> int:
        """Tri-grams of the corpus table and of the pairs that were seen since."""
        return len(self._table.tokens) + sum(map(len, self._learned.values()))

    @property
    def num_bytes(self) -> int:
        """Size of the table, and of what was learned as arrays of 8-byte ids and weights."""
        learned = sum(8 + 16 * len(successors) for successors in self._learned.values())
        return self._table.num_bytes + learned


# --- the corpus -----------------------------------------------------------------------------------


def standard_library_files() -> list[Path]:
    """Return the sources of the standard library, without tests and code pages, by path."""
    root = Path(sysconfig.get_path("stdlib"))
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(found) if not _LEFT_OUT & set(path.parts)]


@functools.cache
def standard_library() -> tuple[str, ...]:
    """Return the texts of `standard_library_files`."""
    return tuple(
        path.read_text(encoding="utf-8", errors="replace") for path in standard_library_files()
    )


def corpus_table(tokenizer: Tokenizer, vocab_size: int) -> TrigramTable:
    """Return the tri-grams of the standard library in a tokenizer's ids.

    Counted on first use (ten seconds or so) and kept in the cache under a hash of the sources and
    of what the tokenizer makes of the beginning of each. A tokenizer that cannot read programs, as
    those of toy models, gives an empty table.
    """
    # A weak key: tables go with their tokenizer.
    known = _TABLES.setdefault(tokenizer, {})
    if vocab_size not in known:
        known[vocab_size] = _corpus_table(tokenizer, vocab_size)
    return known[vocab_size]


_TABLES: weakref.WeakKeyDictionary[Tokenizer, dict[int, TrigramTable]] = weakref.WeakKeyDictionary()


def _corpus_table(tokenizer: Tokenizer, vocab_size: int) -> TrigramTable:
    texts = standard_library()
    if not _reads_programs(tokenizer, vocab_size):
        return TrigramTable.empty(vocab_size)
    digest = hashlib.sha256(f"{_FORMAT} {MOST_SUCCESSORS} {vocab_size}".encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
        digest.update(repr(tokenizer.encode(text[:_PROBE_CHARACTERS])).encode())
    path = cache_dir() / "trigrams" / f"{digest.hexdigest()[:32]}.npz"
    if path.is_file():
        return TrigramTable.load(path, vocab_size)
    table = TrigramTable.count(_encoded(tokenizer, texts), vocab_size)
    table.save(path)
    return table


def _encoded(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    """Yield the ids of each text, without what the tokenizer puts in front of every text."""
    front = len(tokenizer.encode(""))
    for text in texts:
        yield tokenizer.encode(text)[front:]


def _reads_programs(tokenizer: Tokenizer, vocab_size: int) -> bool:
    """Return whether a piece of a program survives encoding and decoding."""
    probe = "def f(x):\n    return x[0] + 1\n"
    try:
        ids = tokenizer.encode(probe)
    except ValueError:
        return False
    return all(0 <= token < vocab_size for token in ids) and tokenizer.decode(ids) == probe


if __name__ == "__main__":
    # Which files count, and how large the table is: `python -m methods.decoding.common_ngrams ID`.
    from models.loading import load

    chosen = load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", offline=True)
    built = corpus_table(chosen.tokenizer, chosen.facts.vocab_size)
    print(
        f"{len(standard_library_files())} files, {sum(map(len, standard_library())):,} characters: "
        f"{len(built.pairs):,} pairs, {len(built.tokens):,} entries, {built.num_bytes:,} bytes"
    )
