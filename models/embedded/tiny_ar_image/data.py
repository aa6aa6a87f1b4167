"""Rendered class-conditional images: ten digits and ten scenes, 64x64 RGB, on rich textures.

An image is a pure function of (seed, split, index). All its randomness comes from an integer hash
of a key, and the key is a bijection of the image's place in one numbering of all splits: two
different images never share a key, so train and held-out images are disjoint by construction, and
any image can be rendered alone, in any order, on a CPU or a GPU. Integer draws are equal
everywhere; floating-point sums may round differently on another device, by one grey level.

Why so much texture: on flat backgrounds the next token is nearly certain, every decoding method
looks good and relaxed ones cannot be told apart; real image models spread their probability over
many codes. Value noise whose cells are about as large as
a token makes each token hard to guess from its neighbours, while shape and class stay plain to see.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

IMAGE_SIZE = 64
CLASSES = (
    *(f"digit {digit}" for digit in range(10)),
    "stripes",
    "checks",
    "rings",
    "dots",
    "clouds",
    "cells",
    "disc",
    "triangle",
    "cross",
    "bricks",
)
# First number and size of each split in the common numbering.
SPLITS = MappingProxyType(
    {
        "train": (0, 1 << 30),
        "validation": (1 << 30, 1 << 30),
        "reference": (1 << 31, 1 << 30),
        "warm-up": (3 << 30, 1 << 30),
    }
)
_MASK = 0xFFFFFFFF


def labels_of(indices: Tensor) -> Tensor:
    """Return the class of each image, (images,), int64: classes take turns."""
    return indices % len(CLASSES)


def keys_of(indices: Tensor, split: str, seed: int = 0) -> Tensor:
    """Return the key that all randomness of an image comes from, (images,), int64 in [0, 2**32).

    For one seed this is a bijection of (split, index).

    Raises:
        ValueError: The split is unknown, or an index lies outside it.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}.")
    first, size = SPLITS[split]
    if len(indices) and not (int(indices.min()) >= 0 and int(indices.max()) < size):
        raise ValueError(f"indices of split {split!r} must lie in [0, {size}).")
    offset = _hash(torch.tensor(seed)).to(indices.device)
    return _hash((indices + first) ^ offset)


