"""Scores of embeddings, by the definitions of `mteb`, also on resampled items.

Each scorer takes how often an item counts, one row a resample, and returns one number a row: the
bootstrap is a matrix of counts. Where a probe has to be trained (a classifier, a clustering) that
happens once, and only the items that are judged are resampled.

Source: mteb 2.26 (arXiv 2210.07316, 2502.13595); cross-checked against it in the tests.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# mteb's: seed of every task, texts of a label that a classifier sees, how often it is trained, for
# how many steps, how often documents are clustered, and documents of one step of k-means.
SEED = 42
SHOTS = 8
EXPERIMENTS = 10
PROBE_STEPS = 100
CLUSTERINGS = 10
KMEANS_BATCH = 512
# Rows of counts that are worked on at once, which bounds the memory.
_ROWS = 256


class Correlations(NamedTuple):
    """Agreement of similarities with human judgements, one number a row; NaN where it has none."""

    spearman: Floats
    pearson: Floats


def cosines(first: Floats, second: Floats) -> Floats:
    """Return the cosine of each pair of rows, (pairs,); 0 where one of them is zero."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.divide((first * second).sum(1), norms, out=np.zeros_like(norms), where=norms > 0)


def correlations(similarities: Floats, gold: Floats, counts: Floats) -> Correlations:
    """Return Spearman's and Pearson's correlation of weighted pairs.

    A pair that counts n times is as good as n equal pairs; ranks of equal values are averaged.

    Args:
        similarities: (pairs,).
        gold: Human judgements, (pairs,).
        counts: How often each pair counts, (resamples, pairs).
    """
    spearman, pearson = np.empty(len(counts)), np.empty(len(counts))
    first, second = _Ranking(similarities), _Ranking(gold)
    for start in range(0, len(counts), _ROWS):
        rows = slice(start, start + _ROWS)
        weights = counts[rows]
        spearman[rows] = _correlation(first.ranks(weights), second.ranks(weights), weights)
        pearson[rows] = _correlation(similarities[None], gold[None], weights)
    return Correlations(spearman, pearson)


def training_draws(labels: Sequence[Any], *, shots: int, experiments: int) -> list[list[int]]:
    """Return the places of the texts that each experiment's classifier is trained on.

    Source: mteb's `_undersample_data`: the order is shuffled again from where it was, each time by
    a generator seeded alike.
    """
    order = list(range(len(labels)))
    found = []
    for _ in range(experiments):
        np.random.RandomState(SEED).shuffle(order)
        left = dict.fromkeys(labels, shots)
        chosen = []
        for place in order:
            if left[labels[place]]:
                left[labels[place]] -= 1
                chosen.append(place)
        found.append(chosen)
    return found


def probe_hits(
    train: Floats,
    train_labels: Sequence[Any],
    experiments: Sequence[Sequence[int]],
    test: Floats,
    test_labels: Sequence[Any],
) -> Floats:
    """Return the share of experiments in which each test text is classified rightly, (texts,).

    Args:
        train: Embeddings, (train texts, dimension).
        train_labels: Their labels.
        experiments: Places of the texts that each experiment trains a logistic regression on.
        test: Embeddings, (texts, dimension).
        test_labels: Their labels.
    """
    from sklearn.linear_model import LogisticRegression

    labels, truth = np.asarray(train_labels), np.asarray(test_labels)
    hits = np.zeros(len(truth))
    for places in experiments:
        chosen = list(places)
        with warnings.catch_warnings():
            # The steps are the protocol's, whether they are enough or not.
            warnings.simplefilter("ignore")
            probe = LogisticRegression(max_iter=PROBE_STEPS, random_state=SEED)
            hits += probe.fit(train[chosen], labels[chosen]).predict(test) == truth
    return hits / len(experiments)


def clustering_bags(documents: int, size: int, generator: random.Random) -> Integers:
    """Return the documents of each clustering, drawn with replacement, (clusterings, size)."""
    bags = [generator.choices(range(documents), k=size) for _ in range(CLUSTERINGS)]
    return np.array(bags, dtype=np.int64)


