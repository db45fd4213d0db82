"""A run of `epic-ray train` in a process of its own, and what it has left: times, counts, features, purities."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from epic_ray.method.peaks import find_peaks_grouped
from epic_ray.method.topk import search
from epic_ray.run_dir import RunDir, map_folder, table_file, table_folder
from epic_ray.stages.maps import count_chosen_maps
from epic_ray.stages.rounds import read_basis
from epic_ray.tables import read_table, read_tables, to_numpy

SPLITS = {"train": "fitting", "val": "held out"}
COUNTS = (5, 20)


@dataclass(frozen=True)
class FinishedRun:
    """A run folder, and the seconds from the start of the process to its end."""

    seconds: float
    run_dir: RunDir
    record: dict[str, Any]

    @property
    def images(self) -> int:
        """Images of both splits."""
        return int(self.record["counts"]["images"])

    @property
    def prototype_forwards(self) -> int:
        """Images sent through the network again, for their map alone."""
        return sum(count_chosen_maps(self.run_dir, split) for split in SPLITS)

    @property
    def pass_forwards(self) -> int:
        """Images sent through the network by the pass."""
        return int(self.record["counts"]["forwarded"]) - self.prototype_forwards

    @property
    def basis(self) -> Tensor:
        """U."""
        return read_basis(self.run_dir)

    @property
    def purity(self) -> dict[str, float]:
        """What the run says of its U, by split and number of prototypes a channel."""
        told = self.record["purity"]["after"]
        return {f"{name} @{n}": told[split][f"at_{n}"] for split, name in SPLITS.items() for n in COUNTS}

    def fitting_images(self) -> Iterator[tuple[str, int, int]]:
        """File, first byte and bytes (-1: all) of each image that was fitted on, in the order of the run."""
        table = read_table(self.run_dir, table_file("manifest", "train"), ["uri", "byte_offset", "size_bytes"])
        for uri, start, size in zip(*(column.to_pylist() for column in table.columns), strict=True):
            yield (uri, 0, -1) if start is None else (uri, start, size)


def train(settings: dict[str, Any], folder: Path, name: str, code: Path | None = None) -> FinishedRun:
    """`epic-ray train` into a new run folder. `code`: a folder of Python files that the network is made from."""
    command = [sys.executable, "-m", "epic_ray", "train", "--quiet"]
    for key, value in (settings | {"name": name, "output.root": str(folder)}).items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    found_in = [str(bench.REPOSITORY), str(code or ""), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(place for place in found_in if place)}
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=bench.REPOSITORY, env=environment)
    seconds = time.perf_counter() - start
    run_dir = RunDir(str(folder / name))
    return FinishedRun(seconds, run_dir, run_dir.read_json("run.json"))


class Features:
    """Pooled features (N, D) and maps (N, S, D) of both splits, of a run that has kept all maps."""

    def __init__(self, run: FinishedRun) -> None:
        self.pooled = {split: _pooled(run.run_dir, split) for split in SPLITS}
        self.maps = {split: _maps(run.run_dir, split) for split in SPLITS}

    def purity(self, basis: Tensor) -> dict[str, float]:
        """Mean purity over all channels, the strongest images chosen anew in each split."""
        return {f"{name} @{n}": self._purity(split, basis, n) for split, name in SPLITS.items() for n in COUNTS}

    def _purity(self, split: str, basis: Tensor, n: int) -> float:
        pooled = self.pooled[split]
        images = search([(torch.arange(len(pooled)), pooled)], basis, n).indices
        channels, slots = (images >= 0).nonzero(as_tuple=True)
        peaks = find_peaks_grouped(self.maps[split], images[channels, slots], channels, basis)
        return float(peaks.purity.double().mean())


def _pooled(run_dir: RunDir, split: str) -> Tensor:
    table = read_tables(run_dir, run_dir.list(table_folder("features", split)), ["position", "pooled"])
    order = to_numpy(table["position"]).argsort()
    return torch.from_numpy(to_numpy(table["pooled"])[order])


def _maps(run_dir: RunDir, split: str) -> Tensor:
    files = [pa.ipc.open_file(run_dir.open(file)).read_all() for file in run_dir.list(map_folder(split))]
    order = np.concatenate([to_numpy(file["position"]) for file in files]).argsort()
    return torch.from_numpy(np.concatenate([to_numpy(file["maps"]) for file in files])[order])


def check_purity(run: FinishedRun, features: Features) -> dict[str, float]:
    """The purities of the run's own U; ends the script where they are not those of its `run.json`."""
    found = features.purity(run.basis)
    for key, told in run.purity.items():
        if abs(found[key] - told) > 1e-4:
            sys.exit(f"{run.run_dir}: purity {key} is {found[key]} here, and {told} in run.json")
    return found
