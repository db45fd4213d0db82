"""Tables: wrong ones are refused, pandas, polars and DuckDB read the written ones alike, and the README names all."""

import io
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from epic_ray.errors import ResultError
from epic_ray.run_dir import RunDir, table_file
from epic_ray.tables import (
    FEATURES,
    SCHEMA_VERSION,
    TABLES,
    VECTOR,
    Column,
    build_table,
    read_metadata,
    read_table,
    read_tables,
    to_numpy,
    write_table,
)

README = Path(__file__).resolve().parents[1] / "README.md"
ROWS = 4
VECTOR_SIZES = {"pooled": 3, "logits": 2}


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    return RunDir(str(tmp_path / "run"))


def some_values(column: Column):
    """Values of the column's type: the second row null where it may be."""
    rng = np.random.default_rng(len(column.name))
    if column.type in (VECTOR, FEATURES):
        return rng.normal(size=(ROWS, VECTOR_SIZES[column.name])).astype(np.float32)
    if isinstance(column.type, pa.FixedShapeTensorType):
        return rng.uniform(0, 99, (ROWS, *column.type.shape)).astype(np.float32)
    if pa.types.is_string(column.type):
        values = ["train/n01/ä b.jpg", "", 'quote"d', "日本"]
    elif pa.types.is_integer(column.type):
        values = [3, 0, 2**31 - 1, -1]
    else:
        values = [0.1, -1.5, 3e-8, 1.0]
    if column.nullable:
        values[1] = None
    return pa.array(values, column.type)


def tiny(name: str) -> pa.Table:
    return build_table(name, {column.name: some_values(column) for column in TABLES[name].columns})


