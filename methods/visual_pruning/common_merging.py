"""Clusters of visual tokens by density peaks (DPC-KNN), as Chat-UniVi merges them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clusters:
    """A partition of tokens.

    Attributes:
        centres: Number of each cluster's centre, best score first, (clusters,).
        member_of: Cluster of each token, (tokens,).
        distance: Of each token to its centre, (tokens,).
    """

    centres: Tensor
    member_of: Tensor
    distance: Tensor

    def means(self, vectors: Tensor) -> Tensor:
        """Return the mean of each cluster's vectors, (clusters, width), in their dtype."""
        count = len(self.centres)
        total = torch.zeros(count, vectors.shape[1], dtype=torch.float32, device=vectors.device)
        total.index_add_(0, self.member_of, vectors.float())
        sizes = torch.bincount(self.member_of, minlength=count)
        return (total / sizes[:, None]).to(vectors.dtype)

    def members(self, cluster: int) -> Tensor:
        """Return the tokens of a cluster, ascending."""
        return (self.member_of == cluster).nonzero().flatten()


def dpc_knn(vectors: Tensor, count: int, neighbours: int) -> Clusters:
    """Cluster by density peaks: centres are dense and far from anything denser.

    The density is `exp(-mean squared distance)` over the nearest `neighbours`, the token itself
    among them; distances are Euclidean over the root of the width. Where the authors tell equal
    densities apart by random noise, here the lower number counts as denser.

    Source: DPC-KNN as in Chat-UniVi (arXiv 2311.08046) and PPE (arXiv 2510.22936).

    Args:
        vectors: (tokens, width).
        count: Clusters, at most the tokens.
        neighbours: For the density; fewer where there are fewer tokens.
    """
    tokens, width = vectors.shape
    distance = torch.cdist(vectors.float()[None], vectors.float()[None])[0] / width**0.5
    # cdist leaves rounding on the diagonal.
    distance.fill_diagonal_(0)
    nearest = distance.sort(dim=1).values[:, : min(neighbours, tokens)]
    density = torch.exp(-nearest.square().mean(1))
    number = torch.arange(tokens, device=vectors.device)
    is_denser = (density[None] > density[:, None]) | (
        (density[None] == density[:, None]) & (number[None] < number[:, None])
    )
    apart = distance.masked_fill(~is_denser, torch.inf).min(1).values
    apart = torch.where(apart.isinf(), distance.max(), apart)
    centres = (density * apart).sort(descending=True, stable=True).indices[:count]
    member_of = distance[:, centres].argmin(1)
    # A centre with a duplicate stays in its own cluster.
    member_of[centres] = torch.arange(count, device=vectors.device)
    return Clusters(centres, member_of, distance[number, centres[member_of]])


def dpc_flops(tokens: int, width: int) -> float:
    """Return the operations of the distances of all pairs."""
    return 2.0 * tokens * tokens * width
