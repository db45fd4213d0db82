"""One pass over images: decode on CPU tasks, then an actor with the classifier; a whole unit at a time.

A unit is a fixed slice of a split's manifest and one row of Ray Data from end to end, so that nothing can cut or join
it on the way: its address at first, then its decoded images packed into one value. Its batches are fixed, so a unit
that is computed again is computed equal; the actor publishes a unit's files itself, the one that commits it last.
"""

import gc
import json
import os
import socket
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data as rd
import torch

from epic_ray import errors, interrupts
from epic_ray.config import ModelConfig
from epic_ray.errors import EpicError, ResultError, RunFailed
from epic_ray.logs import Reporter
from epic_ray.method.classifier import SplitClassifier
from epic_ray.method.preprocessing import Preprocessing
from epic_ray.run_dir import RunDir, table_folder, unit_number
from epic_ray.stages.attempts import Attempts
from epic_ray.stages.decoding import CarefulNeeded, Decoded, decode_carefully, decode_plainly
from epic_ray.stages.images import UnitRange, image_column, read_unit
from epic_ray.stages.loading import load
from epic_ray.stages.reading import ImageReader
from epic_ray.stages.resources import Resources, first_cause, peak_memory_bytes, take_device
from epic_ray.tables import read_metadata, to_numpy

FINGERPRINT_KEY = "epic_ray.fingerprint"
_FACTS_KEY = "epic_ray.unit"
_IMAGE_COLUMN = "image"
_STORE_READERS = 16
# Ray replaces what it loses by itself; what it gives up on is begun anew from what is committed, so many times without
# a further unit in between
_MOST_IN_VAIN = 3


@dataclass
class PassTotals:
    """What a pass really did, summed over its units: counted where it happened.

    units_redone: forwards of units that were begun again, since the last pass that came to its end.
    """

    images: int = 0
    decoded: int = 0
    forwarded: int = 0
    failed: int = 0
    units_redone: int = 0
    bytes_written: int = 0
    peak_memory_bytes: int = 0
    actors: set[str] = field(default_factory=set)

    def add(self, summary: dict[str, Any]) -> None:
        self.images += summary["images"]
        self.decoded += summary["decoded"]
        self.forwarded += summary["forwarded"]
        self.failed += summary["failed"]
        self.bytes_written += summary["bytes_written"]
        self.peak_memory_bytes = max(self.peak_memory_bytes, summary["peak_memory_bytes"])
        self.actors.add(summary["actor"])


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
            committed[number] = UnitFacts(**json.loads(about[_FACTS_KEY]))
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


def pack(table: pa.Table) -> pa.Table:
    """A table as one row of another: its Arrow stream in the column `packed`."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    content = sink.getvalue()
    offsets = pa.py_buffer(np.array([0, content.size], np.int64).tobytes())
    return pa.table({"packed": pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, content])})


def unpack(row: pa.Table) -> pa.Table:
    """The table that `pack` packed; its columns lie in the row's own memory."""
    if row.num_rows != 1:
        raise RuntimeError(f"a block holds {row.num_rows} units: Ray Data joined blocks")
    return pa.ipc.open_stream(row["packed"].chunk(0)[0].as_buffer()).read_all()


def fault_row(error: Exception, stage: str) -> pa.Table:
    """A fault as an answer: raised inside Ray Data, it would lose its kind and its cause. The traceback goes to the
    process's log, the fault itself to the driver, which raises it."""
    traceback.print_exception(error)
    fault = first_cause(error, stage)
    return pa.table({"fault": [type(fault).__name__], "message": [str(fault)]})


