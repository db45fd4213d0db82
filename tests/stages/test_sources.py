"""Every form of an image data set lists to the same rows, on a disk and on a store; and how a form is found."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import gated_s3, ids, listing, only_train, place, s3, some_pictures, write_form, write_tar  # noqa: F401

from epic_ray import storage
from epic_ray.config import DataConfig
from epic_ray.errors import InputError, RunFailed
from epic_ray.stages.reading import ImageReader
from epic_ray.stages.sources import Source, find_source
from epic_ray.stages.sources.base import BATCH_ROWS, join_each

FORMS = ("imagefolder", "parquet", "webdataset", "csv")


def labels(source: Source, table: pa.Table) -> list[str | None]:
    """Class names, those of class numbers looked up."""
    names = source.class_names()[1]
    rows = table.select(["class_name", "class_index"]).to_pylist()
    return [row["class_name"] if row["class_index"] is None else names[row["class_index"]] for row in rows]


# --- all forms


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("on", ["disk", "store"])
def test_the_same_images_list_equal_in_every_form(tmp_path, request, form, on):
    pictures, root = some_pictures(), str(tmp_path)
    write_form(tmp_path, form, pictures)
    if on == "store":
        store = request.getfixturevalue("s3")
        root = f"{store.new_bucket()}/my%20data"
        store.upload(tmp_path, root)
    source, table = listing(only_train(root))
    assert (source.format, source.split) == (form, "train")
    assert table.num_rows == len(set(table["image_id"].to_pylist())) == 30
    assert labels(source, table) == [picture.label for picture in pictures]
    assert list(ImageReader(source.image_column).read_many(table)) == [picture.data for picture in pictures]
    for row, picture in list(zip(table.to_pylist(), pictures, strict=True))[::7]:
        address = {name: row[name] for name in ("uri", "byte_offset", "row", "size_bytes")}
        assert ImageReader(source.image_column).read(**address) == picture.data
        assert row["size_bytes"] in (len(picture.data), None)
        assert row["uri"].startswith(f"{root}/")
    assert listing(only_train(root))[1].equals(table)
    assert sorted(set(table["uri"].to_pylist())) == source.files or form in ("imagefolder", "csv")


@pytest.mark.parametrize("form", FORMS)
def test_without_labels_no_label_is_looked_for(tmp_path, form):
    write_form(tmp_path, form, some_pictures())
    source, table = listing(only_train(tmp_path, labels="none", label_column="there is none"))
    assert table["class_name"].null_count == table["class_index"].null_count == 30
    assert source.class_names() == ([], [])


@pytest.mark.parametrize("form", FORMS)
def test_a_stamp_tells_whether_files_of_many_images_changed(tmp_path, form):
    write_form(tmp_path, form, some_pictures())
    data = only_train(tmp_path)
    source = find_source(data, "train")
    if form in ("imagefolder", "csv"):
        assert source.stamp is None
        return
    assert source.stamp == find_source(data, "train").stamp
    assert set(source.stamps) == set(source.files)
    os.utime(source.files[0], ns=(1, 1))
    again = find_source(data, "train")
    assert again.stamp != source.stamp
    assert [file for file in source.files if again.stamps[file] != source.stamps[file]] == source.files[:1]


def bytes_held(root: Path, count: int) -> int:
    """The most that Arrow holds between the batches of a listing of so many rows."""
    images, labels = pa.repeat(pa.scalar(b"x"), count), pa.array(np.arange(count) % 7)
    pq.write_table(pa.table({"image": images, "label": labels}), root / "train.parquet")
    del images, labels
    before, sizes, most = pa.total_allocated_bytes(), [], 0
    for batch in find_source(only_train(root), "train").batches():
        assert (batch.column("class_index").to_numpy() == batch.column("row").to_numpy() % 7).all()
        sizes.append(batch.num_rows)
        most = max(most, pa.total_allocated_bytes() - before)
    assert sizes == [BATCH_ROWS] * (count // BATCH_ROWS) + [count % BATCH_ROWS]
    return most


def test_a_listing_is_streamed(tmp_path):
    one_batch, many = bytes_held(tmp_path, BATCH_ROWS + 1), bytes_held(tmp_path, 600_000)
    assert many < 2 * one_batch


@pytest.mark.parametrize("root", ["/a b", "s3://bucket/a%20b", "s3://bucket?endpoint_override=http://h:1&region=x"])
@settings(deadline=None)
@given(st.lists(st.text("ab%?#ü ", min_size=1), max_size=4))
def test_addresses_are_joined_one_by_one_or_all_at_once_alike(root, names):
    expected = [storage.join(root, name) for name in names]
    assert join_each(root, pa.array(names, pa.string())).to_pylist() == expected


# --- finding what lies at a place


def test_the_default_splits_find_hugging_face_and_webdataset_conventions(tmp_path):
    for form in ("parquet", "webdataset", "csv"):
        for split in ("train", "val"):
            write_form(tmp_path / form, form, some_pictures(6), split)
        sources = [find_source(DataConfig(root=str(tmp_path / form)), split) for split in ("train", "val")]
        assert [source.format for source in sources] == [form] * 2
        assert [len(source.files) for source in sources] == [1 if form == "csv" else 2] * 2
        assert not {*sources[0].files} & {*sources[1].files}
    assert sources[1].where == f"{tmp_path}/csv/val.csv"
    assert sources[1].notes() == ["there is no `val`; val.csv is taken: 1 file(s), first val.csv"]


def test_with_a_format_set_only_the_place_itself_counts(tmp_path):
    write_form(tmp_path, "parquet", some_pictures(6))
    with pytest.raises(InputError, match=r"/train: no such folder \(split `train`\); folders there: data; set"):
        find_source(only_train(tmp_path, format="parquet"), "train")
    source = find_source(only_train(tmp_path, "data", format="parquet"), "train")
    assert [Path(file).name for file in source.files] == [f"train-0000{number}-of-00002.parquet" for number in (0, 1)]
    assert source.notes() == []


@pytest.mark.parametrize("where", ["a/b", "a/b/", "./a/b", "a/b/*.tar", "a/*/1*.tar", "*/b/[12].tar"])
def test_folders_and_patterns_give_shards_sorted_by_name(tmp_path, where):
    for name in ("2", "1", "10"):
        write_tar(tmp_path / f"a/b/{name}.tar", [(f"{name}.jpg", name.encode())])
    place(tmp_path, "a/b/.hidden.tar", "a/1.txt")
    expected = {"a/*/1*.tar": ["1", "10"], "*/b/[12].tar": ["1", "2"]}.get(where, ["1", "10", "2"])
    assert ids(only_train(tmp_path, where)) == [f"a/b/{name}.tar#{name}" for name in expected]


def test_a_name_that_looks_like_a_pattern_is_a_name_where_it_is_there(tmp_path):
    place(tmp_path, "[train]/a/1.png", "t/a/2.png")
    assert ids(only_train(tmp_path, "[train]")) == ["[train]/a/1.png"]
    write_tar(tmp_path / "x[1]-0.tar", [("k.jpg", b"")])
    assert ids(only_train(tmp_path, "x[1]")) == ["x[1]-0.tar#k"]


def test_the_root_itself_can_be_the_split(tmp_path):
    place(tmp_path, "a/1.png")
    source, table = listing(only_train(tmp_path, "."))
    assert (table["image_id"].to_pylist(), source.where) == (["a/1.png"], str(tmp_path))
    assert table["uri"].to_pylist() == [f"{tmp_path}/a/1.png"]


@pytest.mark.parametrize(
    ("there", "says"),
    [
        (["a.parquet", "b.tar"], "1 file.s. like a.parquet, 1 file.s. like b.tar; .*one of parquet, webdataset"),
        (["a.parquet", "cat/1.png"], "1 folder.s., first cat, 1 file.s. like a.parquet; .*of imagefolder, parquet"),
        (["a.tar", "1.png"], "1 file.s. like 1.png, 1 file.s. like a.tar; set data.format to one of imagefolder, web"),
    ],
)
def test_several_forms_in_one_folder_are_named(tmp_path, there, says):
    place(tmp_path / "train", *there)
    with pytest.raises(InputError, match=rf"/train: holds images in several forms \(split `train`\): {says}"):
        find_source(only_train(tmp_path), "train")


def test_a_set_format_decides_between_several_forms(tmp_path):
    place(tmp_path, "train/cat/1.png", "train/labels.csv")
    write_tar(tmp_path / "train/a.tar", [("k.jpg", b"")])
    assert ids(only_train(tmp_path, format="webdataset")) == ["train/a.tar#k"]
    source, table = listing(only_train(tmp_path, format="imagefolder"))
    assert table["image_id"].to_pylist() == ["train/cat/1.png"]
    assert source.notes() == ["2 file(s) without an image suffix are left out, first a.tar"]
    with pytest.raises(InputError, match=r"/train: holds no .parquet file .*but there is a.tar, cat, labels.csv; set"):
        find_source(only_train(tmp_path, format="parquet"), "train")


def test_a_pattern_of_several_forms_or_of_images_is_told(tmp_path):
    place(tmp_path, "x.tar", "x.csv", "a/1.png", "a/2.png")
    with pytest.raises(InputError, match=r"matches files of several forms .*: there is x.csv, x.tar; set data.splits"):
        find_source(only_train(tmp_path, "x*"), "train")
    with pytest.raises(InputError, match=r"no such folder \(split `train`\), but there is a/1.png, a/2.png; name the"):
        find_source(only_train(tmp_path, "a/*.png"), "train")
    with pytest.raises(InputError, match=r"/y\*: no files match \(split `train`\); folders there: a; files there: x"):
        find_source(only_train(tmp_path, "y*"), "train")


@pytest.mark.parametrize("there", [[], ["val/a/1.png"]])
def test_a_split_without_a_folder_says_which_folders_there_are(tmp_path, there):
    place(tmp_path, *there)
    says = "folders there: val" if there else "the data set's root has no folders"
    with pytest.raises(InputError, match=rf"/train: no such folder \(split `train`\); {says}"):
        find_source(only_train(tmp_path), "train")


def test_a_root_that_is_absent_or_a_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"no such folder .*root does not exist"):
        find_source(only_train(tmp_path / "absent"), "train")
    place(tmp_path, "file", "train")
    with pytest.raises(InputError, match=r"no such folder .*file is a file"):
        find_source(only_train(tmp_path / "file"), "train")
    with pytest.raises(InputError, match="no such folder"):
        find_source(only_train(tmp_path), "train")


@pytest.mark.parametrize("name", ["train.tar.gz", "train/0.tgz", "train/0.tar.zst"])
def test_a_compressed_tar_file_is_to_be_unpacked(tmp_path, name):
    place(tmp_path, name)
    for where in (name, f"{name[:-5]}*"):
        with pytest.raises(InputError, match=rf"/{name}: is compressed, and its images cannot be read .*unpack it to"):
            find_source(only_train(tmp_path, where), "train")


@pytest.mark.slow
def test_what_a_store_refuses_is_told(s3, gated_s3, monkeypatch):  # noqa: F811
    with pytest.raises(InputError, match=r"s3://absent-bucket.*NO_SUCH_BUCKET.*check the address and the rights"):
        find_source(only_train("s3://absent-bucket/x"), "train")
    with pytest.raises(InputError, match=r"/x/train: no such folder .*the data set's root does not exist"):
        find_source(only_train(f"{s3.new_bucket()}/x"), "train")
    store, gate = gated_s3
    root = store.new_bucket()
    gate.shut()
    monkeypatch.setenv(storage.PATIENCE_VARIABLE, "0.5")
    with pytest.raises(RunFailed, match=r"s3://.*: the store did not answer for 0 s .*start again when it does"):
        find_source(only_train(root), "train")
