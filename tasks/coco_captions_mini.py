"""coco-captions-mini: COCO's caption protocol on rendered scenes that no embedded model saw.

Scenes of the generator's `test` split, asked as tiny-vlm was in training and compared with the one
description that the generator writes: count, background, every object with its place, text. Written
as a file of COCO's format and read back like one. Descriptions follow a pattern, so that CIDEr is
high as soon as the objects are right; it falls where things are missed. One item:
    file "1/shapes/96/test/0"   references ["3 objects on plain background: large red star at ..."]
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.embedded.scenes import coco as files
from models.embedded.scenes.generator import VERSION, generate
from models.embedded.scenes.raster import picture
from models.embedded.tiny_vlm.text import CAPTION_REQUEST
from tasks.base import Dataset, Item
from tasks.captions_common import Captioned, CaptionTask
from tasks.coco_data import check_annotations

NUM_IMAGES = 200
_SIZE = 96
_WARMUP_IMAGES = 4


@dataclass(frozen=True, kw_only=True)
class CocoCaptionsMini(CaptionTask):
    """Descriptions of rendered scenes; CIDEr-D against the generator's."""

    prompt: str = CAPTION_REQUEST
    max_new_tokens: int = 120

    version = "1.0"
    data = Dataset(
        source="generated",
        revision=f"models/embedded/scenes, version {VERSION}",
        split="test",
        license="Apache-2.0",
    )
    scale = "embedded"

    def captioned(self) -> Sequence[Captioned]:
        """Return the scenes in the generator's order."""
        return _scenes("test", NUM_IMAGES)

    def warmup_items(self) -> Iterator[Item]:
        """Yield scenes of the validation split."""
        for number, scene in enumerate(_scenes("validation", _WARMUP_IMAGES)):
            yield self.item(scene._replace(name=f"warmup/{number}"))

    def item(self, image: Captioned) -> Item:
        """Return a scene with a hash of its pixels, so that its items' hash covers them."""
        plain = super().item(image)
        pixels = picture(image.file)
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()[:16]
        return Item(plain.id, {**plain.fields, "pixels": digest})

    def pixels(self, item: Item) -> npt.NDArray[np.uint8]:
        """Return the picture, which is drawn once and kept."""
        return picture(item.fields["file"])


@functools.cache
def _scenes(split: str, count: int) -> tuple[Captioned, ...]:
    """Return the first scenes of a split as a COCO file gives them."""
    scenes = [generate("shapes", _SIZE, split, index) for index in range(count)]
    file = check_annotations(files.captions(scenes), "captions", f"the generator's {split} file")
    return tuple(
        Captioned(
            str(image.id),
            scene.key,
            image.width,
            image.height,
            tuple(each.caption for each in file.captions[image.id]),
        )
        for image, scene in zip(file.images.values(), scenes, strict=True)
    )
