"""Random detections for the tests of scorers, and detectors that say what they are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from models.base import (
    Decoding,
    DetectionOutput,
    Detections,
    DetectorFacts,
    Instance,
    Trace,
)
from models.embedded.scenes.generator import generate
from models.embedded.tiny_detector.data import geometry
from tasks.base import Item
from tasks.coco_common import DetectionTask
from tasks.coco_data import Annotation, Category, ImageRecord, ResultKind
from tasks.coco_scorers import Size, run_lengths

HEIGHT, WIDTH = 160, 200
SIGMAS = (0.05, 0.06, 0.07)


class Material(NamedTuple):
    images: list[ImageRecord]
    categories: list[Category]
    truths: dict[int, list[Annotation]]
    results: list[dict[str, Any]]


def material(
    style: str, kind: ResultKind, images: int = 24, seed: int = 0, categories: int = 4
) -> Material:
    """Make truths and results of a style: random, crowded, empty, adversarial."""
    draw = np.random.default_rng([seed, images])
    # Ids are neither dense nor in order, one of them is 0.
    records = [ImageRecord(int(i) * 7, f"{i}.jpg", WIDTH, HEIGHT) for i in draw.permutation(images)]
    names = [
        Category(int(c) * 3, f"c{c}", ("a", "b", "c"), SIGMAS) for c in draw.permutation(categories)
    ]
    truths: dict[int, list[Annotation]] = {record.id: [] for record in records}
    results: list[dict[str, Any]] = []
    most = {"random": 6, "crowded": 30, "empty": 4, "adversarial": 6}[style]
    number = -1
    for record in records:
        for _ in range(draw.integers(0, most)):
            low = draw.uniform(0, 120, 2)
            # A few pixels to half of the image, so that all sizes occur.
            extent = np.exp(draw.uniform(np.log(4), np.log(70), 2)) * (
                2 if draw.random() < 0.2 else 1
            )
            extent = np.minimum(extent, (WIDTH, HEIGHT) - low)
            number += 1
            chosen = names[draw.integers(len(names))]
            points = [
                value
                for _ in range(3)
                for value in (*(low + draw.uniform(0, 1, 2) * extent), int(draw.integers(0, 3)))
            ]
            truths[record.id].append(
                Annotation(
                    number,
                    record.id,
                    chosen.id,
                    (*map(float, low), *map(float, extent)),
                    float(extent.prod() * draw.uniform(0.5, 1)),
                    bool(draw.random() < (0.3 if style == "crowded" else 0.05)),
                    [_ring(low, extent)],
                    tuple(map(float, points)),
                )
            )
            if style == "empty":
                continue
            copies = draw.integers(0, 9 if style == "crowded" else 3)
            for _ in range(copies):
                spread = 4 if style != "adversarial" else draw.choice([0, 3, 40])
                moved = np.concatenate([low, extent]) + draw.normal(0, spread, 4)
                moved = np.concatenate([moved[:2].clip(0), moved[2:].clip(1)])
                scores = {"adversarial": draw.choice([0.0, 0.5, 1.0]), "crowded": 0.2}
                place = draw.integers(len(names)) if draw.random() < 0.1 else names.index(chosen)
                results.append(
                    {
                        "image_id": record.id,
                        "category_id": names[place].id,
                        "score": float(scores.get(style, draw.random())),
                        **_said(kind, moved, np.array(points), draw, spread),
                    }
                )
    if style == "adversarial":
        # More than count, none at all in an image, boxes without area, one around everything.
        first = records[0].id
        corner, whole = np.array([5.0, 5.0, 0.0, 0.0]), np.array([0.0, 0.0, WIDTH, HEIGHT])
        for box in [corner] * 60 + [whole] * 60:
            results.append(
                {
                    "image_id": first,
                    "category_id": names[0].id,
                    "score": 0.5,
                    **_said(kind, box, np.zeros(9), draw, 1),
                }
            )
        results = [each for each in results if each["image_id"] != records[1].id]
    return Material(records, names, truths, results)


def _ring(low: Any, extent: Any) -> list[float]:
    (x, y), (w, h) = low, extent
    return [float(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)]


def _said(kind: ResultKind, box: Any, points: Any, draw: Any, spread: float) -> dict[str, Any]:
    if kind == "bbox":
        return {"bbox": [float(value) for value in box]}
    if kind == "segm":
        return {"segmentation": run_lengths([_ring(box[:2], box[2:])], Size(HEIGHT, WIDTH))}
    moved = points.reshape(3, 3).copy()
    moved[:, :2] += draw.normal(0, max(spread, 1), (3, 2))
    return {"keypoints": [float(value) for value in moved.ravel()]}


class Told:
    """A detector that says what a function tells it."""

    name = "told"

    def __init__(
        self,
        say: Callable[[Sequence[str]], Sequence[Sequence[Instance]]],
        *,
        bins: int | None = None,
        errors: tuple[str, ...] = (),
        tokens: int = 0,
    ) -> None:
        self.say, self.errors, self.tokens = say, errors, tokens
        self.facts = DetectorFacts(
            outputs=("box", "point", "polygon", "keypoint"),
            bins=bins,
            matrix_parameters=1,
            weight_bytes=4,
            dtype="float32",
        )
        self.asked: list[tuple[Any, ...]] = []

    def detect(
        self,
        image: Any,
        phrases: Sequence[str],
        output: DetectionOutput,
        decoding: Decoding,
        *,
        keypoints: Sequence[str] = (),
    ) -> Detections:
        self.asked.append((image, tuple(phrases), output, decoding, tuple(keypoints)))
        return Detections(
            token_ids=tuple(range(self.tokens)),
            text="told",
            finish="eos",
            trace=Trace(),
            found=tuple(tuple(each) for each in self.say(phrases)),
            format_errors=self.errors,
        )

    def synchronize(self) -> None:
        pass


Said = dict[str, list[Instance]]


def truth_of(item: Item, output: str, score: float | None = 0.9) -> Said:
    """Return the truth of an item as a detector would say it."""
    said: Said = {phrase: [] for phrase in item.fields["phrases"]}
    for truth in item.fields["truths"]:
        x, y, w, h = truth["bbox"]
        box = (x, y, x + w, y + h)
        points: Any = ()
        if output == "box":
            at = box
        elif output == "point":
            at = (x + w / 2, y + h / 2)
        elif output == "polygon":
            at = ring_of(item, truth)
        else:
            flat = truth["keypoints"]
            at, points = box, tuple(zip(flat[::3], flat[1::3], strict=True))
        instance = Instance(coordinates=at, keypoints=points, score=score, tokens=len(at))
        said[truth["phrase"]].append(instance)
    return said


def ring_of(item: Item, truth: Any) -> tuple[float, ...]:
    """Return the outline of eight corners that tiny-detector is taught for a truth."""
    _, family, size, split, index = item.fields["file"].split("/")
    scene = generate(family, int(size), split, int(index))
    (found,) = [
        one
        for one in scene.objects
        if geometry(one, "box")[:2] == tuple(truth["bbox"][:2]) and one.shape == truth["phrase"]
    ]
    return geometry(found, "outline")


def output_of(task: DetectionTask, item: Item, said: Said, **told: Any) -> str:
    model = Told(lambda phrases: [said[phrase] for phrase in phrases], **told)
    return task.call(model, item).text
