"""The bytes of images, wherever a listing says that they lie: own files, tar files, Parquet files, object stores."""

import errno
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from epic_ray import storage
from epic_ray.errors import InputError
from epic_ray.stages.sources.files import LocalFile, RemoteFile, in_order, open_file
from epic_ray.stages.sources.parquet import bytes_column, open_parquet

_IN_FLIGHT = 16
_ROWS_AT_ONCE = 1024
_PIECE_BYTES = 16 << 20
_PAUSES_SECONDS = (0.2, 0.6)
# what a file is, rather than what its disk says at the moment
_FINAL = {
    errno.ENOENT: "there is no such file",
    errno.ENOTDIR: "there is no such file",
    errno.EACCES: "no right to read it",
    errno.EPERM: "no right to read it",
    errno.EISDIR: "is a folder",
    errno.ELOOP: "is a link that leads nowhere",
    errno.ENAMETOOLONG: "its name is too long",
}
# faults of this process, which say nothing about a file
_AWAY = (  # what a share answers that is away
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
)
_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_OF_THE_STORE = ("NO_SUCH_BUCKET", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN")

Result = TypeVar("Result")


class UnreadableError(OSError):
    """An image that cannot be read, for good; the message is one line that says why, without the uri."""


class _Place(NamedTuple):
    uri: str
    byte_offset: int | None
    row: int | None
    size_bytes: int | None


class ImageReader:
    """The bytes of images by the rows of a manifest; `image_column` is the dotted column of Parquet files.

    The last Parquet file's footer and the piece of it that was read last are kept, so that rows in order are read once.
    For one thread.
    """

    def __init__(self, image_column: str | None = None) -> None:
        self._column = image_column or ""
        self._parquet: _ParquetImages | None = None

    def read(
        self, uri: str, byte_offset: int | None = None, row: int | None = None, size_bytes: int | None = None
    ) -> bytes:
        """The encoded image.

        Raises UnreadableError for what is wrong with this image, StorageAway for a store that stays away, InputError
        for one that refuses the credentials or has no such bucket.
        """
        with _Shards() as shards:
            return self._read(_Place(uri, byte_offset, row, size_bytes), shards)

    def read_many(self, rows: pa.Table) -> Iterator[bytes | OSError]:
        """The images of rows (columns uri, byte_offset, row, size_bytes) in their order, an UnreadableError for one
        that cannot be read; up to 16 are read at once where they lie on a store. Raises what else `read` raises.
        """
        one_by_one = rows["row"].null_count < rows.num_rows or not any(map(storage.is_uri, _unique(rows["uri"])))
        with _Shards() as shards:
            if one_by_one:
                yield from (self._try(place, shards) for place in _places(rows))
            else:
                yield from in_order(lambda place: self._try(place, shards), _places(rows), _IN_FLIGHT)

    def _try(self, place: _Place, shards: "_Shards") -> bytes | OSError:
        try:
            return self._read(place, shards)
        except UnreadableError as error:
            return error.with_traceback(None)

    def _read(self, place: _Place, shards: "_Shards") -> bytes:
        call = _from_store if storage.is_uri(place.uri) else _from_disk
        if place.row is not None:
            return self._read_row(place.uri, place.row, call)
        return call(lambda: _read_file(place, shards))

    def _read_row(self, uri: str, row: int, call: Callable[[Callable[[], Any]], Any]) -> bytes:
        if self._parquet is None or self._parquet.uri != uri:
            self._parquet = None  # two are never held at once
            self._parquet = call(lambda: _ParquetImages(uri, self._column))
        parquet: _ParquetImages = self._parquet
        parquet.demand(row)
        try:
            return call(lambda: parquet.read(row))
        except UnreadableError as error:
            parquet.give_up(row, str(error))
            raise


def _unique(column: pa.ChunkedArray) -> list[str]:
    return pc.unique(column).to_pylist()


def _places(rows: pa.Table) -> Iterator[_Place]:
    for batch in rows.select(list(_Place._fields)).to_batches(max_chunksize=_ROWS_AT_ONCE):
        yield from map(_Place, *(column.to_pylist() for column in batch.columns))


# --- files


class _Shards:
    """Files of many images that are read at offsets: the last one on a disk, the last two on a store."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[str, LocalFile | RemoteFile] = {}

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def open(self, uri: str) -> LocalFile | RemoteFile:
        with self._lock:
            if uri not in self._files:
                while len(self._files) > storage.is_uri(uri):
                    file = self._files.pop(next(iter(self._files)))
                    if isinstance(file, LocalFile):  # one on a store holds nothing, and is perhaps being read
                        file.close()
                self._files[uri] = open_file(uri)
            return self._files[uri]


def _read_file(place: _Place, shards: _Shards) -> bytes:
    if place.byte_offset is None:
        with open_file(place.uri) as file:
            return bytes(file.read())
    file = shards.open(place.uri)
    size = file.size - place.byte_offset if place.size_bytes is None else place.size_bytes
    data = file.read_at(place.byte_offset, size)
    if len(data) < size or size < 0:
        raise UnreadableError(f"file ends early, after {file.size} bytes")
    return data


def _from_disk(call: Callable[[], Result]) -> Result:
    """The result of `call`; a fault of the disk is met with two more attempts. Raises UnreadableError."""
    pauses = list(_PAUSES_SECONDS)
    while True:
        try:
            return call()
        except UnreadableError:
            raise
        except (OSError, ValueError) as error:
            number = getattr(error, "errno", None) or 0
            if number in _OURS:
                raise
            if number in _AWAY:
                away = f"{_one_line(error)}: the disk or share is away; start again when it is back"
                raise storage.StorageAway(away) from error
            if not number or number in _FINAL or not pauses:
                raise UnreadableError(_FINAL.get(number) or _one_line(error)) from error
        time.sleep(pauses.pop(0))


def _from_store(call: Callable[[], Result]) -> Result:
    """The result of `call`, which is patient by itself. Raises UnreadableError, StorageAway, InputError."""
    try:
        return call()
    except (UnreadableError, storage.StorageAway):
        raise
    except (OSError, ValueError) as error:
        if any(word in str(error) for word in _OF_THE_STORE):
            raise InputError(f"{_one_line(error)}; check the address and the credentials") from error
        if "ACCESS_DENIED" in str(error) or "HTTP status 403" in str(error):
            raise UnreadableError(_FINAL[errno.EACCES]) from error
        raise UnreadableError(_FINAL.get(getattr(error, "errno", None) or 0) or _one_line(error)) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


# --- Parquet


class _ParquetImages:
    """A column of bytes of one Parquet file; of it, the rows that were decoded last: 16 MiB of them, or one."""

    def __init__(self, uri: str, column: str) -> None:
        self.uri = uri
        self._file = open_parquet(uri)
        path = bytes_column(self._file.schema_arrow, column)
        if path is None:
            raise UnreadableError(f"the file has no column `{column}` of bytes")
        self._path = path
        metadata = self._file.metadata
        self._ends = np.cumsum([metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)])
        self._lost: dict[int, tuple[int, str]] = {}
        self._group, self._start = -1, 0
        self._values: Any = []
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def demand(self, row: int) -> None:
        """Raises UnreadableError for a row that the file does not have, or that is known to be damaged."""
        if not 0 <= row < self._file.metadata.num_rows:
            raise UnreadableError(f"the file has no row {row}, but {self._file.metadata.num_rows} rows")
        first, why = self._lost.get(self._group_of(row), (row + 1, ""))
        if row >= first:
            raise UnreadableError(why)

    def give_up(self, row: int, why: str) -> None:
        """Notes that nothing can be read where a row was looked for: those behind it need not be tried."""
        if self._group == -1:
            self._lost[self._group_of(row)] = (row, why)

    def read(self, row: int) -> bytes:
        """The bytes of a row. Raises UnreadableError, OSError."""
        group = self._group_of(row)
        try:
            if group != self._group or row < self._start:
                self._enter(group)
            while row >= self._start + len(self._values):
                self._start += len(self._values)
                self._values = None  # before the next ones are made
                self._values = self._bytes_of(next(self._batches))
        except (pa.ArrowException, StopIteration) as error:
            self._leave()
            raise UnreadableError(f"its row group {group} is damaged ({_one_line(error)})") from error
        except BaseException:
            self._leave()
            raise
        value = self._values[row - self._start]
        if not value.is_valid:
            raise UnreadableError("its bytes are null in the Parquet file")
        return value.as_py()

    def _group_of(self, row: int) -> int:
        return int(np.searchsorted(self._ends, row, side="right"))

    def _leave(self) -> None:
        self._group, self._start, self._values, self._batches = -1, 0, [], iter(())

    def _enter(self, group: int) -> None:
        self._leave()
        metadata = self._file.metadata.row_group(group)
        columns = (metadata.column(number) for number in range(metadata.num_columns))
        size = next(column.total_uncompressed_size for column in columns if column.path_in_schema == self._path)
        rows = max(1, _PIECE_BYTES * metadata.num_rows // max(size, 1))
        self._batches = self._file.iter_batches(
            min(rows, metadata.num_rows), row_groups=[group], columns=[self._path], use_threads=False
        )
        self._group, self._start = group, int(self._ends[group]) - metadata.num_rows

    def _bytes_of(self, batch: pa.RecordBatch) -> pa.Array:
        values = batch.column(0)
        while pa.types.is_struct(values.type):  # of the wanted leaf alone
            values = pc.struct_field(values, [0])
        return values
