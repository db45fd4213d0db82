"""Starts and updates that were tried for the fit, beside those of the product; docs/solver.md tells how they ended.

V (N,D) pooled features, maps (N,S,D), U (D,D), M (D,D) weighted peak directions, w_r the weight of rank r.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from feature_maps import Maps
from torch import Tensor

from epic_ray.method.basis import ica_basis, pca_basis, polar_factor, random_basis
from epic_ray.method.peaks import find_peaks_grouped
from epic_ray.method.solvers import SingleProcess
from epic_ray.method.starts import quartimax_start, varimax_start

Weights = Callable[[int], Tensor]
Start = Callable[[Maps], Tensor]

CELLS = 60_000
PROXIMITY = 1e-3


# --- weights of the ranks 1 .. n


def equal(n: int) -> Tensor:
    """Every prototype the same."""
    return torch.ones(n)


def root(n: int) -> Tensor:
    """1 / sqrt(r)."""
    return torch.arange(1, n + 1).rsqrt()


def harmonic(n: int) -> Tensor:
    """The sum over m = r .. n of 1/m: then the weighted mean is the mean of purity@1, purity@2 .. purity@n."""
    return (1 / torch.arange(1, n + 1)).flip(0).cumsum(0).flip(0)


def linear(n: int) -> Tensor:
    """Falling to 0 after rank n."""
    return 1 - torch.arange(n) / n


def exponential(n: int) -> Tensor:
    """Falling by a factor e over 0.4 n ranks."""
    return torch.exp(-torch.arange(n) / (0.4 * n))


# --- starts


def identity(maps: Maps) -> Tensor:
    """The network's own channels."""
    return torch.eye(maps.pooled.shape[1])


def quartimax(iterations: int) -> Start:
    """The product's, on pooled features."""
    return lambda maps: quartimax_start(maps.pooled_blocks, maps.pooled.shape[1], iterations, SingleProcess())


def varimax(iterations: int) -> Start:
    """The product's other one, of centred features."""
    return lambda maps: varimax_start(maps.pooled_blocks, maps.pooled.shape[1], iterations, SingleProcess())


def quartimax_of_cells(iterations: int) -> Start:
    """The same on random cells in place of pooled features."""

    def start(maps: Maps) -> Tensor:
        cells = some_cells(maps)
        return quartimax_start(lambda: cells.split(8192), cells.shape[1], iterations, SingleProcess())

    return start


def varimax_of_cells(iterations: int) -> Start:
    """The same of random cells."""

    def start(maps: Maps) -> Tensor:
        cells = some_cells(maps)
        return varimax_start(lambda: cells.split(8192), cells.shape[1], iterations, SingleProcess())

    return start


def pca(maps: Maps) -> Tensor:
    """Principal axes of the pooled features."""
    return pca_basis(maps.pooled)


def ica(maps: Maps) -> Tensor:
    """FastICA of the pooled features, made orthogonal."""
    return ica_basis(maps.pooled, seed=0, max_iterations=50)


def random(maps: Maps) -> Tensor:
    """A rotation drawn uniformly."""
    return random_basis(maps.pooled.shape[1], seed=0)


def sparse_cells(steps: int = 500, learning_rate: float = 0.002) -> Start:
    """Our reading of Unsupervised Interpretable Basis Extraction (arXiv 2303.10523), from the identity.

    Every cell should belong to few of D linear classifiers, and to these clearly: y = sigmoid((U x - b) / t) of the
    cell x, q = y / sum(y); the loss adds the entropy of q (sparse), -sum q log y (the strongest near 1),
    a penalty on classifiers with a mean y below nu (none idle), and log t (a wide margin). U is kept orthogonal by
    its polar factor after each step of Adam; the authors parametrise it, and weigh the terms otherwise than equally.
    """

    def start(maps: Maps) -> Tensor:
        cells = some_cells(maps)
        cells = cells / cells.std(dim=0).mean()
        d = cells.shape[1]
        basis, bias, log_width = torch.eye(d), cells.mean(dim=0) + cells.std(dim=0), torch.zeros(())
        leaves = [leaf.requires_grad_() for leaf in (basis, bias, log_width)]
        optimizer = torch.optim.Adam(leaves, lr=learning_rate)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            batch = cells[torch.randint(len(cells), (2048,), generator=generator)]
            loss = _sparse_loss((batch @ basis.T - bias) / log_width.exp(), log_width)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                basis.copy_(polar_factor(basis))
        return basis.detach()

    return start


