"""Draws batches of scenes with torch, on any device: pixel for pixel what `raster` draws.

All arithmetic is on integers, so that devices cannot differ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.embedded.scenes.font import CELL, glyphs
from models.embedded.scenes.generator import (
    MAX_CHARACTERS,
    MAX_OBJECTS,
    MAX_RADIUS,
    templates,
)
from models.embedded.scenes.raster import DARK, LIGHT, TEXT_OWNER


class RasterBatch(NamedTuple):
    """Drawn scenes: image (batch, 3, size, size) and owner (batch, size, size), both uint8."""

    image: Tensor
    owner: Tensor


class Renderer:
    """Tables of one device and image size, and the drawing."""

    def __init__(self, size: int, device: torch.device | str) -> None:
        self.size = size
        self._shapes = torch.from_numpy(templates()).flatten().to(device)
        self._glyphs = torch.from_numpy(glyphs()).flatten().to(device).bool()
        steps = torch.arange(size, device=device)
        self._y, self._x = steps[:, None], steps[None, :]

    @torch.no_grad()
    def render(self, packed: Tensor) -> RasterBatch:
        """Draw scenes from what `Scene.pack` returns, (batch, PACKED), integers."""
        rows = packed.long()[:, :, None, None]
        owner = torch.zeros(
            (len(rows), self.size, self.size), dtype=torch.uint8, device=rows.device
        )
        image = self._background(rows)
        side = 2 * MAX_RADIUS
        for place in range(MAX_OBJECTS):
            shape, radius, cx, cy, *rgb = rows[:, 17 + 7 * place : 24 + 7 * place].unbind(1)
            i, j = self._x - (cx - radius), self._y - (cy - radius)
            near = (i >= 0) & (j >= 0) & (i < 2 * radius) & (j < 2 * radius)
            where = ((shape * (MAX_RADIUS + 1) + radius) * side + j) * side + i
            inside = near & self._shapes[where.where(near, 0)]
            owner.masked_fill_(inside, place + 1)
            image = torch.where(inside[:, None], torch.stack(rgb, 1), image)
        length, codes = rows[:, 8], rows[:, 9 : 9 + MAX_CHARACTERS, 0, 0]
        left, top, scale, inverted = rows[:, 13:17].unbind(1)
        scale = scale.clamp(min=1)
        i, j = self._x - left, self._y - top
        width, height = length * CELL * scale, (CELL + 1) * scale
        plate = (i >= 0) & (j >= 0) & (i < width) & (j < height)
        column, line = (i // scale).where(plate, 0), (j // scale).where(plate, 0)
        written = (column // CELL).clamp(max=MAX_CHARACTERS - 1)
        code = codes.gather(1, written.flatten(1)).view_as(written)
        on_glyph = plate & (line < CELL)
        where = (code * CELL + line) * CELL + column % CELL
        drawn = on_glyph & self._glyphs[where.where(on_glyph, 0)]
        # Ink where the glyph is, paper elsewhere; inverted plates swap the two.
        dark = drawn ^ (inverted == 0)
        shade = torch.where(dark, DARK, LIGHT)
        image = torch.where(plate[:, None], shade[:, None], image)
        owner.masked_fill_(plate, TEXT_OWNER)
        return RasterBatch(image.to(torch.uint8), owner)

    def _background(self, rows: Tensor) -> Tensor:
        pattern, _, _, _, tone, first, second, third = rows[:, :8].unbind(1)
        first = first.clamp(min=1)
        x, y = self._x, self._y
        along = torch.where(
            second == 0,
            x,
            torch.where(second == 1, y, torch.where(second == 2, x + y, x - y + 4 * self.size)),
        )
        striped = (along + third) // first % 2
        dx, dy = (x + second) % first - first // 2, (y + third) % first - first // 2
        dotted = (2 * (dx * dx + dy * dy) <= first).long()
        checkered = ((x + second) // first + (y + third) // first) % 2
        bit = striped * (pattern == 1) + dotted * (pattern == 2) + checkered * (pattern == 3)
        return rows[:, 1:4] + (tone * bit)[:, None]


def tiles(images: Tensor) -> Tensor:
    """Cut (batch, 3, 2s, 2s) into thumbnails and crops, (batch, 5, 3, s, s), uint8."""
    half = images.shape[-1] // 2
    blocks = images.view(-1, 3, half, 2, half, 2).long().sum((3, 5))
    thumbnails = ((blocks + 2) // 4).to(torch.uint8)
    crops = [images[..., :half, :half], images[..., :half, half:]]
    crops += [images[..., half:, :half], images[..., half:, half:]]
    return torch.stack([thumbnails, *crops], 1)
