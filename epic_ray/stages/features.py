"""The one pass over the images: pooled features, prediction and status of each, and the maps where they fit."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from epic_ray.config import FITTING_SPLIT, ModelConfig
from epic_ray.errors import InputError
from epic_ray.run_dir import RunDir, table_folder, unit_file, unit_map_file
from epic_ray.stages.image_pass import FINGERPRINT_KEY, Unit, UnitActor, UnitFacts, committed_units, cut_units
from epic_ray.stages.maps import cells_last, committed_map_units, write_maps
from epic_ray.stages.resources import Resources
from epic_ray.tables import build_table, read_metadata, read_tables, to_numpy, write_table

NON_FINITE = "the classifier's features or logits are not finite for this image"


class FeatureActor(UnitActor):
    """Turns a unit of images into files of features, maps (if kept) and statuses, the last of which commits it."""

    def __init__(
        self, run_dir: RunDir, model: ModelConfig, resources: Resources, fingerprint: str, keep_maps: bool
    ) -> None:
        super().__init__(run_dir, model, resources, fingerprint)
        self._keep_maps = keep_maps

    def commit(self, unit: Unit, readable: np.ndarray) -> int:
        results = self._compute(unit, readable)
        finite = results.finite
        for row in readable[~finite]:
            unit.reasons[row] = NON_FINITE
        good = readable[finite]
        names = (unit.split, unit.number)
        difference, agreeing = float(results.difference[finite].max(initial=0)), int(results.agrees[finite].sum())
        about = self.metadata(UnitFacts(len(good), unit.rows.num_rows - len(good), difference, agreeing))
        written = 0
        if self._keep_maps and len(good):
            positions = to_numpy(unit.column("position", good))
            written += write_maps(
                self.run_dir, unit_map_file(*names), positions, results.maps[finite], self.fingerprint
            )
        if len(good):
            written += write_table(
                self.run_dir, unit_file("features", *names), self._features(unit, good, results, finite, about)
            )
        return written + write_table(
            self.run_dir, unit_file("images", *names), self._images(unit, good, results, about)
        )

    def _compute(self, unit: Unit, readable: np.ndarray) -> "_Results":
        classifier, count = self.classifier, len(readable)
        cells = classifier.grid[0] * classifier.grid[1]
        results = _Results.empty(
            count, classifier.channel_count, classifier.class_count, cells if self._keep_maps else 0
        )
        for rows, maps, logits in self.forward(unit.pixels, readable):
            pooled = maps.mean(dim=(2, 3))
            rebuilt = pooled @ classifier.weight.T + classifier.bias
            results.pooled[rows] = pooled.cpu().numpy()
            results.logits[rows] = logits.cpu().numpy()
            results.agrees[rows] = (rebuilt.argmax(dim=1) == logits.argmax(dim=1)).cpu().numpy()
            results.difference[rows] = (rebuilt - logits).abs().amax(dim=1).cpu().numpy()
            top = logits.max(dim=1)
            results.predicted[rows] = top.indices.cpu().numpy()
            results.logit[rows] = top.values.cpu().numpy()
            results.probability[rows] = torch.exp(top.values - logits.logsumexp(dim=1)).cpu().numpy()
            if self._keep_maps:
                results.maps[rows] = cells_last(maps).cpu().numpy()
        return results

    def _features(
        self, unit: Unit, good: np.ndarray, results: "_Results", finite: np.ndarray, about: dict[str, str]
    ) -> pa.Table:
        columns: dict[str, Any] = {name: unit.column(name, good) for name in ("split", "position", "image_id")}
        columns["pooled"] = results.pooled[finite]
        if unit.split != FITTING_SPLIT:
            columns["logits"] = results.logits[finite]
        return build_table("features", columns, about)

    def _images(self, unit: Unit, good: np.ndarray, results: "_Results", about: dict[str, str]) -> pa.Table:
        count, rows = unit.rows.num_rows, unit.rows
        absent = np.ones(count, bool)
        absent[good] = False

        def spread(values: np.ndarray, dtype: Any) -> pa.Array:
            full = np.zeros(count, dtype)
            full[good] = values[results.finite]
            return pa.array(full, mask=absent)

        sizes = unit.sizes_px.astype(np.int32)
        unknown = (sizes == 0).any(axis=1)
        columns = {name: rows[name] for name in ("split", "position", "image_id", "label")}
        columns |= {
            "status": pa.array(["ok" if reason is None else "failed" for reason in unit.reasons]),
            "reason": pa.array(unit.reasons, pa.string()),
            "width_px": pa.array(sizes[:, 0], mask=unknown),
            "height_px": pa.array(sizes[:, 1], mask=unknown),
            "predicted": spread(results.predicted, np.int32),
            "logit": spread(results.logit, np.float32),
            "probability": spread(results.probability, np.float32),
            "split_difference": spread(results.difference, np.float32),
        }
        return build_table("images", columns, about)


@dataclass
class _Results:
    pooled: np.ndarray
    logits: np.ndarray
    maps: np.ndarray
    difference: np.ndarray
    predicted: np.ndarray
    logit: np.ndarray
    probability: np.ndarray
    agrees: np.ndarray

    @classmethod
    def empty(cls, count: int, channels: int, classes: int, cells: int) -> "_Results":
        floats = [np.empty((count, *shape), np.float32) for shape in ((channels,), (classes,), (cells, channels), ())]
        scalars = [np.empty(count, dtype) for dtype in (np.int32, np.float32, np.float32, bool)]
        return cls(*floats, *scalars)

    @property
    def finite(self) -> np.ndarray:
        finite: np.ndarray = np.isfinite(self.pooled).all(axis=1) & np.isfinite(self.logits).all(axis=1)
        return finite


def units_to_do(
    run_dir: RunDir, split: str, manifest: pa.Table, unit_size: int, fingerprint: str, maps_wanted: bool
) -> list[pa.Table]:
    """The units of a split of which a file is missing; what other settings have left is removed.

    A unit is done where its statuses are committed, and with them its features and (where wanted) its maps.
    """
    featured = committed_units(run_dir, "features", split, fingerprint)
    mapped = committed_map_units(run_dir, split, fingerprint)
    statuses = committed_units(run_dir, "images", split, fingerprint)
    done = {
        number
        for number, facts in statuses.items()
        if not facts.readable or (number in featured and (number in mapped or not maps_wanted))
    }
    return [unit for number, unit in enumerate(cut_units(manifest, unit_size)) if number not in done]


def feature_files(run_dir: RunDir, split: str, fingerprint: str) -> list[str]:
    """The feature files of a split that were made from `fingerprint`, by unit."""
    files = run_dir.list(table_folder("features", split))
    return [file for file in files if read_metadata(run_dir, file).get(FINGERPRINT_KEY) == fingerprint]


def read_images_table(run_dir: RunDir, split: str, columns: list[str] | None = None) -> pa.Table:
    """What became of each image of a split, in the manifest's order."""
    return read_tables(run_dir, run_dir.list(table_folder("images", split)), columns)


