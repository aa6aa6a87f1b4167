"""ZOO-Prune: keep visual tokens that the projector is sensitive to and that differ.

How much the projector's output moves when a token is nudged is measured without gradients, by
central differences along random directions. Tokens are then chosen greedily by sensitivity times
distance to the nearest chosen one. Training-free; does not see the question.

Source: arXiv 2509.24837; its repository holds no code. Settled here: directions are shared by all
tokens (`shared_directions`), likeness is judged behind the projector (`similarity`), a token of
Qwen2.5-VL is nudged in front of the norm of its group of four. The estimator runs in float32
whatever the model's dtype: in bfloat16 a step of 0.01 is rounded away and rounding is measured.
`jvp` and `mlp` are the limit of small steps, `gram` is `mlp` with the second matrix at a low rank
(our reading of the trick reported for LLaVA-NeXT), `frob` is the expectation over all directions.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd.functional import jvp

from methods.checks import require_choice, require_count
from methods.visual_pruning.common import (
    VisualTokenMethod,
    greedy_by,
    greedy_flops,
    normalised,
    top_k,
)
from models.base import Unsupported
from models.vision_language import Seen, VisionLanguage, VisualPlan
from models.vision_language_towers import ProjectorParts

Fusion = Literal["product", "sum", "sensitivity", "diversity", "norm"]
Estimator = Literal["fd", "jvp", "mlp", "gram", "frob"]
Similarity = Literal["post", "pre"]

# Directions that are nudged along at a time.
_DIRECTIONS_AT_ONCE = 8
# The second matrix's singular values and vectors, which depend on nothing else.
_SPECTRA: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Tensor, Tensor]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True, kw_only=True)
class ZooPrune(VisualTokenMethod):
    """Sensitivity of the projector times diversity.

    Attributes:
        directions: Random directions, m.
        step: Length of a nudge, h.
        fusion: `product` or `sum` of sensitivity and distance; `sensitivity` or `diversity` alone;
            `norm` puts the length of the projected token in the place of its sensitivity, a
            control.
        estimator: `fd` central differences, `jvp` their limit by differentiation, `mlp` the
            same in closed form, `gram` with the second matrix at rank `rank`, `frob` the
            Frobenius norm of the Jacobian.
        shared_directions: Nudge all tokens along the same directions.
        similarity: Compare tokens behind (`post`) or in front of (`pre`) the projector.
        rank: For `gram`.
        seed: Of the directions.
    """

    directions: int = 64
    step: float = 0.01
    fusion: Fusion = "product"
    estimator: Estimator = "fd"
    shared_directions: bool = True
    similarity: Similarity = "post"
    rank: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("directions", self.directions, 1, None, "It counts random directions.")
        if not 0 < self.step < math.inf:
            raise ValueError(
                f"step must be above 0, got {self.step}. It is a distance in features."
            )
        require_choice("fusion", self.fusion, get_args(Fusion))
        require_choice("estimator", self.estimator, get_args(Estimator))
        require_choice("similarity", self.similarity, get_args(Similarity))
        require_count("rank", self.rank, 1, None, "It counts singular vectors.")
        require_count("seed", self.seed, 0, None, "It starts the draw.")

    def plan(self, model: VisionLanguage) -> VisualPlan:
        """Return a plan that tests the projector."""
        parts = model.tower.projector_parts()
        if self.estimator == "frob" and parts.norm_weight is not None:
            raise Unsupported(
                f"zoo-prune:estimator=frob is for projectors without a norm in front; that of "
                f"'{model.name}' has one."
            )
        if self.estimator == "gram":
            spectrum(parts.second)  # outside the clock: it depends on the weights alone
        return VisualPlan(wanted=self.budget, reduce=self._reduce, positions=self.positions)

    def _reduce(self, seen: Seen) -> Tensor:
        features = seen.encoded.features.float()
        budget = self.budget(len(features))
        if self.fusion == "norm":
            scores = seen.projected.float().norm(dim=-1)
        else:
            scores = self.sensitivity(seen.projector_parts, features)
            seen.count(self.estimator_flops(seen.projector_parts, len(features)))
        likeness = seen.projected if self.similarity == "post" else features
        if self.fusion != "sensitivity":
            seen.count(greedy_flops(len(likeness), likeness.shape[1], budget))
        return select(scores, likeness, budget, self.fusion)

    def sensitivity(self, parts: ProjectorParts, features: Tensor) -> Tensor:
        """Return the mean change of the projector's output by a nudge, per unit of its length.

        Args:
            parts: The projector.
            features: Float32 or float64, which the estimate then has, (tokens, width).

        Returns:
            Not normalised, (tokens,).
        """
        if self.estimator == "frob":
            return frobenius(parts, features)
        tokens, width = features.shape
        total = torch.zeros(tokens, dtype=features.dtype, device=features.device)
        drawn = self.draw(1 if self.shared_directions else tokens, width)
        drawn = drawn.to(features.device, features.dtype)
        lengths = self._lengths(parts, features[:, None])
        for start in range(0, self.directions, _DIRECTIONS_AT_ONCE):
            total += lengths(drawn[:, start : start + _DIRECTIONS_AT_ONCE]).sum(1)
        return total / self.directions

    def draw(self, sets: int, width: int) -> Tensor:
        """Return random directions of length 1, (sets, directions, width), float64."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(sets, self.directions, width, generator=generator, dtype=torch.float64)
        return drawn / drawn.norm(dim=-1, keepdim=True)

    def _lengths(self, parts: ProjectorParts, features: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what takes directions, (1 or tokens, directions, width), to lengths of changes.

        What the directions have no part in is computed here, once for all of them.

        Args:
            parts: The projector.
            features: (tokens, 1, width).

        Returns:
            A function whose result is (tokens, directions).
        """

        def differences(along: Tensor) -> Tensor:
            ahead, behind = (parts(features + way * self.step * along) for way in (1, -1))
            return (ahead - behind).norm(dim=-1) / (2 * self.step)

        def derivatives(along: Tensor) -> Tensor:
            spread = features.expand(-1, along.shape[1], -1)
            # Tensors that were made for inference only cannot be differentiated; copies can.
            with torch.inference_mode(False), torch.enable_grad():
                change: Tensor = jvp(parts, spread.clone(), along.expand_as(spread).clone())[1]
            return change.norm(dim=-1)

        if self.estimator == "fd":
            return differences
        if self.estimator == "jvp":
            return derivatives
        slope = activation_slope(parts, parts.hidden(parts.inner(features)))
        first = parts.first.weight.T.to(features.dtype)
        if self.estimator == "mlp":
            second = parts.second.weight.T
        else:
            # Of V S U' the rotation U' changes no length.
            values, vectors = spectrum(parts.second)
            second = vectors[:, : self.rank] * values[: self.rank]
        second = second.to(features.dtype)

        def closed_form(along: Tensor) -> Tensor:
            hidden = slope * (parts.inner_change(features, along) @ first)
            return (hidden @ second).norm(dim=-1)

        return closed_form

    def estimator_flops(self, parts: ProjectorParts, tokens: int) -> float:
        """Return the operations of the matrix products of the estimator."""
        first, second = parts.first.weight.numel(), parts.second.weight.numel()
        pairs = tokens * self.directions
        if self.estimator in ("fd", "jvp"):
            # Two sides of a difference; for the derivative the function, and back twice.
            runs = 2 if self.estimator == "fd" else 3
            return 2.0 * runs * pairs * (first + second)
        hidden = parts.first.weight.shape[0]
        if self.estimator == "frob":
            # The products of each matrix with itself do not depend on the image.
            return 2.0 * tokens * (first + hidden * hidden)
        is_shared = self.shared_directions and parts.norm_weight is None
        turned = (self.directions if is_shared else pairs) * first
        behind = (
            second
            if self.estimator == "mlp"
            else hidden * min(self.rank, *parts.second.weight.shape)
        )
        return 2.0 * (tokens * first + turned + pairs * behind)


def select(scores: Tensor, likeness: Tensor, budget: int, fusion: Fusion) -> Tensor:
    """Choose tokens by sensitivity and distance; pure.

    Args:
        scores: Sensitivity, (tokens,).
        likeness: What distances are taken of, (tokens, width).
        budget: How many.
        fusion: See `ZooPrune`.

    Returns:
        Their numbers, ascending, (budget,).
    """
    low, high = scores.min(), scores.max()
    # Where all are alike they weigh nothing, and the distance alone decides.
    weights = (scores - low) / (high - low).clamp_min(torch.finfo(scores.dtype).tiny)
    if fusion == "sensitivity":
        return top_k(weights, budget).sort().values

    def score(distance: Tensor) -> Tensor:
        if fusion == "diversity":
            return distance
        return weights + distance if fusion == "sum" else weights * distance

    weights = weights.to(torch.float32)
    return greedy_by(normalised(likeness), weights.argmax(), budget, score).sort().values


def activation_slope(parts: ProjectorParts, hidden: Tensor) -> Tensor:
    """Return the derivative of the projector's activation, elementwise."""
    with torch.inference_mode(False), torch.enable_grad():
        values = hidden.clone().requires_grad_()
        return torch.autograd.grad(parts.activation(values).sum(), values)[0]


def frobenius(parts: ProjectorParts, features: Tensor) -> Tensor:
    """Return the Frobenius norm of the Jacobian over the root of the width, (tokens,).

    `||J||^2 = g' (W2'W2 * W1 W1') g` for J = W2 diag(g) W1, with `*` by elements.
    """
    first, second = (each.weight.to(features.dtype) for each in (parts.first, parts.second))
    slope = activation_slope(parts, parts.hidden(features))
    both = (second.T @ second) * (first @ first.T)
    squares = ((slope @ both) * slope).sum(-1)
    return (squares / features.shape[-1]).sqrt()


def spectrum(matrix: torch.nn.Linear) -> tuple[Tensor, Tensor]:
    """Return a matrix's singular values, largest first, and right singular vectors as columns."""
    if matrix not in _SPECTRA:
        with torch.inference_mode(False), torch.no_grad():
            _, values, rows = torch.linalg.svd(matrix.weight.double(), full_matrices=False)
        _SPECTRA[matrix] = values, rows.T
    return _SPECTRA[matrix]
