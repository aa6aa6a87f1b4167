"""Data of embedding tasks in four forms, and how each is scored from the vectors of its units.

A unit is what is encoded together and resampled as one: a pair of texts, or a single text. Each
form says what its units are, what human or label knowledge belongs to them, and how the vectors of
the units that are there become the numbers that `mteb` reports for that type of task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tasks.base import Metric
from tasks.mteb_scorers import (
    Floats,
    Integers,
    correlations,
    cosines,
    ndcg_at_10,
    probe_hits,
    v_measures,
    weighted_mean,
)

# Vectors of the texts of one unit, (texts, dimension).
Vectors = Floats


@dataclass(frozen=True, eq=False)
class EmbeddingData(ABC):
    """Texts and what is known of them.

    Class attributes:
        metrics: Metrics of this form, the headline first.
    """

    metrics: ClassVar[tuple[Metric, ...]]

    @abstractmethod
    def units(self) -> list[tuple[str, ...]]:
        """Return the texts of each unit, in the standard order."""

    @abstractmethod
    def known(self, unit: int) -> Any:
        """Return what the score of a unit depends on besides its vectors, JSON-able."""

    @abstractmethod
    def numbers(self, vectors: Mapping[int, Vectors], counts: Floats) -> dict[str, Floats]:
        """Score the units that have vectors.

        Args:
            vectors: Of each unit that is there, in float64.
            counts: How often each unit counts, (resamples, units); 0 for those that are not there.
                Row 0 is every unit once.

        Returns:
            One number a row for each metric, (resamples,); NaN where there is none.
        """


def _metric(name: str, unit: str) -> Metric:
    return Metric(name=name, unit=unit, kind="corpus")


@dataclass(frozen=True, eq=False)
class PairList(EmbeddingData):
    """Pairs of texts with a human judgement each; a unit is a pair."""

    pairs: tuple[tuple[str, str], ...]
    gold: tuple[float, ...]
    metrics = (_metric("cosine_spearman", "correlation"), _metric("cosine_pearson", "correlation"))

    def units(self) -> list[tuple[str, ...]]:
        """Return the pairs."""
        return list(self.pairs)

    def known(self, unit: int) -> float:
        """Return the judgement of a pair."""
        return self.gold[unit]

    def numbers(self, vectors: Mapping[int, Vectors], counts: Floats) -> dict[str, Floats]:
        """Return the correlations of cosine and judgement."""
        there = sorted(vectors)
        both = np.stack([vectors[unit] for unit in there])
        found = correlations(
            cosines(both[:, 0], both[:, 1]), np.array(self.gold)[there], counts[:, there]
        )
        return {"cosine_spearman": found.spearman, "cosine_pearson": found.pearson}


@dataclass(frozen=True, eq=False)
class PairMatrix(EmbeddingData):
    """Documents of which every pair has a human judgement; a unit is a document.

    The pairs are not independent, so documents are resampled: a pair counts as often as both its
    documents do, and a document with itself is no pair.
    """

    texts: tuple[str, ...]
    gold: Floats  # (documents, documents); the upper triangle is read
    metrics = PairList.metrics

    def units(self) -> list[tuple[str, ...]]:
        """Return the documents."""
        return [(text,) for text in self.texts]

    def known(self, unit: int) -> list[float]:
        """Return the judgements of a document with those behind it."""
        return [float(value) for value in self.gold[unit, unit + 1 :]]

    def pairs(self) -> tuple[Integers, Integers]:
        """Return the places of the first and second documents of all pairs, (pairs,) each."""
        first, second = np.triu_indices(len(self.texts), 1)
        return first, second

    def numbers(self, vectors: Mapping[int, Vectors], counts: Floats) -> dict[str, Floats]:
        """Return the correlations of cosine and judgement."""
        first, second = self.pairs()
        there = np.isin(first, list(vectors)) & np.isin(second, list(vectors))
        first, second = first[there], second[there]
        if not len(first):
            nothing = np.full(len(counts), np.nan)
            return {metric.name: nothing for metric in self.metrics}
        size = len(next(iter(vectors.values()))[0])
        rows = np.zeros((len(self.texts), size))
        for unit, vector in vectors.items():
            rows[unit] = vector[0]
        found = correlations(
            cosines(rows[first], rows[second]),
            self.gold[first, second],
            counts[:, first] * counts[:, second],
        )
        return {"cosine_spearman": found.spearman, "cosine_pearson": found.pearson}


@dataclass(frozen=True, eq=False)
class _JudgedBehind(EmbeddingData):
    """Units that are given, all of them needed, and behind them those that are judged by them.

    Only the latter are resampled.
    """

    @property
    @abstractmethod
    def given(self) -> int:
        """Number of units that are given."""

    @abstractmethod
    def judged(self, given: Floats, others: Floats, places: Sequence[int]) -> Floats:
        """Return the headline of each unit that is judged, (judged,).

        Args:
            given: Vectors of all units that are given, (given, dimension).
            others: Vectors of those that are judged, (judged, dimension).
            places: Which they are, counted from the first behind the given ones, (judged,).
        """

    def numbers(self, vectors: Mapping[int, Vectors], counts: Floats) -> dict[str, Floats]:
        """Return the mean headline of the units that are judged."""
        [metric], size = self.metrics, self.given
        units = [unit for unit in sorted(vectors) if unit >= size]
        if not units or any(unit not in vectors for unit in range(size)):
            return {metric.name: np.full(len(counts), np.nan)}
        found = self.judged(
            np.stack([vectors[unit][0] for unit in range(size)]),
            np.stack([vectors[unit][0] for unit in units]),
            [unit - size for unit in units],
        )
        return {metric.name: weighted_mean(found, counts[:, units])}


@dataclass(frozen=True, eq=False)
class LabelledTexts(_JudgedBehind):
    """Labelled texts to train a probe on, and others to try it on; a unit is a text."""

    train: tuple[str, ...]
    train_labels: tuple[str, ...]
    experiments: tuple[tuple[int, ...], ...]
    test: tuple[str, ...]
    test_labels: tuple[str, ...]
    metrics = (_metric("accuracy", "fraction"),)

    def units(self) -> list[tuple[str, ...]]:
        """Return the training texts, then the others."""
        return [(text,) for text in (*self.train, *self.test)]

    def known(self, unit: int) -> list[Any]:
        """Return a text's label, and the experiments that train on it (none for a test text)."""
        label = (*self.train_labels, *self.test_labels)[unit]
        return [label, [run for run, places in enumerate(self.experiments) if unit in places]]

    @property
    def given(self) -> int:
        """Number of training texts."""
        return len(self.train)

    def judged(self, given: Floats, others: Floats, places: Sequence[int]) -> Floats:
        """Return the share of experiments that classify each text rightly."""
        truth = [self.test_labels[place] for place in places]
        return probe_hits(given, self.train_labels, self.experiments, others, truth)


