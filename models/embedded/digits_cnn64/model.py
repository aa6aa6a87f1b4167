"""`digits-cnn64`: a small classifier whose 64 averaged features stand in for Inception's.

Its scores are proxy scores: they are written `fd[digits-cnn64@<hash8> | …]` and never FID.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FEATURES = 64


class DigitsCnn64(nn.Module):
    """Three 5x5 convolutions, a global average, a linear head; under 0.1 M parameters.

    The stride of 8 and the kernels of 5 let a feature see 59 of the 64 pixels: a digit must be
    seen whole to be told from its parts.
    """

    def __init__(self, classes: int = 20) -> None:
        super().__init__()
        self.classes = classes
        self.body = nn.Sequential(
            nn.Conv2d(3, 28, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(28),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(28, 36, 5, padding=2, bias=False),
            nn.BatchNorm2d(36),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(36, FEATURES, 5, padding=2, bias=False),
            nn.BatchNorm2d(FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        """Return the averaged features of images in [-1, 1], (images, 64)."""
        out: Tensor = self.body(images).mean((2, 3))
        return out

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images in [-1, 1], (images, classes)."""
        out: Tensor = self.head(self.features(images))
        return out


class Reading(NamedTuple):
    """Features (images, 64) and logits (images, classes), float64."""

    features: Tensor
    logits: Tensor


@torch.no_grad()
def read(model: DigitsCnn64, images: Tensor, *, batch: int = 500) -> Reading:
    """Run uint8 images, (images, 3, 64, 64), wherever they lie, through the model."""
    device = model.head.weight.device
    features = []
    for part in images.split(batch):
        features.append(model.features(part.to(device).float() / 127.5 - 1).cpu())
    found = torch.cat(features).double()
    head = model.head
    logits = found @ head.weight.double().cpu().T + head.bias.double().cpu()
    return Reading(found, logits)


class Moments(NamedTuple):
    """Mean (d,) and covariance (d, d) of features, float64, and the number of images."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    images: int


def moments(features: Tensor) -> Moments:
    """Return the moments of features, (images, d); the covariance divides by N - 1.

    Raises:
        ValueError: The set is smaller than twice the dimension: its covariance means nothing.
    """
    count, dim = features.shape
    if count < 2 * dim:
        raise ValueError(
            f"a Frechet distance of {dim} features needs at least {2 * dim} images a set, "
            f"got {count}."
        )
    values = features.double().cpu().numpy()
    return Moments(values.mean(0), np.cov(values, rowvar=False), count)


def frechet_distance(first: Tensor | Moments, second: Tensor | Moments) -> float:
    """Return the Frechet distance of Gaussians fitted to two sets of features, (images, d).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); the trace of the root is the sum of the roots of
    the eigenvalues of S1 S2, taken complex: rounding makes small ones slightly negative.

    Raises:
        ValueError: A set is smaller than twice the dimension.
    """
    a, b = (some if isinstance(some, Moments) else moments(some) for some in (first, second))
    eigenvalues = np.linalg.eigvals(a.covariance @ b.covariance).astype(np.complex128)
    root_trace = float(np.sqrt(eigenvalues).real.sum())
    gap = a.mean - b.mean
    traces = float(np.trace(a.covariance) + np.trace(b.covariance))
    return float(gap @ gap) + traces - 2 * root_trace


def load_extractor(
    folder: Path = Path(__file__).parent, device: torch.device | str = "cpu"
) -> DigitsCnn64:
    """Load the extractor in float32, in evaluation mode.

    Raises:
        FileNotFoundError: The folder holds no weights.
    """
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no trained weights in {folder}: run "
            f"`python -m models.embedded.digits_cnn64.train --out {folder}`."
        )
    state = {
        name: value if name.endswith("num_batches_tracked") else value.float()
        for name, value in load_file(folder / "model.safetensors").items()
    }
    model = DigitsCnn64(classes=len(state["head.bias"]))
    model.load_state_dict(state)
    return model.to(device).eval().requires_grad_(False)


def weights_label(folder: Path = Path(__file__).parent) -> str:
    """Return the name that scores carry: `digits-cnn64@<first 8 of the weights' SHA-256>`."""
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return f"digits-cnn64@{digest[:8]}"


def save_moments(found: Moments, path: Path) -> None:
    """Write moments as safetensors, float64."""
    tensors = {
        "mean": torch.from_numpy(found.mean),
        "covariance": torch.from_numpy(found.covariance),
        "images": torch.tensor(found.images),
    }
    save_file(tensors, path)


def load_moments(path: Path) -> Moments:
    """Read what `save_moments` wrote."""
    tensors = load_file(path)
    return Moments(
        tensors["mean"].numpy(), tensors["covariance"].numpy(), int(tensors["images"].item())
    )
