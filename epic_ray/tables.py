"""Every table of a run: its columns, their types, units and meaning; writing and reading with checks.

The files are plain Parquet that pandas, polars and DuckDB read as they are. Vectors are Arrow's canonical fixed-shape
tensors of float32 or float16; units and meanings stand in the field metadata, name and schema version in the schema
metadata.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from epic_ray.errors import ResultError, RunFailed
from epic_ray.layout import BOX, FEATURES, VECTOR, encoding, rows_per_group, vector_type
from epic_ray.run_dir import RunDir
from epic_ray.seal import Sealing, is_sealed
from epic_ray.storage import StorageAway, patiently

SCHEMA_VERSION = 3


@dataclass(frozen=True)
class Column:
    name: str
    type: pa.DataType | str
    meaning: str
    unit: str = ""
    nullable: bool = False


@dataclass(frozen=True)
class Table:
    name: str
    what: str
    columns: tuple[Column, ...]

    def schema(self, metadata: Mapping[str, str] | None = None, **vectors: pa.FixedShapeTensorType) -> pa.Schema:
        """The Arrow schema; `vectors` gives the columns that depend on the model, of which absent ones are left out."""
        fields = []
        for column in self.columns:
            kind = column.type
            if isinstance(kind, str):
                if column.name not in vectors:
                    continue
                kind = vector_type(kind, vectors[column.name])
            about = {"meaning": column.meaning} | ({"unit": column.unit} if column.unit else {})
            fields.append(pa.field(column.name, kind, nullable=column.nullable, metadata=about))
        about = {"epic_ray.table": self.name, "epic_ray.schema_version": str(SCHEMA_VERSION)}
        return pa.schema(fields, metadata=about | dict(metadata or {}))


_IMAGE_ID = Column(
    "image_id",
    pa.string(),
    "path of the image relative to the data set's root; in files of many, `file#key` or `file#row`",
)
_SPLIT = Column("split", pa.string(), "split of the image")
_POSITION = Column("position", pa.int64(), "row of the image in its split's manifest, from 0")
_LABEL = Column("label", pa.int32(), "class index of the image in the head; null without labels", nullable=True)
_CHANNEL = Column("channel", pa.int32(), "row of U, from 0; under basis `before`, channel of the classifier's own map")
_SIGN = Column("sign", pa.string(), "`positive`: strongest activation; `negative`: strongest negated activation")
_BASIS = Column("basis", pa.string(), "`before`: the classifier's own channels (U = I); `after`: the fitted U")
_CELL_ROW = Column("cell_row", pa.int32(), "row of the channel's peak in the feature map, from 0", "cell")
_CELL_COL = Column("cell_col", pa.int32(), "column of the channel's peak in the feature map, from 0", "cell")
_BOX = Column("box_xyxy_px", BOX, "the peak cell (left, top, right, bottom) in the upright original image", "px")
_LISTED = (
    _SPLIT,
    _POSITION,
    _IMAGE_ID,
    Column("uri", pa.string(), "the file that holds the image's bytes: its own, or one of many images"),
    Column("byte_offset", pa.int64(), "where the image begins in a tar file", "byte", nullable=True),
    Column("row", pa.int64(), "row of the image in a Parquet file, from 0", nullable=True),
    _LABEL,
    Column("size_bytes", pa.int64(), "size of the encoded image, where the listing tells it", "byte", nullable=True),
)

TABLES = {
    table.name: table
    for table in (
        Table(
            "classes",
            "The classes of the head.",
            (
                Column("class_index", pa.int32(), "row of the head's weight, from 0"),
                Column("name", pa.string(), "what the class is called in pictures and pages"),
                Column("folder", pa.string(), "name that class folders carry, where it differs", nullable=True),
            ),
        ),
        Table("manifest", "The images of the data set, before any was read; one file a split.", _LISTED),
        Table("selection", "The images that `explain` was asked for, as in the manifest; one file a split.", _LISTED),
        Table(
            "images",
            "What became of each image in the pass; one file a unit, the commit of that unit.",
            (
                _SPLIT,
                _POSITION,
                _IMAGE_ID,
                _LABEL,
                Column("status", pa.string(), "`ok` or `failed`"),
                Column("reason", pa.string(), "why it failed", nullable=True),
                Column("width_px", pa.int32(), "width of the upright original", "px", nullable=True),
                Column("height_px", pa.int32(), "height of the upright original", "px", nullable=True),
                Column("predicted", pa.int32(), "class index of the largest logit", nullable=True),
                Column("logit", pa.float32(), "the classifier's own logit of the predicted class", nullable=True),
                Column("probability", pa.float32(), "softmax of the logits at the predicted class", nullable=True),
                Column(
                    "split_difference",
                    pa.float32(),
                    "largest |difference| of A·v + b from the classifier's own logits",
                    nullable=True,
                ),
            ),
        ),
        Table(
            "features",
            "Pooled features of each readable image; one file a unit.",
            (
                _SPLIT,
                _POSITION,
                _IMAGE_ID,
                Column("pooled", FEATURES, "v: mean of the last feature map over its cells, one entry a channel"),
                Column("logits", VECTOR, "the classifier's own logits; only in splits that are not fitted on"),
            ),
        ),
        Table(
            "prototypes",
            "The images that activate each channel most, in the split that U was fitted on.",
            (
                _BASIS,
                _SPLIT,
                _SIGN,
                _CHANNEL,
                Column("rank", pa.int32(), "place among the channel's prototypes, from 1"),
                _POSITION,
                _IMAGE_ID,
                _LABEL,
                Column("value", pa.float32(), "the channel's mean activation over the cells (the paper's sum / (H·W))"),
                Column("purity", pa.float32(), "share of the peak cell's length that lies in the channel, in [-1, 1]"),
                _CELL_ROW,
                _CELL_COL,
                _BOX,
                Column("heat", VECTOR, "the channel at every cell of the map, row by row; `value` is its mean"),
            ),
        ),
        Table(
            "purity",
            "Mean purity of each channel's n positive prototypes, chosen anew in each split.",
            (
                _BASIS,
                _SPLIT,
                _CHANNEL,
                Column("n", pa.int32(), "prototypes asked for"),
                Column("prototype_count", pa.int32(), "prototypes found: fewer than n in a split of fewer images"),
                Column("purity", pa.float32(), "their mean purity, in [-1, 1]"),
            ),
        ),
        Table(
            "history",
            "The rounds of the fit.",
            (
                Column("round", pa.int32(), "round, from 1"),
                Column("prototypes_per_channel", pa.int32(), "prototypes a channel was fitted on"),
                Column(
                    "purity_start", pa.float64(), "mean purity (weighted) of the round's prototypes before its update"
                ),
                Column("purity_end", pa.float64(), "mean purity of the same prototypes after it"),
                Column(
                    "moved", pa.float64(), "mean over channels of 1 - |cosine| of U's row before and after the round"
                ),
                Column("steps", pa.int32(), "updates of U in the round"),
                Column("loss", pa.float64(), "mean loss over the round's last epoch (adam)", nullable=True),
                Column("images", pa.int64(), "distinct images among the round's prototypes"),
                Column("new_images", pa.int64(), "of these, images that no earlier round had chosen"),
                Column("orthogonality_error", pa.float64(), "largest |entry| of U·Uᵀ - I after the round"),
            ),
        ),
        Table(
            "explanations",
            "The strongest channels of each image's prediction; one file a unit.",
            (
                _SPLIT,
                _POSITION,
                _IMAGE_ID,
                _LABEL,
                Column("predicted", pa.int32(), "class index of the largest logit"),
                Column("logit", pa.float32(), "the classifier's own logit of the predicted class"),
                Column("probability", pa.float32(), "softmax of the logits at the predicted class"),
                Column("rank", pa.int32(), "place of the channel in this prediction, from 1"),
                _CHANNEL,
                Column("sign", pa.string(), "`positive` or `negative`: the side on which the channel is active"),
                Column("share", pa.float32(), "exact signed part of the logit: Â_yk·v̂_k; all channels + bias = logit"),
                Column("score", pa.float32(), "the paper's: Â_yk·ReLU(v̂_k)"),
                Column("value", pa.float32(), "v̂_k: the channel's mean activation over the cells"),
                Column("purity", pa.float32(), "purity of the channel's peak cell in this image"),
                _CELL_ROW,
                _CELL_COL,
                _BOX,
            ),
        ),
    )
}


def build_table(name: str, columns: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> pa.Table:
    """A table from columns of Python, numpy or Arrow values, in the schema's types and order.

    2-D numpy arrays become fixed-shape tensors. Raises ResultError for missing or unknown columns and wrong types.
    """
    arrays = {key: _vectors(value) if getattr(value, "ndim", 1) == 2 else value for key, value in columns.items()}
    vectors = {key: array.type for key, array in arrays.items() if isinstance(array, pa.ExtensionArray)}
    schema = TABLES[name].schema(metadata, **vectors)
    if set(schema.names) != set(arrays):
        raise ResultError(f"table {name}: has columns {sorted(arrays)}, but its schema {sorted(schema.names)}")
    try:
        ready = [
            array
            if isinstance(array, pa.Array | pa.ChunkedArray) and array.type == field.type
            else pa.array(array, type=field.type)
            for field, array in ((field, arrays[field.name]) for field in schema)
        ]
        table = pa.Table.from_arrays(ready, schema=schema)
        table.validate()
    except pa.ArrowException as error:
        raise ResultError(f"table {name}: {error}") from error
    for field in schema:
        if not field.nullable and table[field.name].null_count:
            raise ResultError(f"table {name}: {table[field.name].null_count} null(s) in {field.name}")
    return table


def _vectors(values: Any) -> pa.FixedShapeTensorArray:
    if len(values):
        return pa.FixedShapeTensorArray.from_numpy_ndarray(values)
    kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(values.dtype), values.shape[1:])
    return kind.wrap_array(pa.array([], kind.storage_type))


def write_table(run_dir: RunDir, relative: str, table: pa.Table) -> int:
    """Publishes a table as one Parquet file; gives its size in bytes."""
    return write_tables(run_dir, relative, table.schema, [table])


def write_tables(run_dir: RunDir, relative: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Publishes tables of one schema as one Parquet file, one after another; gives its size in bytes.

    Pages carry checksums, which every reading tries; the file as a whole carries a seal (`count_rows`).
    """
    rows = rows_per_group(schema)

    def write(stream: pa.NativeFile) -> None:
        sealing = Sealing(stream)
        with pq.ParquetWriter(sealing, schema, **encoding(schema)) as writer:
            for table in tables:
                writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=rows)
            sealing.hold()
        sealing.finish()

    return run_dir.publish(relative, write)


