"""ImageNet 256 x 256, class-conditional: FID by the official protocol, and what is shown beside it.

50,000 samples, 50 of each class; Inception's features of 2015 (2,048 of `pool_3`) against the
statistics of ADM's reference file, which are of the training set. FID is that number and no other:
with another number of images (`images=`, `--limit`) the metric is called `fd[…]`.

| metric | of what |
|---|---|
| `fid[…]` | Frechet distance, 50,000 images |
| `sfid[…]` | the same of 7 channels of an inner layer (17 x 17 places), which sees the layout |
| `fid-infinity[…]`, `fid-infinity-error[…]` | at endlessly many images, and its standard error |
| `inception-score[…]` | logits without bias, parts of 5,000 in the order of the images |
| `precision[…]`, `recall[…]` | k = 3, against the file's 10,000 images |
| `kid[…]` | 100 pairs of subsets of 1,000, against the same |
| `nll`, `entropy`, `unique_tokens`, `excess_acceptance` | see `tasks/image_common.py` |

Nothing is downloaded. In `folder` (by default `imagenet-fid` in tokenmark's cache) lie

- `VIRTUAL_imagenet256_labeled.npz`, from openai/guided-diffusion's `evaluations`: mean and
  covariance of both feature sets, and 10,000 images;
- `weights-inception-2015-12-05-6726825d.pth`, from toshas/torch-fidelity's releases.

Names carry the beginning of the hashes of both. Images take turns through the classes, so no part
of the inception score is sorted. There is no resampling: a distance of 2,048 features takes half a
minute, so noise is told by other seeds (`seed=1`, `seed=2`) and by FID-infinity's error.

A run stores each batch as it comes and goes on where it was killed; an image of 256 x 256 takes
about 0.1 MB, 50,000 about 6 GB a method, which scoring holds in memory.

Source: arXiv 1706.08500; ADM, arXiv 2105.05233; the evaluator of openai/guided-diffusion, whose
features torch-fidelity's Inception repeats (TensorFlow's bilinear resizing included).
Choice of ours: sFID's layer, `mixed_6/conv` of the graph, is taken as the output of the 1 x 1
branch of `Mixed_6d` behind its ReLU, channels last as in the graph.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.base import Unsupported
from models.cache import cache_dir
from tasks.base import Dataset, Metric
from tasks.image_common import IMAGES_PER_FEATURE, Floats, ImageTask, Pixels, features_of

if TYPE_CHECKING:
    from torch import Tensor

    from models.embedded.digits_cnn64.model import Moments

OFFICIAL_IMAGES = 50_000
STATISTICS = "VIRTUAL_imagenet256_labeled.npz"
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
_CLASSES = 1000
_POOL = 2048
_SPATIAL_CHANNELS = 7
_SUBSET = 1000
_BATCH = 64
# Names of metrics, better when high or low; those with "fd" are distances of Gaussians.
_LOWER = ("fd", "sfd", "fd-infinity", "fd-infinity-error", "kid")
_HIGHER = ("inception-score", "precision", "recall")


class Reference(NamedTuple):
    """What images are compared with.

    Attributes:
        pool, spatial: Moments of both feature sets, of the training images.
        images: The file's own images, (10000, 256, 256, 3), for precision, recall and KID.
    """

    pool: Moments
    spatial: Moments
    images: Pixels


@dataclass(frozen=True, kw_only=True)
class ImagenetFid(ImageTask):
    """Class-conditional images of ImageNet's classes.

    Attributes:
        images: 50,000 for FID.
        folder: Where the reference and Inception's weights are; empty for `imagenet-fid` in
            tokenmark's cache.
    """

    images: int = OFFICIAL_IMAGES
    batch: int = 50
    folder: str = ""

    version = "1.0"
    data = Dataset(
        source="openai/guided-diffusion",
        revision="ADM's reference batch, by its hash",
        split="train (statistics)",
        license="ImageNet's terms",
    )
    needs = ("extra:image",)

    @property
    def classes(self) -> int:
        """ImageNet's."""
        return _CLASSES

    @property
    def quality_metrics(self) -> tuple[Metric, ...]:
        """FID first, by that name at 50,000 images alone; see the module's table."""
        found = []
        for name in (*_LOWER, *_HIGHER):
            if name.startswith("fd-infinity") and self.images < IMAGES_PER_FEATURE * _POOL:
                continue
            if name == "kid" and self.images < _SUBSET:
                continue
            found.append(
                Metric(
                    name=self._name(name),
                    unit="distance" if name in _LOWER else "score",
                    kind="corpus",
                    higher_is_better=name in _HIGHER,
                )
            )
        return tuple(found)

    def conditions(self) -> dict[str, str]:
        """Return the hashes of the reference and of Inception's weights.

        Raises:
            Unsupported: The extra is not installed, or a file is not there.
        """
        if importlib.util.find_spec("torch_fidelity") is None:
            raise Unsupported(
                "task 'imagenet-fid' needs the extra 'image', which is not installed: "
                "pip install -e '.[image]' -c constraints.txt"
            )
        for name in (STATISTICS, WEIGHTS):
            if not (self._folder / name).is_file():
                raise Unsupported(
                    f"task 'imagenet-fid' needs {name} in {self._folder}; `run.py show task "
                    f"imagenet-fid` says where it comes from."
                )
        return {
            "reference": file_hash(self._folder / STATISTICS),
            "inception": file_hash(self._folder / WEIGHTS),
        }

    def corpus(self, outputs: Mapping[str, str], draws: NDArray[np.int64]) -> Mapping[str, Floats]:
        """Return the metrics of all images together; resamples have none."""
        values = self._values(outputs)
        found = {}
        for metric in self.quality_metrics:
            found[metric.name] = np.full(len(draws), np.nan)
            found[metric.name][0] = values[metric.name]
        return found

    def _values(self, outputs: Mapping[str, str]) -> dict[str, float]:
        from models.embedded.digits_cnn64.model import frechet_distance
        from tasks import image_scorers as rules

        network = inception(self._folder / WEIGHTS)
        reference = read_reference(self._folder / STATISTICS)
        (pool, spatial, probabilities), _ = features_of(outputs, network)
        once = np.ones((1, len(pool)))
        values: dict[str, float] = {}
        for name, features, theirs in (
            ("fd", pool, reference.pool),
            ("sfd", spatial, reference.spatial),
        ):
            ours = rules.weighted_moments(features, once[0])
            values[name] = frechet_distance(ours, theirs)
        if self.images >= IMAGES_PER_FEATURE * _POOL:
            limit = rules.fid_infinity(pool, reference.pool)
            values["fd-infinity"], values["fd-infinity-error"] = limit
        their_pool = _reference_features(self._folder / STATISTICS, self._folder / WEIGHTS)
        covered = rules.precision_recall(pool, their_pool, once)
        values["precision"], values["recall"] = float(covered[0][0]), float(covered[1][0])
        values["inception-score"] = rules.inception_score(probabilities)
        if self.images >= _SUBSET:
            values["kid"] = rules.kid_subsets(pool, their_pool, size=_SUBSET)
        return {self._name(name): value for name, value in values.items()}

    @property
    def _folder(self) -> Path:
        return Path(self.folder).expanduser() if self.folder else cache_dir() / "imagenet-fid"

    def _name(self, name: str) -> str:
        """Return a metric's name with all that its number depends on; `fid` at 50,000 alone."""
        if self.images == OFFICIAL_IMAGES:
            name = name.replace("fd", "fid")
        hashes = [
            file_hash(path)[:8] if path.is_file() else "missing"
            for path in (self._folder / WEIGHTS, self._folder / STATISTICS)
        ]
        return f"{name}[inception@{hashes[0]} | ref=adm-train@{hashes[1]} | n={self.images}]"


