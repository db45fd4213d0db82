"""Final tables of a fit: prototypes and purity, before and after, on the fitting and the held-out split."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from epic_ray.config import FITTING_SPLIT, ModelConfig, RunConfig
from epic_ray.logs import Reporter
from epic_ray.method.peaks import Peaks, find_peaks_grouped, heat_maps
from epic_ray.method.preprocessing import Preprocessing
from epic_ray.method.topk import Query, TopN
from epic_ray.run_dir import RunDir, table_file
from epic_ray.stages.features import FeaturePass, status_of
from epic_ray.stages.loading import load
from epic_ray.stages.maps import MapGatherer, MapStore
from epic_ray.stages.resources import Resources, first_cause, take_device
from epic_ray.stages.search import search_split
from epic_ray.tables import build_table, read_table, to_numpy, write_table

PURITY_COUNTS = (5, 20)
SIGN_NAMES = {1: "positive", -1: "negative"}


@dataclass
class PrototypesJob:
    """What the stage works on; `forwarded` counts images whose map had to be computed anew.

    passed: the pass over the fitting split, and over the held-out one if there is one.
    """

    run_dir: RunDir
    config: RunConfig
    resources: Resources
    preprocessing: Preprocessing
    grid: tuple[int, int]
    passed: list[FeaturePass]
    forwarded: int = field(default=0)


def make_prototypes(job: PrototypesJob, basis: torch.Tensor, reporter: Reporter) -> dict[str, int]:
    """Writes the tables `prototypes` and `purity`; gives their rows."""
    bases = {"before": torch.eye(len(basis)), "after": basis}
    prototypes, purity = [], []
    with reporter.stage("prototypes", len(job.passed) * len(bases), "searches") as meter:
        for passed in job.passed:
            split = passed.split
            store = MapStore(job.run_dir, split, passed.made_from())
            found = _search(job, passed, bases)
            _ensure_maps(job, store, passed, found)
            for name, tops in found.items():
                drawn = job.config.prototypes.per_channel if split == FITTING_SPLIT else 0
                peaks = {sign: _peaks(store, top, bases[name], sign, drawn) for sign, top in tops.items()}
                purity += _purity_rows(name, split, peaks[1])
                if split == FITTING_SPLIT:
                    prototypes += [_prototype_table(job, name, passed, sign, tops[sign], peaks[sign]) for sign in tops]
                meter.advance()
    tables = {"prototypes": pa.concat_tables(prototypes), "purity": pa.concat_tables(purity)}
    for name, table in tables.items():
        write_table(job.run_dir, table_file(name), table)
    return {name: table.num_rows for name, table in tables.items()}


def _search(job: PrototypesJob, passed: FeaturePass, bases: dict[str, torch.Tensor]) -> dict[str, dict[int, TopN]]:
    """The top-n for each basis and sign that the tables need; negative prototypes only of the fitting split."""
    per_channel = job.config.prototypes.per_channel
    counts = {1: max(*PURITY_COUNTS, per_channel if passed.split == FITTING_SPLIT else 0)}
    if passed.split == FITTING_SPLIT:
        counts[-1] = per_channel
    queries = [Query(basis, n, sign) for basis in bases.values() for sign, n in counts.items()]
    answers = iter(search_split(job.run_dir, passed.files(), queries))
    return {name: {sign: next(answers) for sign in counts} for name in bases}


def _ensure_maps(job: PrototypesJob, store: MapStore, passed: FeaturePass, found: dict[str, dict[int, TopN]]) -> None:
    """Forwards the chosen images whose map is not there, spread over as many tasks as there are feature actors."""
    chosen = torch.cat([top.indices.flatten() for tops in found.values() for top in tops.values()]).unique()
    missing = store.missing(chosen[chosen >= 0].numpy())
    if not len(missing):
        return
    shares = np.array_split(missing, min(job.resources.feature_actors, len(missing)))
    task = ray.remote(num_cpus=1, num_gpus=job.resources.gpus_per_actor)(_gather)
    arguments = (job.run_dir, passed, job.config.model, job.resources)
    try:
        job.forwarded += sum(ray.get([task.remote(*arguments, share) for share in shares]))
    except ray.exceptions.RayError as error:
        raise first_cause(error, "prototypes") from error
    store.refresh()


def _gather(
    run_dir: RunDir, passed: FeaturePass, model: ModelConfig, resources: Resources, positions: np.ndarray
) -> int:
    device = take_device(resources.device, resources.threads)
    store = MapStore(run_dir, passed.split, passed.made_from())
    gatherer = MapGatherer(store, passed.fingerprint, load(model, resources.precision), resources.batch_size, device)
    return gatherer.ensure(positions)


def _peaks(store: MapStore, top: TopN, basis: torch.Tensor, sign: int, drawn: int) -> dict[str, np.ndarray]:
    """Purity (D, n) and peak cell (D, n) of every (channel, slot) of `top`, and heat (D, drawn, S) of the first slots;
    unused slots are NaN, -1 and 0."""
    channels, slots = (top.indices >= 0).nonzero(as_tuple=True)
    purity = np.full(top.indices.shape, np.nan, np.float32)
    cells, heat = np.full(top.indices.shape, -1, np.int64), np.zeros((len(purity), drawn, 1), np.float32)
    for rows, maps, image_slots in _blocks(store, top.indices[channels, slots]):
        peaks: Peaks = find_peaks_grouped(maps, image_slots, channels[rows], basis, sign)
        where = (channels[rows].numpy(), slots[rows].numpy())
        purity[where], cells[where] = peaks.purity.numpy(), peaks.cells.numpy()
        if heat.shape[2] != maps.shape[1]:
            heat = np.zeros((*heat.shape[:2], maps.shape[1]), np.float32)
        first = slots[rows] < drawn
        where = (channels[rows][first].numpy(), slots[rows][first].numpy())
        heat[where] = heat_maps(maps, image_slots[first], channels[rows][first], basis).numpy()
    return {"purity": purity, "cells": cells, "heat": heat}


def _blocks(store: MapStore, images: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(rows of `images`, maps (b,S,D), the place of each row's image among these) in blocks of bounded memory."""
    for positions, maps in store.blocks(images.unique().numpy()):
        among = torch.from_numpy(positions)
        rows = torch.isin(images, among).nonzero()[:, 0]
        yield rows, torch.from_numpy(maps), torch.searchsorted(among, images[rows])


