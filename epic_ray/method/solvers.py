"""Fitting the orthogonal basis U: in closed form, and by the paper's gradient descent.

N images, D channels, S = H W cells, P pairs (image, channel), n prototypes per channel.
V (N,D) pooled features, z (D,) one cell, U (D,D) basis with rows u_k, M (D,D) peak directions with rows m_k.

A fit runs in rounds: select every channel's top-n images under U, find their peak cells, and raise the mean purity
u_k.z / |z| over them (EPIC, arXiv 2505.12897, sec. 3). With prototypes and cells held fixed the mean purity is
tr(U M^T) / D, m_k the mean of z / |z| over channel k's prototypes: an orthogonal Procrustes problem with a closed
form (ours). Where images and cells live is the business of a `MapSource`, and who else takes part of a `Reducer`.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from epic_ray.method.basis import ica_basis, orthogonal_from_skew, pca_basis, polar_factor, random_basis
from epic_ray.method.peaks import Peaks, find_peaks, find_peaks_grouped, unit_peak_vectors
from epic_ray.method.topk import TopN

__all__ = [
    "DistributedReducer",
    "FitState",
    "MapSource",
    "NonFiniteError",
    "PairSource",
    "Reducer",
    "RoundRecord",
    "SingleProcess",
    "demand_finite",
    "equal_weights",
    "fit_adam",
    "fit_procrustes",
    "ica_basis",
    "nearest_basis",
    "pair_order",
    "pca_basis",
    "peak_directions",
    "random_basis",
    "rank_weights",
]

# Weight of the current U beside M: far below the singular values that matter, enough to hold a direction about
# which no prototype says anything.
_PROXIMITY = 1e-3
# Peak vectors gathered at once: small enough for the allocator to use the same memory again, where a large array is
# mapped anew, page by page, each time (a third of a fit, and far more on a machine short of memory).
_PAIR_BYTES = 2**23

Weights = Callable[[int], Float[Tensor, "n"]]
MapBlock = tuple[Float[Tensor, "_ s d"], Int[Tensor, "_"], Int[Tensor, "_"], Int[Tensor, "_"]]


class NonFiniteError(ArithmeticError):
    """A fit met a value that is NaN or infinite; names the round and the step."""


@runtime_checkable
class MapSource(Protocol):
    """What a solver sees of the images: a search over all of them, and one worker's share of the maps."""

    def search(self, basis: Tensor, n: int) -> TopN:
        """The top-n of every channel over all images, the same on every worker."""
        ...

    def blocks(self, top: TopN) -> Iterable[MapBlock]:
        """This worker's share of the pairs of `top`: maps, and per pair its row among them, its channel and its rank.

        Ranks count from 0, the channel's strongest image.
        """
        ...


@runtime_checkable
class PairSource(MapSource, Protocol):
    """A source that also hands out any image's map on every worker, as gradient descent needs."""

    def pair_maps(self, image_indices: Int[Tensor, "p"]) -> Float[Tensor, "p s d"]:
        """The cells of these images, one row per entry (images may repeat)."""
        ...


@runtime_checkable
class Reducer(Protocol):
    """Sums and broadcasts over the workers of a fit, in place."""

    rank: int
    world: int

    def sum_(self, tensor: Tensor) -> None:
        """Replace the tensor by its sum over all workers."""
        ...

    def broadcast_(self, tensor: Tensor) -> None:
        """Replace the tensor by that of rank 0."""
        ...


class SingleProcess:
    """The reducer of a fit in one process."""

    rank = 0
    world = 1

    def sum_(self, tensor: Tensor) -> None:
        """Leave the tensor as it is."""

    def broadcast_(self, tensor: Tensor) -> None:
        """Leave the tensor as it is."""


