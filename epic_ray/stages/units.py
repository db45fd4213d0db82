"""Units that are committed: what their files say of them, and which are of another make."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from epic_ray.errors import ResultError
from epic_ray.run_dir import RunDir, table_folder, unit_number
from epic_ray.stages.images import UnitRange
from epic_ray.tables import read_metadata

FINGERPRINT_KEY = "epic_ray.fingerprint"
FACTS_KEY = "epic_ray.unit"
_STORE_READERS = 16


@dataclass(frozen=True)
class UnitFacts:
    """What the file that commits a unit says of it, in its metadata: so that it counts whoever computed it, and when.

    decoded: images whose pixels came out whole. readable: images with results. failed: images without.
    max_abs_difference: the largest of the rebuilt logits from the classifier's own; max_relative_difference: the same,
    each divided by 1 + |logit|. agreeing: readable images whose rebuilt logits have the same largest.
    """

    decoded: int
    readable: int
    failed: int
    max_abs_difference: float
    max_relative_difference: float
    agreeing: int


def committed_units(run_dir: RunDir, table: str, units: Iterable[UnitRange]) -> dict[int, UnitFacts]:
    """What `find_units` finds; files of another make are removed."""
    committed, stale = find_units(run_dir, table, units)
    run_dir.delete(stale)
    return committed


def find_units(run_dir: RunDir, table: str, units: Iterable[UnitRange]) -> tuple[dict[int, UnitFacts], list[str]]:
    """Those of a split's units that have a whole file of their own make, by number, with their facts; and the files
    of another make."""
    expected = {unit.number: unit for unit in units}
    split = next(iter(expected.values())).split
    files = run_dir.list(table_folder(table, split))
    committed, stale = {}, []
    for relative, about in zip(files, _metadata_of(run_dir, files), strict=True):
        number = unit_number(relative)
        if number is None:
            continue  # none of ours
        if number in expected and about.get(FINGERPRINT_KEY) == expected[number].made_from:
            committed[number] = UnitFacts(**json.loads(about[FACTS_KEY]))
        else:
            stale.append(relative)
    return committed, stale


def _metadata_of(run_dir: RunDir, files: list[str]) -> list[dict[str, str]]:
    def read(relative: str) -> dict[str, str]:
        try:
            return read_metadata(run_dir, relative)
        except ResultError:
            return {}  # torn, or of another version: written by something else than `publish`

    if run_dir.is_local:
        return [read(file) for file in files]
    with ThreadPoolExecutor(_STORE_READERS) as pool:
        return list(pool.map(read, files))
