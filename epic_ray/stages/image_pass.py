"""One pass over images: decode on CPU tasks, then an actor with the classifier; a whole unit at a time.

A unit is a fixed slice of a split's manifest and one row of Ray Data from end to end, so that nothing can cut or join
it on the way. Its batches are fixed, so a unit that is computed again is computed equal; the actor publishes a unit's
files itself, the one that commits it last.
"""

import gc
import json
import os
import socket
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data as rd
import torch

from epic_ray import errors
from epic_ray.config import ModelConfig
from epic_ray.errors import ResultError
from epic_ray.logs import Reporter
from epic_ray.method.classifier import SplitClassifier
from epic_ray.method.preprocessing import ImageError, Preprocessing, decode_image
from epic_ray.run_dir import RunDir, table_folder
from epic_ray.stages.images import read_image_bytes
from epic_ray.stages.loading import load
from epic_ray.stages.resources import Resources, first_cause, peak_memory_bytes, take_device
from epic_ray.tables import read_metadata, to_numpy

FINGERPRINT_KEY = "epic_ray.fingerprint"
_FACTS_KEY = "epic_ray.unit"
_IMAGE_COLUMN = "image"


@dataclass
class PassTotals:
    """What a pass really did, summed over its units: counted where it happened."""

    images: int = 0
    decoded: int = 0
    forwarded: int = 0
    failed: int = 0
    units: int = 0
    bytes_written: int = 0
    peak_memory_bytes: int = 0
    actors: set[str] = field(default_factory=set)

    def add(self, summary: dict[str, Any]) -> None:
        self.images += summary["images"]
        self.decoded += summary["decoded"]
        self.forwarded += summary["forwarded"]
        self.failed += summary["failed"]
        self.units += 1
        self.bytes_written += summary["bytes_written"]
        self.peak_memory_bytes = max(self.peak_memory_bytes, summary["peak_memory_bytes"])
        self.actors.add(summary["actor"])


def cut_units(manifest: pa.Table, unit_size: int) -> list[pa.Table]:
    """The fixed units of a split's manifest, each with its number in the column `unit`."""
    units = []
    for number, start in enumerate(range(0, manifest.num_rows, unit_size)):
        rows = manifest.slice(start, unit_size).replace_schema_metadata()
        units.append(rows.append_column("unit", pa.array([number] * rows.num_rows, pa.int32())))
    return units


@dataclass(frozen=True)
class UnitFacts:
    """What the file that commits a unit says of it, in its metadata: so that it counts whoever computed it, and when.

    readable: images with results. failed: images without. max_abs_difference: the largest of the rebuilt logits from
    the classifier's own. agreeing: readable images whose rebuilt logits have the same largest.
    """

    readable: int
    failed: int
    max_abs_difference: float
    agreeing: int


def committed_units(run_dir: RunDir, table: str, split: str, fingerprint: str) -> dict[int, UnitFacts]:
    """The units with a whole file made from `fingerprint`, and their facts; files of another make are removed."""
    committed, stale = {}, []
    for relative in run_dir.list(table_folder(table, split)):
        try:
            about = read_metadata(run_dir, relative)
        except ResultError:
            about = {}  # torn: written by something else than `publish`
        if about.get(FINGERPRINT_KEY) == fingerprint:
            number = int(relative.rsplit("-", 1)[1].removesuffix(".parquet"))
            committed[number] = UnitFacts(**json.loads(about[_FACTS_KEY]))
        else:
            stale.append(relative)
    run_dir.delete(stale)
    return committed


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