class DecodeUnit:
    """From the address of a unit to its rows with the decoded images (uint8), the reason where there is none, and the
    original sizes."""

    def __init__(self, stage: str, run_dir: RunDir, attempts: Attempts, preprocessing: Preprocessing) -> None:
        self._stage, self._run_dir, self._attempts, self._preprocessing = stage, run_dir, attempts, preprocessing

    def __call__(self, address: pa.Table) -> pa.Table:
        try:
            return pack(self._decode(UnitRange(**address.to_pylist()[0])))
        except Exception as error:
            return fault_row(error, self._stage)

    def _decode(self, unit: UnitRange) -> pa.Table:
        earlier = self._attempts.begin(unit.split, unit.number, "decode")
        rows = read_unit(self._run_dir, unit)
        column = image_column(self._run_dir, unit.table, unit.split)
        decoded = self._decode_rows(ImageReader(column), rows, careful=earlier > 0)
        columns = {
            "unit": pa.repeat(pa.scalar(unit.number, pa.int32()), rows.num_rows),
            "made_from": pa.repeat(pa.scalar(unit.made_from), rows.num_rows),
            "reason": pa.array(decoded.reasons, pa.string()),
            "width_px": pa.array(decoded.sizes_px[:, 0]),
            "height_px": pa.array(decoded.sizes_px[:, 1]),
            _IMAGE_COLUMN: pa.FixedShapeTensorArray.from_numpy_ndarray(decoded.pixels),
        }
        for name, values in columns.items():
            rows = rows.append_column(name, values)
        return rows

    def _decode_rows(self, reader: ImageReader, rows: pa.Table, careful: bool) -> Decoded:
        """`careful`, in a process apart: an earlier attempt may have died of an image of this unit."""
        if not careful:
            try:
                return decode_plainly(reader.read_many(rows), rows.num_rows, self._preprocessing)
            except CarefulNeeded:
                pass
        return decode_carefully(reader.read_many(rows), rows.num_rows, self._preprocessing)


@dataclass
class Unit:
    """A decoded unit as its actor sees it; `readable` are the rows whose image could be decoded."""

    split: str
    number: int
    made_from: str
    rows: pa.Table
    pixels: np.ndarray
    reasons: list[str | None]
    sizes_px: np.ndarray

    @classmethod
    def of(cls, block: pa.Table) -> "Unit":
        return cls(
            block["split"][0].as_py(),
            block["unit"][0].as_py(),
            block["made_from"][0].as_py(),
            block,
            to_numpy(block[_IMAGE_COLUMN]),
            block["reason"].to_pylist(),
            np.stack([to_numpy(block["width_px"]), to_numpy(block["height_px"])], axis=1),
        )

    @property
    def readable(self) -> np.ndarray:
        return np.array([row for row, reason in enumerate(self.reasons) if reason is None], dtype=np.int64)

    def column(self, name: str, rows: np.ndarray) -> pa.ChunkedArray:
        return self.rows[name].take(pa.array(rows))


class UnitActor:
    """Base of the actors of a pass: holds the classifier, forwards a unit in fixed batches."""

    def __init__(self, run_dir: RunDir, model: ModelConfig, resources: Resources, attempts: Attempts) -> None:
        self.device = take_device(resources.device, resources.threads)
        self.classifier: SplitClassifier = load(model).to(self.device)
        self.run_dir, self.batch_size, self._attempts = run_dir, resources.batch_size, attempts
        self._identity = f"{socket.gethostname()}:{os.getpid()}"
        self.forwarded = 0

    def forward(self, pixels: np.ndarray, rows: np.ndarray) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """(place among `rows`, maps (b,d,h,w), logits (b,c)) batch by batch; the last batch is padded, then cut."""
        batch = np.zeros((self.batch_size, *pixels.shape[1:]), dtype=np.uint8)
        for start in range(0, len(rows), self.batch_size):
            chosen = rows[start : start + self.batch_size]
            batch[: len(chosen)] = pixels[chosen]
            batch[len(chosen) :] = 0
            with torch.inference_mode():
                images = self.classifier.normalise(torch.from_numpy(batch).to(self.device))
                maps, logits = self.classifier(images)
            self.forwarded += len(chosen)
            yield slice(start, start + len(chosen)), maps[: len(chosen)], logits[: len(chosen)]

    def __call__(self, row: pa.Table) -> pa.Table:
        unit = Unit.of(unpack(row))
        self._attempts.begin(unit.split, unit.number, "forward")
        readable, self.forwarded = unit.readable, 0
        bytes_written = self.commit(unit, readable)
        return pa.table(
            {
                "split": [unit.split],
                "unit": [unit.number],
                "decoded": [len(readable)],
                "forwarded": [self.forwarded],
                "failed": [sum(reason is not None for reason in unit.reasons)],
                "bytes_written": [bytes_written],
                "actor": [self._identity],
                "peak_memory_bytes": [peak_memory_bytes()],
                "images": [unit.rows.num_rows],
            }
        )

    def metadata(self, unit: Unit, facts: UnitFacts) -> dict[str, str]:
        """What goes into the metadata of a unit's files."""
        return {FINGERPRINT_KEY: unit.made_from, _FACTS_KEY: json.dumps(asdict(facts))}

    def commit(self, unit: Unit, readable: np.ndarray) -> int:
        """Computes and publishes the unit's files; a row found bad here gets its reason. Gives the bytes written."""
        raise NotImplementedError


