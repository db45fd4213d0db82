"""The one pass over the images: pooled features, prediction and status of each, and the maps where they fit."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from epic_ray.config import FITTING_SPLIT, ModelConfig, fingerprint
from epic_ray.errors import InputError, ResultError
from epic_ray.method.classifier import SplitClassifier
from epic_ray.run_dir import RunDir, table_folder, unit_file, unit_map_file
from epic_ray.stages.attempts import Attempts
from epic_ray.stages.forwarding import ForwardingActor
from epic_ray.stages.images import SplitImages, UnitRange, cut_units
from epic_ray.stages.maps import cells_last, committed_map_units, write_maps
from epic_ray.stages.resources import Resources
from epic_ray.stages.unit_actor import Unit
from epic_ray.stages.units import FINGERPRINT_KEY, UnitFacts, committed_units, find_units
from epic_ray.tables import build_table, read_table, to_numpy, write_table

NON_FINITE = "the classifier's features or logits are not finite for this image"
TOO_LARGE = "the classifier's features are beyond float16 (65,504) for this image; set features.dtype=float32"


class FeatureActor(ForwardingActor):
    """Turns a unit of images into files of features, maps (if kept) and statuses, the last of which commits it."""

    def __init__(
        self, run_dir: RunDir, model: ModelConfig, resources: Resources, attempts: Attempts, keep_maps: bool, dtype: str
    ) -> None:
        super().__init__(run_dir, model, resources, attempts)
        self._keep_maps, self._dtype = keep_maps, np.dtype(dtype)

    def compute(self, unit: Unit, readable: np.ndarray) -> "_Results":
        classifier, parts = self.classifier, []
        cells = classifier.grid[0] * classifier.grid[1]
        maps_kept = np.empty((len(readable), cells if self._keep_maps else 0, classifier.channel_count), np.float32)
        for rows, maps, logits in self.forward(unit.pixels, readable):
            parts.append(_measure(maps, logits, classifier.weight, classifier.bias))
            if self._keep_maps:
                torch.from_numpy(maps_kept[rows]).copy_(cells_last(maps))
        return _Results.of(parts, maps_kept, classifier)

    def publish(self, unit: Unit, readable: np.ndarray, results: "_Results") -> int:
        sound = results.finite
        for row in readable[~sound]:
            unit.reasons[row] = NON_FINITE
        with np.errstate(over="ignore", invalid="ignore"):  # what is too large becomes infinite, and is seen below
            results.pooled = results.pooled.astype(self._dtype)
        finite = results.finite
        for row in readable[sound & ~finite]:
            unit.reasons[row] = TOO_LARGE
        good = readable[finite]
        names = (unit.split, unit.number)
        difference = results.difference[finite]
        relative = difference / (1 + np.abs(results.logit[finite]))
        facts = UnitFacts(
            decoded=len(readable),
            readable=len(good),
            failed=unit.rows.num_rows - len(good),
            max_abs_difference=float(difference.max(initial=0)),
            max_relative_difference=float(relative.max(initial=0)),
            agreeing=int(results.agrees[finite].sum()),
        )
        about = self.metadata(unit, facts)
        written = 0
        if self._keep_maps and len(good):
            positions = to_numpy(unit.column("position", good))
            written += write_maps(self.run_dir, unit_map_file(*names), positions, results.maps[finite], unit.made_from)
        if len(good):
            written += write_table(
                self.run_dir, unit_file("features", *names), self._features(unit, good, results, finite, about)
            )
        return written + write_table(
            self.run_dir, unit_file("images", *names), self._images(unit, good, results, about)
        )

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


def _measure(
    maps: torch.Tensor, logits: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What is kept of a batch, on its device."""
    with torch.inference_mode():
        pooled = maps.mean(dim=(2, 3))
        rebuilt = pooled @ weight.T + bias
        logit, predicted = logits.max(dim=1)
        return {
            "pooled": pooled,
            "logits": logits,
            "difference": (rebuilt - logits).abs().amax(dim=1),
            "predicted": predicted.to(torch.int32),
            "logit": logit,
            "probability": torch.exp(logit - logits.logsumexp(dim=1)),
            "agrees": rebuilt.argmax(dim=1) == predicted,
        }