class DistributedReducer:
    """The reducer over the default process group of torch.distributed, which must be initialised."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()

    def sum_(self, tensor: Tensor) -> None:
        """All-reduce by sum."""
        dist.all_reduce(tensor)

    def broadcast_(self, tensor: Tensor) -> None:
        """Broadcast from rank 0."""
        dist.broadcast(tensor, src=0)


@dataclass(frozen=True)
class RoundRecord:
    """What one round did.

    round: from 0. prototypes_per_channel: n of the round. images: distinct images among the prototypes.
    purity_start, purity_end: mean purity over all channels' prototypes of this round, under the U it began with
        and the U it ended with (`fit_procrustes`: at the cells it was fitted to).
    steps: updates of U. loss: mean training loss of the last epoch; None for the closed form.
    moved: mean over channels of 1 - |cosine| between a channel's row of U before and after.
    """

    round: int
    prototypes_per_channel: int
    images: int
    purity_start: float
    purity_end: float
    steps: int
    loss: float | None
    moved: float


@dataclass
class FitState:
    """Everything a fit needs to go on after `round` finished rounds.

    basis: U now. start: U before the first round. parameter, optimizer: of gradient descent, else None.
    """

    round: int
    basis: Tensor
    start: Tensor
    parameter: Tensor | None = None
    optimizer: dict[str, Any] | None = None

    @classmethod
    def begin(cls, start: Float[Tensor, "d d"]) -> "FitState":
        """The state before the first round, from the basis `start`."""
        return cls(round=0, basis=start.clone(), start=start.clone())


OnRound = Callable[[FitState, RoundRecord], None]


def rank_weights(n: int) -> Float[Tensor, "n"]:
    """Weights 1 / sqrt(r) of the ranks r = 1 .. n: the strongest images count most, and none comes in at a stroke."""
    return torch.arange(1, n + 1, dtype=torch.float64).rsqrt()


def equal_weights(n: int) -> Float[Tensor, "n"]:
    """The same weight for every prototype."""
    return torch.ones(n, dtype=torch.float64)


def fit_procrustes(
    source: MapSource,
    state: FitState,
    schedule: Sequence[int],
    reducer: Reducer,
    on_round: OnRound,
    weigh: Weights = rank_weights,
) -> FitState:
    """Fit U in closed form: each round sets U to the orthogonal matrix nearest to M + 0.001 U (ours).

    For fixed prototypes and cells no round lowers the mean purity. The small term keeps the rows of channels
    without any non-zero prototype where they are, as far as orthogonality lets them, and costs nothing of that
    guarantee. Across workers only M and its counts are summed; rank 0 decomposes M and broadcasts U.

    Args:
        source: where prototypes and maps come from.
        state: `FitState.begin(start)`, or the state handed to `on_round` after some round, to resume there.
        schedule: prototypes per channel of each round, of all rounds, also those done.
        reducer: who else takes part.
        on_round: called after each round with the state to resume from and the round's record.
        weigh: weights of a channel's prototypes by rank, of any scale, for their number n.

    Raises:
        NonFiniteError: a feature map is not finite.
    """
    for number in range(state.round, len(schedule)):
        top = source.search(state.basis, schedule[number])
        directions, purity_start = peak_directions(source, top, state.basis, reducer, weigh)
        demand_finite(directions, number, 0)
        basis = nearest_basis(directions + _PROXIMITY * state.basis, reducer)
        purity_end = float((basis * directions).sum()) / len(basis)
        record = _record(number, top, (state.basis, basis), (purity_start, purity_end), steps=1)
        state = FitState(number + 1, basis, state.start)
        on_round(state, record)
    return state


def fit_adam(
    source: PairSource,
    state: FitState,
    schedule: Sequence[int],
    reducer: Reducer,
    on_round: OnRound,
    *,
    seed: int,
    epochs_per_round: int = 2,
    batch_size: int = 512,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-5,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
) -> FitState:
    """Fit U as the paper does: U = expm(S - S^T) U0 and Adam on S (EPIC, arXiv 2505.12897, sec. 3).

    Every step takes `batch_size` pairs (image, channel) of the round's prototypes in an order drawn from the seed,
    finds the channel's peak cell under the current U and lowers minus the mean purity there. Adam (betas 0.9 and
    0.999, weight decay added to the gradient) keeps its moments over the rounds. Of every batch each worker takes
    its part, and the averaged gradients equal those of one process.

    Args:
        source, state, schedule, reducer, on_round: as in `fit_procrustes`.
        seed: of the order of the pairs.
        epochs_per_round: passes over a round's pairs.
        batch_size: pairs of one step, over all workers.
        learning_rate, weight_decay: of Adam.
        wrap: turns the module that holds S into one that averages gradients over the workers, such as
            DistributedDataParallel; needed where there is more than one.

    Raises:
        NonFiniteError: a gradient is not finite.
        ValueError: several workers and no `wrap`.
    """
    if reducer.world > 1 and wrap is None:
        raise ValueError("several workers need `wrap` (DistributedDataParallel) to average their gradients")
    model = _SkewModel(state.start, state.parameter)
    trained = wrap(model) if wrap else model
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    if state.optimizer is not None:
        optimizer.load_state_dict(copy.deepcopy(state.optimizer))

    for number in range(state.round, len(schedule)):
        top = source.search(state.basis, schedule[number])
        _, purity_start = peak_directions(source, top, state.basis, reducer, equal_weights)
        steps, loss_sum = 0, state.basis.new_zeros(1)
        for epoch in range(epochs_per_round):
            loss_sum.zero_()
            for images, channels in _batches(top, batch_size, seed, number, epoch):
                own = slice(reducer.rank, None, reducer.world)
                optimizer.zero_grad()
                loss = trained(source.pair_maps(images[own]), channels[own], reducer.world / len(images))
                loss.backward()
                demand_finite(model.parameter.grad, number, steps)
                optimizer.step()
                loss_sum += loss.detach()
                steps += 1
        reducer.sum_(loss_sum)
        basis = model.basis()
        _, purity_end = peak_directions(source, top, basis, reducer, equal_weights)
        loss_mean = float(loss_sum) * epochs_per_round / (steps * reducer.world)
        record = _record(number, top, (state.basis, basis), (purity_start, purity_end), steps=steps, loss=loss_mean)
        parameter = model.parameter.detach().clone()
        state = FitState(number + 1, basis, state.start, parameter, copy.deepcopy(optimizer.state_dict()))
        on_round(state, record)
    return state


class _SkewModel(nn.Module):
    """Holds S; its forward gives one worker's part of the loss of a batch."""

    def __init__(self, start: Tensor, parameter: Tensor | None) -> None:
        super().__init__()
        self.start = start
        self.parameter = nn.Parameter(torch.zeros_like(start) if parameter is None else parameter.clone())

    def forward(
        self, cells_PSD: Float[Tensor, "p s d"], channels: Int[Tensor, "p"], weight: float
    ) -> Float[Tensor, ""]:
        """Minus `weight` times the summed purity of the pairs, at each channel's current peak cell.

        |U z| = |z| for every S, so the gradient of the mean of u_k.z / |U z| is that of tr(U M^T), M the summed
        unit vectors: one product instead of a rotated copy of every cell.
        """
        basis = orthogonal_from_skew(self.parameter, self.start)
        peaks = find_peaks(cells_PSD, channels, basis.detach())
        units_PD = unit_peak_vectors(cells_PSD, torch.arange(len(channels), device=channels.device), peaks)
        directions = torch.zeros_like(self.start).index_add_(0, channels, units_PD)
        return -weight * (basis * directions).sum()

    def basis(self) -> Tensor:
        """U, its exponential taken in float64 so that no error of orthogonality builds up over the rounds."""
        exact = orthogonal_from_skew(self.parameter.detach().double(), self.start.double())
        return exact.to(self.start.dtype)


