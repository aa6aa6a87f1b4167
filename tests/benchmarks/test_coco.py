"""The COCO tools on as much as val2017: `pytest tests/benchmarks -m slow --benchmark-enable`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tasks.coco_data import Annotation, Category, ImageRecord
from tasks.coco_scorers import TOOLS, evaluate

pytestmark = pytest.mark.slow

IMAGES, CATEGORIES, TRUTHS = 5000, 80, 36_781


def like_val2017() -> tuple[list[ImageRecord], list[Category], Any, list[dict[str, Any]]]:
    """Make as many images, categories and truths, and two results for each truth."""
    draw = np.random.default_rng(0)
    images = [ImageRecord(number, "", 640, 480) for number in range(1, IMAGES + 1)]
    categories = [Category(number, str(number)) for number in range(1, CATEGORIES + 1)]
    truths: dict[int, list[Annotation]] = {image.id: [] for image in images}
    results = []
    for number in range(1, TRUTHS + 1):
        image, category = int(draw.integers(1, IMAGES + 1)), int(draw.integers(1, CATEGORIES + 1))
        box = np.concatenate([draw.uniform(0, 300, 2), draw.uniform(5, 180, 2)])
        bbox = tuple(map(float, box))
        truth = Annotation(number, image, category, bbox, bbox[2] * bbox[3], False, None, ())
        truths[image].append(truth)
        for spread in (3, 30):
            moved = (box + draw.normal(0, spread, 4)).clip(1)
            results.append(
                {
                    "image_id": image,
                    "category_id": category,
                    "bbox": [float(value) for value in moved],
                    "score": float(draw.random()),
                }
            )
    return images, categories, truths, results


@pytest.mark.parametrize("tool", [*TOOLS, "faster-coco-eval"])
def test_boxes_of_5000_images(benchmark: Any, tool: Any) -> None:
    made = like_val2017()
    found = benchmark.pedantic(evaluate, args=(*made, "bbox"), kwargs={"by": tool}, rounds=1)
    assert found.stats["AP"] > 0.1
