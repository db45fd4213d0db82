"""Bases that a fit may start from, and the choice between them.

N images, D channels; V (N,D) pooled features, x (D,) one of them at unit length, U (D,D) basis with rows u_k.

Both rotations are found from pooled features alone, so no image is read for them: l4 maximisation over the orthogonal
matrices (Zhai et al., JMLR 21, 2020; as starts of EPIC: ours). Only (D, D) matrices are summed over the workers.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from epic_ray.method.solvers import (
    FitState,
    MapSource,
    Reducer,
    Weights,
    demand_finite,
    fit_procrustes,
    nearest_basis,
    peak_directions,
)

__all__ = ["purest_start", "quartimax_start", "varimax_start"]

Blocks = Callable[[], Iterable[Float[Tensor, "_ d"]]]

# A trial: long enough for the order of two starts to be that of finished fits on every set of docs/solver.md.
_TRIAL_ROUNDS = 4
TRIAL_PROTOTYPES = 20


def purest_start(
    source: MapSource, starts: Sequence[Float[Tensor, "d d"]], prototypes: int, reducer: Reducer, weigh: Weights
) -> int:
    """Which of the starts leads to the purest prototypes, by a few rounds of `fit_procrustes` from each (ours).

    Judged by the purity of the last round's prototypes before its update: chosen anew among the images that are
    fitted on, and held-out images are never looked at. A round of a trial has at most `prototypes` a channel, and 20.
    """
    schedule = [min(prototypes, TRIAL_PROTOTYPES)] * _TRIAL_ROUNDS
    reached = [_purity_after(source, start, schedule, reducer, weigh) for start in starts]
    # one worker's word counts: sums on different machines may differ in the last bit
    best = torch.tensor([reached.index(max(reached))], device=starts[0].device)
    reducer.broadcast_(best)
    return int(best)


def _purity_after(
    source: MapSource, start: Float[Tensor, "d d"], schedule: Sequence[int], reducer: Reducer, weigh: Weights
) -> float:
    """The purity of the last round's prototypes, which is not followed by an update."""
    state = FitState.begin(start)
    basis = fit_procrustes(source, state, schedule[:-1], reducer, lambda state, record: None, weigh).basis
    return peak_directions(source, source.search(basis, schedule[-1]), basis, reducer, weigh)[1]


def quartimax_start(
    blocks: Blocks, d: int, iterations: int, reducer: Reducer, *, device: torch.device | str = "cpu"
) -> Float[Tensor, "d d"]:
    """The rotation under which pooled features are sparse: largest sum (u_k.x)^4, from U = I.

    By U <- polar((U X)^3 X^T), X the unit features as columns, the cube entry by entry.

    Args:
        blocks: gives this worker's pooled features anew, in blocks, for each iteration.
        d: channels.
        iterations: updates of U; 0 gives the identity.
        reducer: who else takes part.
        device: where to compute.

    Raises:
        NonFiniteError: a pooled feature is not finite.
    """
    basis = torch.eye(d, device=device)
    for step in range(iterations):
        basis = _climb(_cubes(blocks, basis, torch.zeros_like(basis[0]), reducer), basis, step, reducer)
    return basis


def varimax_start(
    blocks: Blocks, d: int, iterations: int, reducer: Reducer, *, device: torch.device | str = "cpu"
) -> Float[Tensor, "d d"]:
    """The rotation under which centred features are sparse: largest sum of the variances of (u_k.x)^2 (Kaiser 1958).

    As `quartimax_start`, of features less their mean, and less what their variances alone give. Rectified features
    share a large mean, which rules their fourth moments. Each row is turned so that the third moment of its channel
    is positive: few images, with large activations.
    """
    basis = torch.eye(d, device=device)
    mean, covariance, count = _moments(blocks, basis, reducer)
    for step in range(iterations):
        projected = basis.double() @ covariance
        variances = (projected * basis).sum(dim=1, keepdim=True)
        gradient = _cubes(blocks, basis, mean, reducer) - count * variances * projected
        basis = _climb(gradient, basis, step, reducer)
    thirds = torch.zeros(d, dtype=torch.float64, device=device)
    for units_ND in _unit_blocks(blocks, basis, mean):
        thirds += (units_ND @ basis.T).pow(3).sum(dim=0)
    reducer.sum_(thirds)
    return torch.where(thirds < 0, -1.0, 1.0).to(basis).unsqueeze(1) * basis


def _unit_blocks(blocks: Blocks, like: Tensor, mean: Tensor) -> Iterable[Float[Tensor, "_ d"]]:
    """The features at unit length, less `mean`."""
    return (nn.functional.normalize(pooled_ND.to(like), dim=1) - mean for pooled_ND in blocks())


def _cubes(blocks: Blocks, basis: Tensor, mean: Tensor, reducer: Reducer) -> Float[Tensor, "d d"]:
    """(U X)^3 X^T, in float64 so that it does not matter who holds what."""
    total = torch.zeros_like(basis, dtype=torch.float64)
    for units_ND in _unit_blocks(blocks, basis, mean):
        total += (units_ND @ basis.T).pow(3).T @ units_ND
    reducer.sum_(total)
    return total


def _moments(blocks: Blocks, like: Tensor, reducer: Reducer) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), covariance (D, D) in float64, and number of the unit features."""
    products, total = torch.zeros_like(like, dtype=torch.float64), torch.zeros_like(like[0], dtype=torch.float64)
    count = torch.zeros(1, dtype=torch.float64, device=like.device)
    for units_ND in _unit_blocks(blocks, like, torch.zeros_like(like[0])):
        products += units_ND.T @ units_ND
        total += units_ND.sum(dim=0)
        count += len(units_ND)
    for tensor in (products, total, count):
        reducer.sum_(tensor)
    mean = total / count
    return mean.to(like), products / count - torch.outer(mean, mean), count


def _climb(
    gradient: Float[Tensor, "d d"], basis: Float[Tensor, "d d"], step: int, reducer: Reducer
) -> Float[Tensor, "d d"]:
    """The next U: the polar factor of the gradient."""
    demand_finite(gradient, 0, step)
    gradient = gradient.to(basis.dtype)
    # Holds directions that no image has; tiny, as the singular values of the gradient span many orders.
    return nearest_basis(gradient + 1e-6 * gradient.abs().max() * basis, reducer)