def render(
    indices: Tensor | Sequence[int],
    split: str,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Render images.

    Args:
        indices: Numbers of the images within their split, (images,).
        split: One of `SPLITS`.
        seed: Another seed is another data set.
        device: Where to render.

    Returns:
        Images, (images, 3, 64, 64), uint8, and labels, (images,), int64, on `device`.
    """
    indices = torch.as_tensor(indices, dtype=torch.int64, device=device)
    labels = labels_of(indices)
    draws = _Draws(keys_of(indices, split, seed))
    images = torch.empty(len(indices), 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8, device=device)
    for label in range(len(CLASSES)):
        chosen = (labels == label).nonzero().squeeze(1)
        if len(chosen):
            images[chosen] = _render_class(draws.part(chosen), label)
    return images, labels


def render_range(
    count: int,
    split: str,
    *,
    first: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    batch: int = 2000,
) -> tuple[Tensor, Tensor]:
    """Render images `first` to `first + count` in batches; see `render`."""
    images, labels = [], []
    for start in range(first, first + count, batch):
        indices = torch.arange(start, min(start + batch, first + count))
        rendered = render(indices, split, seed=seed, device=device)
        images.append(rendered[0])
        labels.append(rendered[1])
    return torch.cat(images), torch.cat(labels)


def _hash(values: Tensor) -> Tensor:
    """Mix 32-bit integers held in int64; a bijection (two multiply-xorshift rounds)."""
    values = values & _MASK
    values = ((values ^ (values >> 16)) * 0x7FEB352D) & _MASK
    values = ((values ^ (values >> 15)) * 0x846CA68B) & _MASK
    return values ^ (values >> 16)


class _Draws:
    """Uniform numbers of a batch of images; each call draws from its own stream."""

    def __init__(self, keys: Tensor) -> None:
        self._keys = keys
        self._streams = 0

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def device(self) -> torch.device:
        return self._keys.device

    def part(self, chosen: Tensor) -> _Draws:
        return _Draws(self._keys[chosen])

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return numbers in [low, high), (images, *shape), float32."""
        self._streams += 1
        cells = torch.arange(math.prod(shape), device=self.device) + (self._streams << 20)
        # Hashing the cell before the key is mixed in keeps two images from drawing the same
        # sequence, shifted.
        mixed = _hash(self._keys[:, None] ^ _hash(cells)[None])
        numbers = (mixed >> 8).to(torch.float32) * 2.0**-24
        return (low + (high - low) * numbers).view(len(self), *shape)

    def scalar(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return one number an image, (images, 1, 1), to go with pixel coordinates."""
        return self.uniform(1, 1, low=low, high=high)

    def noise(self, cells: int, channels: int) -> Tensor:
        """Return value noise in [-1, 1], (images, channels, 64, 64), `cells` to a side."""
        side = cells + 2
        lattice = self.uniform(channels, side, side, low=-1, high=1)
        shift = self.uniform(2)
        steps = torch.arange(IMAGE_SIZE, device=self.device) * (cells / IMAGE_SIZE)
        places = (shift[:, :, None] + steps) * (2 / (side - 1)) - 1
        x = places[:, 0, None, :].expand(-1, IMAGE_SIZE, -1)
        y = places[:, 1, :, None].expand(-1, -1, IMAGE_SIZE)
        return F.grid_sample(lattice, torch.stack([x, y], -1), align_corners=True)


def _render_class(draws: _Draws, label: int) -> Tensor:
    """Return images of one class, (images, 3, 64, 64), uint8."""
    axis = (torch.arange(IMAGE_SIZE, device=draws.device) + 0.5) * (2 / IMAGE_SIZE) - 1
    x = axis[None, None, :].expand(len(draws), IMAGE_SIZE, IMAGE_SIZE)
    y = axis[None, :, None].expand(len(draws), IMAGE_SIZE, IMAGE_SIZE)
    ink = _digit(draws, x, y, label) if label < 10 else _SCENES[CLASSES[label]](draws, x, y)
    return _paint(draws, ink, x, y)


def _paint(draws: _Draws, ink: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Blend two textured colours by `ink`, (images, 64, 64) in [0, 1]."""
    dark, light = draws.scalar(0.18, 0.38), draws.scalar(0.62, 0.82)
    inverted = draws.scalar() < 0.5
    ground = torch.where(inverted, light, dark)
    figure = torch.where(inverted, dark, light)
    colours = []
    for luminance in (ground, figure):
        hue, saturation = draws.scalar(), draws.scalar(0.03, 0.16)
        thirds = torch.arange(3, device=draws.device).view(1, 3, 1) / 3
        tint = saturation * torch.cos(2 * math.pi * (hue + thirds))
        colours.append((luminance + tint)[..., None])
    image = torch.lerp(colours[0], colours[1], ink[:, None])

    angle = draws.scalar(0, 2 * math.pi)
    along = x * angle.cos() + y * angle.sin()
    shade = draws.scalar(0, 0.12) * along
    # A weak grating under everything, so that stripes alone do not make the class.
    angle, frequency = draws.scalar(0, math.pi), draws.scalar(4, 8)
    across = x * angle.cos() + y * angle.sin()
    phase = draws.scalar(0, 2 * math.pi)
    shade = shade + draws.scalar(0, 0.06) * torch.sin(math.pi * frequency * across + phase)
    shade = shade + draws.scalar(0.05, 0.2) * draws.noise(6, 1)[:, 0]
    shade = shade + draws.scalar(*GRAIN) * draws.noise(15, 1)[:, 0]
    tints = draws.scalar(*TINT)[..., None] * draws.noise(12, 3)
    image = image + shade[:, None] + tints
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


# Ranges of the amplitudes of noise with cells of about a token: brightness, and each colour.
GRAIN = (0.15, 0.3)
TINT = (0.1, 0.2)


def _edge(distance: Tensor, softness: float | Tensor = 0.03) -> Tensor:
    """Return 1 where a signed distance is negative, 0 where positive, softly in between."""
    return (0.5 - distance / (2 * softness)).clamp(0, 1)


def _placed(
    draws: _Draws, x: Tensor, y: Tensor, *, turn: float, shift: float, size: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return the coordinates of a figure that is turned, shifted and scaled at random."""
    angle = draws.scalar(-turn, turn)
    x = x - draws.scalar(-shift, shift)
    y = y - draws.scalar(-shift, shift)
    scale = draws.scalar(*size)
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    return x * cosine + y * sine, y * cosine - x * sine


def _arc(
    centre: tuple[float, float], radii: tuple[float, float], start: float, end: float, pieces: int
) -> list[tuple[float, float]]:
    """Return points of an ellipse's arc; angles in degrees, 0 right, 90 down."""
    angles = [math.radians(start + (end - start) * n / pieces) for n in range(pieces + 1)]
    return [
        (centre[0] + radii[0] * math.cos(a), centre[1] + radii[1] * math.sin(a)) for a in angles
    ]


# Each digit's strokes in a box of x in [-0.6, 0.6] and y in [-1, 1], y downwards.
_STROKES: tuple[list[list[tuple[float, float]]], ...] = (
    [_arc((0, 0), (0.56, 0.92), 0, 360, 18)],
    [[(-0.3, -0.55), (0.08, -0.93), (0.08, 0.95)]],
    [[*_arc((0, -0.42), (0.5, 0.5), 190, 385, 10), (-0.5, 0.93), (0.55, 0.93)]],
    [
        [
            *_arc((-0.05, -0.46), (0.48, 0.46), 205, 450, 9),
            *_arc((-0.05, 0.46), (0.54, 0.46), -90, 150, 9),
        ]
    ],
    [[(0.25, 0.95), (0.25, -0.93), (-0.58, 0.35), (0.6, 0.35)]],
    [
        [
            (0.48, -0.92),
            (-0.36, -0.92),
            (-0.42, -0.12),
            *_arc((-0.02, 0.35), (0.52, 0.58), 225, 495, 11),
        ]
    ],
    [[(0.32, -0.93), (-0.1, -0.5), (-0.46, 0.15)], _arc((0, 0.42), (0.5, 0.5), 0, 360, 14)],
    [[(-0.52, -0.9), (0.52, -0.9), (-0.12, 0.95)]],
    [_arc((0, -0.46), (0.42, 0.44), 0, 360, 12), _arc((0, 0.46), (0.52, 0.48), 0, 360, 13)],
    [_arc((0, -0.42), (0.5, 0.5), 0, 360, 14), [(0.5, -0.4), (0.42, 0.25), (0.05, 0.95)]],
)


def _digit(draws: _Draws, x: Tensor, y: Tensor, digit: int) -> Tensor:
    """Return the ink of a digit written with a slanted, wavering pen."""
    x, y = _placed(draws, x, y, turn=0.3, shift=0.16, size=(0.55, 0.8))
    x = x + draws.scalar(-0.25, 0.25) * y
    wave = draws.uniform(4, 1, 1, low=0, high=2 * math.pi)
    strength = draws.uniform(4, 1, 1, low=0, high=0.07)
    bent = x + strength[:, 0] * torch.sin(2.2 * y + wave[:, 0])
    bent = bent + strength[:, 1] * torch.sin(4.1 * y + wave[:, 1])
    y = y + strength[:, 2] * torch.sin(2.6 * x + wave[:, 2])
    x = bent * draws.scalar(0.85, 1.15)
    distance = torch.full_like(x, torch.inf)
    for stroke in _STROKES[digit]:
        for (x0, y0), (x1, y1) in itertools.pairwise(stroke):
            dx, dy = x1 - x0, y1 - y0
            length = dx * dx + dy * dy
            if length < 1e-12:
                continue
            share = (((x - x0) * dx + (y - y0) * dy) / length).clamp(0, 1)
            squared = (x - x0 - share * dx) ** 2 + (y - y0 - share * dy) ** 2
            distance = torch.minimum(distance, squared)
    return _edge(distance.sqrt() - draws.scalar(0.12, 0.2), 0.05)


def _stripes(draws: _Draws, x: Tensor, y: Tensor) -> Tensor:
    x, y = _placed(draws, x, y, turn=math.pi / 2, shift=1, size=(0.14, 0.26))
    return _edge(torch.sin(math.pi / 2 * x + draws.scalar(0, 0.4) * torch.sin(0.5 * y)), 0.25)


def _checks(draws: _Draws, x: Tensor, y: Tensor) -> Tensor:
    x, y = _placed(draws, x, y, turn=0.4, shift=1, size=(0.24, 0.4))
    return _edge(torch.sin(math.pi / 2 * x) * torch.sin(math.pi / 2 * y), 0.12)


def _rings(draws: _Draws, x: Tensor, y: Tensor) -> Tensor:
    x, y = _placed(draws, x, y, turn=0, shift=0.35, size=(0.14, 0.24))
    return _edge(torch.sin(math.pi / 2 * (x * x + y * y).sqrt() + draws.scalar(0, 6.28)), 0.25)


def _dots(draws: _Draws, x: Tensor, y: Tensor) -> Tensor:
    x, y = _placed(draws, x, y, turn=math.pi / 4, shift=1, size=(0.4, 0.55))
    x, y = x - x.round(), y - y.round()
    return _edge((x * x + y * y).sqrt() - draws.scalar(0.24, 0.34), 0.06)


def _clouds(draws: _Draws, x: Tensor, y: Tensor) -> Tensor:
    del x, y
    field = draws.noise(3, 1)[:, 0] + 0.5 * draws.noise(6, 1)[:, 0]
    return (0.5 + 0.9 * field).clamp(0, 1)


def _cells(draws: _Draws, x: Tensor, y: Tensor) -> Tensor:
    count = 14
    places = draws.uniform(2, count, low=-1.1, high=1.1)
    levels = draws.uniform(count)
    best = torch.full_like(x, torch.inf)
    second = best.clone()
    level = torch.zeros_like(x)
    for cell in range(count):
        squared = (x - places[:, 0, cell, None, None]) ** 2
        distance = (squared + (y - places[:, 1, cell, None, None]) ** 2).sqrt()
        nearer = distance < best
        second = torch.where(nearer, best, torch.minimum(second, distance))
        level = torch.where(nearer, levels[:, cell, None, None], level)
        best = torch.minimum(best, distance)
    # Cells in the ground's half of the range, the walls between them in the figure's colour.
    return torch.maximum(0.45 * level, _edge(second - best - 0.07, 0.03))


def _disc(draws: _Draws, x: Tensor, y: Tensor) -> Tensor:
    x, y = _placed(draws, x, y, turn=math.pi, shift=0.25, size=(0.45, 0.75))
    return _edge((x * x + y * y * draws.scalar(1, 1.3)).sqrt() - 1, 0.05)


def _triangle(draws: _Draws, x: Tensor, y: Tensor) -> Tensor:
    x, y = _placed(draws, x, y, turn=math.pi, shift=0.2, size=(0.36, 0.5))
    sides = [
        x * math.cos(angle) + y * math.sin(angle)
        for angle in (math.pi / 2, math.pi * 7 / 6, math.pi * 11 / 6)
    ]
    return _edge(torch.stack(sides).amax(0) - 0.85, 0.06)


def _cross(draws: _Draws, x: Tensor, y: Tensor) -> Tensor:
    x, y = _placed(draws, x, y, turn=math.pi / 4, shift=0.2, size=(0.6, 0.85))
    width = draws.scalar(0.2, 0.32)
    near, far = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
    return _edge(torch.maximum(near - width, far - 1), 0.04)


def _bricks(draws: _Draws, x: Tensor, y: Tensor) -> Tensor:
    x, y = _placed(draws, x, y, turn=0.15, shift=1, size=(0.34, 0.5))
    row = torch.floor(y)
    x = x * 0.55 + 0.5 * (row % 2)
    mortar = draws.scalar(0.07, 0.12)
    across = (0.5 - (x - torch.floor(x) - 0.5).abs()) / 0.55
    down = 0.5 - (y - row - 0.5).abs()
    return _edge(torch.minimum(across, down) - mortar, 0.04)


_SCENES: MappingProxyType[str, Callable[[_Draws, Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "stripes": _stripes,
        "checks": _checks,
        "rings": _rings,
        "dots": _dots,
        "clouds": _clouds,
        "cells": _cells,
        "disc": _disc,
        "triangle": _triangle,
        "cross": _cross,
        "bricks": _bricks,
    }
)
