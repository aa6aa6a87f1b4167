"""Numbers of image sets: against torch-fidelity, slow loops, and what statistics says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.embedded.digits_cnn64.model import Moments, frechet_distance
from tasks.image_scorers import (
    fid_infinity,
    frechet_bias,
    frechet_resamples,
    inception_score,
    kid_resamples,
    kid_subsets,
    precision_recall,
    weighted_moments,
)
from tasks.resampling import draw_counts

Floats = NDArray[np.float64]


def points(count: int, dim: int, seed: int, shift: float = 0.0) -> Floats:
    draw = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dim, dim))
    return draw.normal(size=(count, dim)) @ mixing + shift


def resamples(count: int, rows: int, seed: int = 0) -> tuple[NDArray[np.int64], Floats]:
    """Draws with row 0 the whole set, and their counts."""
    drawn = np.random.default_rng(seed).integers(count, size=(rows, count))
    draws = np.concatenate([np.arange(count)[None], drawn])
    return draws, draw_counts(draws, count)


def test_distances_agree_with_torch_fidelity() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    ours, theirs = points(400, 24, 1), points(500, 24, 2, shift=0.7)
    first, second = torch.from_numpy(ours), torch.from_numpy(theirs)
    fid = fid_statistics_to_metric(
        fid_features_to_statistics(first), fid_features_to_statistics(second), False
    )["frechet_inception_distance"]
    once = np.ones((1, 400))
    reference = weighted_moments(theirs, np.ones(500))
    assert frechet_resamples(ours, reference, once)[0] == pytest.approx(fid, abs=1e-4)
    # Of one subset that is the whole set, so that nothing is drawn.
    whole = {"kid_subsets": 1, "kid_subset_size": 400, "verbose": False}
    kid = kid_features_to_metric(first, second[:400], **whole)["kernel_inception_distance_mean"]
    assert kid_subsets(ours, theirs[:400], size=400) == pytest.approx(kid, rel=1e-4)
    shares = prc_features_to_metric(first, second, prc_neighborhood=3, verbose=False)
    found = precision_recall(ours, theirs, once)
    assert found.precision[0] == pytest.approx(shares["precision"], abs=1e-6)
    assert found.recall[0] == pytest.approx(shares["recall"], abs=1e-6)
    logits = torch.from_numpy(points(400, 24, 3))
    score = isc_features_to_metric(logits, splits=4, shuffle=False)["inception_score_mean"]
    mine = inception_score(logits.softmax(1).numpy(), split=100)
    assert mine == pytest.approx(score, rel=1e-4)


def test_counted_images_have_the_moments_of_images_that_stand_there_so_often() -> None:
    features = points(30, 5, 0)
    draws, counts = resamples(30, 1)
    found = weighted_moments(features, counts[1])
    repeated = features[draws[1]]
    assert found.mean == pytest.approx(repeated.mean(0))
    assert found.covariance == pytest.approx(np.cov(repeated, rowvar=False))


@pytest.mark.parametrize(
    ("dim", "images", "expected"), [(64, 1000, 1.105), (64, 5000, 0.221), (128, 5000, 0.851)]
)
def test_the_bias_of_white_features_is_that_of_the_formula(
    dim: int, images: int, expected: float
) -> None:
    assert frechet_bias(np.eye(dim), images) == pytest.approx(expected, abs=5e-4)


def test_the_bias_of_features_of_unequal_scale_is_that_of_the_formula_and_of_draws() -> None:
    spectrum = 1 / np.arange(1, 65)
    assert frechet_bias(np.diag(spectrum), 1000) == pytest.approx(0.0481, abs=5e-5)
    exact = Moments(np.zeros(64), np.diag(spectrum), 10**9)
    draw = np.random.default_rng(0)
    found = [
        frechet_distance(
            weighted_moments(draw.normal(size=(1000, 64)) * np.sqrt(spectrum), np.ones(1000)),
            exact,
        )
        for _ in range(8)
    ]
    assert np.mean(found) == pytest.approx(0.0481, rel=0.04)


def test_resampled_distances_lie_around_the_measured_one() -> None:
    reference = weighted_moments(points(4000, 16, 5), np.ones(4000))
    features = points(400, 16, 6, shift=0.2)
    _, counts = resamples(400, 40)
    measured, *others = frechet_resamples(features, reference, counts)
    biased = [frechet_distance(weighted_moments(features, row), reference) for row in counts[1:]]
    spread = np.std(others)
    assert abs(np.mean(others) - measured) < spread / 2
    assert np.mean(biased) - measured > 2 * spread


def test_the_distance_at_endlessly_many_images_is_the_true_one() -> None:
    dim = 8
    exact = Moments(np.zeros(dim), np.eye(dim), 10**9)
    draw = np.random.default_rng(3)
    features = draw.normal(size=(600, dim)) + np.array([0.5] + [0.0] * (dim - 1))
    found = fid_infinity(features, exact)
    plain = frechet_resamples(features, exact, np.ones((1, 600)))[0]
    bias = frechet_bias(np.eye(dim), 600)
    assert found.value == pytest.approx(plain - bias, abs=4 * found.standard_error + 0.3 * bias)
    assert 0 < found.standard_error < plain
    with pytest.raises(ValueError, match="8 features need 80"):
        fid_infinity(features[:79], exact)


def test_the_kernel_distance_equals_a_loop_over_pairs_of_different_images() -> None:
    ours, theirs = points(12, 3, 1), points(9, 3, 2)
    draws, counts = resamples(12, 3)

    def kernel(first: Floats, second: Floats) -> float:
        return float((first @ second / 3 + 1) ** 3)

    within = np.mean([kernel(theirs[i], theirs[j]) for i in range(9) for j in range(9) if i != j])
    for row, drawn in zip(kid_resamples(ours, theirs, counts), draws, strict=True):
        pairs = [(i, j) for i in drawn for j in drawn if i != j]
        among = np.mean([kernel(ours[i], ours[j]) for i, j in pairs])
        across = np.mean([kernel(ours[i], theirs[j]) for i in drawn for j in range(9)])
        assert row == pytest.approx(among + within - 2 * across)


def test_the_kernel_distance_of_alike_sets_is_zero_on_average() -> None:
    found = [
        kid_resamples(points(60, 4, seed), points(80, 4, 1000 + seed), np.ones((1, 60)))[0]
        for seed in range(60)
    ]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(60)
    with pytest.raises(ValueError, match="subsets of 1000"):
        kid_subsets(points(999, 2, 0), points(1000, 2, 1))


def test_precision_and_recall_equal_a_loop_over_balls() -> None:
    ours, theirs = points(25, 2, 1), points(20, 2, 2, shift=0.5)
    draws = np.concatenate([resamples(25, 2)[0], np.full((1, 25), 4)])  # at last one image alone
    counts = draw_counts(draws, 25)

    def radius(values: Floats, place: int) -> float:
        gaps = sorted(float(np.linalg.norm(values[place] - other)) for other in values)
        return gaps[3]

    found = precision_recall(ours, theirs, counts, part=7)
    for row, drawn in enumerate(draws):
        inside = [
            any(np.linalg.norm(ours[i] - theirs[j]) <= radius(theirs, j) for j in range(20))
            for i in drawn
        ]
        covered = [
            any(np.linalg.norm(ours[i] - theirs[j]) <= radius(ours, i) for i in set(drawn))
            for j in range(20)
        ]
        assert found.precision[row] == pytest.approx(np.mean(inside))
        assert found.recall[row] == pytest.approx(np.mean(covered))
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall(ours[:3], theirs, counts[:, :3])


def test_half_of_the_modes_is_precise_and_covers_half() -> None:
    draw = np.random.default_rng(0)
    theirs = np.concatenate([draw.normal(size=(200, 2)), 50 + draw.normal(size=(200, 2))])
    ours = draw.normal(size=(200, 2))
    found = precision_recall(ours, theirs, np.ones((1, 200)))
    assert found.precision[0] > 0.9
    assert 0.4 < found.recall[0] <= 0.5


def test_the_inception_score_counts_classes_and_is_blind_in_sorted_parts() -> None:
    sure = np.eye(10)[np.arange(1000) % 10]
    assert inception_score(sure, split=100) == pytest.approx(10)
    by_class = np.sort(np.arange(1000) % 10)
    assert inception_score(np.eye(10)[by_class], split=100) == pytest.approx(1)
