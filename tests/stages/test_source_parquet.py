"""Images in Parquet files: where the bytes and the labels lie, and what does not serve."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import ids, listing, only_train, some_pictures, write_parquet

from epic_ray.config import DataConfig
from epic_ray.errors import InputError
from epic_ray.stages.reading import ImageReader


def parquet(tmp_path: Path, name: str = "train.parquet", **columns) -> Path:
    pq.write_table(pa.table(columns), tmp_path / name, row_group_size=2)
    return tmp_path / name


BYTES = [b"0", b"1", None, b"3", b"4"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), "struct", "deep"])
def test_bytes_lie_in_a_column_or_in_a_struct(tmp_path, kind):
    values, name, path = pa.array(BYTES, kind if isinstance(kind, pa.DataType) else pa.binary()), "auto", "jpg"
    if kind in ("struct", "deep"):
        values, path = pa.StructArray.from_arrays([pa.array(list("abcde")), values], ["path", "bytes"]), "jpg.bytes"
    if kind == "deep":
        values, name, path = pa.StructArray.from_arrays([values], ["inner"]), "jpg.inner", "jpg.inner.bytes"
    parquet(tmp_path, path=list("vwxyz"), jpg=values)
    source, table = listing(only_train(tmp_path, image_column=name))
    assert source.image_column == path
    assert table["image_id"].to_pylist() == [f"train.parquet#{row}" for row in range(5)]
    assert table["row"].to_pylist() == list(range(5))
    found = [data if isinstance(data, bytes) else None for data in ImageReader(path).read_many(table)]
    assert found == BYTES


@pytest.mark.parametrize(
    ("values", "names", "numbers"),
    [
        (pa.array([0, None, -1, 3, 4], pa.int64()), [None] * 5, [0, None, -1, 3, 4]),
        (pa.array([0, 1, 2, 3, 4], pa.uint8()), [None] * 5, [0, 1, 2, 3, 4]),
        (pa.array(["b", None, "", "a", "b"]), ["b", None, None, "a", "b"], [None] * 5),
        (pa.array(["b", None, "a", "a", "b"]).dictionary_encode(), ["b", None, "a", "a", "b"], [None] * 5),
        (pa.array(list("bbaab"), pa.large_string()), list("bbaab"), [None] * 5),
        (pa.nulls(5), [None] * 5, [None] * 5),
    ],
)
def test_integers_are_class_numbers_and_texts_are_class_names(tmp_path, values, names, numbers):
    parquet(tmp_path, image=BYTES, label=values)
    source, table = listing(only_train(tmp_path))
    assert (table["class_name"].to_pylist(), table["class_index"].to_pylist()) == (names, numbers)
    assert source.class_names()[0] == sorted({name for name in names if name})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"image_column": "photo"},
            r"no column of images' bytes \(looked for `photo`\); columns there: x \(str",
        ),
        ({"image_column": "x"}, r"no column of images' bytes \(looked for `x`\)"),
        ({"label_column": "species"}, r"no column `species`; columns there: x \(string\), .*; set data.label_column"),
        ({"label_column": "weight"}, r"column `weight` holds double, and a label is an integer or a text"),
        ({"label_column": "big"}, r"column `big` holds what is no class number"),
    ],
)
def test_columns_that_do_not_serve_are_told_with_those_there(tmp_path, settings, says):
    parquet(tmp_path, x=list("abcde"), image=BYTES, weight=[1.0] * 5, big=[2**40] * 5)
    with pytest.raises(InputError, match=rf"/train.parquet: (has )?{says}"):
        listing(only_train(tmp_path, **settings))


def test_files_of_a_split_that_differ_are_told(tmp_path):
    parquet(tmp_path, "train-0.parquet", image=BYTES, label=[1] * 5)
    parquet(tmp_path, "train-1.parquet", image=BYTES)
    with pytest.raises(InputError, match=r"/train-1.parquet: has no column `label`, as the first file of"):
        listing(only_train(tmp_path))
    parquet(tmp_path, "train-1.parquet", img=BYTES)
    with pytest.raises(InputError, match=r"/train-1.parquet: has no column `image.*` of bytes, as .*train-0.par"):
        listing(only_train(tmp_path))
    (tmp_path / "train-1.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(InputError, match=r"/train-1.parquet: is no readable Parquet file .*write it anew"):
        listing(only_train(tmp_path))


def test_labels_are_listed_though_every_image_is_destroyed(tmp_path):
    """The listing does not read them."""
    images = [bytes([number]) * 500 for number in range(250)]
    file = parquet(tmp_path, image=images, label=list(range(250)))
    data = file.read_bytes()
    metadata, torn = pq.ParquetFile(file).metadata, bytearray(data)
    for group in range(metadata.num_row_groups):
        chunk = metadata.row_group(group).column(0)
        first = chunk.dictionary_page_offset or chunk.data_page_offset
        torn[first : first + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    file.write_bytes(torn)
    source, table = listing(only_train(tmp_path))
    assert table["class_index"].to_pylist() == list(range(250))
    assert all(isinstance(data, OSError) for data in ImageReader(source.image_column).read_many(table))


def test_the_shared_digits_list_as_they_are_described(shared):
    data = DataConfig(root=str(shared / "data/mnist"), splits={"train": "train", "val": "test"})
    source, table = listing(data, "val")
    assert (table.num_rows, source.image_column) == (5000, "image.bytes")
    assert set(table["class_index"].to_pylist()) == set(range(10))
    first = next(iter(ImageReader(source.image_column).read_many(table.slice(4999))))
    assert first.startswith(b"\x89PNG")


def test_several_parquet_shards_number_their_rows_by_themselves(tmp_path):
    for number, half in enumerate((some_pictures(5), some_pictures(3))):
        write_parquet(tmp_path / f"train-{number}.parquet", half, sorted({one.label for one in half}))
    assert ids(only_train(tmp_path)) == [
        *(f"train-0.parquet#{row}" for row in range(5)),
        *(f"train-1.parquet#{row}" for row in range(3)),
    ]
