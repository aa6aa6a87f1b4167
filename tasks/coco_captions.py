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
from pathlib import Path

import numpy as np
import numpy.typing as npt

from models.base import Unsupported
from tasks.base import Dataset, Item
from tasks.captions_common import Captioned, CaptionTask
from tasks.coco_data import (
    find_file,
    in_drawn_order,
    plain_picture,
    read_annotations,
    read_picture,
)

_WARMUP = ("red", "green", "blue", "white")
_WARMUP_SIZE = 640


@dataclass(frozen=True, kw_only=True)
class CocoCaptions(CaptionTask):
    """Captions of photographs; CIDEr-D against people's.

    Attributes:
        split: As the files call it.
        folder: Holds `annotations` and the split's images; empty for `coco` in tokenmark's cache.
        data_set: Id of a data set on the hub with the same files, for those that the folder lacks.
        revision: Of the data set on the hub; a commit is what reproduces.
    """

    split: str = "val2017"
    folder: str = ""
    data_set: str = ""
    revision: str = "main"

    version = "1.0"
    data = Dataset(source="cocodataset.org", revision="2017", split="val2017", license="CC-BY-4.0")

    def captioned(self) -> Sequence[Captioned]:
        """Return the images that have a caption, in an order drawn from their ids.

        Raises:
            Unsupported: The annotation file is not to be had, or is damaged; says what to do.
        """
        name = f"annotations/captions_{self.split}.json"
        path = find_file(self.folder, self.data_set, name, self.revision)
        state = path.stat()
        return _read(path, self.split, state.st_mtime_ns, state.st_size)

    def warmup_items(self) -> Iterator[Item]:
        """Yield plain pictures, which are in no data set."""
        for number, colour in enumerate(_WARMUP):
            size = (_WARMUP_SIZE, _WARMUP_SIZE)
            yield self.item(Captioned(f"warmup/{number}", colour, *size, ("a colour",)))

    def pixels(self, item: Item) -> npt.NDArray[np.uint8]:
        """Decode an item's image file.

        Raises:
            Unsupported: It is not to be had, or is no image of the size that the annotations say.
        """
        file, size = item.fields["file"], (item.fields["width"], item.fields["height"])
        if item.id.startswith("warmup/"):
            return plain_picture(file, size)
        return read_picture(find_file(self.folder, self.data_set, file, self.revision), size)


@functools.lru_cache(maxsize=2)
def _read(path: Path, split: str, modified_ns: int, size: int) -> tuple[Captioned, ...]:
    """Return what a file asks, read once as long as the file is the same."""
    del modified_ns, size  # part of the key alone
    file = read_annotations(path, "captions")
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
        raise Unsupported(f"{path} holds no caption.")
    return found
