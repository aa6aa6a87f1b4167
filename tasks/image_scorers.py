"""Numbers of sets of images by their features: distances, precision and recall, inception score.

All functions are pure and take features that some network made; whose they are is in the name of a
metric (`fd[digits-cnn64@97d0103f | ref=reference:10000 | n=640]`). FID is one such number: the
Frechet distance by Inception's features of 50,000 images to the published reference, and nothing
else is called so.

A set that is drawn with replacement from another one is smaller than it looks: its distance sits
above the set's own by as much as the set's sits above that of endless images. `frechet_bias` says
by how much, and it is taken off the resampled distances, so that they lie around the measured one.

Sources: Frechet distance, arXiv 1706.08500; KID, arXiv 1801.01401; precision and recall, arXiv
1904.06991; inception score, arXiv 1606.03498; FID-infinity, arXiv 1911.07023.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.embedded.digits_cnn64.model import Moments, frechet_distance
from tasks.image_common import IMAGES_PER_FEATURE

Floats = NDArray[np.float64]
_KID_SUBSETS = 100
_EXTRAPOLATED = 15
_DRAWS_EACH = 3


class Extrapolated(NamedTuple):
    """A distance at endlessly many images, and the standard error of the fitted line there."""

    value: float
    standard_error: float


def weighted_moments(features: Floats, counts: Floats) -> Moments:
    """Return the moments of a set in which each image stands so often.

    Args:
        features: (images, d), float64.
        counts: Whole numbers, (images,).
    """
    total = counts.sum()
    mean = counts @ features / total
    centred = features - mean
    covariance = (centred * counts[:, None]).T @ centred / (total - 1)
    return Moments(mean, covariance, int(total))


def frechet_bias(covariance: Floats, images: int) -> float:
    """Return how far above its limit the Frechet distance of so many images lies on average.

    Second order in the deviation of mean and covariance, for Gaussian features of which both sets
    have the same covariance, and an exact reference.

    Args:
        covariance: (d, d).
        images: Size of the set.
    """
    variances = np.clip(np.linalg.eigvalsh(covariance), 0, None)
    sums = variances[:, None] + variances
    products = variances[:, None] * variances
    ratios = np.divide(products, sums, out=np.zeros_like(products), where=sums > 0)
    pairs = float(ratios.sum() + np.trace(ratios))
    return float(variances.sum()) / images + pairs / (2 * (images - 1))


def frechet_resamples(features: Floats, reference: Moments, counts: Floats) -> Floats:
    """Return the Frechet distance of a set, and of resamples of it less their own bias.

    Args:
        features: (images, d).
        reference: Of the other set.
        counts: How often each image is drawn, (resamples, images). Row 0 is each image once.

    Returns:
        (resamples,).
    """
    found = np.empty(len(counts))
    whole = weighted_moments(features, counts[0])
    bias = frechet_bias(whole.covariance, whole.images)
    for row, drawn in enumerate(counts):
        moments = whole if row == 0 else weighted_moments(features, drawn)
        found[row] = frechet_distance(moments, reference) - (bias if row else 0.0)
    return found


def fid_infinity(features: Floats, reference: Moments, *, seed: int = 0) -> Extrapolated:
    """Return the Frechet distance at endlessly many images.

    Subsets of 15 sizes, evenly spaced from a tenth of the set (or five images a feature) to all of
    it, three draws of each without replacement; a line in one over the size, its value at 0.

    Args:
        features: (images, d).
        reference: Of the other set.
        seed: Of the draws.

    Raises:
        ValueError: There are fewer than ten images a feature: all sizes would be much alike.
    """
    images, dim = features.shape
    smallest = max(images // 10, 5 * dim)
    if images < IMAGES_PER_FEATURE * dim:
        raise ValueError(
            f"a line through sizes from {smallest} to {images} says nothing about endless images; "
            f"{dim} features need {IMAGES_PER_FEATURE * dim}."
        )
    draw = np.random.default_rng(seed)
    sizes = np.linspace(smallest, images, _EXTRAPOLATED).round().astype(int)
    inverse, distances = [], []
    for size in sizes:
        for _ in range(_DRAWS_EACH):
            chosen = features[draw.permutation(images)[:size]]
            distances.append(
                frechet_distance(weighted_moments(chosen, np.ones(len(chosen))), reference)
            )
            inverse.append(1 / size)
    design = np.stack([np.ones(len(inverse)), np.array(inverse)], axis=1)
    solution, *_ = np.linalg.lstsq(design, np.array(distances), rcond=None)
    left = np.array(distances) - design @ solution
    variance = float(left @ left) / (len(left) - 2)
    errors = variance * np.linalg.inv(design.T @ design)
    return Extrapolated(float(solution[0]), float(np.sqrt(errors[0, 0])))


def polynomial_kernel(first: Floats, second: Floats) -> Floats:
    """Return the cubic kernel (x y / d + 1)^3 of two sets, (first, second)."""
    return (first @ second.T / first.shape[1] + 1) ** 3


def kid_resamples(features: Floats, reference: Floats, counts: Floats) -> Floats:
    """Return the kernel distance of a set and of resamples of it, unbiased.

    The whole sets instead of subsets of 1,000: the same expectation with less noise, and any size
    will do. An image that a resample holds twice is not compared with itself.

    Args:
        features: (images, d).
        reference: (references, d).
        counts: How often each image is drawn, (resamples, images).

    Returns:
        (resamples,).
    """
    own = polynomial_kernel(features, features)
    np.fill_diagonal(own, 0.0)
    theirs = polynomial_kernel(reference, reference)
    others = len(reference)
    within = (theirs.sum() - np.trace(theirs)) / (others * (others - 1))
    across = polynomial_kernel(features, reference).mean(axis=1)
    totals = counts.sum(axis=1)
    pairs = totals**2 - (counts**2).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        among = ((counts @ own) * counts).sum(axis=1) / pairs
    found: Floats = among + within - 2 * (counts @ across) / totals
    return found


def kid_subsets(features: Floats, reference: Floats, *, size: int = 1000, seed: int = 0) -> float:
    """Return KID as it is published: the mean over 100 pairs of subsets of 1,000 images.

    Raises:
        ValueError: A set is smaller than a subset.
    """
    if min(len(features), len(reference)) < size:
        raise ValueError(
            f"KID takes subsets of {size} images; there are {len(features)} and {len(reference)}."
        )
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(_KID_SUBSETS):
        ours, theirs = (
            values[draw.choice(len(values), size, replace=False)]
            for values in (features, reference)
        )
        found.append(kid_resamples(ours, theirs, np.ones((1, size)))[0])
    return float(np.mean(found))


class Coverage(NamedTuple):
    """Precision and recall of a set and of resamples of it, (resamples,) each."""

    precision: Floats
    recall: Floats


def precision_recall(
    features: Floats, reference: Floats, counts: Floats, *, neighbours: int = 3, part: int = 4000
) -> Coverage:
    """Return which share of a set lies in the reference's support, and the reverse.

    The support of a set is the union of balls around its points that reach to the k-th nearest
    other point of the set. Both numbers depend on the sizes of both sets. In a resample an image
    that was not drawn has no ball; those that were keep theirs.

    Args:
        features: (images, d).
        reference: (references, d).
        counts: How often each image is drawn, (resamples, images).
        neighbours: k.
        part: Points that are compared with all others at a time.

    Raises:
        ValueError: A set has no k-th neighbour.
    """
    if min(len(features), len(reference)) <= neighbours:
        raise ValueError(
            f"balls to the {neighbours}rd neighbour need more than {neighbours} images a set, got "
            f"{len(features)} and {len(reference)}."
        )
    ours, theirs = (_radii(values, neighbours, part) for values in (features, reference))
    is_inside = np.zeros(len(features), dtype=bool)
    drawn = counts > 0
    covered = np.zeros((len(counts), len(reference)))
    for start in range(0, len(reference), part):
        gaps = _squared_distances(reference[start : start + part], features)
        is_inside |= (gaps <= theirs[start : start + part, None]).any(axis=0)
        # A reference point is covered in a resample if any ball around it belongs to a drawn image.
        holds = (gaps <= ours).astype(np.float64)
        covered[:, start : start + part] = drawn.astype(np.float64) @ holds.T > 0
    return Coverage(counts @ is_inside / counts.sum(axis=1), covered.mean(axis=1))


def _radii(values: Floats, neighbours: int, part: int) -> Floats:
    """Return the squared distance of each point to its k-th nearest other one."""
    found = [
        np.partition(_squared_distances(values[start : start + part], values), neighbours, axis=1)[
            :, neighbours
        ]
        for start in range(0, len(values), part)
    ]
    return np.concatenate(found)


def _squared_distances(first: Floats, second: Floats) -> Floats:
    norms = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1)
    return np.maximum(norms - 2 * first @ second.T, 0.0)


def inception_score(probabilities: Floats, *, split: int = 5000) -> float:
    """Return the inception score: exp of the mean divergence from the mean distribution.

    Args:
        probabilities: Of classes, (images, classes), in the order of the images.
        split: Images of a part; the score is the mean over parts, as ADM's evaluator takes it, so
            images must not be sorted by class.
    """
    scores = []
    for start in range(0, len(probabilities), split):
        part = probabilities[start : start + split]
        mean = part.mean(axis=0, keepdims=True)
        logs = np.log(np.clip(part, 1e-30, None)) - np.log(np.clip(mean, 1e-30, None))
        scores.append(np.exp((part * logs).sum(axis=1).mean()))
    return float(np.mean(scores))
