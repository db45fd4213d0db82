"""Parquet files with the images' bytes in a column, as Hugging Face writes them; only labels are read to list them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from epic_ray import storage
from epic_ray.config import DataConfig
from epic_ray.errors import InputError
from epic_ray.stages.sources.base import BATCH_ROWS, Place, Shard, Source, listed
from epic_ray.stages.sources.files import in_order, open_file, threads_for

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "image_bytes", "bytes")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "target", "fine_label")


class ParquetSource(Source):
    """The rows of Parquet files. Integer labels are class numbers, texts are class names."""

    format = "parquet"

    def __init__(self, data: DataConfig, place: Place, shards: Sequence[Shard], notes: Sequence[str] = ()) -> None:
        super().__init__(data, place, shards, notes)
        first = shards[0].uri
        with _readable(first) as parquet:
            schema = parquet.schema_arrow
        self.image_column: str = _image_column(schema, data.image_column, first)
        self._label = _label_column(schema, data.label_column, first) if self._labelled else None
        if self._label and pa.types.is_integer(_value_type(schema.field(self._label).type)):
            self._index_names = _hugging_face_names(schema, self._label)

    def _rows(self) -> Iterator[pa.RecordBatch]:
        found = in_order(self._labels, self._shards, threads_for(self._root))
        for shard, (count, labels) in zip(self._shards, found, strict=True):
            for start in range(0, count, BATCH_ROWS):
                size = min(BATCH_ROWS, count - start)
                rows = pa.array(np.arange(start, start + size))
                ids = pc.binary_join_element_wise(shard.relative, rows.cast(pa.string()), "#")
                columns = {name: _whole(values.slice(start, size)) for name, values in labels.items()}
                yield listed(ids, shard.uri, row=rows, **columns)

    def _looked_for(self) -> str:
        return f"its {len(self._shards)} Parquet file(s) have no rows"

    def _labels(self, shard: Shard) -> tuple[int, dict[str, pa.ChunkedArray]]:
        """How many rows a file has, and their labels."""
        with _readable(shard.uri) as parquet:
            schema = parquet.schema_arrow
            if bytes_column(schema, self.image_column) is None:
                raise InputError(
                    f"{shard.uri}: has no column `{self.image_column}` of bytes, as {self._shards[0].uri} has; "
                    f"{_columns_there(schema)}"
                )
            if self._label is None:
                return parquet.metadata.num_rows, {}
            _check_label(schema, self._label, shard.uri)
            labels = parquet.read(columns=[self._label]).column(self._label)
        kind = _value_type(labels.type)
        if pa.types.is_dictionary(labels.type):
            labels = labels.cast(kind)
        if pa.types.is_null(kind):
            return len(labels), {}
        if not pa.types.is_integer(kind):
            return len(labels), {"class_name": pc.if_else(pc.equal(labels, ""), None, labels).cast(pa.string())}
        try:
            return len(labels), {"class_index": labels.cast(pa.int32())}
        except pa.ArrowInvalid as error:
            raise InputError(f"{shard.uri}: column `{self._label}` holds what is no class number ({error})") from None


def open_parquet(uri: str) -> pq.ParquetFile:
    """A Parquet file anywhere, its columns read piece by piece. Raises OSError, ArrowException."""
    source = open_file(uri) if storage.is_uri(uri) else pa.OSFile(uri)
    return pq.ParquetFile(source, buffer_size=(1 << 23 if storage.is_uri(uri) else 1 << 20), pre_buffer=False)


def bytes_column(schema: pa.Schema, column: str) -> str | None:
    """The dotted column that holds the bytes where `column` is binary, or a struct with `bytes`; else None."""
    names = [column] if column in schema.names else column.split(".")
    if names[0] not in schema.names:
        return None
    kind = schema.field(names[0]).type
    for name in names[1:]:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column, kind = f"{column}.bytes", kind.field("bytes").type
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return column if is_bytes else None


def _image_column(schema: pa.Schema, wanted: str, where: str) -> str:
    names = IMAGE_COLUMNS if wanted == "auto" else (wanted,)
    for name in names:
        if column := bytes_column(schema, name):
            return column
    looked_for = f"`{wanted}`" if wanted != "auto" else f"one of {', '.join(names)}"
    raise InputError(
        f"{where}: has no column of images' bytes (looked for {looked_for}); {_columns_there(schema)}; "
        "set data.image_column"
    )


def _label_column(schema: pa.Schema, wanted: str, where: str) -> str | None:
    names = LABEL_COLUMNS if wanted == "auto" else (wanted,)
    column = next((name for name in names if name in schema.names), None)
    if column:
        _check_label(schema, column, where)
    elif wanted != "auto":
        raise InputError(f"{where}: has no column `{wanted}`; {_columns_there(schema)}; set data.label_column")
    return column


def _check_label(schema: pa.Schema, column: str, where: str) -> None:
    if column not in schema.names:
        raise InputError(
            f"{where}: has no column `{column}`, as the first file of the split has; {_columns_there(schema)}"
        )
    kind = _value_type(schema.field(column).type)
    if not (pa.types.is_integer(kind) or pa.types.is_null(kind) or _is_text(kind)):
        raise InputError(
            f"{where}: column `{column}` holds {kind}, and a label is an integer or a text; set data.label_column, or "
            "data.labels=none"
        )


def _columns_there(schema: pa.Schema) -> str:
    shown = ", ".join(f"{field.name} ({field.type})" for field in schema)
    return f"columns there: {shown if len(shown) < 400 else ', '.join(schema.names)}"


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _hugging_face_names(schema: pa.Schema, column: str) -> list[str]:
    """The names of a ClassLabel's numbers, in their order, from what Hugging Face writes beside the schema."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = about["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def _whole(values: pa.ChunkedArray) -> pa.Array:
    array = values.combine_chunks()
    return array if isinstance(array, pa.Array) else array.chunk(0)


@contextmanager
def _readable(uri: str) -> Iterator[pq.ParquetFile]:
    """A file whose faults are input errors."""
    try:
        with open_parquet(uri) as parquet:
            yield parquet
    except storage.StorageAway:
        raise
    except (OSError, pa.ArrowException) as error:
        why = " ".join(str(error).split())
        raise InputError(f"{uri}: is no readable Parquet file ({why}); write it anew, or leave it out") from error
