"""What all forms of an image data set have in common: the rows of a listing, and the source that gives them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from epic_ray import storage
from epic_ray.config import DataConfig, fingerprint
from epic_ray.errors import InputError, RunFailed

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
BATCH_ROWS = 65_536
INT32_MAX = 2**31 - 1
LISTED = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("byte_offset", pa.int64()),
        pa.field("row", pa.int64()),
        pa.field("size_bytes", pa.int64()),
        pa.field("class_name", pa.string()),
        pa.field("class_index", pa.int32()),
    ]
)


class Place(NamedTuple):
    """Where a split lies: `relative` to the data set's absolute root ("" is the root itself)."""

    split: str
    root: str
    relative: str

    @property
    def address(self) -> str:
        return storage.join(self.root, self.relative)

    @property
    def where(self) -> str:
        """The address as a person would type it."""
        base = self.root.partition("?")[0] if storage.is_uri(self.root) else self.root
        return f"{base.rstrip('/')}/{self.relative}" if self.relative else base


class Shard(NamedTuple):
    """A file that holds or names many images; `relative` to the data set's root."""

    relative: str
    uri: str
    stamp: str


class Source(ABC):
    """The images of a split, listed in a fixed order. Raises InputError, and RunFailed for a store that stays away.

    where: the split's place as a person would type it. image_column: dotted column of the bytes in Parquet files.
    """

    format: ClassVar[str]
    image_column: str | None = None

    def __init__(self, data: DataConfig, place: Place, shards: Sequence[Shard] = (), notes: Sequence[str] = ()) -> None:
        self.split, self.where = place.split, place.where
        self._place, self._root, self._shards = place, place.root, shards
        self._labelled = data.labels != "none"
        self._taken = list(notes)
        self._names: set[str] = set()
        self._index_names: list[str] = []

    @property
    def files(self) -> list[str]:
        """Addresses of the files that hold or name many images each; [] for a folder."""
        return [shard.uri for shard in self._shards]

    @property
    def stamps(self) -> dict[str, str]:
        """What of each of the files (size, time of its last change) tells that it changed."""
        return {shard.uri: shard.stamp for shard in self._shards}

    @property
    def stamp(self) -> str | None:
        """A hash of the files' names and stamps; None where only listing tells whether images changed."""
        return fingerprint(self.stamps) if self._shards else None

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows, in batches of up to 65,536. Raises InputError where there are none."""
        count = 0
        self._begin()
        try:
            for batch in _of_one_size(self._rows()):
                count += batch.num_rows
                self._names.update(batch.column("class_name").unique().drop_null().to_pylist())
                yield batch
        except storage.StorageAway as error:
            raise RunFailed(str(error)) from error
        if not count:
            raise InputError(f"{self.where}: holds no image (split `{self.split}`); {self._looked_for()}")

    def _begin(self) -> None:
        """Forgets what an earlier listing found."""
        self._names = set()

    @abstractmethod
    def _rows(self) -> Iterator[pa.RecordBatch]:
        """The rows in batches as they come."""

    @abstractmethod
    def _looked_for(self) -> str:
        """What an image is in this form."""

    def notes(self) -> list[str]:
        """What a person should hear; complete once `batches` is exhausted."""
        return list(self._taken)

    def class_names(self) -> tuple[list[str], list[str]]:
        """After `batches`: the classes found by name, sorted; the names of class numbers, where the source has them."""
        return sorted(self._names), list(self._index_names)


@dataclass
class Tally:
    """How many of something there are, and the first."""

    count: int = 0
    first: str = ""

    def add(self, example: str, count: int = 1) -> None:
        self.first = self.first if self.count else example
        self.count += count


# --- rows


def listed(image_ids: pa.Array, uris: pa.Array | str, **columns: pa.Array | str | None) -> pa.RecordBatch:
    """A batch of LISTED; a text stands for that text in all rows, an absent column for nulls."""
    count = len(image_ids)
    arrays = []
    for field in LISTED:
        values = {"image_id": image_ids, "uri": uris, **columns}.get(field.name)
        if values is None:
            values = pa.nulls(count, field.type)
        elif isinstance(values, str):
            values = pa.repeat(pa.scalar(values, field.type), count)
        arrays.append(values)
    return pa.record_batch(arrays, schema=LISTED)


def join_each(root: str, relatives: pa.Array) -> pa.Array:
    """`storage.join(root, relative)` of every relative path, none of which begins or ends with a slash."""
    mark = query = ""
    if storage.is_uri(root):
        root, mark, query = root.partition("?")
        for sign, escaped in (("%", "%25"), ("?", "%3F"), ("#", "%23")):
            relatives = pc.replace_substring(relatives, sign, escaped)
    return pc.binary_join_element_wise(root.rstrip("/") + "/", relatives, mark + query, "")


def _of_one_size(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of BATCH_ROWS, the last one smaller."""
    held: list[pa.RecordBatch] = []
    missing = BATCH_ROWS
    for batch in batches:
        while batch.num_rows >= missing:
            whole = _joined([*held, batch.slice(0, missing)])
            batch, held, missing = batch.slice(missing), [], BATCH_ROWS
            yield whole
        if batch.num_rows:
            held.append(batch)
            missing -= batch.num_rows
    if held:
        yield _joined(held)


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]