class Inception:
    """torch-fidelity's Inception with what of it is scored."""

    def __init__(self, weights: Path) -> None:
        """Load the network; on a GPU where there is one.

        Args:
            weights: A file of tensors by name, pickled; nothing else is read from it.

        Raises:
            Unsupported: It holds something else.
        """
        import pickle

        import torch
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            torch.load(weights, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise Unsupported(f"{weights} holds more than weights: {error}") from error
        # Its own loading would read any object, so the file was looked at first.
        self._network = FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=str(weights),
        )
        self._network.to("cuda" if torch.cuda.is_available() else "cpu")
        self._inner: list[Tensor] = []
        # `mixed_6` of the graph is the third block of 17 x 17 behind the reduction.
        self._network.Mixed_6d.branch1x1.register_forward_hook(
            lambda module, inputs, output: self._inner.append(output)
        )

    def __call__(self, pixels: Pixels) -> tuple[Floats, Floats, Floats]:
        """Return pooled features, those of the inner layer, and class probabilities.

        Args:
            pixels: (images, height, width, 3), uint8.

        Returns:
            (images, 2048), (images, 17 * 17 * 7) and (images, 1008), float64.
        """
        import torch

        device = next(self._network.parameters()).device
        parts: list[Sequence[Tensor]] = []
        for part in torch.from_numpy(np.ascontiguousarray(pixels)).split(_BATCH):
            self._inner.clear()
            with torch.no_grad():
                pool, logits = self._network(part.permute(0, 3, 1, 2).to(device))
            spatial = self._inner[0][:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
            parts.append([pool, spatial, logits.double().softmax(dim=1)])
        first, second, third = (
            torch.cat(list(arrays)).double().cpu().numpy() for arrays in zip(*parts, strict=True)
        )
        return first, second, third


@functools.lru_cache(maxsize=1)
def inception(weights: Path) -> Inception:
    """Return the network, loaded once."""
    return Inception(weights)


@functools.lru_cache(maxsize=1)
def _reference_features(statistics: Path, weights: Path) -> Floats:
    return inception(weights)(read_reference(statistics).images)[0]


@functools.lru_cache(maxsize=1)
def read_reference(path: Path) -> Reference:
    """Read ADM's reference file.

    Raises:
        Unsupported: It is damaged, or lacks one of its arrays.
    """
    from models.embedded.digits_cnn64.model import Moments

    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Any] = {
                name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s", "arr_0")
            }
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise Unsupported(f"{path} is no reference batch of ADM: {error}") from error
    means = {name: np.asarray(arrays[name], dtype=np.float64) for name in arrays if name != "arr_0"}
    # How many images the statistics are of is not in the file: ImageNet's training set.
    return Reference(
        Moments(means["mu"], means["sigma"], 1_281_167),
        Moments(means["mu_s"], means["sigma_s"], 1_281_167),
        arrays["arr_0"],
    )


@functools.lru_cache(maxsize=8)
def _hash_of(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(path: Path) -> str:
    """Return a file's SHA-256; read anew when it has changed."""
    status = path.stat()
    return _hash_of(path, status.st_size, status.st_mtime_ns)
