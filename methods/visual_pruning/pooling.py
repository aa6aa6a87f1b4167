"""Pooling: average the visual tokens of each cell of a coarser grid.

The plainest reduction that loses no part of the picture, and a control that leaves little of many
gains: it looks at neither attention nor question. Averages are taken behind the projector.

Source: adaptive average pooling, the training-free baseline that the survey arXiv 2507.20198 names.
Where the budget is no product of rows and columns, some rows have one cell more than others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.visual_pruning.common import VisualTokenMethod, shared_tiles, tile_grid
from models.vision_language import Merged, Seen, VisionLanguage, VisualPlan
from models.vision_language_towers import Grid


@dataclass(frozen=True, kw_only=True)
class Pooling(VisualTokenMethod):
    """Average pooling of each tile; a cell's mean stands in the place of its middle."""

    role = "control"

    def plan(self, model: VisionLanguage) -> VisualPlan:
        """Return a plan that averages projected tokens."""
        return VisualPlan(wanted=self.budget, reduce=self._reduce, positions=self.positions)

    def _reduce(self, seen: Seen) -> Merged:
        layout = seen.layout
        anchors, means = [], []
        for own, share in shared_tiles(layout, self.budget(seen.num_patches)):
            weights, middles = cells(tile_grid(layout, own), share)
            weights = weights.to(seen.projected.device, seen.projected.dtype)
            seen.count(2.0 * weights.numel() * seen.projected.shape[1])
            anchors.append(own[middles.to(own.device)])
            means.append(weights @ seen.projected[own])
        order = torch.cat(anchors).sort()
        return Merged(order.values, embeddings=torch.cat(means)[order.indices])


def cells(grid: Grid, budget: int) -> tuple[Tensor, Tensor]:
    """Cut a grid into cells, row by row.

    Windows are those of adaptive average pooling: they overlap where they do not divide.

    Args:
        grid: Rows and columns.
        budget: Cells, at most the places.

    Returns:
        Weights of the mean of each cell, (budget, places), and the place in the middle of each,
        ascending, (budget,).
    """
    weights = torch.zeros(budget, grid.rows * grid.columns)
    middles = []
    if not budget:
        return weights, torch.zeros(0, dtype=torch.int64)
    # Cells as square as may be, and no more in a row than there are columns.
    wanted = round((budget * grid.rows / grid.columns) ** 0.5)
    bands = min(max(wanted, -(-budget // grid.columns), 1), grid.rows, budget)
    number = 0
    for band in range(bands):
        top, bottom = _window(band, bands, grid.rows)
        count = (band + 1) * budget // bands - band * budget // bands
        for cell in range(count):
            left, right = _window(cell, count, grid.columns)
            rows = torch.arange(top, bottom)[:, None]
            places = (rows * grid.columns + torch.arange(left, right)).flatten()
            weights[number, places] = 1 / len(places)
            middles.append((top + bottom - 1) // 2 * grid.columns + (left + right - 1) // 2)
            number += 1
    return weights, torch.tensor(middles)


def _window(number: int, count: int, length: int) -> tuple[int, int]:
    return number * length // count, -(-(number + 1) * length // count)