def _purity_rows(basis: str, split: str, peaks: dict[str, np.ndarray]) -> list[pa.Table]:
    tables = []
    channels = np.arange(len(peaks["purity"]), dtype=np.int32)
    for n in PURITY_COUNTS:
        first = peaks["purity"][:, :n]
        found = np.isfinite(first)
        count = found.sum(axis=1).astype(np.int32)
        mean = np.where(found, first, 0).sum(axis=1, dtype=np.float64) / np.maximum(count, 1)
        columns: dict[str, Any] = {
            "basis": [basis] * len(channels),
            "split": [split] * len(channels),
            "channel": channels,
            "n": np.full(len(channels), n, np.int32),
            "prototype_count": count,
            "purity": mean.astype(np.float32),
        }
        tables.append(build_table("purity", columns))
    return tables


def _prototype_table(
    job: PrototypesJob,
    basis: str,
    passed: FeaturePass,
    sign: int,
    top: TopN,
    peaks: dict[str, np.ndarray],
) -> pa.Table:
    per_channel = job.config.prototypes.per_channel
    indices, values = top.indices[:, :per_channel].numpy(), top.values[:, :per_channel].numpy()
    channels, slots = np.nonzero(indices >= 0)
    columns_read = ["image_id", "label", "width_px", "height_px"]
    images = status_of(job.run_dir, passed, indices[channels, slots], columns_read)
    cells = np.stack(np.divmod(peaks["cells"][channels, slots], job.grid[1]), axis=1)
    sizes = np.stack([to_numpy(images["width_px"]), to_numpy(images["height_px"])], axis=1)
    count = len(channels)
    columns: dict[str, Any] = {
        "basis": [basis] * count,
        "split": [passed.split] * count,
        "sign": [SIGN_NAMES[sign]] * count,
        "channel": channels.astype(np.int32),
        "rank": (slots + 1).astype(np.int32),
        "position": indices[channels, slots],
        "image_id": images["image_id"],
        "label": images["label"],
        "value": sign * values[channels, slots],
        "purity": peaks["purity"][channels, slots],
        "cell_row": cells[:, 0].astype(np.int32),
        "cell_col": cells[:, 1].astype(np.int32),
        "box_xyxy_px": job.preprocessing.cell_boxes(cells, job.grid, sizes),
        "heat": peaks["heat"][channels, slots],
    }
    return build_table("prototypes", columns)


def mean_purity(run_dir: RunDir, basis: str, split: str, n: int) -> float:
    """Mean over channels of the table `purity`."""
    table = read_table(run_dir, table_file("purity"))
    chosen = table.filter((pc.field("basis") == basis) & (pc.field("split") == split) & (pc.field("n") == n))
    return float(to_numpy(chosen["purity"]).mean(dtype=np.float64))