@dataclass
class _Results:
    """What the forwards of a unit gave, in the order of its readable rows."""

    pooled: np.ndarray
    logits: np.ndarray
    difference: np.ndarray
    predicted: np.ndarray
    logit: np.ndarray
    probability: np.ndarray
    agrees: np.ndarray
    maps: np.ndarray

    @classmethod
    def of(cls, parts: list[dict[str, torch.Tensor]], maps: np.ndarray, classifier: SplitClassifier) -> "_Results":
        """From the batches' own results, fetched from the device at once."""
        if not parts:
            weight = classifier.weight
            nothing = weight.new_zeros((0, classifier.channel_count, 1, 1)), weight.new_zeros((0, len(weight)))
            parts = [_measure(*nothing, weight, classifier.bias)]
        joined = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
        return cls(**joined, maps=maps)

    @property
    def finite(self) -> np.ndarray:
        finite: np.ndarray = np.isfinite(self.pooled).all(axis=1) & np.isfinite(self.logits).all(axis=1)
        return finite


@dataclass(frozen=True)
class FeaturePass:
    """A split's part of the pass: its units, and what each has left. Small, and sent to whoever reads the features.

    fingerprint: what all of it was made from, the mark of maps that are made later.
    """

    split: str
    rows: int
    unit_size: int
    fingerprint: str
    units: tuple[UnitRange, ...]
    facts: tuple[UnitFacts, ...]

    @property
    def readable(self) -> int:
        return sum(facts.readable for facts in self.facts)

    @property
    def failed(self) -> int:
        return sum(facts.failed for facts in self.facts)

    @property
    def decoded(self) -> int:
        return sum(facts.decoded for facts in self.facts)

    @property
    def max_abs_difference(self) -> float:
        """Largest |difference| of A·v + b from the classifier's own logits."""
        return max((facts.max_abs_difference for facts in self.facts), default=0.0)

    def files(self) -> list["FeatureFile"]:
        """The feature files, by unit: every one of them is needed."""
        return [
            FeatureFile(unit_file("features", self.split, unit.number), unit.made_from, facts.readable)
            for unit, facts in zip(self.units, self.facts, strict=True)
            if facts.readable
        ]

    def readable_units(self) -> list[UnitRange]:
        """The units with a readable image, which alone have features."""
        return [unit for unit, facts in zip(self.units, self.facts, strict=True) if facts.readable]

    def made_from(self) -> frozenset[str]:
        """The fingerprints that maps of this split may carry."""
        return frozenset({self.fingerprint, *(unit.made_from for unit in self.units)})


@dataclass(frozen=True)
class FeatureFile:
    """rows: images whose features it holds."""

    relative: str
    made_from: str
    rows: int


def units_to_do(run_dir: RunDir, images: SplitImages, made_from: str, maps_wanted: bool) -> list[UnitRange]:
    """The units of a split of which a file is missing; what other settings have left is removed.

    A unit is done where its statuses are committed, and with them its features and (where wanted) its maps.
    """
    units = cut_units(images, made_from)
    featured = committed_units(run_dir, "features", units)
    by_number = {unit.number: unit.made_from for unit in units}
    mapped = committed_map_units(run_dir, images.split, by_number, _listed(images, made_from))
    statuses = committed_units(run_dir, "images", units)
    done = {
        number
        for number, facts in statuses.items()
        if not facts.readable or (number in featured and (number in mapped or not maps_wanted))
    }
    return [unit for unit in units if unit.number not in done]


def count_done(run_dir: RunDir, images: SplitImages, made_from: str) -> int:
    """How many units of a split are committed; nothing is removed."""
    units = cut_units(images, made_from)
    return len(find_units(run_dir, "images", units)[0].keys() & find_units(run_dir, "features", units)[0].keys())


def forget_failed(run_dir: RunDir, images: SplitImages, made_from: str) -> int:
    """Takes the commit of units with failed images back; gives how many there were."""
    committed = find_units(run_dir, "images", cut_units(images, made_from))[0]
    failed = [number for number, facts in committed.items() if facts.failed]
    run_dir.delete([unit_file("images", images.split, number) for number in failed])
    return len(failed)


def finished_pass(run_dir: RunDir, images: SplitImages, made_from: str) -> FeaturePass:
    """What the pass has left of a split. Raises ResultError where a unit is not committed."""
    units = cut_units(images, made_from)
    facts = committed_units(run_dir, "images", units)
    missing = [unit.number for unit in units if unit.number not in facts]
    if missing:
        where = run_dir.show(table_folder("images", images.split))
        raise ResultError(f"{where}: unit {missing[0]} is not there as this run made it; run it again")
    found = tuple(facts[unit.number] for unit in units)
    listed = _listed(images, made_from)
    return FeaturePass(images.split, images.rows, images.unit_size, listed, tuple(units), found)


