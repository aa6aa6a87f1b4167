r"""mmbench-mini: MMBench's protocol on rendered scenes that no embedded model was trained on.

Nine categories of questions with four options about scenes of coloured shapes, numbers and words,
40 questions of each, written as a file of MMBench's format and read back like one. The scenes are
of the generator's `test` split, whose descriptions never occur in training or validation (tiny-vlm
trains on `train`). The categories take turns, so that every prefix is balanced. `number` and `word`
need small detail; `size` 192 shows scenes of twice the side in five tiles, 720 visual tokens for
tiny-vlm. Chance is 1/256 of the questions with four options in every rotation, 1/4 unrotated.

One item:
    image "iVBORw0KGgo..."   rotations [prompt "What colour is the star?\nA. red\n...", options
    {"A": "red", ...}, answer "C"; ...]   category "colour"   l2-category "object"
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from models.embedded.scenes import mmbench as files
from models.embedded.scenes.generator import VERSION
from models.embedded.scenes.questions import CATEGORIES, GROUPS, held_out
from tasks.base import Dataset, Item
from tasks.longbench_protocol import in_turn
from tasks.mmbench_common import CircularChoice
from tasks.mmbench_data import ChoiceQuestion, decode_image, read_tsv

QUESTIONS_OF_A_CATEGORY = 40
IMAGE_SIZES = (96, 192)


@dataclass(frozen=True, kw_only=True)
class MMBenchMini(CircularChoice):
    """Multiple choice about rendered scenes; accuracy over questions with all rotations right.

    Attributes:
        max_new_tokens: Longest answer; a letter and the end of the text.
        size: Width and height of the images: 96, or 192 in a thumbnail and four crops.
    """

    max_new_tokens: int = 4
    size: Literal[96, 192] = 96

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
        if self.size not in IMAGE_SIZES:
            raise ValueError(
                f"size must be {' or '.join(map(str, IMAGE_SIZES))} pixels, got {self.size!r}."
            )

    @property
    def categories(self) -> Mapping[str, Sequence[str]]:
        """Those of the generator."""
        return {"l2-category": tuple(dict.fromkeys(GROUPS.values())), "category": CATEGORIES}

    @property
    def crops(self) -> int:
        """Crops a side: images of 192 pixels are cut in two."""
        return self.size // IMAGE_SIZES[0]

    def questions(self) -> Sequence[ChoiceQuestion]:
        """Return the questions, the categories in turn."""
        return scene_questions("test", self.size, QUESTIONS_OF_A_CATEGORY)

    def warmup_items(self) -> Iterator[Item]:
        """Yield questions about scenes of the validation split."""
        for question in scene_questions("validation", self.size, 1):
            yield self.item(f"warmup/{question.number}", question)

    def content_hash(self) -> str:
        """Return a SHA-256 over version, parameters and every item, images by their pixels.

        Libraries compress the same pixels to different files.
        """
        digest = hashlib.sha256(json.dumps([self.version, self.parameters()]).encode())
        for item in self.items():
            fields = dict(item.fields)
            digest.update(decode_image(fields.pop("image")).tobytes())
            digest.update(json.dumps([item.id, item.group, fields], sort_keys=True).encode())
        return digest.hexdigest()


@functools.cache
def scene_questions(split: str, size: int, per_category: int) -> tuple[ChoiceQuestion, ...]:
    """Return questions about scenes of a split as a file of MMBench's format gives them."""
    asked = held_out(split, size, per_category)
    by_category = [
        asked[start : start + per_category] for start in range(0, len(asked), per_category)
    ]
    return read_tsv(files.tsv(in_turn(by_category)), f"the generator's {split} file")
