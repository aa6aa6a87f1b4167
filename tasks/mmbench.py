r"""MMBench: multiple choice about images in 20 abilities, right only if every rotation is.

Source: arXiv 2307.06281; files, circular evaluation and the reading of answers as VLMEvalKit at
e8e78f0 has them, written from a description. The dev split of 1.0 in English has 1,164 questions in
4,329 rows; 1.1 is filtered anew, so name the release with every number. The test split comes
without answers: it has answers, speed and agreement, and no accuracy. Differs from other harnesses:

- An answer that means no option is an outcome of its own, where VLMEvalKit counts it as wrong
  (`circular_official` does) and lmms-eval guesses. No other model judges answers.
- Questions come in an order drawn from their indices, so that `--limit 300` is a fair sample.
- Rotations that a file lacks are made (`tasks/mmbench_data.py`).

LLaVA-1.5-7B has been reported between 62.8 and 64.7 on the same split: compare methods with the
full model of the same run. One item:
    image "/9j/4AAQ..."   rotations [prompt "Is it day?\nA. yes\n...", options {"A": "yes", ...},
    answer "A"; ...]   category "image_scene"   l2-category "coarse_perception"
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tasks.base import Dataset, Item
from tasks.checks import check_choice
from tasks.mmbench_common import CircularChoice, Language
from tasks.mmbench_data import ChoiceQuestion, Rotation, find_file, read_file

# The abilities of arXiv 2307.06281, figure 2, as the files spell them. Questions of other
# categories, in other files, count in the overall numbers.
_CATEGORIES = (
    "action_recognition", "attribute_comparison", "attribute_recognition", "celebrity_recognition",
    "function_reasoning", "future_prediction", "identity_reasoning", "image_emotion",
    "image_quality", "image_scene", "image_style", "image_topic", "nature_relation",
    "object_localization", "ocr", "physical_property_reasoning", "physical_relation",
    "social_relation", "spatial_relationship", "structuralized_imagetext_understanding",
)  # fmt: skip
_L2_CATEGORIES = (
    "attribute_reasoning",
    "coarse_perception",
    "finegrained_perception (cross-instance)",
    "finegrained_perception (instance-level)",
    "logic_reasoning",
    "relation_reasoning",
)


@dataclass(frozen=True, kw_only=True)
class MMBench(CircularChoice):
    """Multiple choice about images; accuracy over questions with all rotations right.

    Attributes:
        split: `dev` has answers, `test` has none.
        language: `en` or `cn`.
        release: `1.0` or `1.1`, two different sets of questions.
        file: TSV or Parquet file; empty for tokenmark's cache (`mmbench/MMBench_DEV_EN.tsv`, with
            `_V11` for 1.1), then, for 1.0, the hub.
        revision: Of the data set on the hub; a commit is what reproduces.
    """

    split: Literal["dev", "test"] = "dev"
    language: Language = "en"
    release: Literal["1.0", "1.1"] = "1.0"
    file: str = ""
    revision: str = "main"

    version = "1.0"
    data = Dataset(
        source="lmms-lab/MMBench", revision="main", split="dev", license="LicenseRef-research-data"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("split", self.split, ("dev", "test"))
        check_choice("language", self.language, get_args(Language))
        check_choice("release", self.release, ("1.0", "1.1"))

    @property
    def categories(self) -> Mapping[str, Sequence[str]]:
        """The official ones."""
        return {"l2-category": _L2_CATEGORIES, "category": _CATEGORIES}

    @property
    def asked_in(self) -> Language:
        """The language of the questions."""
        return self.language

    def questions(self) -> Sequence[ChoiceQuestion]:
        """Return the questions in an order drawn from their indices, the same for every file.

        Raises:
            Unsupported: The file is not to be had, or is damaged; says what to put where.
        """
        path = find_file(
            self.language, self.split, self.release, file=self.file, revision=self.revision
        )
        state = path.stat()
        return _read(path, state.st_mtime_ns, state.st_size)

    def warmup_items(self) -> Iterator[Item]:
        """Yield questions about plain colours, which are in no task."""
        for number, colour in enumerate(("red", "green", "blue", "white")):
            yield self.item(f"warmup/{number}", _plain_question(number, colour))


@functools.lru_cache(maxsize=2)
def _read(path: Path, modified_ns: int, size: int) -> tuple[ChoiceQuestion, ...]:
    """Return a file's questions in their order, read once as long as the file is the same."""
    del modified_ns, size  # part of the key alone

    def drawn(question: ChoiceQuestion) -> bytes:
        return hashlib.sha256(f"mmbench {question.number}".encode()).digest()

    return tuple(sorted(read_file(path), key=drawn))


@functools.cache
def _plain_question(number: int, colour: str) -> ChoiceQuestion:
    import base64
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (336, 336), colour).save(buffer, format="PNG")
    options = {"A": "red", "B": "green", "C": "blue", "D": "white"}
    rotation = Rotation("What colour is the image?", "", options, "ABCD"[number])
    return ChoiceQuestion(
        number=number,
        category="image_style",
        l2_category="coarse_perception",
        image=base64.b64encode(buffer.getvalue()).decode("ascii"),
        rotations=(rotation,) * len(options),
    )
