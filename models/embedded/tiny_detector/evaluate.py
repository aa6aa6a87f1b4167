"""Greedy answers of tiny-detector and their quality: F1 at an IoU, AP50, pointing, duplicates.

The project's task `coco` scores with pycocotools; what stands here is what the recipe needs to
watch itself on a machine that has neither, under the same definitions: greedy one-to-one matching
in the order of falling IoU for F1 (detectors without scores), and 101-point interpolated average
precision with score = exp(mean log-probability of the box's tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from models.detector_format import dequantise
from models.embedded.scenes.generator import SHAPES, Draws, Scene, generate
from models.embedded.scenes.raster_torch import Renderer
from models.embedded.tiny_detector import data
from models.embedded.tiny_detector.rollout import Reply, rollout
from models.embedded.tiny_detector.text import (
    Found,
    Parsed,
    encode_prompt,
    parse,
    prompt,
)
from models.embedded.tiny_vlm.evaluate import prompt_start, visual_embeddings
from models.embedded.tiny_vlm.network import TinyVlm


class Request(NamedTuple):
    """A scene, what is asked of it, and the right answer."""

    scene: Scene
    kind: str
    phrases: list[str]
    answer: list[Found]


def requests(split: str, count: int, kind: str, *, all_shapes: bool) -> list[Request]:
    """Return one request for each of the first scenes of a split.

    Args:
        split: Of the scene generator.
        count: Number of scenes.
        kind: Of answer.
        all_shapes: Ask for the six shapes as categories; otherwise mixed phrases, some absent.
    """
    made = []
    for index in range(count):
        scene = generate("shapes", data.SIZE, split, index)
        if all_shapes:
            phrases = list(SHAPES)
            answer = data.answers(scene, kind, phrases)
        else:
            draws = Draws(f"{scene.key}/{kind}/requests")
            phrases, answer = data.request(scene, kind, draws)
        made.append(Request(scene, kind, phrases, answer))
    return made


@torch.no_grad()
def ask(
    model: TinyVlm,
    asked: list[Request],
    device: torch.device,
    batch: int = 128,
    limit: int = 110,
    **sampling: Any,
) -> list[Reply]:
    """Answer requests, greedily unless `sampling` says otherwise as `rollout` takes it."""
    replies: list[Reply] = []
    renderer, start = Renderer(data.SIZE, device), prompt_start(device)
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        packed = np.stack([request.scene.pack() for request in part])
        image = renderer.render(torch.from_numpy(packed).to(device)).image
        visual = visual_embeddings(model, image)
        prompts = [encode_prompt(prompt(request.kind, request.phrases)) for request in part]
        replies += rollout(model, visual, start, prompts, limit=limit, **sampling)
    return replies


def intersection_over_union(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the IoU of every pair of boxes, (n, 4) and (m, 4) as edges, (n, m)."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    both = (high - low).clip(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(-1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None] - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def matched(overlap: np.ndarray, threshold: float) -> int:
    """Return the pairs of a greedy one-to-one matching, in the order of falling overlap."""
    overlap = overlap.copy()
    count = 0
    while overlap.size and overlap.max() >= threshold:
        i, j = np.unravel_index(overlap.argmax(), overlap.shape)
        overlap[i], overlap[:, j] = -1, -1
        count += 1
    return count


def average_precision(scored: list[tuple[float, bool]], truths: int) -> float:
    """Return the 101-point interpolated average precision of detections (score, is right)."""
    if not truths:
        return float("nan")
    right = np.array([hit for _, hit in sorted(scored, key=lambda item: -item[0])], float)
    found = right.cumsum()
    precision = found / np.arange(1, len(right) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    recall = found / truths
    places = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
    return float(np.mean([precision[p] if p < len(precision) else 0.0 for p in places]))


def is_malformed(request: Request, parsed: Parsed) -> bool:
    """Say whether an answer breaks the grammar, does not end, or names other phrases than asked."""
    answered = [found.phrase for found in parsed.found]
    return bool(parsed.malformed) or not parsed.complete or answered != request.phrases


def boxes_of(instances: list[tuple[int, ...]]) -> np.ndarray:
    """Return instances in pixels, (n, 4) or (n, 2)."""
    width = len(instances[0]) if instances else 4
    pixels = [[dequantise(value, data.SIZE) for value in bins] for bins in instances]
    return np.array(pixels, float).reshape(len(instances), width)


class BoxScores:
    """Quality of boxes, image by image and phrase by phrase.

    Attributes:
        hits: Boxes that are right at IoU 0.5, 0.55, ..., 0.95, matched one to one.
        truths, predictions: All boxes.
        duplicates: Predictions that overlap an earlier one of their phrase by more than 0.9.
        absent, rejected: Phrases that name nothing, and those of them without a prediction.
    """

    def __init__(self) -> None:
        self.hits = [0] * 10
        self.truths = self.predictions = self.duplicates = self.absent = self.rejected = 0
        self._ranked: dict[str, list[tuple[float, bool]]] = {name: [] for name in SHAPES}
        self._totals = dict.fromkeys(SHAPES, 0)

    def add(self, told: np.ndarray, truth: np.ndarray) -> None:
        """Take what was told about a phrase, and what is there, edges in pixels, (boxes, 4)."""
        overlap = intersection_over_union(told, truth)
        for step in range(10):
            self.hits[step] += matched(overlap, 0.5 + 0.05 * step - 1e-9)
        self.truths, self.predictions = self.truths + len(truth), self.predictions + len(told)
        itself = np.triu(intersection_over_union(told, told), 1)
        self.duplicates += int((itself > 0.9).any(0).sum())
        if not len(truth):
            self.absent += 1
            self.rejected += not len(told)

    def rank(
        self, category: str, boxes: np.ndarray, scores: Sequence[float], truth: np.ndarray
    ) -> None:
        """Take boxes with scores, for the average precision of their category.

        Args:
            category: A shape.
            boxes, truth: Edges in pixels, (boxes, 4).
            scores: Of each box.
        """
        self._totals[category] += len(truth)
        free = np.ones(len(truth), bool)
        overlap = intersection_over_union(boxes, truth)
        for number in np.argsort([-value for value in scores], kind="stable"):
            row = np.where(free, overlap[number], -1.0)
            best = int(row.argmax()) if len(row) else -1
            right = best >= 0 and bool(row[best] >= 0.5)
            if right:
                free[best] = False
            self._ranked[category].append((scores[number], right))

    def numbers(self) -> dict[str, float]:
        """Return f1_50, f1_75, f1_95, f1_mean, ap50, duplicates and absent; see `score`."""
        f1 = [2 * hits / max(self.truths + self.predictions, 1) for hits in self.hits]
        precisions = [average_precision(self._ranked[name], self._totals[name]) for name in SHAPES]
        known = any(self._totals.values())
        return {
            "f1_50": f1[0],
            "f1_75": f1[5],
            "f1_95": f1[9],
            "f1_mean": float(np.mean(f1)),
            "ap50": float(np.nanmean(precisions)) if known else float("nan"),
            "duplicates": self.duplicates / max(self.predictions, 1),
            "absent": self.rejected / max(self.absent, 1),
        }


def score(asked: list[Request], replies: list[Reply]) -> dict[str, float]:
    """Return the quality of box answers.

    Returns:
        f1_50, f1_75, f1_95 (micro, over all phrases), f1_mean (over IoU 0.5 to 0.95), ap50 (mean
        over phrases that occur as categories), duplicates (share of predictions that overlap an
        earlier one of the phrase by more than 0.9), absent (share of phrases that name nothing
        and were answered so), malformed (answers that `is_malformed`).
    """
    scores, malformed = BoxScores(), 0
    for request, reply in zip(asked, replies, strict=True):
        parsed = parse(reply.ids, request.kind)
        malformed += is_malformed(request, parsed)
        told = {
            found.phrase: (found.instances, spans)
            for found, spans in zip(parsed.found, parsed.spans, strict=True)
        }
        for phrase, instances in request.answer:
            guesses, spans = told.get(phrase, ([], []))
            truth, guess = boxes_of(instances), boxes_of(guesses)
            scores.add(guess, truth)
            if phrase in SHAPES:
                values = [float(np.exp(np.mean(reply.log_probabilities[a:b]))) for a, b in spans]
                scores.rank(phrase, guess, values, truth)
    return scores.numbers() | {"malformed": malformed / max(len(asked), 1)}


def score_points(asked: list[Request], replies: list[Reply]) -> dict[str, float]:
    """Return F1 of points: right when at most six pixels off in both directions."""
    return _score_near(asked, replies, lambda guess, truth: np.abs(guess - truth).max(-1) <= 6)


def score_outlines(asked: list[Request], replies: list[Reply]) -> dict[str, float]:
    """Return F1 of outlines: right when the corners are two pixels off at most, on average."""
    return _score_near(asked, replies, lambda guess, truth: np.abs(guess - truth).mean(-1) <= 2)


def _score_near(
    asked: list[Request],
    replies: list[Reply],
    near: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> dict[str, float]:
    hits = truths = predictions = malformed = 0
    for request, reply in zip(asked, replies, strict=True):
        parsed = parse(reply.ids, request.kind)
        malformed += is_malformed(request, parsed)
        told = {found.phrase: found.instances for found in parsed.found}
        for phrase, instances in request.answer:
            truth, guess = boxes_of(instances), boxes_of(told.get(phrase, []))
            truths, predictions = truths + len(truth), predictions + len(guess)
            if len(truth) and len(guess):
                hits += matched(near(guess[:, None], truth[None]).astype(float), 0.5)
    return {
        "f1": 2 * hits / max(truths + predictions, 1),
        "malformed": malformed / max(len(asked), 1),
    }


def reply_tokens(replies: list[Reply]) -> float:
    """Return the mean number of tokens of an answer."""
    return float(np.mean([len(reply.ids) for reply in replies]))
