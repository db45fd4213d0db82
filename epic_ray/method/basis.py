"""The orthogonal basis U: rotating maps, absorbing U into the head, and the orthogonal matrices we compare.

B images, D channels, H x W cells, N pooled features, C classes.
Z (B,D,H,W) feature maps, V (N,D) pooled features, A (C,D) weight of the head, U (D,D) basis: row k is channel k.
"""

import warnings

import torch
from jaxtyping import Float
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

# Inverses after which Newton's iteration is given up; 12 are never needed.
_MOST_INVERSES = 30


def rotate(maps: Float[Tensor, "b d h w"], basis: Float[Tensor, "d d"]) -> Float[Tensor, "b d h w"]:
    """Feature maps in the new channels: U z at every cell (EPIC, arXiv 2505.12897, sec. 3)."""
    return torch.einsum("kd,bdhw->bkhw", basis, maps)


def rotate_pooled(pooled: Float[Tensor, "n d"], basis: Float[Tensor, "d d"]) -> Float[Tensor, "n d"]:
    """Pooled features in the new channels: V U^T. Pooling is linear, so this is also the pooled rotated map."""
    return pooled @ basis.T


def absorb(weight: Float[Tensor, "c d"], basis: Float[Tensor, "d d"]) -> Float[Tensor, "c d"]:
    """The head that gives the same logits on rotated features: A U^T, for an orthogonal U (EPIC, sec. 3)."""
    return weight @ basis.T


def orthogonality_error(basis: Float[Tensor, "d d"]) -> float:
    """Largest absolute entry of U U^T - I, computed in float64."""
    exact = basis.detach().double()
    identity = torch.eye(len(exact), dtype=torch.float64, device=exact.device)
    return float((exact @ exact.T - identity).abs().max())


def polar_factor(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The orthogonal matrix nearest to `matrix`: P Q^T from its singular value decomposition P S Q^T.

    It maximises tr(U M^T) over orthogonal U (the orthogonal Procrustes problem, Schoenemann 1966). Its orthogonality
    error stays below 1e-6 at D = 2048. On a CPU by `polar_by_svd`, the faster there (docs/solver.md); on
    a GPU by `polar_by_newton`, which is made of products and inverses alone. Directions of singular value 0 are
    completed arbitrarily.

    Raises:
        ValueError: `matrix` has entries that are not finite.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("polar_factor: the matrix has entries that are not finite")
    factor = polar_by_newton(matrix) if matrix.is_cuda else None
    return polar_by_svd(matrix) if factor is None else factor


def polar_by_svd(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """`polar_factor` by decomposition, in the precision of `matrix`; one step in float64 takes its rounding off."""
    left, _, right = torch.linalg.svd(matrix)
    return _nearer_to_orthogonal((left @ right).double()).to(matrix.dtype)


def polar_by_newton(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"] | None:
    """`polar_factor` by Newton's iteration X <- (s X + X^-T / s) / 2, all of it in float64.

    The scale s brings the norms of X and X^-T together, so that 7 to 10 inverses do for any condition number up to
    1e12 (Higham, SIAM J. Sci. Stat. Comput. 7, 1986). None for a matrix that is singular to working precision.
    """
    factor = matrix.double()
    for _ in range(_MOST_INVERSES):
        inverse, _ = torch.linalg.inv_ex(factor.T)
        if not bool(torch.isfinite(inverse).all()):
            return None
        scale = (_extent(inverse) / _extent(factor)).sqrt()
        nearer = (scale * factor + inverse / scale) / 2
        moved, factor = float((nearer - factor).norm()), nearer
        if moved < 1e-2:
            return _nearer_to_orthogonal(_nearer_to_orthogonal(factor)).to(matrix.dtype)
    return None


def _extent(matrix: Tensor) -> Tensor:
    """Between the spectral norm and sqrt(d) times it: the geometric mean of the largest row and column sums."""
    sums = matrix.abs()
    return (sums.sum(dim=0).max() * sums.sum(dim=1).max()).sqrt()


def _nearer_to_orthogonal(factor: Tensor) -> Tensor:
    """One step of Newton and Schulz, which squares a small orthogonality error."""
    return 1.5 * factor - 0.5 * factor @ (factor.T @ factor)


def orthogonal_from_skew(parameter: Float[Tensor, "d d"], start: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """expm(S - S^T) U0, orthogonal for every S and U0 itself at S = 0 (EPIC, sec. 3; the start U0 is ours).

    Only through U0 can a start with determinant -1 be followed: the exponential has determinant +1.
    """
    return torch.linalg.matrix_exp(parameter - parameter.T) @ start


def random_basis(d: int, seed: int) -> Float[Tensor, "d d"]:
    """A rotation drawn uniformly (Haar) from the orthogonal d x d matrices, float32. A baseline."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(d, d, generator=generator, dtype=torch.float64)
    orthogonal, triangle = torch.linalg.qr(gaussian)
    return (orthogonal * triangle.diagonal().sign()).float()


def pca_basis(pooled_ND: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """Principal axes of the pooled features as rows, the largest variance first. A baseline.

    Each axis points where its projections' third central moment is positive (ours).
    """
    centred_ND = pooled_ND.double() - pooled_ND.double().mean(dim=0)
    _, axes = torch.linalg.eigh(centred_ND.T @ centred_ND)
    return _skewed_upwards(axes.flip(1).T, centred_ND).to(pooled_ND.dtype)


def ica_basis(pooled_ND: Float[Tensor, "n d"], seed: int, max_iterations: int = 200) -> Float[Tensor, "d d"]:
    """The orthogonal matrix nearest to FastICA's unmixing of the pooled features. A baseline.

    With whitening L^-1/2 E^T and rotation R, the polar factor of the unmixing R L^-1/2 E^T is R E^T. Directions
    without variance are no part of the unmixing and follow as last rows. Signs as in `pca_basis`. FastICA may
    stop at `max_iterations` before it has converged.
    """
    centred_ND = pooled_ND.double() - pooled_ND.double().mean(dim=0)
    variances, axes = torch.linalg.eigh(centred_ND.T @ centred_ND / len(centred_ND))
    varying = variances > 1e-8 * variances.max()
    kept_DR, rest_DQ = axes[:, varying], axes[:, ~varying]
    whitened_NR = (centred_ND @ kept_DR / variances[varying].sqrt()).numpy()
    ica = FastICA(whiten=False, random_state=seed, max_iter=max_iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        ica.fit(whitened_NR)
    rotation_RR = polar_factor(torch.from_numpy(ica.components_))
    basis = torch.cat([rotation_RR @ kept_DR.T, rest_DQ.T])
    return _skewed_upwards(basis, centred_ND).to(pooled_ND.dtype)


def _skewed_upwards(basis: Tensor, centred_ND: Tensor) -> Tensor:
    """The rows turned so that the third moment of each projection is not negative."""
    third_moments = (centred_ND @ basis.T).pow(3).sum(dim=0)
    return torch.where(third_moments < 0, -1.0, 1.0).to(basis).unsqueeze(1) * basis
