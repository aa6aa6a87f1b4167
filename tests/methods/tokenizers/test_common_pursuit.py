"""Orthogonal matching pursuit against scikit-learn, least squares in NumPy, and its own theory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp
from torch import Tensor

from methods.tokenizers.common_pursuit import Pursuit, orthogonal_matching_pursuit, sparsemax


def gaussian(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def plain_pursuit(
    dictionary: npt.NDArray[np.float64], vector: npt.NDArray[np.float64], k: int
) -> tuple[list[int], npt.NDArray[np.float64], list[float]]:
    """The definition: best inner product, then least squares over everything taken."""
    taken: list[int] = []
    coefficients = np.zeros(0)
    residual, norms = vector, [float(np.linalg.norm(vector))]
    for _ in range(k):
        scores = np.abs(dictionary @ residual)
        scores[taken] = -1
        taken.append(int(scores.argmax()))
        coefficients = np.linalg.lstsq(dictionary[taken].T, vector, rcond=None)[0]
        residual = vector - coefficients @ dictionary[taken]
        norms.append(float(np.linalg.norm(residual)))
    return taken, coefficients, norms


@pytest.mark.parametrize("k", [1, 3, 8, 40])
def test_indices_and_coefficients_are_those_of_least_squares_at_each_step(k: int) -> None:
    lengths = torch.linspace(0.3, 3, 150)[:, None]  # so that normalising would choose otherwise
    dictionary, vectors = gaussian(150, 40) * lengths, gaussian(9, 40, seed=1)
    found = orthogonal_matching_pursuit(dictionary, vectors, k, batch=4)
    for row, vector in enumerate(vectors.double().numpy()):
        taken, coefficients, norms = plain_pursuit(dictionary.double().numpy(), vector, k)
        assert found.indices[row].tolist() == taken
        np.testing.assert_allclose(found.coefficients[row], coefficients, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(found.residual_norms[row], norms, atol=1e-5)


def test_atoms_of_length_one_give_what_scikit_learn_gives() -> None:
    dictionary = torch.nn.functional.normalize(gaussian(120, 32))
    vectors = gaussian(7, 32, seed=2)
    found = orthogonal_matching_pursuit(dictionary, vectors, 6)
    expected = orthogonal_mp(dictionary.numpy().T, vectors.numpy().T, n_nonzero_coefs=6)
    dense = torch.zeros(7, 120).scatter(1, found.indices, found.coefficients)
    np.testing.assert_allclose(dense.numpy(), expected.T, atol=1e-4)


def test_long_atoms_are_preferred_where_scikit_learn_normalises() -> None:
    dictionary = torch.tensor([[1.0, 0.0], [8.0, 8.0]])
    found = orthogonal_matching_pursuit(dictionary, torch.tensor([[1.0, 0.1]]), 1)
    assert found.indices.tolist() == [[1]]  # inner products 1 and 8.8, cosines 0.995 and 0.77


def test_an_atom_is_taken_once_however_long_it_is() -> None:
    # What rounding leaves along the long atom is more than the short ones' whole product.
    dictionary, vectors = gaussian(30, 24, 1), gaussian(6, 24, 3)
    dictionary[5] = gaussian(1, 24, 2)[0] * 1e8
    found = orthogonal_matching_pursuit(dictionary, vectors, 6)
    for row, vector in zip(found.indices.tolist(), vectors.double().numpy(), strict=True):
        assert row == plain_pursuit(dictionary.double().numpy(), vector, 6)[0]


@pytest.mark.parametrize("seed", range(4))
def test_a_sum_of_three_atoms_is_found_exactly(seed: int) -> None:
    dictionary = torch.nn.functional.normalize(gaussian(200, 64, seed))
    generator = torch.Generator().manual_seed(seed)
    support = torch.stack([torch.randperm(200, generator=generator)[:3] for _ in range(5)])
    weights = torch.tensor([[2.0, -1.5, 1.0]] * 5)
    vectors = Pursuit(support, weights, torch.empty(0)).combine(dictionary)
    found = orthogonal_matching_pursuit(dictionary, vectors, 3)
    assert [set(row) for row in found.indices.tolist()] == [set(row) for row in support.tolist()]
    torch.testing.assert_close(found.combine(dictionary), vectors, atol=1e-4, rtol=0)


def test_the_residual_never_grows_and_is_orthogonal_to_every_taken_atom() -> None:
    dictionary, vectors = gaussian(300, 48), gaussian(20, 48, seed=3)
    found = orthogonal_matching_pursuit(dictionary, vectors, 48)
    assert (found.residual_norms.diff(dim=1) <= 1e-6).all()
    assert all(len(set(row)) == 48 for row in found.indices.tolist())
    half = orthogonal_matching_pursuit(dictionary, vectors, 24)
    residual = vectors - half.combine(dictionary)
    products = torch.einsum("vkd,vd->vk", dictionary[half.indices], residual)
    assert products.abs().max() < 1e-4
    assert torch.equal(half.indices, found.indices[:, :24])


def test_with_as_many_atoms_as_dimensions_nothing_is_left() -> None:
    dictionary, vectors = gaussian(300, 48), gaussian(20, 48, seed=3)
    found = orthogonal_matching_pursuit(dictionary, vectors, 48)
    assert found.residual_norms[:, -1].max() < 1e-4
    torch.testing.assert_close(found.combine(dictionary), vectors, atol=1e-3, rtol=0)


def test_a_finished_vector_takes_no_further_atoms() -> None:
    dictionary = gaussian(50, 20)
    vectors = torch.stack([dictionary[7] * 3, torch.zeros(20), gaussian(1, 20, 5)[0]])
    found = orthogonal_matching_pursuit(dictionary / dictionary.norm(dim=1)[:, None], vectors, 6)
    assert found.indices[0].tolist() == [7, -1, -1, -1, -1, -1]
    assert found.coefficients[0, 1:].tolist() == [0] * 5
    assert found.indices[1].tolist() == [-1] * 6
    assert -1 not in found.indices[2].tolist()


def test_atoms_that_hardly_differ_keep_the_residual_exact() -> None:
    # Rows of an embedding share a large mean. Orthogonalised once, the residual grows here.
    dictionary = gaussian(300, 48) + 300 * gaussian(1, 48, seed=9)
    vectors = gaussian(20, 48, seed=3)
    found = orthogonal_matching_pursuit(dictionary, vectors, 24)
    for indices, norms, vector in zip(found.indices, found.residual_norms, vectors, strict=True):
        taken = dictionary[indices].double().numpy()
        weights = np.linalg.lstsq(taken.T, vector.double().numpy(), rcond=None)[0]
        left = np.linalg.norm(vector.double().numpy() - weights @ taken)
        assert norms[-1].item() == pytest.approx(left, abs=1e-4 * float(vector.norm()))


def test_an_atom_that_depends_on_others_entirely_leaves_a_finished_vector_alone() -> None:
    dictionary = torch.eye(4)[[0, 0, 1]]
    found = orthogonal_matching_pursuit(dictionary, torch.tensor([[2.0, 0.0, 0.0, 3.0]]), 3)
    assert found.indices.tolist() == [[0, -1, -1]]
    assert found.coefficients.tolist() == [[2, 0, 0]]


def test_doubled_atoms_get_no_coefficients_of_rounding_errors() -> None:
    # A plane in ten dimensions: the third atom can only depend on two others.
    plane = gaussian(2, 10)
    dictionary = gaussian(40, 2, seed=1) @ plane
    vectors = gaussian(5, 10, seed=2)
    found = orthogonal_matching_pursuit(dictionary, vectors, 6)
    assert (found.indices[:, 2:] == -1).all()
    expected = torch.linalg.lstsq(plane.T, vectors.T).solution.T @ plane
    torch.testing.assert_close(found.combine(dictionary), expected, atol=1e-4, rtol=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), k=st.integers(1, 8), batch=st.integers(1, 6))
def test_a_rotation_of_the_space_and_the_batch_change_nothing(
    seed: int, k: int, batch: int
) -> None:
    dictionary, vectors = gaussian(60, 24, seed), gaussian(5, 24, seed + 1)
    rotation = torch.linalg.qr(gaussian(24, 24, seed + 2)).Q
    plain = orthogonal_matching_pursuit(dictionary, vectors, k)
    turned = orthogonal_matching_pursuit(dictionary @ rotation, vectors @ rotation, k, batch=batch)
    torch.testing.assert_close(turned.residual_norms, plain.residual_norms, atol=1e-4, rtol=1e-4)
    # Two atoms may tie to the last bit; then their order is open.
    if torch.equal(turned.indices, plain.indices):
        torch.testing.assert_close(turned.coefficients, plain.coefficients, atol=1e-3, rtol=1e-3)


def test_no_vectors_give_no_rows() -> None:
    found = orthogonal_matching_pursuit(gaussian(10, 4), torch.empty(0, 4), 2)
    assert found.combine(gaussian(10, 7)).shape == (0, 7)


@pytest.mark.parametrize("k", [0, 5, 11])
def test_more_atoms_than_there_are_or_than_dimensions_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=r"k must lie in \[1, 4\], got"):
        orthogonal_matching_pursuit(gaussian(10, 4), gaussian(1, 4), k)


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.lists(st.floats(-5, 5), min_size=6, max_size=6), min_size=1, max_size=4))
def test_sparsemax_is_the_nearest_point_of_the_simplex(rows: list[list[float]]) -> None:
    scores = torch.tensor(rows, dtype=torch.float64)
    found = sparsemax(scores)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(len(rows), dtype=torch.float64))
    assert (found >= 0).all()
    # The condition of optimality: no step from it towards a corner comes closer.
    slope = scores - found
    best = slope.max(dim=1).values
    torch.testing.assert_close((slope * found).sum(dim=1), best, atol=1e-9, rtol=0)