def count_failures(run_dir: RunDir, splits: list[str]) -> dict[str, int]:
    """Failures by reason over all splits."""
    reasons: Counter[str] = Counter()
    for split in splits:
        reasons.update(reason.split(":")[0] for reason in _failed(run_dir, split)[0]["reason"].to_pylist())
    return dict(reasons)


def check_failures(run_dir: RunDir, splits: list[str], max_failed_fraction: float) -> None:
    """Raises InputError where more than its share of a split's images failed, or all of them."""
    for split in splits:
        failed, count = _failed(run_dir, split)
        fraction = failed.num_rows / count
        if fraction > max_failed_fraction or failed.num_rows == count:
            first = ", ".join(f"{row['image_id']} ({row['reason']})" for row in failed.slice(0, 3).to_pylist())
            raise InputError(
                f"{split}: {failed.num_rows} of {count} images failed ({fraction:.1%}, "
                f"data.max_failed_fraction is {max_failed_fraction:.1%}): {first}; "
                f"all are listed in {run_dir.show(table_folder('images', split))}; mend them or raise the limit"
            )


def _failed(run_dir: RunDir, split: str) -> tuple[pa.Table, int]:
    """The rows of a split's failed images, and how many images it has in all."""
    table = read_images_table(run_dir, split, ["image_id", "status", "reason"])
    return table.filter(pc.equal(table["status"], "failed")), table.num_rows


def split_difference(run_dir: RunDir, split: str) -> float:
    """Largest |difference| of A·v + b from the classifier's own logits over a split's readable images."""
    return float(pc.max(read_images_table(run_dir, split, ["split_difference"])["split_difference"]).as_py() or 0.0)


def check_split(run_dir: RunDir, splits: list[str], tolerance: float) -> None:
    """Raises InputError where real images show that the logits are no affine function of the pooled map after all."""
    for split in splits:
        table = read_images_table(run_dir, split, ["image_id", "logit", "split_difference"])
        allowed = pc.multiply(pc.add(pc.abs(table["logit"]), 1.0), tolerance)
        wrong = table.filter(pc.fill_null(pc.greater(table["split_difference"], allowed), False))
        if wrong.num_rows:
            worst = wrong.sort_by([("split_difference", "descending")]).slice(0, 1).to_pylist()[0]
            raise InputError(
                f"{split}: the split of the classifier does not hold on {wrong.num_rows} images, worst on "
                f"{worst['image_id']} (logits differ by {worst['split_difference']:.2e}, "
                f"model.tolerance is {tolerance:g}); "
                "the head is not affine in the pooled map; raise model.tolerance only if you know why"
            )
