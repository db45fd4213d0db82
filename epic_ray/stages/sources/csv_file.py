"""CSV and TSV files that name the images, one a line, and may give their labels."""

import csv
import io
import os
import posixpath
import re
import stat
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from epic_ray import storage
from epic_ray.config import DataConfig
from epic_ray.errors import InputError
from epic_ray.stages.sources.base import BATCH_ROWS, INT32_MAX, Place, Shard, Source, join_each, listed
from epic_ray.stages.sources.files import in_order, open_file

URI_COLUMNS = ("uri", "path", "image", "file", "filename", "image_path")
LABEL_COLUMNS = ("label", "class", "class_name", "target")
SIZE_COLUMN = "size_bytes"
_UNTIDY = re.compile(r"(^|/)\.{0,2}(/|$)")
_INTEGER = re.compile(r"[+-]?\d{1,18}", re.ASCII)
_STAT_THREADS, _STAT_AT_ONCE = 16, 256
_PIECE_BYTES = 1 << 20


class _Row(NamedTuple):
    """A line as text; `uri` is empty where it follows from the image id."""

    image_id: str
    uri: str
    label: str
    size: str


class _Columns(NamedTuple):
    names: int
    uri: int
    label: int | None
    size: int | None


class CsvSource(Source):
    """The images that the lines of some files name; addresses are relative to the folder of the file.

    The files are read twice: what is wrong with a line, and whether all labels are integers, is known before the first
    row is given.
    """

    format = "csv"

    def __init__(self, data: DataConfig, place: Place, shards: Sequence[Shard], notes: Sequence[str] = ()) -> None:
        super().__init__(data, place, shards, notes)
        self._image_column, self._label_column = data.image_column, data.label_column
        self._columns = [self._header(shard) for shard in shards]

    @property
    def stamp(self) -> str | None:
        """None where the sizes of local images are taken from the disk: only listing tells whether they changed."""
        told = storage.is_uri(self._root) or all(columns.size is not None for columns in self._columns)
        return super().stamp if told else None

    def _looked_for(self) -> str:
        return "lines below the header are looked for"

    def _rows(self) -> Iterator[pa.RecordBatch]:
        numbers = self._check()
        rows = (row for shard, columns in self._files() for _, row in self._lines(shard, columns))
        while chunk := list(islice(rows, BATCH_ROWS)):
            ids, uris, labels, sizes = zip(*chunk, strict=True)
            named = [label or None for label in labels]
            image_ids, addresses = pa.array(ids, pa.string()), pa.array(uris, pa.string())
            addresses = pc.if_else(pc.equal(addresses, ""), join_each(self._root, image_ids), addresses)
            yield listed(
                image_ids,
                addresses,
                size_bytes=self._sizes(addresses, sizes),
                class_name=None if numbers else pa.array(named, pa.string()),
                class_index=pa.array([int(name) if name else None for name in named], pa.int32()) if numbers else None,
            )

    def _sizes(self, addresses: pa.Array, sizes: Sequence[str]) -> pa.Array:
        if self._columns[0].size is not None:
            return pa.array([int(size) if size else None for size in sizes], pa.int64())
        uris = addresses.to_pylist()
        parts = [uris[start : start + _STAT_AT_ONCE] for start in range(0, len(uris), _STAT_AT_ONCE)]
        return pa.array([size for part in in_order(_measure, parts, _STAT_THREADS) for size in part], pa.int64())

    def _check(self) -> bool:
        """Whether all labels are integers. Raises InputError for the first wrong line."""
        hashes, integers, labels = array("q"), True, False
        for shard, columns in self._files():
            for line, row in self._lines(shard, columns):
                hashes.append(hash(row.image_id))
                if row.label:
                    labels, integers = True, integers and _INTEGER.fullmatch(row.label) is not None
                if row.size and not row.size.isdecimal():
                    raise InputError(f"{shard.uri}: line {line}: `{row.size}` in {SIZE_COLUMN} is no number of bytes")
        self._demand_single(np.frombuffer(hashes, np.int64))
        if integers and labels:
            self._demand_numbers_in_range()
        return integers and labels

    def _demand_single(self, hashes: np.ndarray) -> None:
        ordered = np.sort(hashes)
        suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        if not suspects:
            return
        first: dict[str, str] = {}
        for shard, columns in self._files():
            for line, row in self._lines(shard, columns):
                if hash(row.image_id) in suspects:
                    here = f"{shard.uri}: line {line}"
                    if row.image_id in first:
                        raise InputError(
                            f"{here}: {row.image_id} is listed again, first in line {first[row.image_id]}; remove one"
                        )
                    first[row.image_id] = f"{line} of {shard.relative}" if len(self._shards) > 1 else str(line)

    def _demand_numbers_in_range(self) -> None:
        for shard, columns in self._files():
            for line, row in self._lines(shard, columns):
                if row.label and not -INT32_MAX <= int(row.label) <= INT32_MAX:
                    raise InputError(f"{shard.uri}: line {line}: {row.label} is no class number")

    # --- lines

    def _files(self) -> Iterator[tuple[Shard, _Columns]]:
        return zip(self._shards, self._columns, strict=True)

    def _header(self, shard: Shard) -> _Columns:
        with _reader(shard) as lines:
            names = [name.strip() for name in next(iter(lines), [])]
        wanted = URI_COLUMNS if self._image_column == "auto" else (self._image_column,)
        uri = self._find(names, wanted)
        if uri is None:
            raise InputError(
                f"{shard.uri}: has no column {' or '.join(wanted)}; {_columns_there(names)}; write a header, or set "
                "data.image_column"
            )
        label = None
        if self._labelled:
            label = self._find(names, LABEL_COLUMNS if self._label_column == "auto" else (self._label_column,))
            if label is None and self._label_column != "auto":
                there = _columns_there(names)
                raise InputError(f"{shard.uri}: has no column {self._label_column}; {there}; set data.label_column")
        return _Columns(len(names), uri, label, self._find(names, (SIZE_COLUMN,)))

    @staticmethod
    def _find(names: list[str], wanted: Sequence[str]) -> int | None:
        return next((names.index(name) for name in wanted if name in names), None)

    def _lines(self, shard: Shard, columns: _Columns) -> Iterator[tuple[int, _Row]]:
        """The lines below the header, with their numbers. Raises InputError for one that cannot be read."""
        resolve = self._resolver(shard)
        with _reader(shard) as lines:
            next(iter(lines), None)
            for cells in lines:
                if not cells:
                    continue
                line = lines.line_num
                if len(cells) != columns.names:
                    raise InputError(
                        f"{shard.uri}: line {line} has {len(cells)} values, and the header {columns.names}; quote "
                        "values that hold the separator"
                    )
                if not cells[columns.uri].strip():
                    raise InputError(f"{shard.uri}: line {line} names no image; fill it in or remove the line")
                label = "" if columns.label is None else cells[columns.label].strip()
                size = "" if columns.size is None else cells[columns.size].strip()
                yield line, _Row(*resolve(cells[columns.uri], line), label, size)

    def _resolver(self, shard: Shard) -> Callable[[str, int], tuple[str, str]]:
        """Makes image id and uri of an address as it stands in a line of the file."""
        root, folder = self._root, posixpath.dirname(shard.relative)
        base = root.partition("?")[0].rstrip("/") + "/"
        before = f"{folder}/" if folder else ""
        stores: set[str] = set()

        def resolve(address: str, line: int) -> tuple[str, str]:
            if "://" in address and storage.is_uri(address):
                address = storage.resolve_root(address)
                store = "/".join(address.split("/", 3)[:3])
                if storage.is_uri(address) and store not in stores:
                    _demand_store(address, f"{shard.uri}: line {line}")
                    stores.add(store)
            elif address.startswith("/"):
                address = posixpath.normpath(address)
            else:
                relative = before + address
                if _UNTIDY.search(relative):
                    relative = posixpath.normpath(relative)
                if relative.split("/", 1)[0] != "..":
                    return relative, ""
                address = _above(root, relative, f"{shard.uri}: line {line}")
            if not address.startswith(base):
                return address, address
            return (unquote(address[len(base) :]) if storage.is_uri(address) else address[len(base) :]), ""

        return resolve


