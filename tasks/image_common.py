"""What tasks that make images have in common: items, the call, the stored pictures.

An item is a batch of images of given conditions and seeds, the same for every method. Its stored
output is JSON: each image as a PNG in base64, which is what is scored (8 bits, no loss), and what
the unchanged model says of the image's tokens afterwards, outside the clock:

| field | of each image |
|---|---|
| `images` | PNG |
| `nll` | mean negative log-likelihood of a token under the target, nats |
| `entropy` | mean entropy of the target's distributions that the tokens stand in, nats |
| `unique_tokens` | different tokens over tokens |
| `excess_acceptance` | what the decoding accepted above the exact rule, of a batch |

The target's distribution is that of the guidance and temperature that were asked for, without top-k
and top-p, so that a token from outside them is unlikely and not impossible; at temperature 0 it is
that of temperature 1. The expectation of `nll` less `entropy` is 0 for every exact sampler that
does not cut off tails: a method that draws other tokens moves it.

`excess_acceptance` is the mean over the drafts that a method judged of the chance with which it
accepted them, less 1 - TV(p, q). Whatever a method does otherwise, the law of the token emitted is
that far from the target's, at least; exact methods have 0 up to the noise of their drafts, and what
drafts nothing has 0.
"""

from __future__ import annotations

import base64
import io
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, cast

import numpy as np
import numpy.typing as npt

from models.base import (
    AutoregressiveImageModel,
    Condition,
    GeneratedImages,
    ImageGenerator,
    ImageSampling,
    InvalidOutput,
    Trace,
    Unsupported,
)
from tasks.base import Item, Metric, Result, Scores, Task

if TYPE_CHECKING:
    from collections.abc import Callable

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
WARMUP_ITEMS = 4
# A covariance of d features needs this many images for each of them to mean something.
IMAGES_PER_FEATURE = 10
# Far more than the images of a task, so that no two seeds share one.
_SEED_STRIDE = 1_000_000
READINGS = ("nll", "entropy", "unique_tokens", "excess_acceptance")


@dataclass(frozen=True)
class ImageOutput:
    """A result of the call, and later what is stored of it.

    Attributes:
        text: JSON, see the module's table; empty before `ImageTask.stored`.
        token_ids: Of all images, one after the other.
        trace: What was done.
        made: The images themselves.
    """

    text: str
    token_ids: tuple[int, ...]
    trace: Trace
    made: GeneratedImages


