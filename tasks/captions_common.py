"""What captioning tasks have in common: the call, and the numbers.

| metric | of what |
|---|---|
| `cider` | CIDEr-D of an image against its references, averaged; 10 is equal to the only one |
| `bleu@4` | of all captions together |
| `rouge_l` | of an image, averaged |
| `words` | words of a caption |

See `tasks/caption_scorers.py`. METEOR and SPICE need Java and are not computed.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from models.base import Decoding, VisionLanguageModel, VisualAnswer, VisualPrompt
from tasks import caption_scorers as rules
from tasks.base import Item, Metric, Scores, Task
from tasks.resampling import draw_counts


class Captioned(NamedTuple):
    """An image and what people say about it.

    Attributes:
        name: Of the item.
        file: Of the picture; the task's to read.
        width, height: Pixels.
        references: At least one.
    """

    name: str
    file: str
    width: int
    height: int
    references: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CaptionTask(Task[VisionLanguageModel]):
    """Saying what is in an image.

    Attributes:
        prompt: What the model is asked.
        max_new_tokens: Longest caption.
    """

    prompt: str = "Provide a one-sentence caption for the provided image."
    max_new_tokens: int = 64

    capability = "VisionLanguageModel"

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("prompt must ask for something, it is empty.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")

    @abstractmethod
    def captioned(self) -> Sequence[Captioned]:
        """Return the images in their order, the same object every time."""

    @abstractmethod
    def pixels(self, item: Item) -> npt.NDArray[np.uint8]:
        """Return an item's image, (height, width, 3)."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """See the module's table."""
        return (
            Metric(name="cider", unit="", kind="mean"),
            Metric(name="bleu@4", unit="fraction", kind="corpus"),
            Metric(name="rouge_l", unit="fraction", kind="mean"),
            Metric(name="words", unit="words", kind="mean"),
        )

    def items(self) -> Iterator[Item]:
        """Yield the images with their references."""
        for each in self.captioned():
            yield self.item(each)

    def item(self, image: Captioned) -> Item:
        """Return an image as an item."""
        fields = {**image._asdict(), "references": list(image.references)}
        return Item(fields.pop("name"), fields)

    def call(
        self, model: VisionLanguageModel, item: Item, *, fixed_length: bool = False
    ) -> VisualAnswer:
        """Ask for a caption; the image file is decoded by whoever is measured."""
        decoding = Decoding(max_new_tokens=self.max_new_tokens, ignore_eos=fixed_length)
        return model.answer(VisualPrompt(image=self.pixels(item), text=self.prompt), decoding)

    def score(self, item: Item, output: str) -> Scores:
        """Return the scores of a caption; see the module's table."""
        words = rules.words_of(output)
        references = [rules.words_of(text) for text in item.fields["references"]]
        return {
            "cider": rules.cider(words, references, _rarity(tuple(self.captioned()))),
            "rouge_l": rules.rouge_l(words, references),
            "words": float(len(words)),
        }

    def corpus(
        self, outputs: Mapping[str, str], draws: npt.NDArray[np.int64]
    ) -> Mapping[str, npt.NDArray[np.float64]]:
        """Return BLEU-4 of all captions together."""
        references = {each.name: each.references for each in self.captioned()}
        counts = np.array(
            [
                rules.bleu_counts(
                    rules.words_of(output), [rules.words_of(text) for text in references[name]]
                )
                for name, output in outputs.items()
            ]
        )
        return {"bleu@4": rules.bleu(draw_counts(draws, len(outputs)) @ counts)}


@functools.lru_cache(maxsize=2)
def _rarity(images: tuple[Captioned, ...]) -> rules.Rarity:
    return rules.Rarity.of(
        [[rules.words_of(text) for text in image.references] for image in images]
    )
