"""The second half of a pass: an actor that takes decoded units and publishes what it makes of them.

Imports no torch; `forwarding.py` has the actor with the classifier.
"""

import json
import os
import socket
import threading
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from epic_ray.run_dir import RunDir
from epic_ray.stages.attempts import Attempts
from epic_ray.stages.decode_unit import IMAGE_COLUMN, fault_row, unpack
from epic_ray.stages.resources import peak_memory_bytes
from epic_ray.stages.units import FACTS_KEY, FINGERPRINT_KEY, UnitFacts
from epic_ray.tables import to_numpy

CALLS_AT_ONCE = 2
"""Units that an actor with a GPU works on: one is computed while another is unpacked or published."""


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
            to_numpy(block[IMAGE_COLUMN]),
            block["reason"].to_pylist(),
            np.stack([to_numpy(block["width_px"]), to_numpy(block["height_px"])], axis=1),
        )

    @property
    def readable(self) -> np.ndarray:
        return np.array([row for row, reason in enumerate(self.reasons) if reason is None], dtype=np.int64)

    def column(self, name: str, rows: np.ndarray) -> pa.ChunkedArray:
        return self.rows[name].take(pa.array(rows))


class UnitActor:
    """Base of the actors of a pass: computes on a unit, then publishes what came of it.

    Where Ray calls an actor from several threads (`CALLS_AT_ONCE`), one computes while the others unpack the next unit
    or publish the last.
    """

    def __init__(self, run_dir: RunDir, attempts: Attempts) -> None:
        self.run_dir, self._attempts = run_dir, attempts
        self._identity = f"{socket.gethostname()}:{os.getpid()}"
        self._turn = threading.Lock()

    def __call__(self, row: pa.Table) -> pa.Table:
        unit = Unit.of(unpack(row))
        readable = unit.readable
        with self._turn:
            # not before its turn: the unit before it may end the process
            self._attempts.begin(unit.split, unit.number, "forward")
            results = self.compute(unit, readable)
        bytes_written = self.publish(unit, readable, results)
        return pa.table(
            {
                "split": [unit.split],
                "unit": [unit.number],
                "decoded": [len(readable)],
                "forwarded": [len(readable)],
                "failed": [sum(reason is not None for reason in unit.reasons)],
                "bytes_written": [bytes_written],
                "actor": [self._identity],
                "peak_memory_bytes": [peak_memory_bytes()],
                "images": [unit.rows.num_rows],
            }
        )

    def metadata(self, unit: Unit, facts: UnitFacts) -> dict[str, str]:
        """What goes into the metadata of a unit's files."""
        return {FINGERPRINT_KEY: unit.made_from, FACTS_KEY: json.dumps(asdict(facts))}

    def compute(self, unit: Unit, readable: np.ndarray) -> Any:
        """Computes on the readable rows of a unit; gives what `publish` needs, in this process's own memory."""
        raise NotImplementedError

    def publish(self, unit: Unit, readable: np.ndarray, results: Any) -> int:
        """Publishes the unit's files; a row found bad here gets its reason. Gives the bytes written."""
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
