"""Feature maps on disk: kept by the pass where they fit the budget, else of chosen images only; read in blocks.

Arrow IPC files, memory-mapped where the run is local, so that a chosen image costs one copy of its own map.
S = H·W cells, row-major; D channels, last.
"""

import hashlib
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from epic_ray.errors import InputError, ResultError, RunFailed
from epic_ray.method.classifier import SplitClassifier
from epic_ray.method.preprocessing import ImageError
from epic_ray.run_dir import CHOSEN_MAPS, UNIT_MAPS, RunDir, chosen_map_file, map_folder, unit_number
from epic_ray.stages.decoding import decode_carefully
from epic_ray.stages.images import image_column, read_positions
from epic_ray.stages.reading import ImageReader, UnreadableError
from epic_ray.stages.resources import MIB, available_cores
from epic_ray.tables import to_numpy

_FILE_BYTES = 128 * MIB
# larger arrays are mapped anew each time, page by page, which takes longer than reading what goes into them
_READ_BYTES = 8 * MIB
_FINGERPRINT = b"epic_ray.fingerprint"


def map_bytes(classifier: SplitClassifier) -> int:
    """Bytes of one image's feature map in float32."""
    return 4 * classifier.channel_count * classifier.grid[0] * classifier.grid[1]


def write_maps(run_dir: RunDir, relative: str, positions: np.ndarray, maps_BSD: np.ndarray, fingerprint: str) -> int:
    """Publishes the maps of some images of a split as one file; gives its size in bytes."""
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(maps_BSD)
    schema = pa.schema(
        [pa.field("position", pa.int64(), nullable=False), pa.field("maps", tensor.type, nullable=False)],
        metadata={_FINGERPRINT: fingerprint.encode(), b"shape": json.dumps(maps_BSD.shape[1:]).encode()},
    )
    batch = pa.record_batch([pa.array(positions, pa.int64()), tensor], schema=schema)

    def write(stream: pa.NativeFile) -> None:
        with pa.ipc.new_file(stream, schema) as writer:
            writer.write_batch(batch)

    return run_dir.publish(relative, write)


def committed_map_units(run_dir: RunDir, split: str, units: Mapping[int, str], fingerprint: str) -> set[int]:
    """Numbers of the units whose maps are kept, `units` giving what each is made from.

    Maps of other features, and chosen images' maps that are not made from `fingerprint`, are removed: they are large,
    and unread.
    """
    committed, stale = set(), []
    for file in run_dir.list(map_folder(split)):
        name, made_from = file.rsplit("/", 1)[-1], _made_from(run_dir, file)
        if name.startswith(UNIT_MAPS):
            number = unit_number(file)
            if number is None or (made_from and made_from == units.get(number)):
                committed |= set() if number is None else {number}
                continue
        elif not name.startswith(CHOSEN_MAPS) or made_from == fingerprint:
            continue
        stale.append(file)
    run_dir.delete(stale)
    return committed


def count_chosen_maps(run_dir: RunDir, split: str) -> int:
    """Images of a split that were forwarded again, for their map alone."""
    count = 0
    for file in run_dir.list(map_folder(split)):
        if file.rsplit("/", 1)[-1].startswith(CHOSEN_MAPS):
            count += run_dir.ask(file, partial(_rows_of, run_dir, file))
    return count


def _rows_of(run_dir: RunDir, relative: str) -> int:
    with run_dir.open(relative) as source:
        reader = pa.ipc.open_file(source)
        return sum(reader.get_batch(number).num_rows for number in range(reader.num_record_batches))


def _made_from(run_dir: RunDir, relative: str) -> str | None:
    def read() -> dict[bytes, bytes]:
        with run_dir.open(relative) as source:
            return pa.ipc.open_file(source).schema.metadata or {}

    try:
        return run_dir.ask(relative, read).get(_FINGERPRINT, b"").decode()
    except pa.ArrowInvalid:
        return None