def _demand_store(address: str, line: str) -> None:
    try:
        storage.locate(address)
    except InputError as error:
        raise InputError(f"{line}: {error}") from None


def _above(root: str, relative: str, line: str) -> str:
    """The address of a path that leaves the root. Raises InputError where it leaves the store."""
    if not storage.is_uri(root):
        return posixpath.normpath(f"{root}/{relative}")
    base, mark, query = root.partition("?")
    scheme, _, rest = base.partition("://")
    bucket, _, prefix = rest.partition("/")
    path = posixpath.normpath(posixpath.join(unquote(prefix), relative))
    if path.split("/", 1)[0] == "..":
        raise InputError(f"{line}: {relative} leaves the bucket; give the whole address")
    return storage.join(f"{scheme}://{bucket}{mark}{query}", path)


def _measure(uris: Sequence[str]) -> list[int | None]:
    """Bytes of local files; None for what is absent, no file, or remote."""
    return [None if storage.is_uri(uri) else _measure_one(uri) for uri in uris]


def _measure_one(path: str) -> int | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # told when it is read
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _columns_there(names: list[str]) -> str:
    return f"columns there: {', '.join(names)}" if names else "it is empty"


@contextmanager
def _reader(shard: Shard) -> Iterator[Any]:
    """The lines of a file as lists of texts; its faults are input errors that name the line."""
    lines = None
    try:
        with open_file(shard.uri) as file:
            text = io.TextIOWrapper(io.BufferedReader(file, _PIECE_BYTES), encoding="utf-8-sig", newline="")
            separator = "\t" if shard.relative.lower().endswith(".tsv") else ","
            lines = csv.reader(text, delimiter=separator, strict=True)
            yield lines
    except UnicodeDecodeError as error:
        line = lines.line_num + 1 if lines else 1
        raise InputError(f"{shard.uri}: no UTF-8 soon after line {line} ({error}); save it as UTF-8") from None
    except csv.Error as error:
        line = lines.line_num if lines else 1
        raise InputError(f"{shard.uri}: line {line} cannot be read ({error}); check its quotes") from None
    except storage.StorageAway:
        raise
    except OSError as error:
        raise InputError(f"{shard.uri}: cannot be read ({error}); check the file and the rights") from error
