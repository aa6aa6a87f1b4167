"""Each check of the battery for images catches a method that breaks it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType

import pytest

from hardware.profile import Profile
from methods.base import Method, Output
from methods.visual_ar.raster import Raster
from models.base import Condition, GeneratedImages, ImageGenerator, ImageSampling
from models.wrapper import Around
from runner.conformance_base import Broken
from runner.conformance_image_battery import ImageBattery


class Tampered(Around):
    """An image generator; what it makes is that of the model, unless a method spoils it."""

    def generate(
        self, conditions: Sequence[Condition], seeds: Sequence[int], sampling: ImageSampling
    ) -> GeneratedImages:
        made: GeneratedImages = self._model.generate(conditions, seeds, sampling)
        return made

    def of_tokens(self, made: GeneratedImages, tokens: Sequence[Sequence[int]]) -> GeneratedImages:
        import torch

        rows = tuple(tuple(row) for row in tokens)
        return replace(made, tokens=rows, pixels=self._model.pixels(torch.tensor(rows)))


@dataclass(frozen=True, kw_only=True)
class Tampering(Method[ImageGenerator]):
    """Claims to be plain decoding."""

    capability = "ImageGenerator"
    output = Output.IDENTICAL
    neutral = MappingProxyType({})
    model_class = Tampered

    @contextmanager
    def apply(self, model: ImageGenerator, hardware: Profile) -> Iterator[ImageGenerator]:
        yield self.model_class(model)


class OtherToken(Tampered):
    """Says another last token where nobody draws it."""

    def generate(self, *arguments: object) -> GeneratedImages:
        made = super().generate(*arguments)  # type: ignore[arg-type]  # passed on
        return self.of_tokens(made, [[*row[:-1], (row[-1] + 1) % 48] for row in made.tokens])


class Cold(Tampered):
    """Draws at a lower temperature than it was asked for."""

    def generate(
        self, conditions: Sequence[Condition], seeds: Sequence[int], sampling: ImageSampling
    ) -> GeneratedImages:
        return super().generate(conditions, seeds, replace(sampling, temperature=0.5))


class Woven(Tampered):
    """Takes every other token from another image: each place is right by itself."""

    def generate(
        self, conditions: Sequence[Condition], seeds: Sequence[int], sampling: ImageSampling
    ) -> GeneratedImages:
        made = super().generate(conditions, seeds, sampling)
        other = super().generate(conditions, [seed + 1000 for seed in seeds], sampling)
        pairs = zip(made.tokens, other.tokens, strict=True)
        mixed = [[(one, two)[n % 2][n] for n in range(len(one))] for one, two in pairs]
        return self.of_tokens(made, mixed)


class OtherPixels(Tampered):
    """Shows the images of a batch in another order."""

    def generate(self, *arguments: object) -> GeneratedImages:
        made = super().generate(*arguments)  # type: ignore[arg-type]  # passed on
        return replace(made, pixels=made.pixels[::-1].copy())


class NoSeeds(Tampered):
    """Has one seed of its own."""

    def generate(
        self, conditions: Sequence[Condition], seeds: Sequence[int], sampling: ImageSampling
    ) -> GeneratedImages:
        return super().generate(conditions, [0] * len(seeds), sampling)


class Miscounted(Tampered):
    """Says that it accepted a draft that it never had."""

    def generate(self, *arguments: object) -> GeneratedImages:
        made = super().generate(*arguments)  # type: ignore[arg-type]  # passed on
        made.trace.accepted[3] += 1
        return made


SPOILT = [
    ("greedy_output", OtherToken, "not those of plain decoding"),
    ("sampled_output", Cold, "differ from those of plain sampling"),
    ("sampled_output", Woven, "never is"),
    ("images", OtherPixels, "not of the same images"),
    ("seeds", NoSeeds, "ignores the seed"),
    ("trace", Miscounted, "tokens are accounted for"),
]


@pytest.mark.parametrize(("check", "spoilt", "message"), SPOILT)
def test_a_method_that_breaks_a_promise_is_found(
    monkeypatch: pytest.MonkeyPatch, check: str, spoilt: type[Tampered], message: str
) -> None:
    monkeypatch.setattr(Tampering, "model_class", spoilt)
    with pytest.raises(Broken, match=message):
        getattr(ImageBattery(Tampering()), check)()


def test_plain_decoding_passes_the_checks_that_find_them() -> None:
    battery = ImageBattery(Raster())
    for check in sorted({check for check, _, _ in SPOILT}):
        assert getattr(battery, check)()
    assert "1920 tokens of 120 images" in battery.sampled_output()