class MapStore:
    """The maps of a split's images, found by position in the manifest; those of `made_from` alone are seen.

    On an object store a file is copied to a local folder before it is mapped: chosen images are read here and there.
    """

    def __init__(self, run_dir: RunDir, split: str, made_from: Collection[str]) -> None:
        self.run_dir, self.split, self._made_from = run_dir, split, {text.encode() for text in made_from}
        self._copies = None if run_dir.is_local else tempfile.TemporaryDirectory(prefix="epic-ray-maps-")
        self._tables: dict[str, pa.Table] = {}
        self._order = np.empty(0, np.int64)
        self._places = np.empty((0, 2), np.int64)
        self.refresh()

    def refresh(self) -> None:
        """Takes up the files that other processes have published; files of other features are not seen."""
        for relative in self.run_dir.list(map_folder(self.split)):
            if relative not in self._tables:
                table = self._open(relative)
                if (table.schema.metadata or {}).get(_FINGERPRINT) in self._made_from:
                    self._tables[relative] = table
        positions = [to_numpy(table["position"]) for table in self._tables.values()]
        places = [
            np.stack([np.full(len(rows), file), np.arange(len(rows))], axis=1) for file, rows in enumerate(positions)
        ]
        if positions:
            self._order, first = np.unique(np.concatenate(positions), return_index=True)
            self._places = np.concatenate(places)[first]

    def _open(self, relative: str) -> pa.Table:
        try:
            return pa.ipc.open_file(self._mapped(relative)).read_all()
        except pa.ArrowInvalid as error:
            where = self.run_dir.show(relative)
            raise ResultError(f"{where}: is no whole file of maps ({error}); remove it and run again") from None

    def _mapped(self, relative: str) -> pa.NativeFile:
        if self._copies is None:
            return self.run_dir.open(relative)
        path = Path(self._copies.name) / relative.rsplit("/", 1)[-1]
        self.run_dir.fetch(relative, path)
        return pa.memory_map(str(path))

    def missing(self, positions: np.ndarray) -> np.ndarray:
        """Of these images, sorted, those whose map is not there."""
        return np.setdiff1d(positions, self._order)

    def read(self, positions: np.ndarray) -> np.ndarray:
        """The maps (len(positions), S, D) of images, in the given order. Raises ResultError where one is missing."""
        places = self._places[self._find(positions)]
        tables = list(self._tables.values())
        shape = tables[0]["maps"].type.shape if tables else (0, 0)
        out = np.empty((len(positions), *shape), np.float32)
        for file in np.unique(places[:, 0]):
            rows = np.flatnonzero(places[:, 0] == file)
            out[rows] = to_numpy(tables[file]["maps"])[places[rows, 1]]
        return out

    def blocks(self, positions: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The maps of sorted, distinct images in blocks of bounded memory: (positions, maps (b, S, D))."""
        if not len(positions):
            return
        size = max(1, _READ_BYTES // self.read(positions[:1]).nbytes)
        for start in range(0, len(positions), size):
            block = positions[start : start + size]
            yield block, self.read(block)

    def _find(self, positions: np.ndarray) -> np.ndarray:
        if not len(positions):
            return positions
        found = np.searchsorted(self._order, positions).clip(max=max(len(self._order) - 1, 0))
        if not len(self._order) or (self._order[found] != positions).any():
            count = len(self.missing(positions))
            raise ResultError(f"{self.run_dir}: {count} map(s) of split {self.split} are missing; run the fit again")
        return found


class MapGatherer:
    """Forwards chosen images for their maps, in this process, and commits them to the store."""

    def __init__(
        self, store: MapStore, made_from: str, classifier: SplitClassifier, batch_size: int, device: Any
    ) -> None:
        self.store, self._written_from = store, made_from
        self._reader = ImageReader(image_column(store.run_dir, "manifest", store.split))
        self._classifier, self._batch_size, self._device = classifier.to(device), batch_size, device
        self.forwarded = 0
        self.decoded = 0

    def ensure(self, positions: np.ndarray) -> int:
        """Forwards those of the images whose map is missing; gives how many.

        A file is named after the images it holds, so that no start, worker or stage writes over another's.
        """
        missing = self.store.missing(positions)
        size = max(self._batch_size, _FILE_BYTES // map_bytes(self._classifier))
        for start in range(0, len(missing), size):
            block = missing[start : start + size]
            key = hashlib.sha256(block.astype("<i8").tobytes()).hexdigest()[:16]
            relative = chosen_map_file(self.store.split, key)
            write_maps(self.store.run_dir, relative, block, self._forward(block), self._written_from)
        return len(missing)

    def _forward(self, positions: np.ndarray) -> np.ndarray:
        classifier, (height, width) = self._classifier, self._classifier.preprocessing.crop
        cells = classifier.grid[0] * classifier.grid[1]
        out = np.empty((len(positions), cells, classifier.channel_count), np.float32)
        batch = np.zeros((self._batch_size, height, width, 3), np.uint8)
        with ThreadPoolExecutor(max(4, available_cores())) as pool:
            for start in range(0, len(positions), self._batch_size):
                rows = read_positions(self.store.run_dir, self.store.split, positions[start : start + self._batch_size])
                count = rows.num_rows
                found = self._reader.read_many(rows)
                for row, pixels in enumerate(pool.map(self._decode, rows["image_id"].to_pylist(), found)):
                    batch[row] = pixels
                batch[count:] = 0
                with torch.inference_mode():
                    images = classifier.normalise(torch.from_numpy(batch).to(self._device))
                    maps = cells_last(classifier(images)[0][:count])
                out[start : start + count] = maps.cpu().numpy()
                self.decoded += count
                self.forwarded += count
        return out

    def _decode(self, image_id: str, data: bytes | OSError) -> np.ndarray:
        try:
            if isinstance(data, OSError):
                raise data
            return self._classifier.preprocessing.load(data)[0]
        except MemoryError:  # it came through the pass in a process of its own
            decoded = decode_carefully(iter([data]), 1, self._classifier.preprocessing)
            if decoded.reasons[0]:
                raise RunFailed(f"{image_id}: {decoded.reasons[0]}; it was decoded in the pass: start again") from None
            return decoded.pixels[0]
        except (ImageError, UnreadableError) as error:
            raise InputError(
                f"{image_id}: was read in the pass, but cannot be read again ({error}); the data set changed under the "
                "run; run it again"
            ) from error


def cells_last(maps_BDHW: torch.Tensor) -> torch.Tensor:
    """(b, d, h, w) -> (b, h·w, d), contiguous."""
    return maps_BDHW.flatten(2).transpose(1, 2).contiguous()


def keep_all_maps(counts: Sequence[int], classifier: SplitClassifier, budget_bytes: int) -> bool:
    """Whether the maps of so many images fit the budget."""
    return sum(counts) * map_bytes(classifier) <= budget_bytes
