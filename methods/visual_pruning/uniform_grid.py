"""Uniform grid: the control that keeps evenly spaced visual tokens.

Rows and columns are evenly spaced, as many as come closest to the budget with cells as square as
the picture's own; what is missing is filled in, and what is too much left out, at even distances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.visual_pruning.common import VisualTokenMethod, shared_tiles, spread_evenly, tile_grid
from models.vision_language import Seen, VisionLanguage, VisualPlan
from models.vision_language_towers import Grid


@dataclass(frozen=True, kw_only=True)
class UniformGrid(VisualTokenMethod):
    """Evenly spaced tokens of each tile."""

    role = "control"

    def plan(self, model: VisionLanguage) -> VisualPlan:
        """Return a plan that keeps evenly spaced patches."""
        return VisualPlan(wanted=self.budget, reduce=self._reduce, positions=self.positions)

    def _reduce(self, seen: Seen) -> Tensor:
        layout = seen.layout
        kept = [
            own[evenly_spaced(tile_grid(layout, own), share).to(own.device)]
            for own, share in shared_tiles(layout, self.budget(seen.num_patches))
        ]
        return torch.cat(kept).sort().values


def evenly_spaced(grid: Grid, budget: int) -> Tensor:
    """Return evenly spaced places of a grid, ascending, exactly `budget` of them.

    Args:
        grid: Rows and columns.
        budget: From 0 to the number of places.
    """
    places = grid.rows * grid.columns
    if budget in (0, places):
        return torch.arange(budget)

    def misfit(shape: tuple[int, int]) -> tuple[int, float]:
        rows, columns = shape
        cells = math.log((grid.rows / rows) / (grid.columns / columns))
        return abs(rows * columns - budget), abs(cells)

    shapes = [
        (rows, columns)
        for rows in range(1, grid.rows + 1)
        for columns in {max(1, budget // rows), -(-budget // rows)}
        if columns <= grid.columns
    ]
    # A shape that misses the budget by up to a tenth may still have the squarer cells.
    slack = budget // 10
    rows, columns = min(
        shapes, key=lambda shape: (max(0, misfit(shape)[0] - slack), misfit(shape)[1])
    )
    lines, posts = spread_evenly(rows, grid.rows), spread_evenly(columns, grid.columns)
    chosen = (lines[:, None] * grid.columns + posts).flatten()
    if len(chosen) > budget:
        return chosen[spread_evenly(budget, len(chosen))]
    others = torch.arange(places)
    others = others[~torch.isin(others, chosen)]
    filled = others[spread_evenly(budget - len(chosen), len(others))]
    return torch.cat([chosen, filled]).sort().values