def read_table(run_dir: RunDir, relative: str, columns: list[str] | None = None) -> pa.Table:
    """One file of a table, its schema checked. Raises ResultError for an absent, torn or foreign file."""
    table: pa.Table = _read(run_dir, relative, lambda parquet: parquet.read(columns=columns))
    return table


def read_batches(run_dir: RunDir, relative: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """One file of a table, a row group at a time: what a long table costs in memory does not grow with it."""
    count = _read(run_dir, relative, lambda parquet: parquet.num_row_groups)
    for group in range(count):

        def read_group(parquet: pq.ParquetFile, group: int = group) -> pa.Table:
            return parquet.read_row_group(group, columns=columns)

        yield _read(run_dir, relative, read_group)


def take_rows(run_dir: RunDir, relative: str, rows: np.ndarray, columns: list[str] | None = None) -> pa.Table:
    """Rows of one file of a table, by their numbers in ascending order; only their row groups are read."""

    def take(parquet: pq.ParquetFile) -> pa.Table:
        sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        ends = np.cumsum([0, *sizes])
        if len(rows) and not 0 <= rows[0] <= rows[-1] < ends[-1]:
            raise ResultError(f"{run_dir.show(relative)}: has {ends[-1]} rows, row {rows[-1]} was asked for")
        groups = np.searchsorted(ends, rows, side="right") - 1
        parts = [
            parquet.read_row_group(int(group), columns=columns).take(pa.array(rows[groups == group] - ends[group]))
            for group in np.unique(groups)
        ]
        if not parts:
            return parquet.schema_arrow.empty_table().select(columns or parquet.schema_arrow.names)
        return pa.concat_tables(parts)

    table: pa.Table = _read(run_dir, relative, take)
    return table


def count_rows(run_dir: RunDir, relative: str) -> int:
    """Rows of a table's file, every byte of which is found as it was written. Raises ResultError where it is not.

    A file from before there were seals is read page by page.
    """
    try:
        sealed = run_dir.ask(relative, lambda: _is_sealed(run_dir, relative))
    except FileNotFoundError:
        raise ResultError(f"{run_dir.show(relative)}: missing; run the stage that writes it again") from None
    if sealed is False:
        raise _torn(run_dir, relative, "its bytes are not those that were written")
    if sealed is None:
        for _ in read_batches(run_dir, relative):
            pass
    return int(_read(run_dir, relative, lambda parquet: parquet.metadata.num_rows))


def _is_sealed(run_dir: RunDir, relative: str) -> bool | None:
    with run_dir.filesystem.open_input_file(run_dir.path(relative)) as file:
        return is_sealed(file)


def _read(run_dir: RunDir, relative: str, use: Callable[[pq.ParquetFile], Any]) -> Any:
    """What `use` makes of a table's file, its pages' checksums tried; a store that is away is waited for."""

    def parse(source: pa.NativeFile) -> Any:
        try:
            parquet = pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=True)
            check_schema(parquet.schema_arrow, run_dir.show(relative))
            return use(parquet)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise _torn(run_dir, relative, error) from error

    def read() -> Any:
        with run_dir.open(relative) as file:
            try:
                return parse(file)
            except OSError as error:
                if run_dir.is_local:
                    raise _torn(run_dir, relative, error) from error
                file.seek(0)
                content = file.read()  # was it the file or the store? a store that is away fails here again
            try:
                return parse(pa.BufferReader(content))
            except OSError as error:
                raise _torn(run_dir, relative, error) from error

    try:
        return patiently(run_dir.filesystem, run_dir.show(relative), read)
    except StorageAway as error:
        raise RunFailed(str(error)) from error