def v_measures(vectors: Floats, labels: Sequence[Any], bags: Integers, counts: Floats) -> Floats:
    """Return the mean V-measure of several clusterings, (resamples,).

    Args:
        vectors: Embeddings, (documents, dimension).
        labels: Of the documents; there are as many clusters as labels.
        bags: Documents of each clustering, (clusterings, size).
        counts: How often each document counts, (resamples, documents).
    """
    from sklearn.cluster import MiniBatchKMeans

    classes, truth = np.unique(np.asarray(labels), return_inverse=True)
    size = len(classes)
    model = MiniBatchKMeans(
        n_clusters=size, batch_size=KMEANS_BATCH, init="k-means++", n_init=1, random_state=SEED
    )
    total = np.zeros(len(counts))
    for bag in bags:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fewer distinct points than clusters
            clusters = model.fit_predict(vectors[bag])
        cells = truth[bag] * size + clusters
        for start in range(0, len(counts), _ROWS):
            weights = counts[start : start + _ROWS, bag]
            tables = (
                np.stack([np.bincount(cells, row, minlength=size * size) for row in weights])
                .reshape(-1, size, size)
                .astype(np.float64)
            )
            total[start : start + _ROWS] += v_measure(tables)
    return total / len(bags)


def v_measure(tables: Floats) -> Floats:
    """Return the V-measure of contingency tables (tables, classes, clusters), (tables,).

    The harmonic mean of homogeneity and completeness; a side without entropy is perfect. NaN for an
    empty table.
    """
    total = tables.sum((1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        joint = tables / total[:, None, None]
    classes, clusters = joint.sum(2), joint.sum(1)
    both, one, other = (
        _entropy(each) for each in (joint.reshape(len(joint), -1), classes, clusters)
    )
    information = one + other - both
    homogeneity = np.divide(information, one, out=np.ones_like(one), where=one > 1e-12)
    completeness = np.divide(information, other, out=np.ones_like(other), where=other > 1e-12)
    added = homogeneity + completeness
    found = np.divide(
        2 * homogeneity * completeness, added, out=np.zeros_like(added), where=added > 1e-12
    )
    found[~(total > 0)] = np.nan
    return found


def ndcg_at_10(queries: Floats, documents: Floats, relevant: Sequence[Mapping[int, int]]) -> Floats:
    """Return nDCG@10 of each query over all documents by cosine, (queries,).

    The gain of a document is its grade, as trec_eval has it; of equally similar documents the later
    one comes first, as there.

    Args:
        queries: (queries, dimension).
        documents: (documents, dimension).
        relevant: Grade of each relevant document of each query.
    """
    units = [
        each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-12)
        for each in (queries, documents)
    ]
    similarities = units[0] @ units[1].T
    discounts = 1 / np.log2(np.arange(2, 12))
    found = np.zeros(len(queries))
    for row, grades in enumerate(relevant):
        order = np.lexsort((-np.arange(len(documents)), -similarities[row]))[:10]
        gains = np.array([grades.get(int(place), 0) for place in order], dtype=np.float64)
        best = np.array(sorted(grades.values(), reverse=True)[:10], dtype=np.float64)
        ideal = float(best @ discounts[: len(best)])
        found[row] = float(gains @ discounts[: len(gains)]) / ideal if ideal else 0.0
    return found


def weighted_mean(values: Floats, counts: Floats) -> Floats:
    """Return the mean of values that count several times, (resamples,); NaN where none counts."""
    total = counts.sum(1)
    return np.divide(counts @ values, total, out=np.full(len(total), np.nan), where=total > 0)


class _Ranking:
    """Ranks of values that count several times, without sorting them again."""

    def __init__(self, values: Floats) -> None:
        self._order = np.argsort(values, kind="stable")
        ordered = values[self._order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        self._starts = starts
        self._group = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(values)]))

    def ranks(self, weights: Floats) -> Floats:
        """Return the average rank of each value, (resamples, values)."""
        groups = np.add.reduceat(weights[:, self._order], self._starts, axis=1)
        middle = groups.cumsum(1) - (groups - 1) / 2
        ranks = np.empty_like(weights)
        ranks[:, self._order] = middle[:, self._group]
        return ranks


def _correlation(first: Floats, second: Floats, weights: Floats) -> Floats:
    """Return the weighted correlation of each row, NaN where one side does not vary."""
    total = weights.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        first = first - (weights * first).sum(1, keepdims=True) / total
        second = second - (weights * second).sum(1, keepdims=True) / total
        spread = np.sqrt((weights * first**2).sum(1) * (weights * second**2).sum(1))
        found: Floats = (weights * first * second).sum(1) / spread
    found[~(spread > 1e-12 * np.maximum(total[:, 0], 1))] = np.nan
    return found


def _entropy(shares: Floats) -> Floats:
    """Return the entropy of each row, nats."""
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    found: Floats = -(shares * logs).sum(1)
    return found
