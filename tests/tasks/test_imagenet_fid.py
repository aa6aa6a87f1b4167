"""imagenet-fid: names, files, and the protocol on a stand-in for Inception."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.base import Unsupported
from models.embedded.digits_cnn64.model import frechet_distance
from tasks import image_scorers as rules
from tasks import imagenet_fid as module
from tasks.imagenet_fid import STATISTICS, WEIGHTS, ImagenetFid, read_reference
from tests.tasks.test_imagenet_fid_mini import outputs_of, whole

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]
DIM, SPATIAL = 12, 9


def stand_in(pixels: Pixels) -> tuple[Floats, Floats, Floats]:
    """Features of the sizes that a test can afford, and probabilities."""
    flat = pixels.reshape(len(pixels), -1).astype(np.float64) / 255
    mixing = np.random.default_rng(0).normal(size=(flat.shape[1], DIM + SPATIAL + 5)) / 10
    found = flat @ mixing
    logits = torch.from_numpy(found[:, DIM + SPATIAL :])
    return found[:, :DIM], found[:, DIM : DIM + SPATIAL], logits.softmax(1).numpy()


def pictures(count: int, seed: int, low: int = 0) -> Pixels:
    draw = np.random.default_rng(seed)
    return draw.integers(low, 256, (count, 6, 6, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reference by the stand-in, in the file's own layout."""
    pool, spatial, _ = stand_in(pictures(1000, 1))
    np.savez(
        tmp_path / STATISTICS,
        mu=pool.mean(0).astype(np.float32),
        sigma=np.cov(pool, rowvar=False).astype(np.float32),
        mu_s=spatial.mean(0),
        sigma_s=np.cov(spatial, rowvar=False),
        arr_0=pictures(150, 2),
    )
    (tmp_path / WEIGHTS).write_bytes(b"stand-in")
    monkeypatch.setattr(module, "inception", lambda weights: stand_in)
    monkeypatch.setattr(module, "_POOL", DIM)
    monkeypatch.setattr(module, "_SUBSET", 100)
    return tmp_path


def test_fid_is_the_name_of_fifty_thousand_images_alone(folder: Path) -> None:
    def names(images: int) -> list[str]:
        return [metric.name for metric in ImagenetFid(images=images, folder=str(folder)).metrics]

    official = names(50_000)
    hashes = (module.file_hash(folder / WEIGHTS)[:8], module.file_hash(folder / STATISTICS)[:8])
    assert official[0] == f"fid[inception@{hashes[0]} | ref=adm-train@{hashes[1]} | n=50000]"
    assert official[1].startswith("sfid[")
    assert official[2].startswith("fid-infinity[")
    for images in (49_999, 50_001, 5000, 10):
        assert not any("fid" in name for name in names(images))
    limited = ImagenetFid(folder=str(folder)).limited(20)
    assert limited.images == 1000
    assert limited.metrics[0].name == official[0].replace("fid[", "fd[").replace("50000", "1000")
    # Another reference file is another metric.
    np.savez(folder / STATISTICS, mu=np.zeros(DIM))
    assert names(50_000)[0] != official[0]


def test_each_class_has_fifty_images_and_no_part_is_sorted() -> None:
    task = ImagenetFid()
    classes = [label for item in task.items() for label in item.fields["classes"]]
    assert np.bincount(classes).tolist() == [50] * 1000
    assert len(set(classes[:5000])) == 1000


def test_what_is_missing_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = ImagenetFid(folder=str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match=r"extra 'image'.*pip install -e '\.\[image\]'"):
        task.conditions()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(Unsupported, match=STATISTICS):
        task.conditions()
    (tmp_path / STATISTICS).write_bytes(b"no archive")
    with pytest.raises(Unsupported, match=WEIGHTS):
        task.conditions()
    (tmp_path / WEIGHTS).write_bytes(b"weights")
    assert task.conditions().keys() == {"reference", "inception"}
    with pytest.raises(Unsupported, match="no reference batch"):
        read_reference(tmp_path / STATISTICS)


def test_all_numbers_are_those_of_the_parts(folder: Path) -> None:
    task = ImagenetFid(images=240, batch=20, folder=str(folder))
    pixels = pictures(240, 3, low=40)
    draws = np.concatenate([whole(task), np.zeros((2, 12), dtype=np.int64)])
    found = task.corpus(outputs_of(task, pixels), draws)
    assert found.keys() == {metric.name for metric in task.metrics if metric.kind == "corpus"}
    values = {name.split("[")[0]: column for name, column in found.items()}
    assert all(np.isnan(column[1:]).all() for column in values.values())
    pool, spatial, probabilities = stand_in(pixels)
    reference = read_reference(folder / STATISTICS)
    theirs = stand_in(reference.images)[0]
    once = np.ones((1, 240))
    expected = {
        "fd": rules.frechet_resamples(pool, reference.pool, once)[0],
        "sfd": frechet_distance(rules.weighted_moments(spatial, once[0]), reference.spatial),
        "fd-infinity": rules.fid_infinity(pool, reference.pool).value,
        "fd-infinity-error": rules.fid_infinity(pool, reference.pool).standard_error,
        "kid": rules.kid_subsets(pool, theirs, size=100),
        "inception-score": rules.inception_score(probabilities),
        "precision": rules.precision_recall(pool, theirs, once).precision[0],
        "recall": rules.precision_recall(pool, theirs, once).recall[0],
    }
    assert {name: column[0] for name, column in values.items()} == pytest.approx(expected)
    assert reference.pool.mean.dtype == np.float64


class Small(torch.nn.Module):
    """The parts of Inception that are hooked, small."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__()
        self.Mixed_6d = torch.nn.Module()
        self.Mixed_6d.branch1x1 = torch.nn.Conv2d(3, 8, 1)
        self.arguments = arguments

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert images.dtype == torch.uint8
        inner = self.Mixed_6d.branch1x1(images.float()[:, :, :17, :17])
        return inner.mean((2, 3)), inner.sum((2, 3))


def test_the_inner_layer_is_read_channels_last_and_batches_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(source, "FeatureExtractorInceptionV3", Small)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.save({"weight": torch.zeros(1)}, tmp_path / WEIGHTS)
    network = module.Inception(tmp_path / WEIGHTS)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 20, 20, 3), dtype=np.uint8)
    pool, spatial, probabilities = network(pixels)
    assert (pool.shape, spatial.shape, probabilities.shape) == ((70, 8), (70, 2023), (70, 8))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    with torch.no_grad():
        inner = network._network.Mixed_6d.branch1x1(images.float()[:, :, :17, :17])
    expected = inner[69, :7, 3, 5].numpy()
    assert spatial[69].reshape(17, 17, 7)[3, 5] == pytest.approx(expected, rel=1e-5)
    assert probabilities.sum(1) == pytest.approx(np.ones(70))


def test_the_network_hooked_is_torch_fidelitys_own() -> None:
    source = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    with torch.device("meta"):
        block = source.InceptionC(768, channels_7x7=160)
    # `mixed_6/conv` of the graph: a 1 x 1 convolution to 192 channels, normalised, then ReLU.
    assert block.branch1x1.conv.weight.shape == (192, 768, 1, 1)


def test_weights_that_are_more_than_weights_are_not_loaded(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1), "path": tmp_path}, tmp_path / WEIGHTS)
    with pytest.raises(Unsupported, match="more than weights"):
        module.Inception(tmp_path / WEIGHTS)