def _torn(run_dir: RunDir, relative: str, error: Exception | str) -> ResultError:
    return ResultError(f"{run_dir.show(relative)}: is no readable Parquet file ({error}); run its stage again")


def check_schema(schema: pa.Schema, where: str) -> None:
    """Raises ResultError unless a file's columns are those of the table that its metadata names."""
    about = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    name, version = about.get("epic_ray.table"), about.get("epic_ray.schema_version")
    if name not in TABLES or version != str(SCHEMA_VERSION):
        raise ResultError(
            f"{where}: table {name!r} of schema version {version!r}; this epic-ray reads {SCHEMA_VERSION}"
        )
    known = {column.name: column.type for column in TABLES[name].columns}
    wrong = [field.name for field in schema if field.name not in known or not _fits(field.type, known[field.name])]
    wrong += [key for key, kind in known.items() if not isinstance(kind, str) and key not in schema.names]
    if wrong:
        raise ResultError(f"{where}: columns {wrong} are not those of table {name}; written by another version?")


def _fits(found: pa.DataType, expected: pa.DataType | str) -> bool:
    if not isinstance(expected, str):
        return bool(found == expected)
    kinds = (pa.float32(), pa.float16()) if expected == FEATURES else (pa.float32(),)
    return isinstance(found, pa.FixedShapeTensorType) and len(found.shape) == 1 and found.value_type in kinds


def read_tables(run_dir: RunDir, relatives: list[str], columns: list[str] | None = None) -> pa.Table:
    """Several files of one table, in the given order."""
    return pa.concat_tables(
        [read_table(run_dir, relative, columns).replace_schema_metadata() for relative in relatives]
    )


def read_metadata(run_dir: RunDir, relative: str) -> dict[str, str]:
    """The schema metadata of a table's file, from its footer alone. Raises ResultError as `read_table` does."""
    metadata = _read(run_dir, relative, lambda parquet: parquet.schema_arrow.metadata or {})
    return {key.decode(): value.decode() for key, value in metadata.items()}


def to_numpy(column: pa.ChunkedArray | pa.Array) -> Any:
    """A column as numpy: fixed-shape tensors as (rows, ...), others as one value a row."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # no chunk at all
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], type=array.type)
    return array.to_numpy_ndarray() if isinstance(array, pa.ExtensionArray) else array.to_numpy(zero_copy_only=False)
