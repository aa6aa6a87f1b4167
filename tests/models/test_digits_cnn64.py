"""The proxy extractor: its arithmetic, its distortions, and the calibration of its weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor

from models.embedded.digits_cnn64 import model as module
from models.embedded.digits_cnn64.model import (
    FEATURES,
    DigitsCnn64,
    Moments,
    frechet_distance,
    load_extractor,
    load_moments,
    moments,
    read,
    save_moments,
    weights_label,
)
from models.embedded.digits_cnn64.train import augment, calibrate, distortions, train_extractor
from models.embedded.tiny_ar_image.data import CLASSES, render_range

FOLDER = Path(module.__file__).parent


def points(count: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mix


def test_the_distance_of_a_set_to_itself_is_zero_and_distances_are_symmetric():
    first, second = points(500, 6, 0), points(400, 6, 1)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first))


def test_the_distance_scales_turns_and_shifts_as_it_must():
    first, second = points(500, 6, 0), points(400, 6, 1)
    distance = frechet_distance(first, second)
    assert frechet_distance(3 * first, 3 * second) == pytest.approx(9 * distance)
    turn = torch.linalg.qr(points(6, 6, 2)).Q
    assert frechet_distance(first @ turn, second @ turn) == pytest.approx(distance)
    shift = torch.arange(6.0, dtype=torch.float64)
    assert frechet_distance(first, first + shift) == pytest.approx(55, abs=1e-6)


def test_the_distance_of_diagonal_gaussians_is_that_of_their_roots():
    first = Moments(np.zeros(3), np.diag([4.0, 9.0, 0.0]), 100)
    second = Moments(np.ones(3), np.diag([1.0, 16.0, 1.0]), 100)
    assert frechet_distance(first, second) == pytest.approx(3 + 1 + 1 + 1, abs=1e-6)


def test_the_distance_equals_the_one_by_a_matrix_root():
    first, second = points(300, 5, 3), points(300, 5, 4)
    a, b = moments(first), moments(second)
    root = linalg.sqrtm(a.covariance @ b.covariance).real
    wanted = np.trace(a.covariance + b.covariance - 2 * root) + ((a.mean - b.mean) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(wanted)


def test_small_sample_bias_is_that_of_the_second_order_formula():
    # Isotropic, unit variance, exact statistics on the other side, d = 32, N = 1000.
    exact = Moments(np.zeros(32), np.eye(32), 10**9)
    found = []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        found.append(frechet_distance(torch.randn(1000, 32, generator=generator), exact))
    assert np.mean(found) == pytest.approx(32 / 1000 + 32 * 33 / (4 * 999), rel=0.05)


def test_sets_too_small_for_a_covariance_are_refused():
    with pytest.raises(ValueError, match="at least 12 images a set, got 11"):
        frechet_distance(points(11, 6, 0), points(50, 6, 1))


def test_moments_survive_their_file(tmp_path: Path):
    found = moments(points(100, 4, 0))
    save_moments(found, tmp_path / "m.safetensors")
    again = load_moments(tmp_path / "m.safetensors")
    assert again.images == 100
    assert np.array_equal(again.mean, found.mean)
    assert np.array_equal(again.covariance, found.covariance)


def test_the_extractor_is_small_sees_most_of_the_image_and_reads_in_double_precision():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DigitsCnn64().eval()
    assert sum(parameter.numel() for parameter in model.parameters()) < 100_000
    convolutions = [part for part in model.body if isinstance(part, torch.nn.Conv2d)]
    assert len(convolutions) == 3
    images = render_range(5, "validation")[0]
    reading = read(model, images, batch=2)
    assert reading.features.shape == (5, FEATURES)
    assert reading.logits.dtype == torch.float64
    wanted = model(images.float() / 127.5 - 1)
    torch.testing.assert_close(reading.logits.float(), wanted, atol=1e-5, rtol=1e-4)
    # The field of view of one feature: 59 pixels, counted by the gradient away from the edges.
    inputs = torch.zeros(1, 3, 128, 128, requires_grad=True)
    smooth = torch.nn.Sequential(
        *(torch.nn.AvgPool2d(2) if isinstance(p, torch.nn.MaxPool2d) else p for p in model.body)
    )
    for part in convolutions:
        torch.nn.init.constant_(part.weight, 0.01)
    smooth[:-1](inputs + 1)[0, 0, 8, 8].backward()
    assert inputs.grad is not None
    assert int((inputs.grad[0, 0].abs().sum(0) > 0).sum()) == 59


def test_augmentation_is_light_and_leaves_some_images_as_sharp_as_they_were():
    images = render_range(40, "train")[0].float() / 127.5 - 1
    changed = augment(images, torch.Generator().manual_seed(0))
    assert changed.shape == images.shape
    size = 64

    def best_shift(image: Tensor, other: Tensor) -> float:
        return min(
            (image[:, 3 + y : size - 3 + y, 3 + x : size - 3 + x] - other[:, 3:-3, 3:-3])
            .abs()
            .mean()
            .item()
            for y in range(-3, 4)
            for x in range(-3, 4)
        )

    errors = [best_shift(a, b) for a, b in zip(images, changed, strict=True)]
    assert max(errors) < 0.25
    assert min(errors) < 1e-4
    assert any(error > 0.01 for error in errors)
    shifted = [(a - b).abs().mean().item() for a, b in zip(images, changed, strict=True)]
    assert sum(shifted) > 2 * sum(errors)


def test_distortions_are_what_they_are_called():
    images = render_range(20, "validation")[0]
    found = distortions(images, torch.Generator().manual_seed(0))
    grey = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    noisy = distortions(grey, torch.Generator().manual_seed(0))
    assert noisy["noise 0.1"].float().std().item() == pytest.approx(12.75, rel=0.03)
    assert noisy["noise 0.3"].float().std().item() == pytest.approx(38.25, rel=0.03)
    assert torch.equal(noisy["blur 3x3"], grey)
    shuffled = found["patch shuffle"]
    assert not torch.equal(shuffled, images)
    assert torch.equal(shuffled.flatten(2).sort(-1).values, images.flatten(2).sort(-1).values)
    corner = images[:, :, 1:4, 1:4].float().mean((2, 3)).round()
    assert (found["blur 3x3"][:, :, 2, 2].float() - corner).abs().max() <= 1


def test_the_recipe_learns_and_its_file_loads(tmp_path: Path):
    with torch.random.fork_rng():
        model = train_extractor(
            tmp_path, device="cpu", seed=0, steps=12, batch=32, images=60, max_seconds=None
        )
    again = load_extractor(tmp_path)
    images = render_range(6, "validation")[0]
    torch.testing.assert_close(
        read(again, images).features, read(model, images).features, atol=0.02, rtol=0.02
    )
    assert weights_label(tmp_path).startswith("digits-cnn64@")
    rows = (tmp_path / "curve.csv").read_text().splitlines()
    assert rows[0] == "stage,step,seconds,loss,accuracy"


def test_a_folder_without_weights_says_how_to_train_them(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"python -m models\.embedded\.digits_cnn64"):
        load_extractor(tmp_path)


# -------------------------------------------------------------------------- committed weights


def test_the_committed_extractor_recognises_held_out_images():
    images, labels = render_range(600, "validation")
    accuracy = (read(load_extractor(), images).logits.argmax(1) == labels).float().mean()
    assert accuracy >= 0.95


def test_the_committed_extractor_sees_every_distortion():
    distances = calibrate(load_extractor(), count=1000)
    floor = distances.pop("floor")
    assert set(distances) == {
        "blur 3x3",
        "noise 0.1",
        "noise 0.3",
        "patch shuffle",
        "one class only",
    }
    # The floor falls with the number of images: 20-fold is asked at the published 5,000.
    assert min(distances.values()) > 4 * floor
    assert distances["noise 0.3"] > distances["noise 0.1"]


def test_the_published_calibration_holds():
    quality = json.loads((FOLDER / "quality.json").read_text())
    assert quality["model"] == weights_label()
    assert quality["images"] == 5000
    assert all(quality["gates"].values())
    assert set(quality["accuracy_by_class"]) == set(CLASSES)
