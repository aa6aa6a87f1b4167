"""imagenet-fid-mini: paired images, honest names, and what a stored picture is worth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.base import ImageSampling, InvalidOutput, Trace, Unsupported
from models.embedded.tiny_ar_image.data import render
from models.image_generation import AutoregressiveImages, read_tokens
from runner.conformance_image import tiny_images
from runner.registry import Registry
from tasks import imagenet_fid_mini as module
from tasks.base import Task
from tasks.image_common import READINGS, ImageTask, decoded, encoded, read_output
from tasks.imagenet_fid_mini import (
    ImagenetFidMini,
    extractor_name,
    frame_of,
    read_features,
    reference_moments,
)
from tests.models.tiny_images import networks

Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def model() -> AutoregressiveImages:
    return AutoregressiveImages(*networks(), "tiny")


def real(numbers: range, split: str = "validation") -> Pixels:
    return render(list(numbers), split)[0].permute(0, 2, 3, 1).numpy()


def text_of(pixels: Pixels) -> str:
    readings: Mapping[str, list[float]] = {name: [] for name in READINGS}
    return json.dumps({"images": [encoded(image) for image in pixels], **readings})


def outputs_of(task: ImageTask, pixels: Pixels) -> dict[str, str]:
    """Outputs of a task whose images are these."""
    items = list(task.items())
    parts = np.split(pixels, np.cumsum([len(item.fields["seeds"]) for item in items])[:-1])
    return {item.id: text_of(part) for item, part in zip(items, parts, strict=True)}


def whole(task: ImageTask) -> NDArray[np.int64]:
    return np.arange(len(list(task.items())))[None]


def test_classes_and_seeds_are_the_same_whatever_the_batch() -> None:
    def asked(task: ImagenetFidMini) -> list[tuple[int, int]]:
        return [
            pair
            for item in task.items()
            for pair in zip(item.fields["classes"], item.fields["seeds"], strict=True)
        ]

    one, many = ImagenetFidMini(images=50), ImagenetFidMini(images=50, batch=8)
    assert asked(one) == asked(many)
    assert len(set(asked(one))) == 50
    assert np.bincount([label for label, _ in asked(one)]).tolist() == [3] * 10 + [2] * 10
    other = asked(ImagenetFidMini(images=50, seed=1))
    assert [label for label, _ in other] == [label for label, _ in asked(one)]
    assert not {seed for _, seed in other} & {seed for _, seed in asked(one)}
    measured = {seed for _, seed in asked(many)}
    for item in many.warmup_items():
        assert len(item.fields["seeds"]) == 8
        assert not measured & set(item.fields["seeds"])


def test_a_call_makes_the_images_and_what_is_stored_is_read_from_the_unchanged_model(
    model: AutoregressiveImages,
) -> None:
    task = ImagenetFidMini(images=3, batch=2, guidance_scale=2.0, temperature=0.8, top_k=3)
    item = next(task.items())
    made = task.call(model, item)
    sampling = ImageSampling(guidance_scale=2.0, temperature=0.8, top_k=3)
    expected = model.generate([0, 1], [0, 1], sampling)
    assert made.token_ids == expected.tokens[0] + expected.tokens[1]
    output = task.stored(model, item, made)
    pixels, readings = read_output(output.text)
    assert np.array_equal(pixels, expected.pixels)
    # The law without top-k: 3 of 40 codes could not be read at all under the other.
    laws = read_tokens(
        model, [0, 1], torch.tensor(expected.tokens), replace(sampling, top_k=0)
    ).double()
    chosen = laws.gather(2, torch.tensor(expected.tokens)[..., None])[..., 0]
    assert readings["nll"] == pytest.approx((-chosen.log()).mean(1).tolist())
    assert readings["entropy"] == pytest.approx(torch.special.entr(laws).sum(2).mean(1).tolist())
    assert readings["unique_tokens"][0] == len(set(expected.tokens[0])) / 16
    scores = task.score(item, output.text)
    assert scores["nll"] == pytest.approx(np.mean(readings["nll"]))


def test_models_of_other_classes_and_other_pixels_are_refused(model: AutoregressiveImages) -> None:
    task = ImagenetFidMini(images=1)
    item = next(task.items())
    with pytest.raises(Unsupported, match="of 20 classes; 'tiny-random-images' makes them of 5"):
        task.call(tiny_images(), item)

    class Larger:
        name, facts = model.name, model.facts

        def generate(self, *arguments: Any) -> Any:
            found = model.generate(*arguments)
            return replace(found, pixels=found.pixels.repeat(2, axis=1), trace=Trace())

    with pytest.raises(InvalidOutput, match=r"\(1, 16, 16, 3\)"):
        task.call(Larger(), item)  # type: ignore[arg-type]  # on purpose


def test_pictures_survive_their_text_to_the_bit() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert np.array_equal(decoded(encoded(image)), image)


def test_no_metric_by_a_proxy_extractor_is_called_fid() -> None:
    registry = Registry()
    for name in registry.entries("task"):
        task_class = registry.load_task(name)
        if not issubclass(task_class, ImageTask) or name == "imagenet-fid":
            continue
        for images in (1, 100, 640, 50_000):
            task: Task[Any] = task_class(images=images)
            for metric in task.metrics:
                assert "fid" not in metric.name.lower().replace("fidelity", "")
                if metric.unit.startswith("proxy"):
                    assert extractor_name() in metric.name
                    assert f"n={images}" in metric.name


def test_distances_need_ten_images_a_feature_unless_asked_for_and_then_say_small() -> None:
    def headline(**settings: Any) -> str:
        return ImagenetFidMini(**settings).metrics[0].name

    name = f"fd[{extractor_name()} | ref=reference:10000 | n=640]"
    assert headline(images=640) == name
    assert headline(images=639) == "class_accuracy"
    assert headline(images=639, allow_small=True) == name.replace("640", "639, small")
    assert headline(images=127, allow_small=True) == "class_accuracy"


def test_a_limit_changes_the_number_in_the_names() -> None:
    task = ImagenetFidMini(images=1000, batch=8).limited(100)
    assert task.images == 800
    assert "n=800" in task.metrics[0].name
    assert ImagenetFidMini(images=10).limited(100).images == 10


@pytest.mark.parametrize("setting", ["images", "batch", "guidance_scale", "top_p"])
def test_settings_out_of_range_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=setting):
        ImagenetFidMini(**{setting: -1})


def test_real_images_are_at_the_floor_and_spoilt_ones_are_not() -> None:
    task = ImagenetFidMini(images=200, batch=10, allow_small=True)
    name = task.metrics[0].name
    over = name.replace("fd[", "fd-over-floor[")
    fresh = real(range(1000, 1200))
    noisy = fresh.astype(int) + np.random.default_rng(0).normal(0, 38, fresh.shape)
    spoilt = noisy.clip(0, 255).round().astype(np.uint8)
    one_class = real(range(7, 200 * 20, 20))
    found = {
        kind: task.corpus(outputs_of(task, pixels), whole(task))
        for kind, pixels in (("fresh", fresh), ("noise", spoilt), ("one class", one_class))
    }
    assert found["fresh"][over][0] < 2
    # At 200 images the floor itself is high; at 5,000 noise is at 900 floors.
    assert found["noise"][over][0] > 20
    assert found["one class"][over][0] > 20
    frame = frame_of(200)
    assert found["noise"][over][0] == pytest.approx(found["noise"][name][0] / frame.floor)
    ceiling = found["fresh"][name.replace("fd[", "fd-ceiling[")][0]
    assert ceiling == frame.ceiling > 20 * frame.floor
    names = {metric.name for metric in task.metrics if metric.kind == "corpus"}
    assert names == found["fresh"].keys()
    kid, recall = (next(each for each in names if each.startswith(w)) for w in ("kid", "recall"))
    assert found["fresh"][kid][0] < found["one class"][kid][0]
    assert found["fresh"][recall][0] > 2 * found["one class"][recall][0]


def test_resamples_are_of_whole_batches() -> None:
    task = ImagenetFidMini(images=160, batch=20, allow_small=True)
    name = task.metrics[0].name
    pixels = real(range(160))
    outputs = outputs_of(task, pixels)
    draws = np.array([range(8), [0, 0, 1, 2, 3, 4, 5, 6]])
    found = task.corpus(outputs, draws)[name]
    chosen = np.concatenate([pixels[20 * batch : 20 * batch + 20] for batch in draws[1]])
    from tasks.image_scorers import frechet_bias, frechet_resamples, weighted_moments

    features, everything = read_features(chosen)[0], read_features(pixels)[0]
    once = np.ones((1, 160))
    plain = frechet_resamples(features, reference_moments(), once)[0]
    covariance = weighted_moments(everything, once[0]).covariance
    assert found[1] == pytest.approx(plain - frechet_bias(covariance, 160))


def test_class_accuracy_is_of_the_classes_that_were_asked_for() -> None:
    task = ImagenetFidMini(images=40, batch=20)
    first, second = task.items()
    pixels = real(range(20))
    assert task.score(first, text_of(pixels))["class_accuracy"] >= 0.95
    turned = np.roll(pixels, 1, axis=0)
    assert task.score(second, text_of(turned))["class_accuracy"] <= 0.05
    assert module.extractor_name().startswith("digits-cnn64@")
