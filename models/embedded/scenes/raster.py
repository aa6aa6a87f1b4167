"""Draws one scene with numpy: the picture, and which object owns each pixel."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from models.embedded.scenes.font import CELL, glyphs
from models.embedded.scenes.generator import MAX_OBJECTS, Scene, generate, templates

# The owner of the text plate's pixels; objects are 1 to MAX_OBJECTS, the background 0.
TEXT_OWNER = MAX_OBJECTS + 1
LIGHT, DARK = 250, 12


class Raster(NamedTuple):
    """A drawn scene.

    Attributes:
        image: (size, size, 3), uint8.
        owner: Whose each pixel is, (size, size), uint8: 0 background, 1 to 6 the objects in their
            order, `TEXT_OWNER` the plate.
    """

    image: np.ndarray
    owner: np.ndarray


def render(scene: Scene) -> Raster:
    """Draw a scene; `raster_torch.render_batch` draws the same pixels."""
    size, row = scene.size, scene.pack().astype(np.int64)
    y, x = np.mgrid[:size, :size]
    pattern, red, green, blue, tone, first, second, third = row[:8]
    if pattern == 1:
        along = (x, y, x + y, x - y + 4 * size)[second]
        bit = (along + third) // first % 2
    elif pattern == 2:
        dx, dy = (x + second) % first - first // 2, (y + third) % first - first // 2
        bit = 2 * (dx * dx + dy * dy) <= first
    elif pattern == 3:
        bit = ((x + second) // first + (y + third) // first) % 2
    else:
        bit = np.zeros_like(x)
    image = np.array([red, green, blue]) + (tone * bit)[..., None]
    owner = np.zeros((size, size), np.uint8)
    for place in range(MAX_OBJECTS):
        shape, radius, cx, cy, *rgb = row[17 + 7 * place : 24 + 7 * place]
        window = np.s_[cy - radius : cy + radius, cx - radius : cx + radius]
        inside = templates()[shape, radius, : 2 * radius, : 2 * radius]
        image[window][inside] = rgb
        owner[window][inside] = place + 1
    length, codes, (left, top, scale, inverted) = row[8], row[9:13], row[13:17]
    if length:
        ink, paper = (DARK, LIGHT) if inverted else (LIGHT, DARK)
        plate = np.s_[top : top + (CELL + 1) * scale, left : left + CELL * scale * length]
        image[plate], owner[plate] = paper, TEXT_OWNER
        for place, code in enumerate(codes[:length]):
            start = left + place * CELL * scale
            window = np.s_[top : top + CELL * scale, start : start + CELL * scale]
            drawn = glyphs()[code].repeat(scale, 0).repeat(scale, 1).astype(bool)
            image[window][drawn] = ink
    return Raster(image.astype(np.uint8), owner)


@functools.cache
def picture(key: str) -> np.ndarray:
    """Return the picture of a scene by its key, drawn once and kept."""
    _, family, size, split, index = key.split("/")
    return render(generate(family, int(size), split, int(index))).image


def mask(raster: Raster, place: int) -> np.ndarray:
    """Return the visible pixels of the object at a place from 0, (size, size), bool."""
    return raster.owner == place + 1


def box(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """Return a mask's box as edges (x0, y0, x1, y1): x1 - x0 is its width in pixels.

    Raises:
        ValueError: The mask is empty.
    """
    rows, columns = np.nonzero(pixels.any(1))[0], np.nonzero(pixels.any(0))[0]
    if not len(rows):
        raise ValueError("an empty mask has no box.")
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def extreme_points(pixels: np.ndarray) -> np.ndarray:
    """Return a mask's four key points: top, right, bottom, left, as (x, y), (4, 2), float.

    Each is the middle of the mask's pixels in its first or last row or column, so that a flat
    edge has one well-defined point.
    """
    x0, y0, x1, y1 = box(pixels)

    def middle(line: np.ndarray) -> float:
        return float(line.nonzero()[0].mean() + 0.5)

    return np.array(
        [
            (middle(pixels[y0]), y0),
            (x1, middle(pixels[:, x1 - 1])),
            (middle(pixels[y1 - 1]), y1),
            (x0, middle(pixels[:, x0])),
        ],
        float,
    )


def tiles(image: np.ndarray) -> np.ndarray:
    """Cut a 2s x 2s image into a thumbnail and four crops, (5, s, s, 3), uint8.

    The thumbnail is the rounded mean of 2x2 pixels; the crops follow in reading order.
    """
    half = len(image) // 2
    blocks = image.reshape(half, 2, half, 2, 3).astype(np.int64).sum((1, 3))
    crops = image.reshape(2, half, 2, half, 3).swapaxes(1, 2).reshape(4, half, half, 3)
    return np.concatenate([((blocks + 2) // 4).astype(np.uint8)[None], crops])
