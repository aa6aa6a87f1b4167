"""COCO: objects of 80 categories in photographs, and the key points of people.

Source: arXiv 1405.0312; annotation files of the 2017 release, val2017 with 5,000 images. Files are
COCO's own, in a folder as the archives unpack or in a data set on the hub with the same files. Any
other data in COCO's format will do: `split` names its files.

Differs from other harnesses: a detector is given names, so `phrases` says which: `all` categories,
or those that are in the image (`present`, as Rex-Omni's table has it, where what is found of other
categories is not looked at; images with nothing are left out). Images come in an order drawn from
their ids, so that `--limit 500` is a fair sample. Captions are a task of their own,
`coco-captions`. One item:
    file "val2017/000000000139.jpg"   width 640   phrases ["person", "bicycle", ...]
    truths [phrase "person", bbox [412.8, 157.61, 53.05, 138.01], area 2913.1, iscrowd 0; ...]
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from models.base import Unsupported
from tasks.base import Dataset, Item
from tasks.checks import check_choice
from tasks.coco_common import Asked, DetectionTask, Question
from tasks.coco_data import (
    WARMUP_COLOURS,
    WARMUP_SIZE,
    Category,
    CocoFiles,
    ImageRecord,
    Kind,
    Stamped,
    in_drawn_order,
    read_annotations,
)

Phrases = Literal["all", "present"]


@dataclass(frozen=True, kw_only=True)
class Coco(CocoFiles, DetectionTask):
    """Objects in photographs; F1 without scores, AP with them.

    Attributes:
        phrases: What is asked about an image: `all` categories or those `present`.
    """

    phrases: Phrases = "all"

    version = "1.0"
    data = Dataset(source="cocodataset.org", revision="2017", split="val2017", license="CC-BY-4.0")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("phrases", self.phrases, ("all", "present"))

    def questions(self) -> Sequence[Question]:
        """Return the images in an order drawn from their ids.

        Raises:
            Unsupported: The annotation file is not to be had, or is damaged; says what to do.
        """
        return self._asked().questions

    def categories(self) -> Sequence[Category]:
        """Return the categories of the file; asked for key points, those that have some."""
        return self._asked().categories

    def warmup_items(self) -> Iterator[Item]:
        """Yield plain pictures, which are in no data set, with all categories asked."""
        for number, colour in enumerate(WARMUP_COLOURS):
            image = ImageRecord(-1 - number, colour, WARMUP_SIZE, WARMUP_SIZE)
            phrases = tuple(category.name for category in self.categories())
            question = Question(image, phrases, ())
            yield self.item(f"warmup/{number}", question, self.categories())

    def _asked(self) -> Asked:
        kind: Kind = "person_keypoints" if self.output == "keypoint" else "instances"
        return _read(self.annotation_file(kind), kind, self.split, self.phrases)


@functools.lru_cache(maxsize=2)
def _read(source: Stamped, kind: Kind, split: str, phrases: Phrases) -> Asked:
    """Return what a file asks, read once as long as the file is the same."""
    file = read_annotations(source.path, kind)
    with_points = kind == "person_keypoints"
    categories = tuple(c for c in file.categories.values() if c.keypoints or not with_points)
    if not categories:
        raise Unsupported(f"no category of {source.path} has key points.")
    names = {each.id: each.name for each in categories}
    questions = []
    for image in in_drawn_order(file.images.values()):
        truths = tuple(each for each in file.annotations[image.id] if each.category_id in names)
        present = {truth.category_id for truth in truths}
        asked = tuple(
            name for number, name in names.items() if phrases == "all" or number in present
        )
        if asked:
            named = image._replace(file_name=f"{split}/{image.file_name}")
            questions.append(Question(named, asked, truths))
    return Asked(tuple(questions), categories)
