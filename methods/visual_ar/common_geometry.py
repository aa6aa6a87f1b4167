"""Which image tokens resemble each other: neighbours in the codebook or among the embeddings."""

from __future__ import annotations

import weakref
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from models.base import AutoregressiveImageModel

Metric = Literal["l2", "cosine", "random"]
Space = Literal["codebook", "embeddings"]

# Rows of a distance table that exist at a time: a codebook of 16,384 would need a gigabyte.
_ROWS = 1024

_TABLES: weakref.WeakKeyDictionary[Any, dict[object, Any]] = weakref.WeakKeyDictionary()


def squared_distances(vectors: Tensor, rows: Tensor) -> Tensor:
    """Return |v_i - v_j|^2 of some rows to all vectors, (rows, vectors), float64, never negative.

    Args:
        vectors: (vectors, size).
        rows: Indices, (rows,).
    """
    wide = vectors.double()
    own = wide[rows]
    products = own @ wide.T
    found = own.square().sum(-1, keepdim=True) + wide.square().sum(-1) - 2 * products
    # A vector's distance to itself is 0, which a difference of large numbers is not.
    found[torch.arange(len(rows), device=found.device), rows] = 0.0
    return found.clamp(min=0)


def nearest_neighbours(
    vectors: Tensor, count: int, metric: Metric = "l2", *, seed: int = 0
) -> Tensor:
    """Return the nearest other vectors of each, nearest first, (vectors, count), int64.

    Equal distances are ordered by index. Between vectors of length one `l2` and `cosine` are the
    same order.

    Args:
        vectors: (vectors, size).
        count: Neighbours of each, fewer than there are vectors.
        metric: Distance; `random` orders the others by lot, as a control.
        seed: Of the lot.
    """
    total = len(vectors)
    if not 0 <= count < total:
        raise ValueError(
            f"count must lie in [0, {total - 1}], got {count}: it leaves a vector out."
        )
    found = []
    generator = torch.Generator().manual_seed(seed)
    unit = F.normalize(vectors.double(), dim=-1)
    for rows in torch.arange(total, device=vectors.device).split(_ROWS):
        if metric == "random":
            apart = torch.rand(len(rows), total, generator=generator).to(vectors.device).double()
        else:
            apart = squared_distances(unit if metric == "cosine" else vectors, rows)
        apart[torch.arange(len(rows), device=apart.device), rows] = torch.inf
        found.append(apart.argsort(dim=-1, stable=True)[:, :count])
    return torch.cat(found)


def distance_quantile(vectors: Tensor, share: float) -> float:
    """Return the squared distance that a share of all pairs of different vectors do not exceed."""
    parts = []
    for rows in torch.arange(len(vectors), device=vectors.device).split(_ROWS):
        apart = squared_distances(vectors, rows)
        later = torch.arange(len(vectors), device=vectors.device) > rows[:, None]
        parts.append(apart[later])
    ordered = torch.cat(parts).sort().values
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])


def token_embeddings(model: AutoregressiveImageModel) -> Tensor:
    """Return the decoder's input embeddings of all tokens, (vocab, size), as they are; kept."""
    tables = _TABLES.setdefault(model, {})
    if "embeddings" not in tables:
        with torch.no_grad():
            everything = torch.arange(model.facts.vocab_size, device=model.device)
            tables["embeddings"] = model.embed(everything)
    found: Tensor = tables["embeddings"]
    return found


def embedding_quantile(model: AutoregressiveImageModel, share: float) -> float:
    """Return `distance_quantile` of the embeddings of a model's codes; kept with the model."""
    tables = _TABLES.setdefault(model, {})
    key = ("quantile", share)
    if key not in tables:
        tables[key] = distance_quantile(token_embeddings(model)[_code_tokens(model)], share)
    return float(tables[key])


def token_neighbours(
    model: AutoregressiveImageModel, count: int, metric: Metric = "l2", space: Space = "codebook"
) -> Tensor:
    """Return the nearest tokens of each token, (vocab, count), int64; kept with the model.

    Tokens that are no code (row ends, words) have no neighbours and are none: their rows hold -1.
    Where there are fewer neighbours than `count` the table is narrower.
    """
    tables = _TABLES.setdefault(model, {})
    key = (count, metric, space)
    if key not in tables:
        tables[key] = _neighbours(model, count, metric, space)
    found: Tensor = tables[key]
    return found


def _neighbours(
    model: AutoregressiveImageModel, count: int, metric: Metric, space: Space
) -> Tensor:
    tokens = _code_tokens(model)
    if space == "embeddings":
        vectors = token_embeddings(model)[tokens]
    else:
        vectors = model.codebook[model.codes(tokens)]
    near = nearest_neighbours(vectors, min(count, len(tokens) - 1), metric)
    table = torch.full((model.facts.vocab_size, near.shape[1]), -1, device=model.device)
    table[tokens] = tokens[near]
    return table


def _code_tokens(model: AutoregressiveImageModel) -> Tensor:
    """Return the tokens that are codes, ascending."""
    everything = torch.arange(model.facts.vocab_size, device=model.device)
    return everything[model.codes(everything) >= 0]
