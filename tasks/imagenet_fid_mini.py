"""imagenet-fid-mini: class-conditional images judged by a small classifier's features.

Twenty classes of rendered digits and scenes, the same classes and seeds for every method. The
features are those of `digits-cnn64`, a classifier of these pictures: a stand-in for Inception where
its weights are not to be had. Its distances are **proxy distances**. They are called by their
extractor, its weights' hash, the reference and the number of images, never FID, and their scale
means nothing by itself, so each stands beside

- the floor: as many fresh real images of the same classes against the same reference,
- the ceiling: as many real images of one class only.

| metric, `[digits-cnn64@hash, reference and its size, n=images]` behind its name | of what |
|---|---|
| `fd[…]` | Frechet distance; unit `proxy-fd` |
| `fd-over-floor[…]`, `fd-floor[…]`, `fd-ceiling[…]` | the same over its floor; floor; ceiling |
| `kid[…]` | unbiased kernel distance, also for few images |
| `precision[…]`, `recall[…]` | shares in the other set's support, k = 3 |
| `class_accuracy` | images that the classifier takes for their class |
| `nll`, `entropy`, `unique_tokens`, `excess_acceptance` | see `tasks/image_common.py` |

A distance of 64 features wants 640 images. With fewer there is none, unless `allow_small` asks for
it (from 128 on): then its name ends in `small`. Distances of different numbers of images are not
compared; `--limit` changes the number in the name.

Numbers of a set with noise: distances vary from one sampling seed to another (`seed=1`, `seed=2`),
and a difference of less than two floors is none.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.base import Dataset, Item, Metric, Scores
from tasks.image_common import (
    IMAGES_PER_FEATURE,
    Floats,
    ImageTask,
    Pixels,
    features_of,
    read_output,
)
from tasks.resampling import draw_counts

if TYPE_CHECKING:
    from models.embedded.digits_cnn64.model import DigitsCnn64, Moments

FEATURES = 64
_FOLDER = Path(__file__).parents[1] / "models" / "embedded" / "digits_cnn64"
_REFERENCE = "reference"
_REFERENCE_MOMENTS = 10_000
_REFERENCE_IMAGES = 1000
_CEILING_CLASS = 3
_CLASSES = 20
_FEWEST_FOR_MOMENTS = 2 * FEATURES
_FEWEST_FOR_BALLS = 50
_RENDERED = 500


class Frame(NamedTuple):
    """What a set is held against: numbers that depend on its size alone."""

    floor: float
    ceiling: float


@dataclass(frozen=True, kw_only=True)
class ImagenetFidMini(ImageTask):
    """Rendered digits and scenes of twenty classes.

    Attributes:
        images: How many. An image of tiny-ar-image takes about half a second on one core.
        allow_small: Whether there is a distance of fewer than ten images a feature.
    """

    images: int = 100
    allow_small: bool = False

    version = "1.0"
    data = Dataset(
        source="generated",
        revision="models/embedded/tiny_ar_image/data.py; features of models/embedded/digits_cnn64",
        split="reference, validation",
        license="Apache-2.0",
    )
    scale = "embedded"

    @property
    def classes(self) -> int:
        """Digits and scenes."""
        return _CLASSES

    @property
    def has_distance(self) -> bool:
        """Whether there are enough images for a Frechet distance."""
        fewest = _FEWEST_FOR_MOMENTS if self.allow_small else IMAGES_PER_FEATURE * FEATURES
        return self.images >= fewest

    @property
    def quality_metrics(self) -> tuple[Metric, ...]:
        """The distance first where there is one, else how many images show their class."""
        accuracy = Metric(
            name="class_accuracy",
            unit="fraction",
            kind="binary" if self.batch == 1 else "mean",
        )
        distances: tuple[Metric, ...] = ()
        if self.has_distance:
            distances = tuple(
                Metric(
                    name=self._name(name, _REFERENCE_MOMENTS),
                    unit="proxy-fd",
                    kind="corpus",
                    higher_is_better=False,
                )
                for name in ("fd", "fd-over-floor", "fd-floor", "fd-ceiling")
            )
        kernel = Metric(
            name=self._name("kid", _REFERENCE_IMAGES),
            unit="proxy-kid",
            kind="corpus",
            higher_is_better=False,
        )
        shares: tuple[Metric, ...] = ()
        if self.images >= _FEWEST_FOR_BALLS:
            shares = tuple(
                Metric(name=self._name(name, _REFERENCE_IMAGES), unit="fraction", kind="corpus")
                for name in ("precision", "recall")
            )
        first = (*distances, accuracy) if distances else (accuracy,)
        return (*first, kernel, *shares)

    def conditions(self) -> dict[str, str]:
        """Return whose features are compared."""
        return {"extractor": extractor_name()}

    def score(self, item: Item, output: str) -> Scores:
        """Return whether the classifier sees the classes, and what is said of the tokens."""
        _, logits = read_features(read_output(output).pixels)
        right = logits.argmax(axis=1) == np.array(item.fields["classes"])
        return {"class_accuracy": float(right.mean()), **super().score(item, output)}

    def corpus(self, outputs: Mapping[str, str], draws: NDArray[np.int64]) -> Mapping[str, Floats]:
        """Return the distances of all images together; see the module's table."""
        from tasks import image_scorers as rules

        (features, _), owners = features_of(outputs, read_features)
        counts = draw_counts(draws, len(outputs))[:, owners]
        found: dict[str, Floats] = {}
        if self.has_distance:
            distances = rules.frechet_resamples(features, reference_moments(), counts)
            frame = frame_of(len(features))
            for name, values in {
                "fd": distances,
                "fd-over-floor": distances / frame.floor,
                "fd-floor": np.full(len(counts), frame.floor),
                "fd-ceiling": np.full(len(counts), frame.ceiling),
            }.items():
                found[self._name(name, _REFERENCE_MOMENTS)] = values
        theirs = reference_features()
        found[self._name("kid", _REFERENCE_IMAGES)] = rules.kid_resamples(features, theirs, counts)
        if self.images >= _FEWEST_FOR_BALLS:
            covered = rules.precision_recall(features, theirs, counts)
            found[self._name("precision", _REFERENCE_IMAGES)] = covered.precision
            found[self._name("recall", _REFERENCE_IMAGES)] = covered.recall
        return found

    def _name(self, name: str, references: int) -> str:
        """Return a metric's name with all that its number depends on."""
        size = f"n={self.images}"
        if name.startswith("fd") and self.images < IMAGES_PER_FEATURE * FEATURES:
            size += ", small"
        return f"{name}[{extractor_name()} | ref={_REFERENCE}:{references} | {size}]"