@dataclass(frozen=True, eq=False)
class LabelledClusters(EmbeddingData):
    """Labelled documents to be clustered; a unit is a document.

    A resample has fewer distinct documents than there are, and the fewer, the better labels and
    clusters seem to fit: every resample lies above the number itself. Its mean excess is taken off.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    bags: Integers  # documents of each clustering, (clusterings, size)
    metrics = (_metric("v_measure", "fraction"),)

    def units(self) -> list[tuple[str, ...]]:
        """Return the documents."""
        return [(text,) for text in self.texts]

    def known(self, unit: int) -> list[Any]:
        """Return a document's label, and how often each clustering draws it."""
        return [self.labels[unit], [int(count) for count in (self.bags == unit).sum(1)]]

    def numbers(self, vectors: Mapping[int, Vectors], counts: Floats) -> dict[str, Floats]:
        """Return the mean V-measure of the clusterings."""
        if len(vectors) < len(self.texts):
            return {"v_measure": np.full(len(counts), np.nan)}
        rows = np.stack([vectors[unit][0] for unit in range(len(self.texts))])
        found = v_measures(rows, self.labels, self.bags, counts)
        if len(found) > 1:
            found[1:] -= found[1:].mean() - found[0]
        return {"v_measure": found}


@dataclass(frozen=True, eq=False)
class Retrieval(_JudgedBehind):
    """Queries and the documents that answer them; a unit is a document or a query.

    Only queries are judged: the documents are what is searched.
    """

    documents: tuple[str, ...]
    queries: tuple[str, ...]
    relevant: tuple[Mapping[int, int], ...]  # grade of each relevant document of each query
    metrics = (_metric("ndcg_at_10", "fraction"),)

    def units(self) -> list[tuple[str, ...]]:
        """Return the documents, then the queries."""
        return [(text,) for text in (*self.documents, *self.queries)]

    def known(self, unit: int) -> dict[str, int] | None:
        """Return the grades of a query's documents; None for a document."""
        if unit < len(self.documents):
            return None
        grades = self.relevant[unit - len(self.documents)]
        return {str(place): grade for place, grade in sorted(grades.items())}

    @property
    def given(self) -> int:
        """Number of documents."""
        return len(self.documents)

    def judged(self, given: Floats, others: Floats, places: Sequence[int]) -> Floats:
        """Return the nDCG@10 of each query."""
        return ndcg_at_10(others, given, [self.relevant[place] for place in places])


@dataclass(frozen=True, eq=False)
class PlainTexts(EmbeddingData):
    """The distinct texts of a task whose scorer is mteb's alone; a unit is a text.

    What is known of them is in mteb's data set: `source` says in which state of it.
    """

    texts: tuple[str, ...]
    source: str = ""
    metrics = ()

    def units(self) -> list[tuple[str, ...]]:
        """Return the texts."""
        return [(text,) for text in self.texts]

    def known(self, unit: int) -> str:
        """Return where it is: the path and revision, or the digest, of mteb's data set."""
        return self.source

    def numbers(self, vectors: Mapping[int, Vectors], counts: Floats) -> dict[str, Floats]:
        """Return nothing."""
        return {}


def distinct(texts: Sequence[str]) -> tuple[str, ...]:
    """Return texts without repetitions, in the order of their first appearance."""
    return tuple(dict.fromkeys(texts))