def pair_order(count: int, seed: int, round_number: int, epoch: int) -> Int[Tensor, "count"]:
    """The order in which `fit_adam` takes the pairs of a round, numbered channel by channel, best image first."""
    state = np.random.SeedSequence([seed, round_number, epoch]).generate_state(1)
    return torch.randperm(count, generator=torch.Generator().manual_seed(int(state[0])))


def _batches(
    top: TopN, batch_size: int, seed: int, number: int, epoch: int
) -> Iterator[tuple[Int[Tensor, "_"], Int[Tensor, "_"]]]:
    """Image indices and channels of each step's pairs."""
    used = top.indices >= 0
    images, channels = top.indices[used], used.nonzero()[:, 0]
    for batch in pair_order(len(images), seed, number, epoch).to(images.device).split(batch_size):
        yield images[batch], channels[batch]


def peak_directions(
    source: MapSource, top: TopN, basis: Tensor, reducer: Reducer, weigh: Weights
) -> tuple[Float[Tensor, "d d"], float]:
    """M, row k the weighted mean of z / |z| at the peaks of channel k's prototypes, and the purity tr(U M^T) / D.

    Args:
        source: where the maps come from.
        top: the prototypes.
        basis: U.
        reducer: who else takes part.
        weigh: weights of a channel's prototypes by rank.
    """
    # float64: the sum may not depend on how the images are shared out, and U answers to its last bits
    sums, total = torch.zeros_like(basis, dtype=torch.float64), torch.zeros_like(basis[0], dtype=torch.float64)
    by_rank = weigh(top.indices.shape[1]).to(total)
    pair_rows = max(1, _PAIR_BYTES // sums[:1].nbytes)
    for maps_BSD, image_slots, channels, ranks in source.blocks(top):
        peaks = find_peaks_grouped(maps_BSD, image_slots, channels, basis)
        weights = by_rank[ranks]
        total.index_add_(0, channels, weights)
        for rows in torch.arange(len(channels), device=channels.device).split(pair_rows):
            part = Peaks(peaks.cells[rows], peaks.purity[rows], peaks.value[rows])
            units_PD = unit_peak_vectors(maps_BSD, image_slots[rows], part).double()
            sums.index_add_(0, channels[rows], units_PD.mul_(weights[rows].unsqueeze(1)))
    reducer.sum_(sums)
    reducer.sum_(total)
    directions = (sums / torch.where(total == 0, 1.0, total).unsqueeze(1)).to(basis.dtype)
    return directions, float((basis * directions).sum()) / len(basis)


def nearest_basis(matrix: Float[Tensor, "d d"], reducer: Reducer) -> Float[Tensor, "d d"]:
    """The polar factor, from rank 0: decompositions on different machines may differ in the last bit."""
    basis = polar_factor(matrix) if reducer.rank == 0 else torch.empty_like(matrix)
    reducer.broadcast_(basis)
    return basis


def demand_finite(tensor: Tensor | None, number: int, step: int) -> None:
    """Raises NonFiniteError unless all of the tensor is finite; names the round and the step."""
    if tensor is None or not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(f"the update of the basis is not finite; round {number}, step {step}")


def _record(
    number: int,
    top: TopN,
    bases: tuple[Tensor, Tensor],
    purities: tuple[float, float],
    *,
    steps: int,
    loss: float | None = None,
) -> RoundRecord:
    before, after = bases
    return RoundRecord(
        round=number,
        prototypes_per_channel=top.indices.shape[1],
        images=len(top.indices[top.indices >= 0].unique()),
        purity_start=purities[0],
        purity_end=purities[1],
        steps=steps,
        loss=loss,
        moved=float((1 - (before * after).sum(dim=1).abs()).mean()),
    )