class DecodeUnit:
    """Adds to a unit's rows the decoded image (uint8), the reason where there is none, and its original size."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._preprocessing = preprocessing

    def __call__(self, packed: pa.Table) -> pa.Table:
        rows = unpack(packed)
        height, width = self._preprocessing.crop
        pixels = np.zeros((rows.num_rows, height, width, 3), dtype=np.uint8)
        sizes = np.zeros((rows.num_rows, 2), dtype=np.int32)
        reasons = [self._decode(uri, pixels, sizes, row) for row, uri in enumerate(rows["uri"].to_pylist())]
        columns = {
            "reason": pa.array(reasons, pa.string()),
            "width_px": pa.array(sizes[:, 0]),
            "height_px": pa.array(sizes[:, 1]),
            _IMAGE_COLUMN: pa.FixedShapeTensorArray.from_numpy_ndarray(pixels),
        }
        for name, values in columns.items():
            rows = rows.append_column(name, values)
        return pack(rows)

    def _decode(self, uri: str, pixels: np.ndarray, sizes: np.ndarray, row: int) -> str | None:
        try:
            image = decode_image(read_image_bytes(uri))
            pixels[row] = self._preprocessing.apply(image)
            sizes[row] = image.size
        except (ImageError, OSError) as error:
            return " ".join(str(error).split()) or type(error).__name__
        return None


@dataclass
class Unit:
    """A decoded unit as its actor sees it; `readable` are the rows whose image could be decoded."""

    split: str
    number: int
    rows: pa.Table
    pixels: np.ndarray
    reasons: list[str | None]
    sizes_px: np.ndarray

    @classmethod
    def of(cls, block: pa.Table) -> "Unit":
        return cls(
            block["split"][0].as_py(),
            block["unit"][0].as_py(),
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

    def __init__(self, run_dir: RunDir, model: ModelConfig, resources: Resources, fingerprint: str) -> None:
        self.device = take_device(resources.device, resources.threads)
        self.classifier: SplitClassifier = load(model).to(self.device)
        self.run_dir, self.batch_size, self.fingerprint = run_dir, resources.batch_size, fingerprint
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

    def metadata(self, facts: UnitFacts) -> dict[str, str]:
        """What goes into the metadata of a unit's files."""
        return {FINGERPRINT_KEY: self.fingerprint, _FACTS_KEY: json.dumps(asdict(facts))}

    def commit(self, unit: Unit, readable: np.ndarray) -> int:
        """Computes and publishes the unit's files; a row found bad here gets its reason. Gives the bytes written."""
        raise NotImplementedError


class GuardedActor:
    """An actor of a pass whose fault is its answer: raised inside Ray Data, a fault would lose its kind and its cause.

    The traceback goes to the process's log, the fault itself to the driver, which raises it.
    """

    def __init__(self, stage: str, actor: type[UnitActor], arguments: dict[str, Any]) -> None:
        self._stage, self._fault = stage, None
        try:
            self._actor = actor(**arguments)
        except Exception as error:
            self._fault = error

    def __call__(self, row: pa.Table) -> pa.Table:
        try:
            if self._fault:
                raise self._fault
            return self._actor(row)
        except Exception as error:
            traceback.print_exception(error)
            fault = first_cause(error, self._stage)
            return pa.table({"fault": [type(fault).__name__], "message": [str(fault)]})


def run_pass(
    stage: str,
    actor: type[UnitActor],
    arguments: dict[str, Any],
    units: list[pa.Table],
    preprocessing: Preprocessing,
    resources: Resources,
    reporter: Reporter,
) -> PassTotals:
    """Sends the units through decode tasks and a pool of actors; gives what was done. Raises the first cause."""
    totals = PassTotals()
    if not units:
        return totals
    context = rd.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    actors = min(resources.feature_actors, len(units))
    dataset = rd.from_arrow([pack(unit) for unit in units]).map_batches(
        DecodeUnit(preprocessing).__call__, batch_size=1, batch_format="pyarrow", num_cpus=1
    )
    dataset = dataset.map_batches(
        GuardedActor,
        batch_size=1,
        batch_format="pyarrow",
        compute=rd.ActorPoolStrategy(min_size=1, max_size=actors, initial_size=actors),
        num_gpus=resources.gpus_per_actor or None,
        num_cpus=0,  # actors that hold CPUs can leave none to the tasks they wait for; and decoding stays apart
        fn_constructor_kwargs={"stage": stage, "actor": actor, "arguments": arguments},
    )
    try:
        with reporter.stage(stage, sum(unit.num_rows for unit in units), "images") as meter:
            for summary in dataset.iter_rows():
                if summary.get("fault"):
                    raise getattr(errors, summary["fault"])(summary["message"])
                totals.add(summary)
                meter.advance(summary["images"], f"{totals.failed} failed" if totals.failed else "")
    except (ray.exceptions.RayError, RuntimeError) as error:
        raise first_cause(error, stage) from error
    finally:
        # an actor pool keeps its GPUs until its dataset is gone
        del dataset
        gc.collect()
    return totals
