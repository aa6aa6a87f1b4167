"""Down-sampling: make the image smaller, so that the tower has fewer patches to look at.

The control that no pruner should lose to: it needs no choice and makes the tower cheaper as well.
VTC-Bench (arXiv 2510.07143) found that it beats many methods on common benchmarks, and judges them
by the questions that it gets wrong.

The image is resized by area (bilinear, antialiased) and the tower's position embeddings are
interpolated, as transformers does for CLIP. The grid is the one of exactly as many patches whose
proportions are closest to the tower's own, at most 2:1 off them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from methods.visual_pruning.common import VisualTokenMethod
from models.base import Unsupported
from models.vision_language import VisionLanguage, VisualPlan
from models.vision_language_towers import Grid


@dataclass(frozen=True, kw_only=True)
class Downsampling(VisualTokenMethod):
    """A smaller image, the same for every tile."""

    role = "control"

    def plan(self, model: VisionLanguage) -> VisualPlan:
        """Return a plan that shrinks the image."""
        return VisualPlan(shrink=self._grid, wanted=self.budget, positions=self.positions)

    def _grid(self, grid: Grid, tiles: int) -> Grid:
        budget = self.budget(tiles * grid.rows * grid.columns)
        if budget % tiles:
            raise Unsupported(
                f"downsampling gives each of {tiles} tiles as many tokens; {budget} cannot be "
                f"divided so."
            )
        return smaller_grid(grid, budget // tiles)


def smaller_grid(grid: Grid, budget: int) -> Grid:
    """Return the grid of exactly `budget` places that is most like another one.

    Args:
        grid: Rows and columns; no side of the result is longer.
        budget: At most its places.

    Raises:
        models.base.Unsupported: There is none within 2:1 of its proportions; names the nearest
            number that has one.
    """

    def bend(rows: int, columns: int) -> float:
        return abs(math.log((rows / columns) / (grid.rows / grid.columns)))

    found = {
        rows * columns: Grid(rows, columns)
        # The best shape of each number comes last.
        for rows, columns in sorted(
            (
                (rows, columns)
                for rows in range(1, grid.rows + 1)
                for columns in range(1, grid.columns + 1)
                if bend(rows, columns) <= math.log(2) + 1e-9
            ),
            key=lambda shape: (-bend(*shape), -shape[0]),
        )
    }
    if budget not in found:
        nearest = min(found, key=lambda count: (abs(count - budget), count))
        raise Unsupported(
            f"no grid of {budget} patches has the proportions of {grid.rows} x {grid.columns}; "
            f"{nearest} can be had."
        )
    return found[budget]
