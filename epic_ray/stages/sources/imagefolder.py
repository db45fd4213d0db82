"""ImageFolder: one folder a class, images anywhere below it; listed folder by folder."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from epic_ray import storage
from epic_ray.config import DataConfig
from epic_ray.errors import InputError
from epic_ray.stages.sources.base import BATCH_ROWS, IMAGE_SUFFIXES, Place, Source, Tally, join_each, listed
from epic_ray.stages.sources.files import Entry, in_order, list_below, list_folder, threads_for

_SHOWN = 8


class _Part:
    """Consecutive images of a split: those of one class folder, or some of the split's own folder (folder None)."""

    def __init__(self, folder: str | None) -> None:
        self.folder = folder
        self.others, self.lost = Tally(), Tally()
        self.batch: pa.RecordBatch | None = None
        self._paths: list[str] = []
        self._sizes: list[int | None] = []

    @property
    def is_empty(self) -> bool:
        return self.batch is None and not self.others.count and not self.lost.count

    def add(self, path: str, size_bytes: int | None) -> None:
        """A file, by its path below the split's folder."""
        if path.lower().endswith(IMAGE_SUFFIXES):
            self._paths.append(path)
            self._sizes.append(size_bytes)
        else:
            (self.others if size_bytes is not None else self.lost).add(path)

    def close(self, place: Place, labelled: bool) -> "_Part":
        """Packs the rows, as parts wait for their turn."""
        if self._paths:
            prefix = f"{place.relative}/" if place.relative else ""
            ids = pa.array([prefix + path for path in self._paths], pa.string())
            name = self.folder if labelled else None
            sizes = pa.array(self._sizes, pa.int64())
            self.batch = listed(ids, join_each(place.root, ids), size_bytes=sizes, class_name=name)
        self._paths, self._sizes = [], []
        return self


class ImageFolderSource(Source):
    """Images by their suffix; sorted by the parts of their paths. The first folder below the split's is the class."""

    format = "imagefolder"

    def __init__(self, data: DataConfig, place: Place, notes: Sequence[str] = ()) -> None:
        super().__init__(data, place, notes=notes)
        self._begin()

    def _begin(self) -> None:
        super()._begin()
        self._others, self._lost = Tally(), Tally()
        self._empty: list[str] = []

    def _rows(self) -> Iterator[pa.RecordBatch]:
        for part in in_order(self._list, self._parts(), threads_for(self._root)):
            self._others.add(part.others.first, part.others.count)
            self._lost.add(part.lost.first, part.lost.count)
            if part.folder is not None and part.is_empty:
                self._empty.append(part.folder)
            if part.batch is not None:
                yield part.batch

    def _looked_for(self) -> str:
        first = f"; {self._others.count} other file(s) are there, first {self._others.first}"
        return f"files that end in {', '.join(IMAGE_SUFFIXES)} are looked for{first if self._others.count else ''}"

    def notes(self) -> list[str]:
        notes = super().notes()
        if self._others.count:
            notes.append(
                f"{self._others.count} file(s) without an image suffix are left out, first {self._others.first}"
            )
        if self._lost.count:
            what = "link(s) to nothing or special file(s)"
            notes.append(f"{self._lost.count} {what} without an image suffix are left out, first {self._lost.first}")
        if self._empty:
            more = f" and {len(self._empty) - _SHOWN} more" if len(self._empty) > _SHOWN else ""
            notes.append(f"empty class folder(s): {', '.join(self._empty[:_SHOWN])}{more}")
        return notes

    def class_names(self) -> tuple[list[str], list[str]]:
        found, _ = super().class_names()
        return (sorted({*found, *self._empty}) if self._labelled else []), []

    def _parts(self) -> Iterator[str | list[Entry]]:
        """In order: the class folders, and the files beside them in runs."""
        run: list[Entry] = []
        for entry in self._entries(self._place.address):
            if run and (entry.is_folder or len(run) == BATCH_ROWS):
                yield run
                run = []
            if entry.is_folder:
                yield entry.name
            else:
                run.append(entry)
        if run:
            yield run

    def _list(self, part: str | list[Entry]) -> _Part:
        if isinstance(part, list):
            found = _Part(None)
            for entry in part:
                found.add(entry.name, entry.size_bytes)
        else:
            found = _Part(part)
            remote = storage.is_uri(self._root)
            for path, size_bytes in self._walk_store(part) if remote else self._walk(part, _identity(self.where)):
                found.add(path, size_bytes)
        return found.close(self._place, self._labelled)

    def _walk_store(self, folder: str) -> Iterator[tuple[str, int | None]]:
        for parts, size_bytes in list_below(storage.join(self._place.address, folder)):
            yield "/".join((folder, *parts)), size_bytes

    def _walk(self, folder: str, above: frozenset[Any]) -> Iterator[tuple[str, int | None]]:
        """The files of a local folder and below; `above` are the folders that it lies in."""
        address = storage.join(self._place.address, folder)
        here = _identity(address)
        if here <= above:
            raise InputError(f"{address}: is a link to a folder that it lies in; remove the link")
        for entry in self._entries(address):
            path = f"{folder}/{entry.name}"
            if entry.is_folder:
                yield from self._walk(path, above | here)
            else:
                yield path, entry.size_bytes

    def _entries(self, address: str) -> list[Entry]:
        try:
            return list_folder(address)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{address}: is gone; the data set changed while it was listed") from None


def _identity(folder: str) -> frozenset[Any]:
    try:
        status = os.stat(folder)
    except OSError:  # told when it is listed
        return frozenset([folder])
    return frozenset([(status.st_dev, status.st_ino)])
