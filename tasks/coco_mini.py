"""coco-mini: COCO's protocol on rendered scenes that no embedded model was trained on.

Scenes of one to six coloured shapes, of the generator's `test` split, whose descriptions never
occur in training or validation (tiny-detector trains on `train`), written as a file of COCO's
format and read back like one. Asked are the six shapes as categories (`shapes`), or phrases as
tiny-detector saw them in training (`mixed`: "red star", "large object", ..., three in ten name
nothing; a request in four names all shapes). Every phrase is a category of its own.

At 96 pixels nearly everything is small to COCO, so the limits between sizes shrink with the area of
an image, from one of 640 pixels: 23 and 207 square pixels; names say so (`APs*`). No shape is that
small that it would be in the first of them.

Masks are exact, and a polygon of few corners is not: the eight corners that tiny-detector is taught
reach an IoU of 0.85 on average, of crosses 0.62 and of stars 0.65, so that even a perfect answer is
wrong for these at an IoU of 0.75.

One item:
    file "1/shapes/96/test/0"   phrases ["circle", "square", ...]
    truths [phrase "square", bbox [12, 40, 24, 24], area 576, iscrowd 0; ...]
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from models.base import DetectionOutput
from models.embedded.scenes import coco as files
from models.embedded.scenes.generator import (
    MAX_OBJECTS,
    SHAPES,
    VERSION,
    Draws,
    Scene,
    generate,
)
from models.embedded.scenes.raster import picture
from models.embedded.tiny_detector.data import SIZE, request
from tasks.base import Dataset, Item
from tasks.checks import check_choice
from tasks.coco_common import Asked, DetectionTask, Question
from tasks.coco_data import Category, check_annotations
from tasks.coco_scorers import COCO_BUCKETS

Phrases = Literal["shapes", "mixed"]
NUM_IMAGES = 200
_WARMUP_IMAGES = 4
# What tiny-detector calls the kinds of answer.
_KINDS = {"box": "box", "point": "point", "polygon": "outline", "keypoint": "box"}
_COCO_SIZE = 640


@dataclass(frozen=True, kw_only=True)
class CocoMini(DetectionTask):
    """Shapes in rendered scenes; F1 without scores, AP with them.

    Attributes:
        max_new_tokens: Longest answer.
        phrases: What is asked about an image: the six `shapes`, or `mixed` phrases.
        objects: Number of objects in a scene, 1 to 6; 0 for any.
    """

    max_new_tokens: int = 160
    phrases: Phrases = "shapes"
    objects: int = 0

    version = "1.0"
    data = Dataset(
        source="generated",
        revision=f"models/embedded/scenes, version {VERSION}",
        split="test",
        license="Apache-2.0",
    )
    scale = "embedded"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("phrases", self.phrases, get_args(Phrases))
        if not 0 <= self.objects <= MAX_OBJECTS:
            raise ValueError(
                f"objects must be 1 to {MAX_OBJECTS}, or 0 for any number, got {self.objects}."
            )

    @property
    def buckets(self) -> tuple[float, float]:
        """COCO's, shrunk with the area of the images."""
        small, medium = COCO_BUCKETS
        share = (SIZE / _COCO_SIZE) ** 2
        return small * share, medium * share

    @property
    def mark(self) -> str:
        """The sizes are not COCO's."""
        return "*"

    def questions(self) -> Sequence[Question]:
        """Return the scenes in the generator's order."""
        return self._asked("test", NUM_IMAGES).questions

    def categories(self) -> Sequence[Category]:
        """Return every phrase that is asked."""
        return self._asked("test", NUM_IMAGES).categories

    def warmup_items(self) -> Iterator[Item]:
        """Yield scenes of the validation split."""
        asked = self._asked("validation", _WARMUP_IMAGES)
        for number, question in enumerate(asked.questions):
            yield self.item(f"warmup/{number}", question, asked.categories)

    def more_fields(self, question: Question) -> Mapping[str, Any]:
        """Return a hash of the scene's pixels, so that its items' hash covers them."""
        pixels = picture(question.image.file_name)
        return {"pixels": hashlib.sha256(pixels.tobytes()).hexdigest()[:16]}

    def pixels(self, item: Item) -> npt.NDArray[np.uint8]:
        """Return the picture, which is drawn once and kept."""
        return picture(item.fields["file"])

    def _asked(self, split: str, count: int) -> Asked:
        return _scenes(split, count, self.phrases, self.objects, self.output)


@functools.cache
def _scenes(
    split: str, count: int, phrases: Phrases, objects: int, output: DetectionOutput
) -> Asked:
    """Return the first scenes of a split with so many objects, as a COCO file gives them."""
    scenes = (generate("shapes", SIZE, split, index) for index in itertools.count())
    wanted = (scene for scene in scenes if objects in (0, len(scene.objects)))
    pairs = [(scene, asked_of(scene, phrases, output)) for scene in itertools.islice(wanted, count)]
    source = f"the generator's {split} file"
    file = check_annotations(files.instances(pairs), "person_keypoints", source)
    questions = [
        Question(
            image._replace(file_name=scene.key),
            tuple(asked),
            tuple(file.annotations[image.id]),
        )
        for image, (scene, asked) in zip(file.images.values(), pairs, strict=True)
    ]
    return Asked(tuple(questions), tuple(file.categories.values()))


def asked_of(scene: Scene, phrases: Phrases, output: DetectionOutput) -> list[str]:
    """Return what is asked about a scene."""
    if phrases == "shapes":
        return list(SHAPES)
    kind = _KINDS[output]
    return request(scene, kind, Draws(f"{scene.key}/{kind}/requests"))[0]
