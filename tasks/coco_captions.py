"""COCO captions: one sentence about a photograph, against five that people wrote.

Source: arXiv 1504.00325; the annotation file `captions_val2017.json` of the 2017 release, 5,000
images, in a folder as the archives unpack or in a data set on the hub with the same files. Metrics
are those of COCO's server but METEOR and SPICE, see `tasks/caption_scorers.py`. The Karpathy split,
which most papers use, is another choice of images: give its files another `split`. Images come in
an order drawn from their ids, so that `--limit 500` is a fair sample. One item:
    file "val2017/000000000139.jpg"   width 640   references ["A woman stands in ...", ...]
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from models.base import Unsupported
from tasks.base import Dataset, Item
from tasks.captions_common import Captioned, CaptionTask
from tasks.coco_data import (
    WARMUP_COLOURS,
    WARMUP_SIZE,
    CocoFiles,
    Stamped,
    in_drawn_order,
    read_annotations,
)


@dataclass(frozen=True, kw_only=True)
class CocoCaptions(CocoFiles, CaptionTask):
    """Captions of photographs; CIDEr-D against people's."""

    version = "1.0"
    data = Dataset(source="cocodataset.org", revision="2017", split="val2017", license="CC-BY-4.0")

    def captioned(self) -> Sequence[Captioned]:
        """Return the images that have a caption, in an order drawn from their ids.

        Raises:
            Unsupported: The annotation file is not to be had, or is damaged; says what to do.
        """
        return _read(self.annotation_file("captions"), self.split)

    def warmup_items(self) -> Iterator[Item]:
        """Yield plain pictures, which are in no data set."""
        for number, colour in enumerate(WARMUP_COLOURS):
            size = (WARMUP_SIZE, WARMUP_SIZE)
            yield self.item(Captioned(f"warmup/{number}", colour, *size, ("a colour",)))


@functools.lru_cache(maxsize=2)
def _read(source: Stamped, split: str) -> tuple[Captioned, ...]:
    """Return what a file asks, read once as long as the file is the same."""
    file = read_annotations(source.path, "captions")
    found = tuple(
        Captioned(
            str(image.id),
            f"{split}/{image.file_name}",
            image.width,
            image.height,
            tuple(each.caption for each in file.captions[image.id]),
        )
        for image in in_drawn_order(file.images.values())
        if file.captions[image.id]
    )
    if not found:
        raise Unsupported(f"{source.path} holds no caption.")
    return found
