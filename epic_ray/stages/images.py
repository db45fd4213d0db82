"""The images of a run: listed once from any source into a manifest, cut into units, looked up by their place in it.

A split may have millions of images, so the driver holds none of their rows: a listing streams from its source into a
local file, from there (with labels) into the run's manifest; digests of the units are all that stays in memory.
"""

import errno
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from epic_ray.config import DataConfig, fingerprint
from epic_ray.errors import InputError, ResultError, RunFailed
from epic_ray.logs import Reporter
from epic_ray.run_dir import RunDir, table_file
from epic_ray.stages.classes import ClassNames
from epic_ray.stages.reading import ImageReader
from epic_ray.stages.sources import Source, find_source
from epic_ray.tables import TABLES, build_table, read_batches, read_metadata, take_rows, write_tables

_ABOUT_KEY = "epic_ray.listing"
_WHOLE = 65_536  # rows of a digest of the whole listing, which does not depend on the size of units
# what of a row another listing may differ in; the uri follows from the id and the data set's root
_IDENTITY = ("position", "image_id", "label", "size_bytes", "byte_offset", "row")


@dataclass(frozen=True)
class SplitImages:
    """What is held in memory of a split's images: the table that lists them, how many, digests of all and of units."""

    split: str
    table: str
    rows: int
    digest: str
    unit_size: int
    unit_digests: tuple[str, ...]


class Address(NamedTuple):
    """Where the bytes of one image lie: all that reading it takes."""

    uri: str
    byte_offset: int | None = None
    row: int | None = None
    size_bytes: int | None = None
    column: str | None = None

    def read(self) -> bytes:
        """The encoded image. Raises UnreadableError, or StorageAway."""
        return ImageReader(self.column).read(self.uri, self.byte_offset, self.row, self.size_bytes)


@dataclass(frozen=True)
class UnitRange:
    """A unit of work: `count` rows of a manifest from row `start` on, and what its results are made from."""

    table: str
    split: str
    number: int
    start: int
    count: int
    made_from: str


def cut_units(images: SplitImages, made_from: str) -> list[UnitRange]:
    """The fixed units of a split; another image in a unit makes it another unit, and no other."""
    return [
        UnitRange(
            images.table,
            images.split,
            number,
            number * images.unit_size,
            min(images.unit_size, images.rows - number * images.unit_size),
            fingerprint(made_from, images.split, digest),
        )
        for number, digest in enumerate(images.unit_digests)
    ]


# --- listing


@dataclass(frozen=True)
class _About:
    """What a manifest says of its making, in its metadata, so that an unchanged source need not be listed again."""

    listed_from: str
    labelled_by: str
    rows: int
    digest: str
    unit_size: int
    unit_digests: list[str]
    image_column: str | None
    class_names: list[str]
    index_names: list[str]

    def images(self, split: str, table: str) -> SplitImages:
        return SplitImages(split, table, self.rows, self.digest, self.unit_size, tuple(self.unit_digests))