class GuardedActor:
    """An actor of a pass whose fault is its answer; the fault of a decode task passes through it."""

    def __init__(self, stage: str, actor: type[UnitActor], arguments: dict[str, Any]) -> None:
        self._stage, self._fault = stage, None
        try:
            self._actor = actor(**arguments)
        except Exception as error:
            self._fault = error

    def __call__(self, row: pa.Table) -> pa.Table:
        if "fault" in row.column_names:
            return row
        try:
            if self._fault:
                raise self._fault
            return self._actor(row)
        except Exception as error:
            return fault_row(error, self._stage)


def run_pass(
    stage: str,
    actor: type[UnitActor],
    arguments: dict[str, Any],
    units_to_do: Callable[[], list[UnitRange]],
    preprocessing: Preprocessing,
    resources: Resources,
    reporter: Reporter,
    images: int,
) -> PassTotals:
    """Sends the units that are not committed through decode tasks and a pool of actors; gives what was done.

    images: those of all units, committed or not.
    Raises the first cause of a failure; what Ray itself could not go on with is taken up again from what is committed.
    """
    totals = PassTotals()
    units = units_to_do()
    if not units:
        return totals
    run_dir: RunDir = arguments["run_dir"]
    attempts = Attempts(run_dir, stage)
    decode = DecodeUnit(stage, run_dir, attempts, preprocessing)
    arguments = {**arguments, "attempts": attempts}
    already = images - sum(unit.count for unit in units)
    with reporter.stage(stage, images, "images", already=already) as meter:
        in_vain = 0
        while units:
            before, fault = len(units), None
            try:
                with closing(_execute(stage, actor, arguments, decode, units, resources)) as summaries:
                    for summary in summaries:
                        totals.add(summary)
                        meter.advance(summary["images"], f"{totals.failed} failed" if totals.failed else "")
            except (ray.exceptions.RayError, RuntimeError) as error:
                fault = first_cause(error, stage)
                if not isinstance(fault, RunFailed):
                    raise fault from error
            interrupts.check()
            units = units_to_do()
            if fault is None and units:
                raise RunFailed(
                    f"{stage}: {len(units)} unit(s) are not committed although the pass ended; "
                    f"is {run_dir} a folder that all machines share?"
                )
            in_vain = in_vain + 1 if len(units) == before else 1
            if fault and in_vain >= _MOST_IN_VAIN:
                raise fault
            if fault:
                reporter.say(f"{fault}; going on with the {len(units)} unit(s) that are not committed")
    totals.units_redone = attempts.clear("forward")
    return totals


def _execute(
    stage: str,
    actor: type[UnitActor],
    arguments: dict[str, Any],
    decode: DecodeUnit,
    units: list[UnitRange],
    resources: Resources,
) -> Generator[dict[str, Any], None, None]:
    """One execution of Ray Data over units; gives the summary of each as it is committed."""
    context = rd.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    actors = min(resources.feature_actors, len(units))
    dataset = rd.from_arrow([pa.Table.from_pylist([asdict(unit)]) for unit in units]).map_batches(
        decode.__call__, batch_size=1, batch_format="pyarrow", num_cpus=1
    )
    dataset = dataset.map_batches(
        GuardedActor,
        batch_size=1,
        batch_format="pyarrow",
        compute=rd.ActorPoolStrategy(min_size=1, max_size=actors, initial_size=min(actors, resources.actors_at_once)),
        num_gpus=resources.gpus_per_actor or None,
        num_cpus=0,  # actors that hold CPUs can leave none to the tasks they wait for; and decoding stays apart
        fn_constructor_kwargs={"stage": stage, "actor": actor, "arguments": arguments},
    )
    rows = dataset.iter_rows()
    try:
        for summary in rows:
            if summary.get("fault"):
                fault: EpicError = getattr(errors, summary["fault"])(summary["message"])
                raise fault
            yield summary
    finally:
        # an actor pool keeps its GPUs until its dataset is gone
        del dataset, rows
        gc.collect()
