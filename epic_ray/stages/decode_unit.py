"""The first half of a pass: a unit's images, read and decoded on a CPU and packed into one value.

Imports no torch: a machine may run as many of these processes as it has cores.
"""

import traceback

import numpy as np
import pyarrow as pa

from epic_ray.method.preprocessing import Preprocessing
from epic_ray.run_dir import RunDir
from epic_ray.stages.attempts import Attempts
from epic_ray.stages.decoding import CarefulNeeded, Decoded, decode_carefully, decode_plainly
from epic_ray.stages.images import UnitRange, image_column, read_unit
from epic_ray.stages.reading import ImageReader
from epic_ray.stages.resources import first_cause

IMAGE_COLUMN = "image"


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
            IMAGE_COLUMN: pa.FixedShapeTensorArray.from_numpy_ndarray(decoded.pixels),
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
