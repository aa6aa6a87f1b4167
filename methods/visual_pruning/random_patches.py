"""Random patches: the control that keeps a random choice of the visual tokens.

A method that looks at the image must beat it at the same budget; on common benchmarks it is hard
to beat (UniPruneBench, arXiv 2511.02650).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.checks import require_count
from methods.visual_pruning.common import VisualTokenMethod
from models.vision_language import Seen, VisionLanguage, VisualPlan


@dataclass(frozen=True, kw_only=True)
class RandomPatches(VisualTokenMethod):
    """A random choice, another one for each image.

    Attributes:
        seed: Of the draw; the image's pixels are mixed in.
    """

    role = "control"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("seed", self.seed, 0, None, "It starts the draw.")

    def plan(self, model: VisionLanguage) -> VisualPlan:
        """Return a plan that draws patches."""
        return VisualPlan(wanted=self.budget, reduce=self._reduce, positions=self.positions)

    def _reduce(self, seen: Seen) -> Tensor:
        # torch's generator looks at the low 32 bits of a seed only, so both go into them.
        number = zlib.crc32(f"{seen.image_key} {self.seed}".encode())
        chosen = draw(seen.num_patches, self.budget(seen.num_patches), number)
        return chosen.to(seen.encoded.features.device)


def draw(tokens: int, count: int, seed: int) -> Tensor:
    """Return `count` of `tokens` numbers, ascending; each set is equally likely."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(tokens, generator=generator)[:count].sort().values