def plain(value):
    """A cell as a list, a number, a word or None, whatever library it came from."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return None
    if isinstance(value, np.ndarray) or hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


@pytest.mark.parametrize("name", sorted(TABLES))
def test_pandas_polars_and_duckdb_read_a_table_alike(run_dir, name):
    import duckdb
    import pandas
    import polars

    table = tiny(name)
    assert write_table(run_dir, table_file(name), table) > 0
    file = run_dir.path(table_file(name))
    expected = {column: plain(table[column].to_pylist()) for column in table.column_names}
    frame, polar = pandas.read_parquet(file), polars.read_parquet(file)
    duck = duckdb.sql(f"select * from '{file}'")
    assert list(frame.columns) == polar.columns == duck.columns == table.column_names
    rows = duck.fetchall()
    for place, column in enumerate(table.column_names):
        words = [plain(value) for value in frame[column].astype(object).where(frame[column].notna(), None)]
        assert words == expected[column]
        assert plain(polar[column].to_list()) == expected[column]
        assert [plain(row[place]) for row in rows] == expected[column]


@pytest.mark.parametrize("name", sorted(TABLES))
def test_a_table_comes_back_as_it_was_written(run_dir, name):
    table = tiny(name)
    write_table(run_dir, table_file(name), table)
    back = read_table(run_dir, table_file(name))
    assert back.equals(table)
    assert back.schema.equals(table.schema, check_metadata=True)
    twice = read_tables(run_dir, [table_file(name)] * 2)
    assert twice.num_rows == 2 * ROWS
    for column in table.column_names:
        assert len(to_numpy(twice[column])) == 2 * ROWS


def test_units_meanings_and_version_travel_in_the_file(run_dir):
    write_table(run_dir, table_file("prototypes"), tiny("prototypes"))
    schema = pq.read_schema(run_dir.path(table_file("prototypes")))
    assert schema.field("box_xyxy_px").metadata[b"unit"] == b"px"
    assert schema.field("cell_row").metadata[b"unit"] == b"cell"
    assert b"unit" not in schema.field("purity").metadata
    assert all(field.metadata[b"meaning"] for field in schema)
    about = read_metadata(run_dir, table_file("prototypes"))
    assert about["epic_ray.table"] == "prototypes"
    assert about["epic_ray.schema_version"] == str(SCHEMA_VERSION)


def test_every_column_has_a_meaning_and_every_pixel_column_its_unit():
    columns = [column for table in TABLES.values() for column in table.columns]
    assert all(column.meaning for column in columns)
    assert all(table.what for table in TABLES.values())
    assert {column.name for column in columns if column.name.endswith("_px")} == {
        column.name for column in columns if column.unit == "px"
    }


def test_features_are_written_without_a_dictionary_and_words_with_one(run_dir):
    write_table(run_dir, table_file("features"), tiny("features"))
    group = pq.ParquetFile(run_dir.path(table_file("features"))).metadata.row_group(0)
    encoded = {group.column(n).path_in_schema.split(".")[0]: group.column(n).encodings for n in range(5)}
    assert "RLE_DICTIONARY" in encoded["image_id"]
    assert "RLE_DICTIONARY" not in encoded["pooled"]


def features_of(rows: int, channels: int, dtype=np.float32) -> pa.Table:
    columns = {"split": ["train"] * rows, "position": np.arange(rows), "image_id": [str(n) for n in range(rows)]}
    vectors = np.random.default_rng(0).normal(size=(rows, channels)).astype(dtype)
    return build_table("features", columns | {"pooled": vectors})


def test_vectors_are_written_as_they_are_and_all_else_compressed(run_dir):
    write_table(run_dir, table_file("features"), features_of(600, 32))
    group = pq.ParquetFile(run_dir.path(table_file("features"))).metadata.row_group(0)
    chunks = {group.column(n).path_in_schema.split(".")[0]: group.column(n) for n in range(4)}
    assert {name: chunk.compression for name, chunk in chunks.items()} == {
        "split": "ZSTD",
        "position": "ZSTD",
        "image_id": "ZSTD",
        "pooled": "UNCOMPRESSED",
    }
    assert chunks["pooled"].encodings == ("RLE", "PLAIN")


@pytest.mark.parametrize(("dtype", "bytes_an_entry"), [(np.float32, 4), (np.float16, 2)])
def test_a_unit_of_features_takes_the_bytes_that_the_readme_says(run_dir, dtype, bytes_an_entry):
    for channels in (512, 2048):
        size = write_table(run_dir, table_file("features"), features_of(512, channels, dtype))
        assert 0 < size / 512 - bytes_an_entry * channels < 32


def test_a_long_file_is_read_in_row_groups_of_bounded_size(run_dir):
    write_table(run_dir, table_file("features"), features_of(9000, 1024))
    write_table(run_dir, "tables/features/narrow.parquet", features_of(20_000, 4))
    wide = pq.ParquetFile(run_dir.path(table_file("features"))).metadata
    assert [wide.row_group(n).num_rows for n in range(wide.num_row_groups)] == [4096, 4096, 808]
    narrow = pq.ParquetFile(run_dir.path("tables/features/narrow.parquet")).metadata
    assert [narrow.row_group(n).num_rows for n in range(narrow.num_row_groups)] == [16_384, 3616]


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_features_that_an_earlier_version_compressed_are_read_as_ever(run_dir, compression):
    table = features_of(700, 16)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression=compression, use_dictionary=["image_id"], write_page_checksum=True)
    run_dir.publish_bytes(table_file("features"), sink.getvalue())
    assert read_table(run_dir, table_file("features")).equals(table)


def test_features_of_half_precision_are_read_alike_by_pandas_polars_and_duckdb(run_dir):
    import duckdb
    import pandas
    import polars

    table = features_of(50, 7, np.float16)
    write_table(run_dir, table_file("features"), table)
    back = read_table(run_dir, table_file("features"))
    assert back["pooled"].type == pa.fixed_shape_tensor(pa.float16(), [7])
    expected = to_numpy(table["pooled"])
    assert (to_numpy(back["pooled"]) == expected).all()
    file = run_dir.path(table_file("features"))
    rows = duckdb.sql(f"select pooled from '{file}'").fetchall()
    for found in (
        np.stack(pandas.read_parquet(file)["pooled"]),
        np.array(polars.read_parquet(file)["pooled"].to_list()),
        np.array([row[0] for row in rows]),
    ):
        assert (found.astype(np.float32) == expected.astype(np.float32)).all()


def test_logits_stay_in_single_precision(run_dir):
    columns = columns_of("features")
    halves = {name: columns[name].astype(np.float16) for name in ("pooled", "logits")}
    table = build_table("features", columns | halves)
    assert table["pooled"].type == pa.fixed_shape_tensor(pa.float16(), [3])
    assert table["logits"].type == pa.fixed_shape_tensor(pa.float32(), [2])
    half = pa.FixedShapeTensorArray.from_numpy_ndarray(halves["logits"])
    wrong = table.set_column(table.column_names.index("logits"), "logits", half)
    write_table(run_dir, table_file("features"), wrong)
    with pytest.raises(ResultError, match=r"columns \['logits'\] are not those of table features"):
        read_table(run_dir, table_file("features"))


def columns_of(name: str) -> dict:
    return {column.name: some_values(column) for column in TABLES[name].columns}


def test_a_missing_or_unknown_column_is_refused():
    missing, unknown = columns_of("purity"), columns_of("purity") | {"purty": [1.0] * ROWS}
    del missing["n"]
    for columns in (missing, unknown):
        with pytest.raises(ResultError, match="table purity: has columns"):
            build_table("purity", columns)


def test_a_null_where_none_may_be_is_refused():
    with pytest.raises(ResultError, match=r"table manifest: 1 null\(s\) in uri"):
        build_table("manifest", columns_of("manifest") | {"uri": ["a", None, "b", "c"]})
    assert build_table("manifest", columns_of("manifest") | {"label": [None] * ROWS})["label"].null_count == ROWS


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("channel", ["a", "b", "c", "d"]),
        ("channel", [2**40] * ROWS),
        ("channel", np.full(ROWS, 0.5)),
        ("basis", [1, 2, 3, 4]),
        ("purity", [0.1]),
        ("purity", np.zeros((ROWS, 3), np.float32)),
    ],
)
def test_wrong_types_and_lengths_are_refused(column, values):
    with pytest.raises(ResultError, match="table purity: "):
        build_table("purity", columns_of("purity") | {column: values})


def test_vectors_are_float32_and_boxes_have_four_numbers():
    vectors = np.linspace(0, 1, 3 * ROWS).reshape(ROWS, 3)
    table = build_table("features", columns_of("features") | {"pooled": vectors})
    assert table["pooled"].type == pa.fixed_shape_tensor(pa.float32(), [3])
    assert (to_numpy(table["pooled"]) == vectors.astype(np.float32)).all()
    with pytest.raises(ResultError, match="table prototypes: "):
        build_table("prototypes", columns_of("prototypes") | {"box_xyxy_px": np.zeros((ROWS, 3), np.float32)})


def test_a_table_without_rows_keeps_its_vectors_and_boxes(run_dir):
    empty = build_table("explanations", {key: values[:0] for key, values in columns_of("explanations").items()})
    assert empty.schema.field("box_xyxy_px").type == pa.fixed_shape_tensor(pa.float32(), [4])
    write_table(run_dir, table_file("explanations"), empty)
    assert read_table(run_dir, table_file("explanations")).equals(empty)


def test_the_logits_of_the_fitting_split_may_be_left_out():
    columns = columns_of("features")
    del columns["logits"]
    assert build_table("features", columns).column_names[-1] == "pooled"


def test_a_torn_file_is_a_result_error(run_dir):
    write_table(run_dir, table_file("purity"), tiny("purity"))
    whole = run_dir.read_bytes(table_file("purity"))
    for size in (0, 3, 100, len(whole) - 1):
        run_dir.publish_bytes(table_file("purity"), whole[:size])
        with pytest.raises(ResultError, match=r"purity\.parquet: is no readable Parquet file .*run its stage again"):
            read_table(run_dir, table_file("purity"))
        with pytest.raises(ResultError, match="is no readable Parquet file"):
            read_metadata(run_dir, table_file("purity"))


def test_an_absent_file_is_a_result_error(run_dir):
    with pytest.raises(ResultError, match=r"purity\.parquet: missing"):
        read_table(run_dir, table_file("purity"))


def test_a_foreign_table_is_a_result_error(run_dir):
    good = tiny("purity")
    about = {"epic_ray.table": "purity", "epic_ray.schema_version": str(SCHEMA_VERSION)}
    foreign = {
        "no table of ours": good.replace_schema_metadata(),
        "another version": good.replace_schema_metadata(about | {"epic_ray.schema_version": "0"}),
        "another table": good.replace_schema_metadata(about | {"epic_ray.table": "history"}),
        "another column": good.append_column("extra", pa.array([1] * ROWS)),
        "another type": good.set_column(5, "purity", good["purity"].cast(pa.float64())),
        "a column less": good.drop_columns(["purity"]),
    }
    for kind, table in foreign.items():
        file = f"tables/purity/{kind}.parquet"
        write_table(run_dir, file, table)
        with pytest.raises(ResultError, match=rf"{kind}\.parquet: (table|columns) "):
            read_table(run_dir, file)


# --- the README


def readme_columns(name: str) -> list[str] | None:
    """The columns that the README's section of a table lists, or None without such a section."""
    text = README.read_text(encoding="utf-8")
    section = re.search(rf"^#+ [^\n]*tables/{name}\b[^\n]*\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"^\|\s*`(\w+)`", section.group(1), re.MULTILINE) if section else None


@pytest.mark.parametrize("name", sorted(TABLES))
def test_the_readme_documents_every_column_of_a_table_and_no_other(name):
    assert readme_columns(name) == [column.name for column in TABLES[name].columns]