def _listed(images: SplitImages, made_from: str) -> str:
    """What results over a whole split are made from: another image anywhere moves the positions of others."""
    return fingerprint(made_from, images.split, images.digest)


def read_features(run_dir: RunDir, file: FeatureFile, columns: list[str] | None = None) -> pa.Table:
    """The features of a unit. Raises ResultError for an absent file, and for one that another start has left."""
    table = read_table(run_dir, file.relative, columns)
    if (table.schema.metadata or {}).get(FINGERPRINT_KEY.encode()) != file.made_from.encode():
        raise ResultError(f"{run_dir.show(file.relative)}: was made by a start with other settings; run it again")
    if table.num_rows != file.rows:
        raise ResultError(
            f"{run_dir.show(file.relative)}: has {table.num_rows} images, its unit's statuses tell of {file.rows}; "
            "run it again"
        )
    return table


def read_status(run_dir: RunDir, split: str, unit: int, columns: list[str] | None = None) -> pa.Table:
    """What became of each image of a unit, in the manifest's order."""
    return read_table(run_dir, unit_file("images", split, unit), columns)


def status_of(run_dir: RunDir, passed: FeaturePass, positions: np.ndarray, columns: list[str]) -> pa.Table:
    """What became of images, a row for each of `positions` in their order; only their units' files are read."""
    numbers = positions // passed.unit_size
    parts, order = [], []
    for number in np.unique(numbers):
        places = np.flatnonzero(numbers == number)
        table = read_status(run_dir, passed.split, int(number), columns)
        parts.append(table.take(pa.array(positions[places] - number * passed.unit_size)).replace_schema_metadata())
        order.append(places)
    return pa.concat_tables(parts).take(pa.array(np.argsort(np.concatenate(order))))


def _failures(run_dir: RunDir, passed: FeaturePass) -> Iterator[dict[str, Any]]:
    """The failed images of a split, one by one."""
    for unit, facts in zip(passed.units, passed.facts, strict=True):
        if facts.failed:
            table = read_status(run_dir, passed.split, unit.number, ["image_id", "status", "reason"])
            yield from table.filter(pc.equal(table["status"], "failed")).to_pylist()


def count_failures(run_dir: RunDir, passes: Iterable[FeaturePass]) -> dict[str, int]:
    """Failures by reason over all splits."""
    reasons: Counter[str] = Counter()
    for passed in passes:
        reasons.update(row["reason"].split(":")[0] for row in _failures(run_dir, passed))
    return dict(reasons)


def check_failures(run_dir: RunDir, passes: Iterable[FeaturePass], max_failed_fraction: float) -> None:
    """Raises InputError where more than its share of a split's images failed, or all of them."""
    for passed in passes:
        fraction = passed.failed / passed.rows
        if fraction > max_failed_fraction or not passed.readable:
            rows = islice(_failures(run_dir, passed), 3)
            first = ", ".join(f"{row['image_id']} ({row['reason']})" for row in rows)
            raise InputError(
                f"{passed.split}: {passed.failed} of {passed.rows} images failed ({fraction:.1%}, "
                f"data.max_failed_fraction is {max_failed_fraction:.1%}): {first}; "
                f"all are listed in {run_dir.show(table_folder('images', passed.split))}; mend them or raise the limit"
            )


def check_split(run_dir: RunDir, passes: Iterable[FeaturePass], tolerance: float) -> None:
    """Raises InputError where real images show that the logits are no affine function of the pooled map after all."""
    for passed in passes:
        facts = max(zip(passed.facts, passed.units, strict=True), key=lambda pair: pair[0].max_relative_difference)
        if facts[0].max_relative_difference > tolerance:
            columns = ["image_id", "logit", "split_difference"]
            table = read_status(run_dir, passed.split, facts[1].number, columns)
            relative = pc.divide(table["split_difference"], pc.add(pc.abs(table["logit"]), 1.0))
            worst = table.take(pc.sort_indices(relative, [("", "descending")])[:1]).to_pylist()[0]
            raise InputError(
                f"{passed.split}: the split of the classifier does not hold, worst on {worst['image_id']} (logits "
                f"differ by {worst['split_difference']:.2e}, allowed is {tolerance:g}); "
                "the head is not affine in the pooled map, or resources.precision is too low for this network: set "
                "float32; raise model.tolerance only if you know why"
            )
