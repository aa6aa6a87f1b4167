"""Sparse reconstruction: orthogonal matching pursuit, and projection to the simplex.

Pure functions on tensors, batched over the vectors that are to be written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# What float32 leaves of a vector that is reproduced exactly, and of an atom that depends on others.
_NOTHING_LEFT = 1e-6


class Pursuit(NamedTuple):
    """Vectors written as sums of few atoms.

    Attributes:
        indices: Rows of the dictionary, (vectors, k), int64, in the order of their choice; -1 where
            a vector was finished before.
        coefficients: Their weights, (vectors, k), float32; 0 where the index is -1.
        residual_norms: Length of what is left after 0, 1, ..., k atoms, (vectors, k + 1).
    """

    indices: Tensor
    coefficients: Tensor
    residual_norms: Tensor

    def combine(self, rows: Tensor) -> Tensor:
        """Return the same sums over other rows in the atoms' places, (vectors, width).

        Args:
            rows: One for each atom, (atoms, width).
        """
        # A finished vector's places have weight 0, so any row will do for them.
        chosen = rows[self.indices.clamp(min=0)]
        return torch.einsum("vk,vkd->vd", self.coefficients.to(rows.dtype), chosen)


def orthogonal_matching_pursuit(
    dictionary: Tensor, vectors: Tensor, k: int, *, batch: int = 512
) -> Pursuit:
    """Write each vector as a combination of at most `k` atoms of a dictionary.

    Each step takes the atom with the largest absolute inner product with what is left, then the
    least-squares coefficients over all taken atoms. Atoms are *not* normalised, so long ones are
    preferred, as in the released code; `sklearn.linear_model.orthogonal_mp` divides by their
    lengths and agrees on atoms of length 1 only.

    The atoms are orthogonalised twice, which keeps float32 exact at any k (the released code does
    it once and refreshes the basis by a QR every 256 atoms). A vector is finished early where
    nothing is left of it, or where every further atom depends on those taken: what such atoms would
    get are coefficients of rounding errors, divided by a floor of 1e-8 in the released code.

    Args:
        dictionary: One atom a row, (atoms, width), float32.
        vectors: (vectors, width), float32.
        k: Largest number of atoms, 1 to min(atoms, width).
        batch: Vectors at a time; memory is batch * atoms numbers.

    Raises:
        ValueError: `k` is out of range.

    Source: arXiv 2506.06607; `batch_omp` of mergekit at a6e40288.
    """
    atoms, width = dictionary.shape
    if not 1 <= k <= min(atoms, width):
        raise ValueError(
            f"k must lie in [1, {min(atoms, width)}], got {k}: {atoms} atoms of {width} numbers."
        )
    parts = [_pursue(dictionary, part, k) for part in vectors.split(batch)]
    if not parts:
        parts = [_pursue(dictionary, vectors, k)]
    return Pursuit(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _pursue(dictionary: Tensor, vectors: Tensor, k: int) -> Pursuit:
    count, width = vectors.shape
    indices = torch.full((count, k), -1, dtype=torch.int64, device=vectors.device)
    # basis[:, t] is the t-th orthogonalised atom; atom t = sum over s of triangle[:, s, t] basis s.
    basis = vectors.new_zeros(count, k, width)
    triangle = torch.eye(k, dtype=vectors.dtype, device=vectors.device).repeat(count, 1, 1)
    products = vectors.new_zeros(count, k)
    residual = vectors
    lengths = vectors.norm(dim=1)
    residual_norms = [lengths]
    is_open = lengths > 0
    for step in range(k):
        scores = (residual @ dictionary.T).abs_()
        # A finished vector may have taken fewer atoms; -1 would count from the end.
        scores.scatter_(1, indices[:, :step].clamp(min=0), -1.0)
        found = scores.argmax(dim=1)
        atom = dictionary[found]
        before = basis[:, :step]
        along = torch.einsum("vsd,vd->vs", before, atom)
        left = atom - torch.einsum("vs,vsd->vd", along, before)
        again = torch.einsum("vsd,vd->vs", before, left)
        left = left - torch.einsum("vs,vsd->vd", again, before)
        length = left.norm(dim=1)
        is_open = is_open & (length > _NOTHING_LEFT * atom.norm(dim=1))
        indices[:, step] = torch.where(is_open, found, -1)
        taken = is_open.to(vectors.dtype)
        triangle[:, :step, step] = (along + again) * taken[:, None]
        triangle[:, step, step] = torch.where(is_open, length, torch.ones_like(length))
        basis[:, step] = left / length.clamp(min=1e-30)[:, None] * taken[:, None]
        products[:, step] = torch.einsum("vd,vd->v", basis[:, step], vectors)
        residual = vectors - torch.einsum(
            "vs,vsd->vd", products[:, : step + 1], basis[:, : step + 1]
        )
        norms = residual.norm(dim=1)
        residual_norms.append(norms)
        is_open = is_open & (norms > _NOTHING_LEFT * lengths)
    coefficients = torch.linalg.solve_triangular(triangle, products[:, :, None], upper=True)[..., 0]
    return Pursuit(indices, coefficients, torch.stack(residual_norms, dim=1))


def sparsemax(scores: Tensor) -> Tensor:
    """Return the point of the simplex nearest to each row, (rows, choices); mostly zeros.

    Source: arXiv 1602.02068, algorithm 1.
    """
    ordered = scores.sort(dim=1, descending=True).values
    ranks = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=scores.dtype)
    sums = ordered.cumsum(dim=1) - 1
    support = (ordered * ranks > sums).sum(dim=1, keepdim=True)
    threshold = sums.gather(1, support - 1) / support
    return (scores - threshold).clamp(min=0)
