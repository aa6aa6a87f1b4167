"""Scorers against scipy, scikit-learn and slow versions; counts against items really repeated."""

from __future__ import annotations

import math
import random
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import ndcg_score, v_measure_score

from tasks.mteb_data import PairMatrix
from tasks.mteb_scorers import (
    clustering_bags,
    correlations,
    cosines,
    ndcg_at_10,
    probe_hits,
    training_draws,
    v_measure,
    v_measures,
    weighted_mean,
)
from tasks.resampling import draw_counts

small = st.integers(0, 4).map(float)


def test_spearman_averages_the_ranks_of_ties() -> None:
    # By hand: both columns of ranks have a sum of squares of 17 around 3.5.
    first = np.array([1.0, 2, 2, 3, 4, 5])
    second = np.array([20.0, 10, 30, 30, 60, 50])
    ranks = np.array([1, 2.5, 2.5, 4, 5, 6]), np.array([2, 1, 3.5, 3.5, 6, 5])
    expected = float(((ranks[0] - 3.5) * (ranks[1] - 3.5)).sum() / 17.0)
    found = correlations(first, second, np.ones((1, 6)))
    assert found.spearman[0] == pytest.approx(expected)
    assert found.spearman[0] == pytest.approx(stats.spearmanr(first, second).statistic)
    assert found.pearson[0] == pytest.approx(stats.pearsonr(first, second).statistic)


@given(
    rows=st.lists(st.tuples(small, small, st.integers(0, 3)), min_size=1, max_size=12),
)
@settings(max_examples=200, deadline=None)
def test_a_pair_that_counts_twice_is_two_pairs(rows: list[tuple[float, float, int]]) -> None:
    first, second, counts = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    found = correlations(first, second, counts[None])
    repeated = [np.repeat(column, counts.astype(int)) for column in (first, second)]
    if len(repeated[0]) < 2 or np.ptp(repeated[0]) == 0 or np.ptp(repeated[1]) == 0:
        assert math.isnan(found.spearman[0])
        assert math.isnan(found.pearson[0])
    else:
        assert found.spearman[0] == pytest.approx(stats.spearmanr(*repeated).statistic, abs=1e-9)
        assert found.pearson[0] == pytest.approx(stats.pearsonr(*repeated).statistic, abs=1e-9)


def test_many_resamples_are_as_good_as_one_at_a_time() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 9, (2, 40)).astype(float)
    counts = draw_counts(generator.integers(40, size=(600, 40)), 40)
    together = correlations(first, second, counts)
    for row in (0, 255, 256, 599):
        alone = correlations(first, second, counts[row : row + 1])
        assert together.spearman[row] == pytest.approx(alone.spearman[0])
        assert together.pearson[row] == pytest.approx(alone.pearson[0])


def test_documents_drawn_twice_make_pairs_as_often_as_both_are_there() -> None:
    generator = np.random.default_rng(3)
    gold = generator.random((6, 6))
    vectors = generator.standard_normal((6, 4))
    data = PairMatrix(texts=tuple("abcdef"), gold=gold)
    draws = generator.integers(6, size=(20, 6))
    found = data.numbers(
        {place: vectors[place : place + 1] for place in range(6)}, draw_counts(draws, 6)
    )
    for row, drawn in enumerate(draws):
        ours, theirs = [], []
        for place, first in enumerate(drawn):
            for second in drawn[place + 1 :]:
                if first != second:
                    low, high = sorted((first, second))
                    norms = np.linalg.norm(vectors[[low, high]], axis=1)
                    ours.append(vectors[low] @ vectors[high] / norms.prod())
                    theirs.append(gold[low, high])
        if len(set(drawn)) < 3:
            assert np.isnan(found["cosine_spearman"][row])
            continue
        expected = stats.spearmanr(ours, theirs).statistic
        assert found["cosine_spearman"][row] == pytest.approx(expected)


def test_a_constant_encoder_has_no_correlation() -> None:
    similarities = cosines(np.ones((5, 3)), np.ones((5, 3)))
    assert similarities == pytest.approx(np.ones(5))
    found = correlations(similarities, np.arange(5.0), np.ones((1, 5)))
    assert np.isnan(found.spearman).all()


def test_a_vector_of_zeros_is_like_nothing() -> None:
    assert cosines(np.zeros((1, 3)), np.ones((1, 3)))[0] == 0


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=15
    )
)
@settings(max_examples=150, deadline=None)
def test_v_measure_is_scikit_learns(rows: list[tuple[int, int, int]]) -> None:
    table = np.zeros((1, 4, 4))
    classes: list[int] = []
    clusters: list[int] = []
    for first, second, count in rows:
        table[0, first, second] += count
        classes += [first] * count
        clusters += [second] * count
    if not classes:
        assert np.isnan(v_measure(table)[0])
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = v_measure_score(classes, clusters)
    assert v_measure(table)[0] == pytest.approx(expected, abs=1e-9)