def _sparse_loss(scores: Tensor, log_width: Tensor) -> Tensor:
    y, log_y = torch.sigmoid(scores), F.logsigmoid(scores)
    q = y / y.sum(dim=1, keepdim=True)
    entropy = -(q * q.clamp(min=1e-12).log()).sum(dim=1).mean()
    strongest = -(q * log_y).sum(dim=1).mean()
    nu = 1 / scores.shape[1]
    idle = F.relu(nu - y.mean(dim=0)).sum() / nu / scores.shape[1]
    return entropy / math.log(scores.shape[1]) + strongest + idle + 0.1 * log_width


def some_cells(maps: Maps) -> Tensor:
    """At most `CELLS` random cells, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    images, cells, channels = maps.maps.shape
    per_image = min(cells, max(1, CELLS // images))
    chosen = torch.rand(images, cells, generator=generator).argsort(dim=1)[:, :per_image].numpy()
    out = torch.empty(images * per_image, channels)
    for image in range(images):
        out[image * per_image : (image + 1) * per_image] = torch.from_numpy(maps.maps[image][chosen[image]])
    return out


# --- the fit, with more to choose than the product has


def fit(
    maps: Maps,
    start: Tensor,
    schedule: Sequence[int],
    weights: Weights = equal,
    *,
    cells: int = 1,
    damping: float = PROXIMITY,
    memory: float = 0.0,
    last_bases: int = 1,
    updates: int = 1,
    on_round: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Rounds of U <- polar(M + damping U).

    cells: of each prototype, the strongest so many, averaged. memory: of a moving average of M over the rounds.
    last_bases: of so many last rounds U is averaged. updates: of U in a round, with the cells found anew.
    """
    basis, average, bases = start, None, []
    for n in schedule:
        top = maps.search(basis, n)
        for _ in range(updates):
            directions = _peak_directions(maps, top, basis, weights, cells)
            average = directions if average is None else memory * average + (1 - memory) * directions
            basis = polar_factor(average + damping * basis)
        bases = [*bases, basis][-last_bases:]
        if on_round:
            on_round(basis)
    return basis if last_bases == 1 else polar_factor(torch.stack(bases).mean(dim=0))


def _peak_directions(maps: Maps, top, basis: Tensor, weights: Weights, cells: int) -> Tensor:
    rank_weights = weights(top.indices.shape[1])
    total, weight = torch.zeros_like(basis), torch.zeros(len(basis))
    for block, slots, channels, ranks in maps.blocks(top):
        vectors = _peak_vectors(block, slots, channels, basis, cells)
        total.index_add_(0, channels, vectors * rank_weights[ranks, None])
        weight.index_add_(0, channels, rank_weights[ranks])
    return total / weight.clamp(min=1e-9)[:, None]


def _peak_vectors(block: Tensor, slots: Tensor, channels: Tensor, basis: Tensor, cells: int) -> Tensor:
    if cells == 1:
        found = find_peaks_grouped(block, slots, channels, basis).cells
        return F.normalize(block[slots, found], dim=1)
    parts = []
    for rows in torch.arange(len(slots)).split(4096):
        scores = torch.bmm(block[slots[rows]], basis[channels[rows], :, None]).squeeze(2)
        found = scores.topk(cells, dim=1).indices
        parts.append(F.normalize(block[slots[rows, None], found], dim=2).mean(dim=1))
    return torch.cat(parts)
