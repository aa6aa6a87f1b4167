"""What visual-token methods share: budgets, and choosing tokens by scores, grids and distances.

Everything below the method class is a function of tensors. Token numbers are those of an image's
patches in the order in which the decoder reads them; ties go to the lowest number.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import get_args

import torch
from torch import Tensor

from hardware.profile import Profile
from methods.base import Method, Output
from methods.checks import require_choice, require_number, unsuited
from models.base import VisionLanguageModel
from models.vision_language import Numbering, VisionLanguage, VisualPlan
from models.vision_language_towers import Grid, VisualLayout


@dataclass(frozen=True, kw_only=True)
class VisualTokenMethod(Method[VisionLanguageModel]):
    """A method that reduces an image's visual tokens.

    Attributes:
        keep_ratio: Share of the visual tokens that is kept, in (0, 1]; 1 changes nothing.
            LLaVA-NeXT's separators do not count and stay where nothing else is said.
        positions: Whether the tokens that are left are numbered anew (`compact`) or keep their
            numbers (`original`); `auto` is `compact` for decoders with one axis of positions and
            `original` for M-RoPE.
    """

    capability = "VisionLanguageModel"
    output = Output.APPROXIMATE
    neutral = MappingProxyType({"keep_ratio": 1.0})

    keep_ratio: float = 1 / 3
    positions: Numbering = "auto"

    def __post_init__(self) -> None:
        require_number(
            "keep_ratio",
            self.keep_ratio,
            0,
            1,
            "It is the share kept: to remove 80 % of them, pass 0.2.",
            above_low=True,
        )
        require_choice("positions", self.positions, get_args(Numbering))

    @abstractmethod
    def plan(self, model: VisionLanguage) -> VisualPlan:
        """Return what is done about the visual tokens of this model.

        Raises:
            models.base.Unsupported: The model lacks what the method needs.
        """

    def budget(self, tokens: int) -> int:
        """Return how many of so many tokens are kept."""
        return kept_count(self.keep_ratio, tokens)

    @contextmanager
    def apply(self, model: VisionLanguageModel, hardware: Profile) -> Iterator[VisionLanguageModel]:
        """Yield a model that answers by the plan; the model itself is not touched."""
        if not isinstance(model, VisionLanguage):
            raise unsuited(self, model, "a vision-language model whose phases are run here")
        yield model.planned(self.plan(model))


def kept_count(keep_ratio: float, tokens: int) -> int:
    """Return how many tokens a share is, rounded, at least one."""
    return max(1, round(keep_ratio * tokens))


def tile_budgets(layout: VisualLayout, budget: int) -> list[int]:
    """Share a budget among the tiles of an image, equally as far as they have the patches.

    What does not divide goes to the first tiles, the whole image before its crops.

    Args:
        layout: Where the patches stand.
        budget: At most the number of patches.
    """
    return share_out(torch.bincount(layout.patch_tile, minlength=layout.num_tiles).tolist(), budget)


def shared_tiles(layout: VisualLayout, budget: int) -> Iterator[tuple[Tensor, int]]:
    """Yield the numbers of each tile's patches, (own,), and how many of them the budget allows.

    Args:
        layout: Where the patches stand.
        budget: Shared by `tile_budgets`.
    """
    for tile, share in enumerate(tile_budgets(layout, budget)):
        yield (layout.patch_tile == tile).nonzero().flatten(), share


def share_out(room: Sequence[int], budget: int) -> list[int]:
    """Share a budget equally as far as there is room; what does not divide goes to the first."""
    levels = range(max(room, default=0) + 1)
    level = bisect_right(levels, budget, key=lambda level: _filled(room, level)) - 1
    shares = [min(free, level) for free in room]
    left = budget - sum(shares)
    for place, free in enumerate(room):
        given = min(left, free > level)
        shares[place] += given
        left -= given
    return shares


def _filled(room: Sequence[int], level: int) -> int:
    return sum(min(free, level) for free in room)


def tile_grid(layout: VisualLayout, own: Tensor) -> Grid:
    """Return the grid of a tile's patches, which is smaller where padding was cut off.

    Args:
        layout: Where the patches stand.
        own: Numbers of the tile's patches.
    """
    columns = len((layout.patch_place[own] % layout.grid.columns).unique())
    return Grid(len(own) // columns, columns) if columns else Grid(0, 0)


def top_k(scores: Tensor, count: int) -> Tensor:
    """Return the numbers of the largest scores, best first, (count,); the lowest among equals."""
    return scores.sort(descending=True, stable=True).indices[:count]


def neighbours(places: Tensor, grid: Grid, *, square: bool, stops_at_edge: bool) -> Tensor:
    """Return the places beside some places of a grid, each once, ascending.

    Args:
        places: Row by row, (anchors,).
        grid: Rows and columns.
        square: All eight places around; else the four that share a side.
        stops_at_edge: A place at the edge has fewer neighbours. Otherwise places are treated as one
            line of numbers: a row's end is beside the next row's start, and what would leave the
            grid becomes its first or last place, as in the reference code of HiPrune.

    Returns:
        The neighbours; places of `places` may be among them.
    """
    steps = [(-1, 0), (0, -1), (0, 1), (1, 0)]
    if square:
        steps += [(-1, -1), (-1, 1), (1, -1), (1, 1)]
    down, right = torch.tensor(steps, device=places.device).T
    if not stops_at_edge:
        flat = places[:, None] + down * grid.columns + right
        return flat.clamp(0, grid.rows * grid.columns - 1).unique()
    rows = places[:, None] // grid.columns + down
    columns = places[:, None] % grid.columns + right
    inside = (rows >= 0) & (rows < grid.rows) & (columns >= 0) & (columns < grid.columns)
    return (rows * grid.columns + columns)[inside].unique()


def normalised(vectors: Tensor) -> Tensor:
    """Return vectors of length 1, float32; a vector of zeros stays one."""
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def spread_evenly(count: int, among: int) -> Tensor:
    """Return `count` different numbers below `among`, evenly spaced, ascending."""
    return (torch.arange(count) * among + among // 2) // max(count, 1)


def greedy_maxmin(vectors: Tensor, first: Tensor, count: int) -> Tensor:
    """Choose vectors that are far from all chosen ones: k-center, or max-min diversity.

    Args:
        vectors: Of length 1, (tokens, width).
        first: Number of the first one, a tensor without axes.
        count: How many are chosen.

    Returns:
        Numbers in the order of choice, (count,). The distance is 1 - cosine, which orders pairs as
        their angle does.
    """
    return greedy_by(vectors, first, count, lambda distance: distance)


def greedy_by(
    vectors: Tensor, first: Tensor, count: int, score: Callable[[Tensor], Tensor]
) -> Tensor:
    """Choose by a score of the distance to the nearest chosen vector; see `greedy_maxmin`.

    Where no score is above 0 the distance alone decides: with a weight of 0 a token would else be
    chosen by its number.

    Args:
        vectors: Of length 1, (tokens, width).
        first: Number of the first one.
        count: How many are chosen.
        score: From distances, (tokens,), to what is maximised, (tokens,).
    """
    # Numbers stay tensors with an axis: one without is read back from the device at every step.
    chosen = [first.view(1)]
    nearest = torch.full((len(vectors),), -torch.inf, device=vectors.device)
    taken = torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
    for _ in range(count - 1):
        taken.index_fill_(0, chosen[-1], True)
        nearest = torch.maximum(nearest, vectors @ vectors[chosen[-1]][0])
        # Rounding may put a cosine above 1; a distance is not negative.
        distance = (1 - nearest).clamp_(min=0)
        scores = score(distance).masked_fill(taken, -torch.inf)
        by_distance = distance.masked_fill(taken, -torch.inf)
        scores = torch.where(scores.max() > 0, scores, by_distance)
        chosen.append(scores.argmax(0, keepdim=True))
    return torch.cat(chosen)


def greedy_maxsum(vectors: Tensor, first: Tensor, count: int) -> Tensor:
    """Choose vectors with the largest sum of distances to all chosen ones; see `greedy_maxmin`."""
    chosen = [first.view(1)]
    similarity = torch.zeros(len(vectors), device=vectors.device)
    for _ in range(count - 1):
        similarity += vectors @ vectors[chosen[-1]][0]
        similarity.index_fill_(0, chosen[-1], torch.inf)
        chosen.append(similarity.argmin(0, keepdim=True))
    return torch.cat(chosen)


def greedy_flops(tokens: int, width: int, count: int) -> float:
    """Return the operations of a greedy choice: one product with all tokens a step."""
    return 2.0 * tokens * width * (count - 1)