def test_clusters_that_are_far_apart_are_found_and_resampled() -> None:
    generator = np.random.default_rng(0)
    labels = ["a", "b", "c"] * 20
    centres = {"a": (0.0, 0.0), "b": (50.0, 0.0), "c": (0.0, 50.0)}
    vectors = np.array([centres[label] for label in labels]) + generator.standard_normal((60, 2))
    bags = clustering_bags(60, 60, random.Random(42))
    counts = np.concatenate(
        [np.ones((1, 60)), draw_counts(generator.integers(60, size=(9, 60)), 60)]
    )
    assert v_measures(vectors, labels, bags, counts) == pytest.approx(np.ones(10), abs=0.35)
    assert v_measures(vectors, labels, bags, counts)[0] > 0.8
    shuffled = list(generator.permutation(labels))
    assert v_measures(vectors, shuffled, bags, counts)[0] < 0.2


def test_many_resamples_of_a_clustering_are_as_good_as_one_at_a_time() -> None:
    generator = np.random.default_rng(0)
    vectors, labels = generator.standard_normal((30, 4)), ["a", "b", "c"] * 10
    bags = clustering_bags(30, 30, random.Random(42))
    counts = draw_counts(generator.integers(30, size=(300, 30)), 30)
    together = v_measures(vectors, labels, bags, counts)
    for row in (0, 255, 256, 299):
        alone = v_measures(vectors, labels, bags, counts[row : row + 1])
        assert together[row] == pytest.approx(alone[0])


@pytest.mark.parametrize("judged", [4, 14])
def test_ndcg_is_scikit_learns_over_the_first_ten(judged: int) -> None:
    generator = np.random.default_rng(1)
    queries, documents = generator.standard_normal((8, 5)), generator.standard_normal((30, 5))
    relevant = [
        {int(place): int(grade) for place, grade in zip(places, grades, strict=True)}
        for places, grades in zip(
            [generator.choice(30, judged, replace=False) for _ in range(8)],
            generator.integers(1, 4, (8, judged)),
            strict=True,
        )
    ]
    found = ndcg_at_10(queries, documents, relevant)
    for row, grades in enumerate(relevant):
        truth = np.array([[grades.get(place, 0) for place in range(30)]])
        norms = np.linalg.norm(documents, axis=1)
        scores = (documents @ queries[row] / norms)[None]
        assert found[row] == pytest.approx(ndcg_score(truth, scores, k=10))


def test_the_later_of_equal_documents_comes_first() -> None:
    documents = np.ones((12, 2))
    found = ndcg_at_10(np.ones((3, 2)), documents, [{11: 1}, {2: 1}, {1: 1}])
    assert found == pytest.approx([1.0, 1 / math.log2(11), 0.0])
    # To a query of zeros all documents are equal.
    assert ndcg_at_10(np.zeros((1, 2)), np.eye(2), [{1: 1}]) == pytest.approx([1.0])


def test_eight_of_each_label_are_drawn_alike_every_time() -> None:
    labels = ["a"] * 20 + ["b"] * 12 + ["c"] * 5
    draws = training_draws(labels, shots=8, experiments=10)
    assert draws == training_draws(labels, shots=8, experiments=10)
    assert len({tuple(sorted(draw)) for draw in draws}) > 5
    for draw in draws:
        assert len(set(draw)) == len(draw) == 8 + 8 + 5
        assert [sum(labels[place] == each for place in draw) for each in "abc"] == [8, 8, 5]


def test_a_probe_separates_what_can_be_separated_and_not_shuffled_labels() -> None:
    generator = np.random.default_rng(0)
    labels = np.array(["a", "b"] * 60)
    vectors = generator.standard_normal((120, 6))
    vectors[labels == "b", 0] += 6
    halves: list[Any] = [vectors[:60], labels[:60], vectors[60:], labels[60:]]
    draws = training_draws(list(halves[1]), shots=8, experiments=10)
    hits = probe_hits(halves[0], halves[1], draws, halves[2], halves[3])
    assert hits.mean() > 0.97
    shuffled = generator.permutation(halves[3])
    assert 0.35 < probe_hits(halves[0], halves[1], draws, halves[2], shuffled).mean() < 0.65


def test_counts_are_how_often_an_item_is_drawn() -> None:
    counts = draw_counts(np.array([[0, 0, 2], [1, 2, 2]]), 4)
    assert counts.tolist() == [[2, 0, 1, 0], [0, 1, 2, 0]]
    values = np.array([1.0, 10.0, 100.0, 1000.0])
    assert weighted_mean(values, counts).tolist() == [34.0, 70.0]
    assert np.isnan(weighted_mean(values, np.zeros((1, 4)))).all()
