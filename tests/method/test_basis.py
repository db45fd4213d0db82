"""Rotation leaves the logits alone; the matrices are orthogonal."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_ray.method import basis as B

dims = st.integers(1, 24)
seeds = st.integers(0, 2**31)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(d=dims, seed=seeds)
@settings(deadline=None)
def test_logits_are_unchanged_by_the_rotation(d, seed):
    maps, weight, bias = randn(3, d, 4, 5, seed=seed), randn(7, d, seed=seed + 1), randn(7, seed=seed + 2)
    basis = B.polar_factor(randn(d, d, seed=seed + 3))
    logits = maps.mean(dim=(2, 3)) @ weight.T + bias
    rotated = B.rotate(maps, basis).mean(dim=(2, 3)) @ B.absorb(weight, basis).T + bias
    torch.testing.assert_close(rotated, logits, rtol=0, atol=1e-10)


def test_each_rotated_cell_is_the_basis_times_the_cell():
    maps, basis = randn(2, 5, 3, 2), randn(5, 5, seed=1)
    rotated = B.rotate(maps, basis)
    for image, row, column in np.ndindex(2, 3, 2):
        torch.testing.assert_close(rotated[image, :, row, column], basis @ maps[image, :, row, column])


def test_pooling_and_rotation_commute():
    maps, basis = randn(4, 6, 3, 3), randn(6, 6, seed=1)
    pooled = B.rotate(maps, basis).mean(dim=(2, 3))
    torch.testing.assert_close(B.rotate_pooled(maps.mean(dim=(2, 3)), basis), pooled)


def test_orthogonality_error_sees_one_wrong_entry():
    basis = torch.eye(4)
    assert B.orthogonality_error(basis) == 0
    basis[1, 2] = 0.25
    assert B.orthogonality_error(basis) == pytest.approx(0.25)


@given(d=dims, seed=seeds)
@settings(deadline=None)
def test_no_orthogonal_matrix_is_nearer_than_the_polar_factor(d, seed):
    matrix = randn(d, d, seed=seed)
    factor = B.polar_factor(matrix)
    assert B.orthogonality_error(factor) < 1e-10
    other = B.orthogonal_from_skew(0.1 * randn(d, d, seed=seed + 1), factor)
    assert (factor * matrix).sum() >= (other * matrix).sum() - 1e-9


def test_polar_factor_of_a_scaled_rotation_is_that_rotation():
    rotation = B.random_basis(16, seed=3)
    torch.testing.assert_close(B.polar_factor(5 * rotation), rotation, rtol=0, atol=1e-6)


@pytest.mark.parametrize("d", [64, 512])
def test_polar_factor_in_float32_is_orthogonal_to_float32s_last_digit(d):
    # non-negative, as the mean peak directions of rectified features are: one huge singular value
    matrix = torch.rand(d, d, generator=torch.Generator().manual_seed(0))
    assert B.orthogonality_error(B.polar_factor(matrix)) < 1e-7


def test_polar_factor_of_a_singular_matrix_is_still_orthogonal():
    matrix = torch.ones(8, 8)
    assert B.orthogonality_error(B.polar_factor(matrix)) < 1e-6


def near_singular(d, seed, smallest=1e-3):
    """A low-rank non-negative matrix plus a small rotation, as M + 0.001 U of a fit with few images is."""
    generator = torch.Generator().manual_seed(seed)
    few = max(1, d // 4)
    low_rank = torch.rand(d, few, generator=generator) @ torch.rand(few, d, generator=generator)
    return low_rank.double() + smallest * B.random_basis(d, seed + 1).double()


@given(d=dims, seed=seeds, scale=st.floats(1e-6, 1e6))
@settings(deadline=None)
def test_newton_finds_the_factor_of_the_decomposition(d, seed, scale):
    matrix = scale * randn(d, d, seed=seed)
    factor = B.polar_by_newton(matrix)
    # what rounding may do grows with the condition number, in both
    bound = 1e-13 * float(torch.linalg.cond(matrix)) + 1e-12
    torch.testing.assert_close(factor, B.polar_by_svd(matrix), rtol=0, atol=bound)
    assert B.orthogonality_error(factor) < 1e-12


@pytest.mark.parametrize("d", [2, 64, 300])
@pytest.mark.parametrize("smallest", [1e-3, 1e-6])
def test_newton_finds_the_factor_of_a_nearly_singular_matrix(d, smallest):
    matrix = near_singular(d, seed=d, smallest=smallest)
    factor, expected = B.polar_by_newton(matrix), B.polar_by_svd(matrix)
    torch.testing.assert_close(factor, expected, rtol=0, atol=1e-12 / smallest)
    assert float((factor * matrix).sum()) == pytest.approx(float((expected * matrix).sum()), rel=1e-12)
    assert B.orthogonality_error(B.polar_by_newton(matrix.float())) < 1e-7


def test_newton_gives_up_on_a_singular_matrix_and_the_decomposition_does_not():
    matrix = torch.ones(8, 8)
    assert B.polar_by_newton(matrix) is None
    assert B.orthogonality_error(B.polar_factor(matrix)) < 1e-6


def test_polar_factor_refuses_nan():
    with pytest.raises(ValueError, match="not finite"):
        B.polar_factor(torch.full((3, 3), torch.nan))


@given(d=dims, seed=seeds, scale=st.floats(0.01, 3))
@settings(deadline=None)
def test_every_skew_parameter_gives_an_orthogonal_matrix_of_the_starts_determinant(d, seed, scale):
    start = torch.diag(torch.tensor([-1.0] + [1.0] * (d - 1), dtype=torch.float64))
    basis = B.orthogonal_from_skew(scale * randn(d, d, seed=seed), start)
    assert B.orthogonality_error(basis) < 1e-9
    assert torch.linalg.det(basis) == pytest.approx(-1, abs=1e-9)


def test_the_skew_parameter_zero_is_the_start():
    start = B.random_basis(12, seed=1)
    torch.testing.assert_close(B.orthogonal_from_skew(torch.zeros(12, 12), start), start, rtol=0, atol=0)


def test_gradient_through_the_skew_parameter_agrees_with_finite_differences():
    start, parameter = randn(4, 4), 0.3 * randn(4, 4, seed=1)
    assert torch.autograd.gradcheck(B.orthogonal_from_skew, (parameter.requires_grad_(), start))


def test_a_random_basis_depends_on_its_seed_alone():
    assert torch.equal(B.random_basis(20, seed=5), B.random_basis(20, seed=5))
    assert not torch.equal(B.random_basis(20, seed=5), B.random_basis(20, seed=6))
    assert B.orthogonality_error(B.random_basis(200, seed=5)) < 1e-6


def skewed_sources(n=4000, d=5):
    sources = torch.distributions.Gamma(0.5, 1.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return sources.sample((n, d)).float()


def third_moments(pooled, basis):
    projections = pooled.double() @ basis.double().T
    return (projections - projections.mean(dim=0)).pow(3).mean(dim=0)


def test_pca_orders_axes_by_variance_and_points_them_along_the_skew():
    pooled = skewed_sources() @ torch.diag(torch.tensor([1.0, 5, 3, 2, 4]))
    basis = B.pca_basis(pooled)
    assert B.orthogonality_error(basis) < 1e-6
    assert basis.abs().argmax(dim=1).tolist() == [1, 4, 2, 3, 0]
    assert (third_moments(pooled, basis) >= 0).all()


def test_ica_finds_rotated_independent_sources_with_their_signs():
    rotation = B.random_basis(5, seed=2)
    pooled = skewed_sources() @ rotation  # row k of the rotation is the direction of source k
    basis = B.ica_basis(pooled, seed=0)
    assert B.orthogonality_error(basis) < 1e-6
    cosines = basis @ rotation.T
    assert sorted(cosines.argmax(dim=1).tolist()) == [0, 1, 2, 3, 4]
    assert (cosines.max(dim=1).values > 0.99).all()
    assert (third_moments(pooled, basis) >= 0).all()


def test_ica_is_orthogonal_with_dead_channels_and_fewer_images_than_channels():
    pooled = torch.rand(12, 20, generator=torch.Generator().manual_seed(0))
    pooled[:, 3] = 0
    assert B.orthogonality_error(B.ica_basis(pooled, seed=0)) < 1e-5