@functools.cache
def extractor_name() -> str:
    """Return the extractor with the beginning of its weights' hash; needs no torch."""
    digest = hashlib.sha256((_FOLDER / "model.safetensors").read_bytes()).hexdigest()
    return f"digits-cnn64@{digest[:8]}"


@functools.cache
def _extractor() -> DigitsCnn64:
    from models.embedded.digits_cnn64.model import load_extractor

    return load_extractor(_FOLDER)


def read_features(pixels: Pixels) -> tuple[Floats, Floats]:
    """Return features (images, 64) and logits (images, 20) of images (images, 64, 64, 3)."""
    import torch

    from models.embedded.digits_cnn64.model import read

    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    found = read(_extractor(), images)
    return found.features.numpy(), found.logits.numpy()


@functools.cache
def reference_moments() -> Moments:
    """Return the moments of the reference, which come with the extractor."""
    from models.embedded.digits_cnn64.model import load_moments

    return load_moments(_FOLDER / "reference.safetensors")


@functools.cache
def reference_features() -> Floats:
    """Return the features of the first images of the reference, (1000, 64)."""
    return _real_features(np.arange(_REFERENCE_IMAGES), _REFERENCE)


@functools.cache
def frame_of(images: int) -> Frame:
    """Return floor and ceiling of the distance of so many images."""
    from tasks.image_scorers import frechet_resamples

    numbers = np.arange(images)
    whole = np.ones((1, images))
    fresh = _real_features(numbers, "validation")
    single = _real_features(numbers * _CLASSES + _CEILING_CLASS, "validation")
    return Frame(
        *(
            float(frechet_resamples(features, reference_moments(), whole)[0])
            for features in (fresh, single)
        )
    )


def _real_features(numbers: NDArray[np.int64], split: str) -> Floats:
    """Render images and return their features; a part at a time, as pictures take room."""
    from models.embedded.tiny_ar_image.data import render

    parts = []
    for start in range(0, len(numbers), _RENDERED):
        images, _ = render(numbers[start : start + _RENDERED].tolist(), split)
        parts.append(read_features(images.permute(0, 2, 3, 1).numpy())[0])
    return np.concatenate(parts)
