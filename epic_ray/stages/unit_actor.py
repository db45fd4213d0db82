"""The second half of a pass: an actor with the classifier, which forwards units and publishes what they leave."""

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from epic_ray.config import ModelConfig
from epic_ray.method.classifier import SplitClassifier
from epic_ray.run_dir import RunDir
from epic_ray.stages.attempts import Attempts
from epic_ray.stages.decode_unit import IMAGE_COLUMN, fault_row, unpack
from epic_ray.stages.loading import load
from epic_ray.stages.resources import Resources, peak_memory_bytes, take_device
from epic_ray.stages.units import FACTS_KEY, FINGERPRINT_KEY, UnitFacts
from epic_ray.tables import to_numpy


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
        return {FINGERPRINT_KEY: unit.made_from, FACTS_KEY: json.dumps(asdict(facts))}

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