class StoredImages(NamedTuple):
    """A stored output as read again: pixels (images, height, width, 3), and a list by reading."""

    pixels: Pixels
    readings: Mapping[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class ImageTask(Task[ImageGenerator]):
    """Images of classes in turn.

    Attributes:
        images: How many.
        batch: Images of an item, made together. Times are those of a batch, and intervals are over
            batches.
        seed: Another one gives other random numbers for the same classes.
        guidance_scale, temperature, top_k, top_p: See `models.base.ImageSampling`.
    """

    images: int
    batch: int = 1
    seed: int = 0
    guidance_scale: float = 1.5
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    capability = "ImageGenerator"
    # What the conditions of an item are called in its fields.
    conditions_field: ClassVar[str] = "classes"

    def __post_init__(self) -> None:
        if self.images < 1 or self.images > _SEED_STRIDE:
            raise ValueError(f"images must be from 1 to {_SEED_STRIDE}, got {self.images}.")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}.")
        self.sampling()

    @property
    @abstractmethod
    def classes(self) -> int:
        """Number of classes that images are made of, in turn; 0 where captions are."""

    @property
    @abstractmethod
    def quality_metrics(self) -> tuple[Metric, ...]:
        """Metrics of the pictures, the headline first."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those of the pictures, and what the target says of their tokens."""
        units = ("nats", "nats", "fraction", "fraction")
        lower_is_better = ("nll", "excess_acceptance")
        readings = (
            Metric(name=name, unit=unit, kind="mean", higher_is_better=name not in lower_is_better)
            for name, unit in zip(READINGS, units, strict=True)
        )
        return (*self.quality_metrics, *readings)

    def sampling(self) -> ImageSampling:
        """Return how tokens are drawn.

        Raises:
            ValueError: A setting is out of its range.
        """
        return ImageSampling(
            guidance_scale=self.guidance_scale,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )

    def limited(self, items: int) -> Self:
        """Return the task of fewer images: their number is in the names of its metrics."""
        return replace(self, images=min(self.images, items * self.batch))

    def with_room_for(self, items: int) -> Self:
        """Return the task of at least so many batches."""
        return replace(self, images=max(self.images, items * self.batch))

    def items(self) -> Iterator[Item]:
        """Yield batches; image n is of class n modulo the classes, whatever the batch."""
        for first in range(0, self.images, self.batch):
            numbers = range(first, min(first + self.batch, self.images))
            yield self._item(f"{first:06d}", numbers)

    def warmup_items(self) -> Iterator[Item]:
        """Yield batches with numbers that no measured image has."""
        for number in range(WARMUP_ITEMS):
            first = -(number + 1) * self.batch
            yield self._item(f"warm-up/{number}", range(first, first + self.batch))

    def _item(self, name: str, numbers: Sequence[int]) -> Item:
        fields = {
            self.conditions_field: self.wanted(numbers),
            "seeds": [self.seed * _SEED_STRIDE + number for number in numbers],
        }
        return Item(name, fields)

    def wanted(self, numbers: Sequence[int]) -> list[Condition]:
        """Return the conditions of images by their numbers: the classes take turns."""
        return [number % self.classes for number in numbers]

    def call(self, model: ImageGenerator, item: Item, *, fixed_length: bool = False) -> ImageOutput:
        """Make a batch; all images have the same length, so `fixed_length` changes nothing.

        Raises:
            models.base.InvalidOutput: What came back are no images.
            models.base.Unsupported: The model has other classes.
        """
        if model.facts.classes != self.classes:
            raise Unsupported(
                f"the images are of {_what(self.classes)}; '{model.name}' makes them of "
                f"{_what(model.facts.classes)}."
            )
        wanted = item.fields[self.conditions_field]
        made = model.generate(wanted, item.fields["seeds"], self.sampling())
        expected = (len(wanted), *model.facts.image_size, 3)
        if made.pixels.shape != expected or made.pixels.dtype != np.uint8:
            raise InvalidOutput(
                f"pixels must be {expected} of uint8, got {made.pixels.shape} of "
                f"{made.pixels.dtype}."
            )
        token_ids = tuple(token for tokens in made.tokens for token in tokens)
        return ImageOutput("", token_ids, made.trace, made)

    def stored(self, model: ImageGenerator, item: Item, result: Result) -> ImageOutput:
        """Write the pictures as text, with what the unchanged model says of their tokens."""
        output = cast("ImageOutput", result)
        content: dict[str, Any] = {
            "images": [encoded(image) for image in output.made.pixels],
            **self._readings(model, item, output.made.tokens),
        }
        excess = output.trace.notes.get("excess_acceptance", 0.0)
        content["excess_acceptance"] = [excess] if output.made.tokens else []
        return replace(output, text=json.dumps(content))

    def _readings(
        self, model: ImageGenerator, item: Item, tokens: Sequence[Sequence[int]]
    ) -> dict[str, list[float]]:
        if not isinstance(model, AutoregressiveImageModel) or not tokens:
            return {name: [] for name in READINGS}
        import torch

        from models.image_generation import laws_in_parts

        ids = torch.tensor(tokens)
        judged = ImageSampling(
            guidance_scale=self.guidance_scale, temperature=self.temperature or 1.0
        )
        surprises, entropies = [], []
        conditions = item.fields[self.conditions_field]
        for places, found in laws_in_parts(model, conditions, ids, judged):
            laws = found.double()
            drawn = ids[:, places].to(laws.device)[..., None]
            likelihoods = laws.gather(-1, drawn)[..., 0]
            surprises.append(-likelihoods.clamp_min(torch.finfo(torch.float32).tiny).log())
            entropies.append(torch.special.entr(laws).sum(dim=-1))
        surprise, entropy = (torch.cat(parts, 1).mean(dim=1) for parts in (surprises, entropies))
        return {
            "nll": surprise.tolist(),
            "entropy": entropy.tolist(),
            "unique_tokens": [len(set(row)) / len(row) for row in tokens],
        }

    def score(self, item: Item, output: str) -> Scores:
        """Return the means over a batch of what the target says of the tokens."""
        readings = read_output(output).readings
        return {name: float(np.mean(values)) for name, values in readings.items() if values}


def _what(classes: int) -> str:
    return f"{classes} classes" if classes else "captions"


def encoded(image: Pixels) -> str:
    """Return an image, (height, width, 3), as a PNG in base64."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=False)
    return base64.b64encode(file.getvalue()).decode("ascii")


def decoded(text: str) -> Pixels:
    """Return the image that `encoded` wrote."""
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
        return np.asarray(image.convert("RGB"))


def read_output(output: str) -> StoredImages:
    """Read a stored output again."""
    content: dict[str, Any] = json.loads(output)
    pixels = np.stack([decoded(text) for text in content["images"]])
    return StoredImages(pixels, {name: content[name] for name in READINGS})


def features_of(
    outputs: Mapping[str, str], network: Callable[[Pixels], Sequence[Floats]]
) -> tuple[list[Floats], npt.NDArray[np.int64]]:
    """Run all stored images through a network, an output at a time.

    Args:
        outputs: Stored outputs by item.
        network: From pixels (images, height, width, 3) to arrays whose first axis is the images.

    Returns:
        The arrays for all images together, and the number of the output of each image.
    """
    parts, owners = [], []
    for number, output in enumerate(outputs.values()):
        pixels = read_output(output).pixels
        parts.append(network(pixels))
        owners += [number] * len(pixels)
    joined = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    return joined, np.array(owners, dtype=np.int64)
