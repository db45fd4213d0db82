"""How a table lies in its Parquet file: what is compressed, and how much of it is read at a time.

Vectors of a network's numbers are written as they are. Compression takes a tenth or two off such digits, and costs
more time at each reading than the disk saves. All else is compressed.
"""

from typing import Any

import pyarrow as pa

VECTOR = "vector"  # a column whose type depends on the model: float32 [channels], [classes] or [cells]
FEATURES = "features"  # one whose type depends on the settings as well: float32 or float16 [channels]
BOX = pa.fixed_shape_tensor(pa.float32(), [4])

ROW_GROUP_SIZE = 16_384
# of vectors: whoever looks up one image reads no more than this, and a scan still reads long stretches
ROW_GROUP_BYTES = 16 * 1024**2


def vector_type(kind: str, given: pa.FixedShapeTensorType) -> pa.FixedShapeTensorType:
    """The type of a column that depends on the model: float16 where it is given and may be, all else as float32."""
    half = kind == FEATURES and given.value_type == pa.float16()
    return pa.fixed_shape_tensor(pa.float16() if half else pa.float32(), given.shape)


def rows_per_group(schema: pa.Schema) -> int:
    """Rows of a row group: the fewer, the longer their vectors."""
    row_bytes = sum(field.type.shape[0] * field.type.value_type.byte_width for field in schema if _is_vector(field))
    return max(1, min(ROW_GROUP_SIZE, ROW_GROUP_BYTES // max(row_bytes, 1)))


def encoding(schema: pa.Schema) -> dict[str, Any]:
    """Arguments of the Parquet writer. Words have dictionaries; pages carry checksums, which every reading tries."""
    vectors = {_leaf(field) for field in schema if _is_vector(field)}
    leaves = {_leaf(field) for field in schema}
    return {
        "compression": {leaf: "none" if leaf in vectors else "zstd" for leaf in leaves},
        "use_dictionary": [field.name for field in schema if pa.types.is_string(field.type)],
        "write_statistics": sorted(leaves - vectors),
        "write_page_checksum": True,
    }


def _leaf(field: pa.Field) -> str:
    """The column of Parquet that holds a field's values."""
    return f"{field.name}.list.element" if isinstance(field.type, pa.FixedShapeTensorType) else field.name


def _is_vector(field: pa.Field) -> bool:
    return isinstance(field.type, pa.FixedShapeTensorType) and field.type != BOX
