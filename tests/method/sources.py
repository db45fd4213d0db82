"""Feature maps held in memory, for the tests of the solvers and of their starts."""

import torch
from torch import Tensor, nn

from epic_ray.method import topk
from epic_ray.method.basis import random_basis
from epic_ray.method.peaks import find_peaks


class ArraySource:
    """Maps (N,S,D) of all images; worker `rank` of `world` holds the images with index % world == rank."""

    def __init__(self, maps_NSD: Tensor, *, rank: int = 0, world: int = 1, block_images: int = 64) -> None:
        self.maps, self.rank, self.world, self.block_images = maps_NSD, rank, world, block_images
        self.pooled = maps_NSD.mean(dim=1)

    def search(self, basis: Tensor, n: int) -> topk.TopN:
        """The top-n over all images."""
        indices = torch.arange(len(self.pooled))
        return topk.search(
            zip(indices.split(self.block_images), self.pooled.split(self.block_images), strict=True), basis, n
        )

    def blocks(self, top: topk.TopN):
        """This worker's pairs, `block_images` images at a time, their maps in any order of images."""
        channels, ranks = (top.indices >= 0).nonzero(as_tuple=True)
        images = top.indices[channels, ranks]
        own = images[images % self.world == self.rank].unique()
        for block in own.split(self.block_images):
            slots = torch.searchsorted(block, images).clamp(max=len(block) - 1)
            inside = block[slots] == images
            yield self.maps[block], slots[inside], channels[inside], ranks[inside]

    def pair_maps(self, image_indices: Tensor) -> Tensor:
        """The cells of these images."""
        return self.maps[image_indices]


def rectified_maps(n=60, s=9, d=6, seed=0):
    """Feature maps as a network's last ReLU leaves them: sparse, non-negative."""
    return torch.randn(n, s, d, generator=torch.Generator().manual_seed(seed)).relu()


def mixed_concepts(n=300, s=9, d=8, seed=0):
    """Images in which each cell shows one of d concepts, seen through a rotation of the channels; and it."""
    generator = torch.Generator().manual_seed(seed)
    shown = torch.randint(0, d, (n, s), generator=generator)
    strength = 1 + torch.rand(n, s, 1, generator=generator)
    concepts = nn.functional.one_hot(shown, d) * strength
    rotation = random_basis(d, seed + 1)
    noise = 0.02 * torch.randn(n, s, d, generator=generator)
    return concepts @ rotation + noise, rotation


def mean_purity(maps, basis, n, weights=None):
    """Mean purity of every channel's n prototypes, by the definition; weighted by rank where weights are given."""
    top = topk.search([(torch.arange(len(maps)), maps.mean(dim=1))], basis, n)
    channels = torch.arange(len(basis)).repeat_interleave(n)
    purity = find_peaks(maps[top.indices.flatten()], channels, basis).purity.view(-1, n).double().mean(dim=0)
    weights = torch.ones(n) if weights is None else weights
    return ((purity * weights).sum() / weights.sum()).item()
