"""Starts of a fit, from pooled features alone, and the choice between them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import ArraySource, mean_purity, rectified_maps
from torch import nn

from epic_ray.method import starts
from epic_ray.method.basis import orthogonality_error, random_basis
from epic_ray.method.solvers import FitState, NonFiniteError, SingleProcess, fit_procrustes, rank_weights

ALONE = SingleProcess()


def quartimax_objective(basis, pooled):
    return nn.functional.normalize(pooled, dim=1).matmul(basis.T).pow(4).sum().item()


def start_from(pooled, iterations, rows=50, rotate=starts.quartimax_start):
    return rotate(lambda: pooled.split(rows), pooled.shape[1], iterations, ALONE)


both = pytest.mark.parametrize("rotate", [starts.quartimax_start, starts.varimax_start])


@given(seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_every_quartimax_iteration_raises_the_fourth_moments(seed):
    pooled = rectified_maps(n=80, s=2, d=7, seed=seed).mean(dim=1)
    reached = [quartimax_objective(start_from(pooled, iterations), pooled) for iterations in range(6)]
    assert all(after >= before - 1e-5 for before, after in itertools.pairwise(reached))
    assert reached[-1] > reached[0]


def test_quartimax_undoes_a_rotation_of_sparse_features():
    generator = torch.Generator().manual_seed(0)
    sparse = torch.randn(2000, 6, generator=generator) * (torch.rand(2000, 6, generator=generator) < 0.2)
    rotation = random_basis(6, seed=4)
    cosines = (start_from(sparse @ rotation, 40) @ rotation.T).abs()
    assert sorted(cosines.argmax(dim=1).tolist()) == list(range(6))
    assert (cosines.max(dim=1).values > 0.99).all()


def shifted_features(d=20, n=4000, seed=0):
    """Sparse, non-negative features on top of what all images share, seen through a rotation; and the rotation."""
    generator = torch.Generator().manual_seed(seed)
    sparse = torch.rand(n, d, generator=generator) * (torch.rand(n, d, generator=generator) < 0.1)
    rotation = random_basis(d, seed + 4)
    return (sparse + 0.5) @ rotation, rotation


def test_varimax_finds_sparse_features_under_a_large_mean_with_their_signs():
    pooled, rotation = shifted_features()
    cosines = start_from(pooled, 40, rotate=starts.varimax_start) @ rotation.T
    assert sorted(cosines.argmax(dim=1).tolist()) == list(range(20))
    # an image's length holds all its features, so that scaling it to 1 mixes them a little
    assert (cosines.max(dim=1).values > 0.85).all()
    assert (start_from(pooled, 40) @ rotation.T).abs().max(dim=1).values.min() < 0.5  # quartimax follows the mean


def test_varimax_ends_where_no_small_rotation_raises_the_variance_of_the_squares():
    pooled = (rectified_maps(n=500, s=1, d=5)[:, 0] + 0.2) * torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    basis = start_from(pooled, 100, rotate=starts.varimax_start).double().requires_grad_()
    units = nn.functional.normalize(pooled, dim=1).double()
    ((units - units.mean(dim=0)) @ basis.T).square().var(dim=0, correction=0).sum().backward()
    tangent = basis.grad @ basis.detach().T  # symmetric at a stationary point on the orthogonal matrices
    assert (tangent - tangent.T).abs().max() < 1e-3 * tangent.abs().max()


@both
def test_a_rotation_does_not_depend_on_the_blocks_and_starts_at_the_identity(rotate):
    pooled = rectified_maps(n=80).mean(dim=1)
    assert torch.equal(start_from(pooled, 0, rotate=rotate).abs(), torch.eye(6))  # varimax turns some signs
    whole, parts = (start_from(pooled, 5, rows, rotate) for rows in (80, 7))
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-4)


@both
def test_a_rotation_keeps_channels_that_no_image_has(rotate):
    pooled = rectified_maps(n=80).mean(dim=1)
    dead = [2, 4]
    pooled[:, dead] = 0
    basis = start_from(pooled, 10, rotate=rotate)
    assert orthogonality_error(basis) < 1e-6
    torch.testing.assert_close(basis[dead][:, dead].abs(), torch.eye(2), rtol=0, atol=1e-4)


@both
def test_a_feature_that_is_not_finite_stops_a_rotation(rotate):
    with pytest.raises(NonFiniteError, match="step 0"):
        start_from(torch.full((5, 3), torch.inf), 2, rotate=rotate)


@given(seed=st.integers(0, 2**31), n=st.integers(1, 30))
@settings(deadline=None, max_examples=15)
def test_the_start_whose_prototypes_are_purest_after_a_few_rounds_is_chosen(seed, n):
    maps = rectified_maps(n=60, d=8, seed=seed)
    source, used, reached = ArraySource(maps), min(n, 20), []
    candidates = [torch.eye(8), *(random_basis(8, seed=seed + i) for i in range(3))]
    for start in candidates:
        state = fit_procrustes(source, FitState.begin(start), [used] * 3, ALONE, lambda s, r: None)
        reached.append(mean_purity(maps, state.basis, used, rank_weights(used)))
    chosen = starts.purest_start(source, candidates, n, ALONE, rank_weights)
    assert reached[chosen] == pytest.approx(max(reached), abs=1e-5)


def test_equal_starts_give_the_first():
    source = ArraySource(rectified_maps())
    assert starts.purest_start(source, [torch.eye(6), torch.eye(6)], 5, ALONE, rank_weights) == 0


class OneOfTwo(SingleProcess):
    """A worker that is sent `word` as the first worker's choice, whatever its own sums say."""

    world = 2

    def __init__(self, word):
        self.word = word

    def broadcast_(self, tensor):
        if tensor.numel() == 1:
            tensor.fill_(self.word)


def test_workers_that_disagree_take_the_start_of_the_first():
    source = ArraySource(rectified_maps(n=60, s=4, d=6, seed=1))
    bases = [torch.eye(6), random_basis(6, seed=2)]
    for word in (0, 1):
        assert starts.purest_start(source, bases, 10, OneOfTwo(word), rank_weights) == word
