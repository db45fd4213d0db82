"""Feature maps of a data set in files of numpy, made once, and the solvers' view of them without a run around it."""

import tarfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from epic_ray.method import topk
from epic_ray.method.classifier import SplitClassifier
from epic_ray.method.peaks import find_peaks_grouped
from epic_ray.method.preprocessing import decode_image

BATCH = 64
BLOCK_BYTES = 8 * 2**20
SUFFIXES = {".jpg", ".jpeg", ".png"}


def split_images(root: Path, split: str) -> Iterable[bytes]:
    """The images of one split, in a fixed order: a folder of files, Parquet files, or WebDataset tars."""
    if (root / split).is_dir():
        files = sorted(path for path in (root / split).rglob("*") if path.suffix.lower() in SUFFIXES)
        return [path.read_bytes() for path in files]
    tables = sorted([*root.glob(f"{split}-*.parquet"), *root.glob(f"data/{split}-*.parquet")])
    if tables:
        return [row["bytes"] for table in tables for row in pq.read_table(table)["image"].to_pylist()]
    return [data for path in sorted(root.glob(f"{split}-*.tar")) for data in _tar_images(path)]


def _tar_images(path: Path) -> Iterator[bytes]:
    with tarfile.open(path) as tar:
        for member in tar:
            if Path(member.name).suffix in SUFFIXES:
                yield tar.extractfile(member).read()


def make_maps(classifier: SplitClassifier, images: Iterable[bytes], path: Path) -> None:
    """Writes the feature maps (N, S, D), float32, of all images, unless the file is there."""
    if path.exists():
        return
    images = list(images)
    shape = (len(images), classifier.grid[0] * classifier.grid[1], classifier.channel_count)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{zlib.crc32(str(path).encode()):x}.partial")
    out = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
    with ThreadPoolExecutor(2) as pool, torch.inference_mode():
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            pixels = np.stack(list(pool.map(lambda data: classifier.preprocessing.apply(decode_image(data)), batch)))
            maps = classifier(classifier.normalise(torch.from_numpy(pixels)))[0]
            out[start : start + len(batch)] = maps.flatten(2).transpose(1, 2).numpy()
    out.flush()
    partial.rename(path)


@dataclass
class Maps:
    """The maps (N, S, D) of one split in memory, as a source for the solvers."""

    maps: np.ndarray
    pooled: Tensor

    @classmethod
    def open(cls, path: Path) -> "Maps":
        """Those of a file that `make_maps` wrote, read into memory."""
        maps = np.load(path)
        pooled = np.concatenate([maps[start : start + 256].mean(axis=1) for start in range(0, len(maps), 256)])
        return cls(maps, torch.from_numpy(pooled))

    def pooled_blocks(self) -> Iterable[Tensor]:
        """The pooled features, in blocks."""
        return self.pooled.split(8192)

    def search(self, basis: Tensor, n: int) -> topk.TopN:
        """The top-n over all images."""
        indices = torch.arange(len(self.pooled))
        return topk.search(zip(indices.split(8192), self.pooled.split(8192), strict=True), basis, n)

    def blocks(self, top: topk.TopN) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Maps of the chosen images in blocks of bounded memory, and each pair's row among them, channel and rank."""
        channels, ranks = (top.indices >= 0).nonzero(as_tuple=True)
        images = top.indices[channels, ranks]
        chosen, image_slots = images.unique(return_inverse=True)
        size = max(1, BLOCK_BYTES // self.maps[:1].nbytes)
        for start in range(0, len(chosen), size):
            inside = (image_slots >= start) & (image_slots < start + size)
            maps = torch.from_numpy(self.maps[chosen[start : start + size].numpy()])
            yield maps, image_slots[inside] - start, channels[inside], ranks[inside]

    def pair_maps(self, image_indices: Tensor) -> Tensor:
        """The maps of any images, one row an entry."""
        return torch.from_numpy(self.maps[image_indices.numpy()])

    def purity(self, basis: Tensor, counts: Iterable[int] = (5, 20)) -> list[float]:
        """Mean purity over all channels, of the so many strongest images of each, chosen among these images."""
        return [self._purity(basis, count) for count in counts]

    def _purity(self, basis: Tensor, count: int) -> float:
        blocks = self.blocks(self.search(basis, count))
        found = [find_peaks_grouped(maps, slots, channels, basis).purity for maps, slots, channels, _ in blocks]
        return float(torch.cat(found).mean())
