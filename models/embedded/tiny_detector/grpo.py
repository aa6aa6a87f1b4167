"""Group-relative policy optimisation with geometric rewards, as pure functions.

Source: Rex-Omni, arXiv 2510.12798, section on GRPO; IDEA-Research/Rex-Omni at 478e44f, its reward
functions and trainer. The group-relative advantage is DeepSeekMath's (arXiv 2402.03300), the dual
clip that of arXiv 1912.09729, the estimate of the divergence "k3" of J. Schulman's note on
approximating KL divergences (2020).
Differs from the released rewards: they decode bins by 1,000, which gives even an exact answer less
than 1; boxes come in pixels here, so that is the caller's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from models.embedded.tiny_detector.evaluate import intersection_over_union

Matching = Literal["max", "one_to_one"]
DUPLICATE_IOU = 0.9


class Named(NamedTuple):
    """A name and its boxes, (n, 4), or points, (n, 2), in pixels."""

    name: str
    places: np.ndarray


def box_reward(
    told: Sequence[Named],
    truth: Sequence[Named],
    matching: Matching = "max",
    duplicate_penalty: float = 0.0,
) -> float:
    """Return how good boxes are, in [0, 1]: the harmonic mean of a soft precision and recall.

    With `max`, the released reward, each true box counts by the largest overlap with a box of its
    name and the other way round: a box told twice costs nothing. With `one_to_one` a box may be
    used once, so every accurate duplicate lowers the precision.

    Args:
        told, truth: Boxes by name, names different; degenerate boxes are skipped, swapped corners
            put in order.
        matching: See above.
        duplicate_penalty: What is taken off for a whole answer of duplicates: predictions that
            overlap an earlier one of their name by more than 0.9.
    """
    mine = {name: _boxes(places) for name, places in told}
    right = {name: _boxes(places) for name, places in truth}
    predictions = sum(len(boxes) for boxes in mine.values())
    truths = sum(len(boxes) for boxes in right.values())
    if not truths or not predictions:
        return float(truths == predictions)
    precise = found = 0.0
    twice = 0
    for name in {**mine, **right}:
        guess = mine.get(name, np.zeros((0, 4)))
        own = right.get(name, np.zeros((0, 4)))
        itself = np.triu(intersection_over_union(guess, guess), 1)
        twice += int((itself > DUPLICATE_IOU).any(0).sum()) if len(guess) else 0
        if not len(guess) or not len(own):
            continue
        overlap = intersection_over_union(guess, own)
        if matching == "max":
            precise += float(overlap.max(1).sum())
            found += float(overlap.max(0).sum())
        else:
            pairs = linear_sum_assignment(overlap, maximize=True)
            precise += float(overlap[pairs].sum())
            found += float(overlap[pairs].sum())
    precision, recall = precise / predictions, found / truths
    both = precision + recall
    reward = 2 * precision * recall / both if both else 0.0
    return max(0.0, reward - duplicate_penalty * twice / predictions)


def point_reward(
    told: Sequence[Named], regions: Sequence[tuple[str, Sequence[np.ndarray]]]
) -> float:
    """Return F1 of points: right where a point lies in a region of its name that is still free.

    Matching is greedy, regions in their order, as released.

    Args:
        told: Points by name.
        regions: By name the masks, (height, width), bool, whose pixel (i, j) covers x from j to
            j + 1 and y from i to i + 1.
    """
    points = {name: list(places) for name, places in told}
    predictions = sum(len(places) for places in points.values())
    truths = sum(len(masks) for _, masks in regions)
    if not truths or not predictions:
        return float(truths == predictions)
    hits = 0
    for name, masks in regions:
        free = points.get(name, [])
        for mask in masks:
            for number, (x, y) in enumerate(free):
                column, row = int(np.floor(x)), int(np.floor(y))
                inside = 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1]
                if inside and mask[row, column]:
                    del free[number]
                    hits += 1
                    break
    return 2 * hits / (predictions + truths)


def advantages(rewards: Tensor) -> Tensor:
    """Return each answer's advantage within its group, (groups, answers): deviations, scaled.

    A group whose answers earn the same teaches nothing: its advantages are 0.
    """
    spread = rewards.std(-1, keepdim=True)  # unbiased, as released
    return (rewards - rewards.mean(-1, keepdim=True)) / (spread + 1e-6)


def policy_terms(
    log_probabilities: Tensor,
    before: Tensor,
    advantage: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.3,
    dual: float = 3.0,
) -> Tensor:
    """Return the clipped loss of each token, same shape as `log_probabilities`.

    Args:
        log_probabilities: Under the policy.
        before: Under the policy that sampled.
        advantage: Of each token's answer, broadcast.
        low, high: Ratios below 1 - low or above 1 + high earn nothing more.
        dual: A bad token costs at most this much times its advantage.
    """
    ratio = (log_probabilities - before).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    return torch.where(advantage < 0, torch.minimum(loss, -advantage * dual), loss)


def divergence_terms(log_probabilities: Tensor, reference: Tensor) -> Tensor:
    """Return the k3 estimate of KL(policy || reference) of each token; never negative."""
    difference = reference - log_probabilities
    return difference.exp() - difference - 1


def _boxes(places: np.ndarray) -> np.ndarray:
    """Return boxes with ordered corners, those without an area left out."""
    boxes = np.asarray(places, float).reshape(-1, 4)
    boxes = np.concatenate(
        [np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], 1
    )
    return boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
