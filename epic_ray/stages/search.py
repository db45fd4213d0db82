"""Top-n images of every channel, from the feature files alone: no image is read."""

from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch

from epic_ray.method.topk import TopN, search
from epic_ray.run_dir import RunDir
from epic_ray.stages.features import FeatureFile, read_features
from epic_ray.stages.resources import first_cause
from epic_ray.tables import to_numpy

# Files of one task: a constant, so that the shapes of the matrix products, and with them the last bits of the
# values, do not depend on how many workers there are.
_FILES_PER_TASK = 64


def pooled_blocks(run_dir: RunDir, files: Sequence[FeatureFile]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(positions (n,), pooled features (n, D)) of each feature file in turn."""
    for file in files:
        table = read_features(run_dir, file, ["position", "pooled"])
        yield torch.tensor(to_numpy(table["position"])), torch.tensor(to_numpy(table["pooled"]))


def search_files(run_dir: RunDir, files: Sequence[FeatureFile], basis: torch.Tensor, n: int, sign: int = 1) -> TopN:
    """The top-n over feature files, in this process."""
    return search(pooled_blocks(run_dir, files), basis, n, sign)


def search_split(run_dir: RunDir, files: Sequence[FeatureFile], basis: torch.Tensor, n: int, sign: int = 1) -> TopN:
    """The top-n over feature files, as Ray tasks whose results are merged exactly."""
    groups = [files[start : start + _FILES_PER_TASK] for start in range(0, len(files), _FILES_PER_TASK)]
    if len(groups) <= 1:
        return search_files(run_dir, files, basis, n, sign)
    task: Any = ray.remote(num_cpus=1)(search_files)
    shared = ray.put(basis)
    pending = [task.remote(run_dir, group, shared, n, sign) for group in groups]
    best = TopN.empty(len(basis), n)
    try:
        for reference in pending:
            best = best.merge(ray.get(reference))
    except ray.exceptions.RayError as error:
        raise first_cause(error, "search") from error
    return best
