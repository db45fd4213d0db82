"""Made-up pooled features, skewed and one class after another, in a run's feature files."""

import os
import time

import numpy as np
import torch

from epic_ray.method.topk import BLOCK_ROWS
from epic_ray.run_dir import RunDir, unit_file
from epic_ray.stages.features import FeatureFile
from epic_ray.stages.units import FINGERPRINT_KEY
from epic_ray.tables import build_table, write_table

UNIT_ROWS, CLASSES, MADE_FROM = 512, 1000, "benchmark"


def class_means(channels: int) -> torch.Tensor:
    """What tells the classes' features apart."""
    return torch.randn(CLASSES, channels, generator=torch.Generator().manual_seed(1))


def make_features(start: int, stop: int, rows: int, means: torch.Tensor) -> np.ndarray:
    """Features (stop - start, D) of images that lie one class after another: skewed, with some exact zeros."""
    noise = torch.randn(stop - start, means.shape[1], generator=torch.Generator().manual_seed(start))
    own = means[torch.arange(start, stop) * CLASSES // rows]
    return torch.relu(noise.add_(own).mul_(0.7).exp_() - 0.15).numpy()


def write_features(run_dir: RunDir, rows: int, channels: int, dtype: str) -> tuple[float, int]:
    """Writes the feature files of a split; gives the seconds of writing alone, and the bytes."""
    means, seconds, size_bytes = class_means(channels), 0.0, 0
    for start in range(0, rows, BLOCK_ROWS):
        pooled = make_features(start, min(start + BLOCK_ROWS, rows), rows, means).astype(dtype)
        begin = time.perf_counter()
        for first in range(0, len(pooled), UNIT_ROWS):
            size_bytes += write_unit(run_dir, start + first, pooled[first : first + UNIT_ROWS], rows)
        seconds += time.perf_counter() - begin
    return seconds, size_bytes


def write_unit(run_dir: RunDir, start: int, pooled: np.ndarray, rows: int) -> int:
    """Writes one unit's file."""
    positions = np.arange(start, start + len(pooled))
    ids = [f"train/n{place * CLASSES // rows:08d}/n{place * CLASSES // rows:08d}_{place}.JPEG" for place in positions]
    columns = {"split": ["train"] * len(ids), "position": positions, "image_id": ids, "pooled": pooled}
    table = build_table("features", columns, {FINGERPRINT_KEY: MADE_FROM})
    return write_table(run_dir, unit_file("features", "train", start // UNIT_ROWS), table)


def feature_files(rows: int) -> list[FeatureFile]:
    """The files that hold the first `rows` images."""
    starts = range(0, rows, UNIT_ROWS)
    return [
        FeatureFile(unit_file("features", "train", n), MADE_FROM, min(UNIT_ROWS, rows - s))
        for n, s in enumerate(starts)
    ]


def forget(run_dir: RunDir, files: list[FeatureFile]) -> None:
    """Takes the files out of the operating system's cache, so that the disk is read."""
    for file in files:
        handle = os.open(run_dir.path(file.relative), os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
