"""Is a run whole? Marks, schemas, seals, row counts and checksums: what stands against it, file by file.

`check_run` reads every byte of the tables. A folder that was collected says itself what was left out of it, and what
each of its files was: `check_collection`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow.compute as pc
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from epic_ray.errors import ResultError
from epic_ray.lock import living_claims
from epic_ray.run_dir import BASIS, CONFIG, LOCKS, RUN, RunDir, mark_file, table_file, table_folder, unit_number
from epic_ray.tables import count_rows, read_table, to_numpy

COLLECTED = "collected.json"
STAGES = ("images", "features", "fit", "prototypes")  # run.TRAIN_STAGES, which costs an import of torch
_EXPLANATIONS = "explanations-"
_BLOCK_BYTES = 16 * 1024**2

Result = TypeVar("Result")


@dataclass(frozen=True)
class Finding:
    """What stands against a run being whole: the file, relative to the run, and what is wrong with it.

    damaged: the file's own content is not to be trusted; otherwise it only disagrees with others, or is not there.
    """

    file: str
    what: str
    damaged: bool = False

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def check_run(run_dir: RunDir, everything: bool = False) -> list[Finding]:
    """All that stands against a run being whole; [] for a whole one. Writes nothing.

    everything: the pooled features too. A collected run is checked against its own list as well.
    Raises InputError for what may not be read, RunFailed where a store stays away.
    """
    if not run_dir.exists(COLLECTED):
        return check_standing(run_dir) + check_contents(run_dir, everything)
    collected = read_collected(run_dir)
    found = check_collection(run_dir, collected) + check_standing(run_dir)
    known = {finding.file for finding in found}
    contents = check_contents(run_dir, everything and collected["everything"])
    return found + [finding for finding in contents if finding.file not in known]


# --- marks, record and claims: small files alone


def check_standing(run_dir: RunDir) -> list[Finding]:
    """What marks, record and claims say against a run: it is not finished, or something is being written."""
    found = [Finding(LOCKS, f"{claim} is writing to it") for claim in living_claims(run_dir)]
    if not run_dir.exists(CONFIG):
        found.append(Finding(CONFIG, "is missing"))
    record = _read(run_dir, RUN, found)
    expected = _of(record, "fingerprints", dict) or {}
    if record is not None and not set(STAGES) <= set(expected):
        found.append(Finding(RUN, "is no record of a run", damaged=True))
    for stage in STAGES:
        mark = _read(run_dir, mark_file(stage), found)
        if mark is not None and expected and mark.get("fingerprint") != expected.get(stage):
            found.append(Finding(mark_file(stage), f"is of another run than the one that {RUN} tells of"))
    return found + _half_explained(run_dir)


def _read(run_dir: RunDir, file: str, found: list[Finding]) -> dict[str, Any] | None:
    """A JSON file of the run; what is wrong with it is added to `found`."""
    if not run_dir.exists(file):
        found.append(Finding(file, "is missing: the run is not finished"))
        return None
    try:
        value = run_dir.read_json(file)
    except ResultError as error:
        value = str(error)
    if isinstance(value, dict):
        return value
    found.append(Finding(file, "cannot be read", damaged=True))
    return None


def _of(values: dict[str, Any] | None, key: str, kind: type[Result]) -> Result | None:
    value = (values or {}).get(key)
    return value if isinstance(value, kind) else None


def _half_explained(run_dir: RunDir) -> list[Finding]:
    """Splits of which there are explanations, but no mark of a finished pass."""
    marked = set(_explained(run_dir))
    splits = {file.split("/")[2] for file in run_dir.list("tables/explanations")}
    return [
        Finding(table_folder("explanations", split), "explanations are half done: explain the split again")
        for split in sorted(splits - marked)
    ]


def _explained(run_dir: RunDir) -> list[str]:
    prefix = f"marks/{_EXPLANATIONS}"
    return [file[len(prefix) : -len(".json")] for file in run_dir.list("marks") if file.startswith(prefix)]


# --- the tables and U: every byte


def check_contents(run_dir: RunDir, everything: bool = False) -> list[Finding]:
    """What the tables and U say against a run: damage, foreign schemas, and counts that do not agree with the marks."""
    files = [file for file in run_dir.list("tables") if everything or not file.startswith("tables/features/")]
    rows: dict[str, int] = {}
    found: list[Finding] = []

    def count(file: str) -> int | Finding:
        try:
            return count_rows(run_dir, file)
        except ResultError as error:
            return Finding(file, str(error).removeprefix(f"{run_dir.show(file)}: "), damaged=True)

    for file, counted in zip(files, _each(run_dir, count, files), strict=True):
        if isinstance(counted, Finding):
            found.append(counted)
        else:
            rows[file] = counted
    damaged = {finding.file for finding in found}
    contents = _Contents(run_dir, rows, damaged, {stage: _mark(run_dir, stage) for stage in STAGES})
    return [*found, *contents.disagreements(everything), *_check_basis(run_dir, contents.marks["fit"])]


def _each(run_dir: RunDir, read: Callable[[str], Result], files: Iterable[str]) -> list[Result]:
    with ThreadPoolExecutor(2 if run_dir.is_local else 16) as pool:
        return list(pool.map(read, files))


def _mark(run_dir: RunDir, stage: str) -> dict[str, Any]:
    """A mark, or nothing: that it is missing is said elsewhere."""
    try:
        value = run_dir.read_json(mark_file(stage)) if run_dir.exists(mark_file(stage)) else {}
    except ResultError:
        return {}
    return value if isinstance(value, dict) else {}


@dataclass
class _Contents:
    """Row counts of the undamaged files against the marks. What is damaged is a finding already and not compared."""

    run_dir: RunDir
    rows: dict[str, int]
    damaged: set[str]
    marks: dict[str, dict[str, Any]]

    def disagreements(self, everything: bool) -> Iterator[Finding]:
        yield from self._agree(table_file("history"), self.marks["fit"].get("rows"))
        for name in ("prototypes", "purity"):
            expected = _of(self.marks["prototypes"], "rows", dict)
            yield from self._agree(table_file(name), expected.get(name) if expected else None)
        if _of(self.marks["images"], "rows", dict):
            if table_file("classes") not in self.rows and table_file("classes") not in self.damaged:
                yield Finding(table_file("classes"), "is missing")
            yield from self._images(self.marks["images"]["rows"], everything)
        for split in _explained(self.run_dir):
            yield from self._explanations(split, _mark(self.run_dir, f"{_EXPLANATIONS}{split}"))

    def _agree(self, file: str, expected: Any) -> Iterator[Finding]:
        """One table against the rows that a mark tells; None where the stage has no mark."""
        if expected is not None and file not in self.damaged and self.rows.get(file) != expected:
            yield Finding(file, _told(self.rows.get(file), expected))

    def _images(self, expected: dict[str, int], everything: bool) -> Iterator[Finding]:
        listed = {file.split("/")[2] for table in ("manifest", "images") for file in self._files(f"tables/{table}")}
        for split in sorted({name.removesuffix(".parquet") for name in listed} - set(expected)):
            yield Finding(table_folder("images", split), "the run has no such split")
        units = failed = 0
        for split, count in expected.items():
            yield from self._agree(table_file("manifest", split), count)
            if not self.marks["features"]:
                continue
            folder = table_folder("images", split)
            if self._is_damaged(folder):
                return
            files = self._units(folder)
            units += len(files)
            parts = _each(self.run_dir, lambda file: self._read(file, ["position", "status"]), files)
            positions = np.concatenate([np.empty(0, np.int64), *(to_numpy(part["position"]) for part in parts)])
            if not np.array_equal(positions, np.arange(count)):
                yield Finding(folder, f"its {len(positions)} rows are not the {count} images of the manifest in order")
            bad = sum(pc.sum(pc.equal(part["status"], "failed")).as_py() or 0 for part in parts)
            failed += bad
            if everything:
                yield from self._features(split, len(positions) - bad)
        for name, counted in (("units", units), ("failed", failed)):
            told = self.marks["features"].get(name)
            if told is not None and told != counted:
                yield Finding("tables/images", f"has {counted} {name}, {mark_file('features')} tells of {told}")

    def _features(self, split: str, readable: int) -> Iterator[Finding]:
        folder = table_folder("features", split)
        counted = sum(self.rows.get(file, 0) for file in self._units(folder))
        if counted != readable and not self._is_damaged(folder):
            yield Finding(folder, _told(counted, readable))

    def _explanations(self, split: str, mark: dict[str, Any]) -> Iterator[Finding]:
        folder, images, failed = table_folder("explanations", split), mark.get("rows"), mark.get("failed")
        if not isinstance(images, int) or not isinstance(failed, int):
            yield Finding(mark_file(f"{_EXPLANATIONS}{split}"), "cannot be read", damaged=True)
            return
        yield from self._agree(table_file("selection", split), images)
        if not self._is_damaged(folder):
            parts = _each(self.run_dir, lambda file: self._read(file, ["position"]), self._units(folder))
            explained = sum(len(np.unique(to_numpy(part["position"]))) for part in parts)
            if explained != images - failed:
                what = f"explains {explained} images, {mark_file(_EXPLANATIONS + split)} tells of {images - failed}"
                yield Finding(folder, what)

    def _read(self, file: str, columns: list[str]) -> Any:
        return read_table(self.run_dir, file, columns)

    def _files(self, folder: str) -> list[str]:
        return [file for file in [*self.rows, *self.damaged] if file.startswith(f"{folder}/")]

    def _units(self, folder: str) -> list[str]:
        files = [file for file in self._files(folder) if unit_number(file) is not None]
        return sorted(files, key=lambda file: unit_number(file) or 0)

    def _is_damaged(self, folder: str) -> bool:
        return any(file.startswith(f"{folder}/") for file in self.damaged)


def _told(counted: int | None, expected: int) -> str:
    return "is missing" if counted is None else f"has {counted} rows, {expected} are expected"


def _check_basis(run_dir: RunDir, mark: dict[str, Any]) -> list[Finding]:
    """U against the checksum in the mark of its fit; of older runs, against its orthogonality there."""
    if not run_dir.exists(BASIS):
        return [Finding(BASIS, "is missing")] if mark else []
    content = run_dir.read_bytes(BASIS)
    digest, told = mark.get("basis_sha256"), mark.get("orthogonality_error")
    try:
        basis = load_tensors(content)["U"]
        whole = hashlib.sha256(content).hexdigest() == digest if digest else _is_as_orthogonal(basis, told)
    except (SafetensorError, KeyError, ValueError) as fault:
        return [Finding(BASIS, f"cannot be read ({fault})", damaged=True)]
    return [] if whole else [Finding(BASIS, "its bytes are not those that the fit wrote", damaged=True)]


def _is_as_orthogonal(basis: np.ndarray, told: float | None) -> bool:
    basis = basis.astype(np.float64)
    return told is None or bool(abs(np.abs(basis @ basis.T - np.eye(len(basis))).max() - told) < 1e-9)


# --- a collected folder


def read_collected(run_dir: RunDir) -> dict[str, Any]:
    """What a collected folder says of itself. Raises ResultError where it cannot be read."""
    value = run_dir.read_json(COLLECTED)
    kinds = {"source": str, "everything": bool, "whole": bool, "findings": list, "files": dict}
    if not isinstance(value, dict) or any(not isinstance(value.get(key), kind) for key, kind in kinds.items()):
        raise ResultError(f"{run_dir.show(COLLECTED)}: is no list of a collection")
    return value


def check_collection(folder: RunDir, collected: dict[str, Any] | None = None) -> list[Finding]:
    """What is missing or changed of a collected folder, by the checksums in its list, and why it was never whole.

    Files that were added since, by explaining there, are no fault. Raises ResultError for a folder without a list.
    """
    collected = collected or read_collected(folder)
    found = [] if collected["whole"] else [Finding(COLLECTED, "the run was half done when it was collected")]

    def look(file: str) -> Finding | None:
        listed = collected["files"][file]
        if not folder.exists(file):
            return Finding(file, "is missing")
        same = digest_of(folder, file) == (listed["size_bytes"], listed["sha256"])
        return None if same else Finding(file, "was changed since it was collected", damaged=True)

    return found + [finding for finding in _each(folder, look, collected["files"]) if finding]


def digest_of(run_dir: RunDir, relative: str) -> tuple[int, str]:
    """Size and SHA-256 of a published file."""

    def read() -> tuple[int, str]:
        digest, size_bytes = hashlib.sha256(), 0
        with run_dir.filesystem.open_input_stream(run_dir.path(relative), compression=None) as source:
            while block := source.read(_BLOCK_BYTES):
                digest.update(block)
                size_bytes += len(block)
        return size_bytes, digest.hexdigest()

    return run_dir.ask(relative, read)


def to_json(values: dict[str, Any]) -> bytes:
    return f"{json.dumps(values, indent=1, ensure_ascii=False)}\n".encode()