class Listing:
    """The images of some splits as their sources hold them now; nothing is written to the run before `publish`.

    Raises InputError where a split holds no image, or two splits hold the same file.
    """

    def __init__(self, data: DataConfig, splits: Iterable[str], reporter: Reporter, run_dir: RunDir) -> None:
        self._data, self._run_dir, self._reporter = data, run_dir, reporter
        self._folder = tempfile.TemporaryDirectory(prefix="epic-ray-")
        self._sources = {split: find_source(data, split) for split in splits}
        _demand_files_of_their_own(list(self._sources.values()))
        self._abouts = {split: self._known(split) or self._spool(split) for split in self._sources}

    @property
    def class_names(self) -> list[str]:
        """The names of all classes found, sorted."""
        return sorted({name for about in self._abouts.values() for name in about.class_names})

    @property
    def index_names(self) -> list[str]:
        """What the source itself calls the classes that it numbers, in their order; [] where it does not say."""
        return next((about.index_names for about in self._abouts.values() if about.index_names), [])

    def label(self, classes: ClassNames, unit_size: int) -> dict[str, SplitImages]:
        """The images with their labels. Raises InputError for a label that is no class of the head."""
        labelled_by = fingerprint(classes.names, classes.folders)
        found = {}
        for split, about in self._abouts.items():
            if (about.labelled_by, about.unit_size) != (labelled_by, unit_size):
                if about.labelled_by != labelled_by and not self._spooled(split).exists():
                    about = self._spool(split)
                about = self._digested(about, split, self._labelled(split, classes), unit_size)
                about = self._abouts[split] = replace(about, labelled_by=labelled_by)
            found[split] = about.images(split, "manifest")
        return found

    def publish(self, classes: ClassNames) -> int:
        """Writes the manifests of splits that the run does not have as they are now; gives the bytes written."""
        size_bytes = 0
        for split, about in self._abouts.items():
            if self._spooled(split).exists():
                size_bytes += self._write(
                    table_file("manifest", split), "manifest", about, self._labelled(split, classes)
                )
        return size_bytes

    def select(self, split: str, classes: ClassNames, unit_size: int, limit: int | None) -> SplitImages:
        """Publishes all images of a split, or `limit` of them at even steps, as the table `selection`."""
        self.label(classes, unit_size)
        about, relative = self._abouts[split], table_file("selection", split)
        if limit is not None and limit < about.rows:
            chosen = np.array([number * about.rows // limit for number in range(limit)])

            def rows() -> Iterator[pa.Table]:
                return _picked(self._labelled(split, classes), chosen)

            about = replace(self._digested(about, split, rows(), unit_size), rows=limit)
        else:

            def rows() -> Iterator[pa.Table]:
                return self._labelled(split, classes)

        if _read_about(self._run_dir, relative) != about:
            self._write(relative, "selection", about, rows())
        return about.images(split, "selection")

    def _digested(self, about: _About, split: str, rows: Iterable[pa.Table], unit_size: int) -> _About:
        source = self._sources[split]
        stamps = {uri: f"{stamp} {source.image_column}" for uri, stamp in source.stamps.items()}
        whole, units = _Digests(_WHOLE, stamps), _Digests(unit_size, stamps)
        for table in rows:
            whole.add(table)
            units.add(table)
        return replace(about, digest=fingerprint(whole.end()), unit_size=unit_size, unit_digests=units.end())

    def _known(self, split: str) -> _About | None:
        """What the run's own manifest says, if the files that it was listed from are unchanged."""
        about = _read_about(self._run_dir, table_file("manifest", split))
        return about if about and self._sources[split].stamp and about.listed_from == self._listed_from(split) else None

    def _listed_from(self, split: str) -> str:
        source, data = self._sources[split], self._data
        how = (data.root, data.splits[split], source.format, data.labels, data.image_column, data.label_column)
        return fingerprint(how, source.stamp)

    def _spooled(self, split: str) -> Path:
        return Path(self._folder.name) / f"{split}.parquet"

    def _spool(self, split: str) -> _About:
        """Lists a source into a local file."""
        source, count, writer = self._sources[split], 0, None
        try:
            with self._reporter.stage(f"list {split}", None, "images", brief=True) as meter:
                for batch in source.batches():
                    writer = writer or pq.ParquetWriter(self._spooled(split), batch.schema, compression="lz4")
                    writer.write_batch(batch)
                    count += batch.num_rows
                    meter.advance(batch.num_rows)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise RunFailed(f"{self._folder.name}: no space for the listing ({error}); set TMPDIR to another") from None
        finally:
            if writer:
                writer.close()
        for note in source.notes():
            self._reporter.say(f"{split}: {note}")
        if not count:
            raise InputError(f"{source.where}: holds no image (split `{split}`)")
        class_names, index_names = source.class_names()
        return _About(
            self._listed_from(split), "", count, "", 0, [], source.image_column, sorted(class_names), list(index_names)
        )

    def _labelled(self, split: str, classes: ClassNames) -> Iterator[pa.Table]:
        """The rows of a split's manifest, in tables of a few thousand."""
        if not self._spooled(split).exists():
            yield from read_batches(self._run_dir, table_file("manifest", split))
            return
        position, where = 0, self._sources[split].where
        for batch in pq.ParquetFile(self._spooled(split)).iter_batches():
            rows = pa.table(batch)
            columns = {name: rows[name] for name in ("image_id", "uri", "byte_offset", "row", "size_bytes")}
            columns |= {
                "split": pa.repeat(pa.scalar(split), rows.num_rows),
                "position": pa.array(np.arange(position, position + rows.num_rows)),
                "label": classes.labels(rows, where),
            }
            position += rows.num_rows
            yield build_table("manifest", columns)

    def _write(self, relative: str, table: str, about: _About, rows: Iterable[pa.Table]) -> int:
        schema = TABLES[table].schema({_ABOUT_KEY: json.dumps(asdict(about))})
        return write_tables(self._run_dir, relative, schema, rows)


def _demand_files_of_their_own(sources: list[Source]) -> None:
    """Splits that share a file would make held-out figures mean nothing."""
    owners: dict[str, str] = {}
    for source in sources:
        for file in source.files:
            other = owners.setdefault(file, source.split)
            if other != source.split:
                raise InputError(
                    f"{file}: is part of split `{other}` and of split `{source.split}`; held-out figures would mean "
                    "nothing; set data.splits to patterns that share no file"
                )


def _read_about(run_dir: RunDir, relative: str) -> _About | None:
    if not run_dir.exists(relative):
        return None
    try:
        text = read_metadata(run_dir, relative).get(_ABOUT_KEY)
        return _About(**json.loads(text)) if text else None
    except (ResultError, ValueError, TypeError):
        return None  # of another version, or torn: listed anew


def _picked(tables: Iterable[pa.Table], rows: np.ndarray) -> Iterator[pa.Table]:
    """Of consecutive tables, the rows with these numbers."""
    start = 0
    for table in tables:
        low, high = np.searchsorted(rows, [start, start + table.num_rows])
        yield table.take(pa.array(rows[low:high] - start))
        start += table.num_rows


class _Digests:
    """A digest of every `size` rows in turn, wherever the tables happen to be cut.

    `stamps` tell whether a file of many images changed; they count where the rows do not: in Parquet files, whose
    listing gives no sizes.
    """

    def __init__(self, size: int, stamps: dict[str, str]) -> None:
        self._size, self._stamps = size, stamps
        self._held: list[pa.Table] = []
        self._count = 0
        self._found: list[str] = []

    def add(self, table: pa.Table) -> None:
        rest = table.replace_schema_metadata()
        while rest.num_rows:
            part = rest.slice(0, self._size - self._count)
            self._held.append(part)
            self._count += part.num_rows
            rest = rest.slice(part.num_rows)
            if self._count == self._size:
                self._close()

    def end(self) -> list[str]:
        if self._count:
            self._close()
        return self._found

    def _close(self) -> None:
        self._found.append(_digest(pa.concat_tables(self._held), self._stamps))
        self._held, self._count = [], 0


def _digest(rows: pa.Table, stamps: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for uri in rows.filter(pc.is_valid(rows["row"]))["uri"].unique().to_pylist():
        digest.update(stamps[uri].encode())
    for name in _IDENTITY:
        column = rows[name].combine_chunks()
        if pa.types.is_string(column.type):
            digest.update(pc.binary_length(column).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            digest.update("".join(column.to_pylist()).encode())
        else:
            digest.update(pc.fill_null(column, -1).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return digest.hexdigest()[:16]


# --- reading what is listed


def read_unit(run_dir: RunDir, unit: UnitRange) -> pa.Table:
    """The rows of a unit."""
    return take_rows(run_dir, table_file(unit.table, unit.split), np.arange(unit.start, unit.start + unit.count))


def read_positions(run_dir: RunDir, split: str, positions: np.ndarray) -> pa.Table:
    """The manifest's rows at ascending positions."""
    return take_rows(run_dir, table_file("manifest", split), positions)


def addresses_at(run_dir: RunDir, table: str, split: str, positions: Iterable[int]) -> dict[int, Address]:
    """Where images lie, by their rows in a table that lists them; only these rows are read."""
    rows = np.array(sorted(set(positions)), np.int64)
    column = image_column(run_dir, table, split)
    found = take_rows(run_dir, table_file(table, split), rows, list(Address._fields[:-1]))
    places = (Address(**row, column=column) for row in found.to_pylist())
    return dict(zip(rows.tolist(), places, strict=True))


def find_images(run_dir: RunDir, table: str, split: str, image_ids: Iterable[str]) -> dict[str, Address]:
    """Where images lie, by their ids. Raises ResultError for an id that the table does not have."""
    wanted = pa.array(sorted(set(image_ids)), pa.string())
    column = image_column(run_dir, table, split)
    found: dict[str, Address] = {}
    for rows in read_batches(run_dir, table_file(table, split)):
        if len(found) == len(wanted):
            break
        for row in rows.filter(pc.is_in(rows["image_id"], value_set=wanted)).to_pylist():
            found[row["image_id"]] = Address(row["uri"], row["byte_offset"], row["row"], row["size_bytes"], column)
    missing = [name for name in wanted.to_pylist() if name not in found]
    if missing:
        where = run_dir.show(table_file(table, split))
        raise ResultError(f"{where}: does not list {missing[0]}; the run's tables do not belong together, run it again")
    return found


def image_column(run_dir: RunDir, table: str, split: str) -> str | None:
    """The column of a Parquet source that holds the images' bytes, or None."""
    about = _read_about(run_dir, table_file(table, split))
    return about.image_column if about else None
