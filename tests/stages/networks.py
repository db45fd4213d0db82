"""A classifier with faults, for tests: importable in Ray's processes too, as they look where the tests are started."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from epic_ray.demo import DigitNet


class OddNet(DigitNet):
    """Its channel 0 is never active, and an image that is white all over makes its map NaN."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, class_count) of normalised images (B, 3, 32, 32)."""
        maps = self.features(images)
        maps = torch.cat([torch.zeros_like(maps[:, :1]), maps[:, 1:]], dim=1)
        white = (images > 0.99).flatten(1).all(dim=1)
        maps = maps.masked_fill(white[:, None, None, None], float("nan"))
        return self.head(self.pool(maps).flatten(1))


def odd_net(class_count: int = 3) -> nn.Module:
    """The factory that run files name."""
    return OddNet(class_count)


class LoudNet(DigitNet):
    """Its map of an all-white image is finite, but far beyond what half precision holds; of an all-black one NaN."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, class_count) of normalised images (B, 3, 32, 32)."""
        white, black = ((side * images > 0.99).flatten(1).all(dim=1) for side in (1, -1))
        loudness = torch.where(white, 1e8, torch.where(black, torch.nan, 1.0))[:, None, None, None]
        return self.head(self.pool(self.features(images) * loudness).flatten(1))


def loud_net(class_count: int = 3) -> nn.Module:
    """The factory that run files name."""
    return LoudNet(class_count)


def network_in(folder: str, module: str, function: str, **arguments: int) -> nn.Module:
    """A network from a file that lies anywhere: Ray's processes, once started, learn of no new place to import from."""
    spec = importlib.util.spec_from_file_location(module, Path(folder) / f"{module}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return getattr(loaded, function)(**arguments)
