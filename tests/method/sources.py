"""A source of feature maps held in memory, for the tests of the solvers."""

import torch
from torch import Tensor

from epic_ray.method import topk


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
