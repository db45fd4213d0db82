"""Rounds of both solvers on made-up maps that lie on one device, and the polar factor alone."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import bench
import torch
from torch import Tensor

from epic_ray.method import solvers, topk
from epic_ray.method.basis import orthogonality_error, polar_by_newton, polar_by_svd
from epic_ray.method.schedule import prototypes_per_round

BLOCK_BYTES = 8 * 2**20  # of maps at once, as the stages read them
EPOCHS, STEP_PAIRS = 2, 512  # of the published code
PUBLISHED = prototypes_per_round(100, 5, 10, "linear", exact_end=False)


@dataclass(frozen=True)
class FitSizes:
    """schedule: prototypes per channel of the rounds that are run, for `rounds_of_all` in the end. adam: prototypes of
    two rounds of gradient descent, whose difference is the time of steps."""

    images: int = 16_384
    cells: int = 49
    schedule: tuple[int, ...] = (100, 100)
    rounds_of_all: int = 10
    adam: tuple[int, int] = (1, 9)
    repeats: int = 3


class DeviceMaps:
    """Maps (N, S, D) of made-up images, a few concepts in each, as a source for the solvers; all of it on a device."""

    def __init__(self, sizes: FitSizes, channels: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        shape = (sizes.images, sizes.cells, channels)
        self.maps = torch.empty(shape, device=device)
        for part in self.maps.split(256):
            part.normal_(generator=generator).sub_(0.5).relu_()
            part.mul_(torch.rand(len(part), 1, channels, generator=generator, device=device).pow_(4))
        self.pooled = self.maps.mean(dim=1)

    def search(self, basis: Tensor, n: int) -> topk.TopN:
        """The top-n over all images."""
        indices = torch.arange(len(self.pooled), device=basis.device)
        return topk.search(zip(indices.split(8192), self.pooled.split(8192), strict=True), basis, n)

    def blocks(self, top: topk.TopN) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Maps of the chosen images in blocks of bounded memory, and each pair's row among them, channel and rank."""
        channels, ranks = (top.indices >= 0).nonzero(as_tuple=True)
        chosen, image_slots = top.indices[channels, ranks].unique(return_inverse=True)
        size = max(1, BLOCK_BYTES // self.maps[:1].nbytes)
        for start in range(0, len(chosen), size):
            inside = (image_slots >= start) & (image_slots < start + size)
            part = self.maps[chosen[start : start + size]]
            yield part, image_slots[inside] - start, channels[inside], ranks[inside]

    def pair_maps(self, image_indices: Tensor) -> Tensor:
        """The maps of any images, one row an entry."""
        return self.maps[image_indices]


def fits(sizes: FitSizes, channels: int, device: torch.device) -> list[dict[str, Any]]:
    """Seconds of a round of the closed form with either polar factor, and of all that the published code steps."""
    source = DeviceMaps(sizes, channels, device)
    pairs = bench.side_by_side(
        lambda: closed_form(source, sizes.schedule, newton),
        lambda: closed_form(source, sizes.schedule, polar_by_svd),
        sizes.repeats,
    )
    what = f"{sizes.images:,} maps of {sizes.cells} x {channels}, n = {sizes.schedule[0]}"
    rows = []
    for name, seconds in (("Newton", pairs.ours), ("SVD", pairs.baseline)):
        one = statistics.median(seconds) / len(sizes.schedule)
        rows.append(
            {
                "what": f"procrustes, polar factor by {name}; {what}",
                "measured": f"{len(sizes.schedule)} rounds from the identity, {sizes.repeats} times",
                "each s": f"{one:.3g}",
                "of them": sizes.rounds_of_all,
                "all s": f"{one * sizes.rounds_of_all:.3g} (extrapolated)",
            }
        )
    one, measured = adam_step(source, channels, sizes)
    steps = EPOCHS * sum(-(-n * channels // STEP_PAIRS) for n in PUBLISHED)
    told = f"{measured} steps of {STEP_PAIRS} pairs, {sizes.repeats} times"
    extrapolated = f"{one * steps:.3g} (extrapolated)"
    rows.append(
        {"what": "adam, steps alone", "measured": told, "each s": f"{one:.3g}", "of them": steps, "all s": extrapolated}
    )
    return rows


def newton(matrix: Tensor) -> Tensor:
    """As a fit on a GPU takes it: by decomposition where the matrix is singular."""
    factor = polar_by_newton(matrix)
    return polar_by_svd(matrix) if factor is None else factor


def closed_form(source: DeviceMaps, schedule: tuple[int, ...], polar: Callable[[Tensor], Tensor]) -> Tensor:
    """U after these rounds from the identity."""
    start = solvers.FitState.begin(torch.eye(source.pooled.shape[1], device=source.pooled.device))
    with patch.object(solvers, "polar_factor", polar):
        basis = solvers.fit_procrustes(source, start, schedule, solvers.SingleProcess(), lambda *_: None).basis
    return basis.cpu()


def adam_step(source: DeviceMaps, channels: int, sizes: FitSizes) -> tuple[float, int]:
    """Seconds of a step, and the steps measured: what a round takes longer with more prototypes a channel.

    Without the purities that our `fit_adam` measures before and after a round: the published code has its own.
    """

    def seconds(n: int) -> float:
        start = solvers.FitState.begin(torch.eye(channels, device=source.pooled.device))
        begin = time.perf_counter()
        with patch.object(solvers, "peak_directions", lambda *_: (None, 0.0)):
            solvers.fit_adam(source, start, [n], solvers.SingleProcess(), lambda *_: None, seed=42).basis.cpu()
        return time.perf_counter() - begin

    few, many = (EPOCHS * -(-n * channels // STEP_PAIRS) for n in sizes.adam)
    seconds(sizes.adam[0])
    one = [(seconds(sizes.adam[1]) - seconds(sizes.adam[0])) / (many - few) for _ in range(sizes.repeats)]
    return statistics.median(one), many - few


def polar_factors(channels: int, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Seconds of the polar factor by Newton's iteration and by decomposition, and how orthogonal each is."""
    matrix = torch.randn(channels, channels, device=device, generator=torch.Generator(device).manual_seed(0))
    pairs = bench.side_by_side(lambda: newton(matrix).cpu(), lambda: polar_by_svd(matrix).cpu(), min(repeats, 3))
    errors = {name: orthogonality_error(polar(matrix)) for name, polar in (("Newton", newton), ("SVD", polar_by_svd))}
    row = pairs.row(f"{channels} x {channels}: Newton against SVD")
    return [row | {f"{name}: U·Uᵀ − I": f"{error:.0e}" for name, error in errors.items()}]
