"""Every form of an image data set lists to the same rows, on a disk and on a store, and says what it cannot list."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import (  # noqa: F401
    Picture,
    as_nobody,
    gated_s3,
    members_of,
    s3,
    some_pictures,
    write_form,
    write_parquet,
    write_tar,
)

from epic_ray import storage
from epic_ray.config import DataConfig
from epic_ray.errors import InputError, RunFailed
from epic_ray.stages.reading import ImageReader
from epic_ray.stages.sources import LISTED, Source, find_source
from epic_ray.stages.sources.base import BATCH_ROWS, join_each

FORMS = ("imagefolder", "parquet", "webdataset", "csv")


def place(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())


def only_train(root: Path | str, where: str = "train", **more) -> DataConfig:
    return DataConfig(root=str(root), splits={"train": where}, **more)


def listing(data: DataConfig, split: str = "train") -> tuple[Source, pa.Table]:
    source = find_source(data, split)
    return source, pa.Table.from_batches(source.batches(), LISTED)


def column(data: DataConfig, name: str) -> list:
    return listing(data)[1][name].to_pylist()


def ids(data: DataConfig) -> list[str]:
    return column(data, "image_id")


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


def test_listing_a_large_file_holds_little(tmp_path):
    count = 200_000
    images = pa.array([b"x"] * count)
    pq.write_table(pa.table({"image": images, "label": np.arange(count) % 7}), tmp_path / "train.parquet")
    del images
    before, sizes, most = pa.total_allocated_bytes(), [], 0
    for batch in find_source(only_train(tmp_path), "train").batches():
        sizes.append(batch.num_rows)
        most = max(most, pa.total_allocated_bytes() - before)
        del batch
    assert sizes == [BATCH_ROWS] * 3 + [count - 3 * BATCH_ROWS]
    assert most < 60 * BATCH_ROWS * 8


@pytest.mark.parametrize("root", ["/a b", "s3://bucket/a%20b", "s3://bucket?endpoint_override=http://h:1&region=x"])
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
    with pytest.raises(InputError, match="no such folder .*root does not exist"):
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


# --- folders


def test_images_are_sorted_by_the_parts_of_their_paths(tmp_path):
    names = ["B/1.tiff", "a/z.jpeg", "a b/1.png", "b/10.PNG", "b/2.png", "b/deep/er/1.webp", "b/deep.png", "c.png"]
    place(tmp_path / "train", *names)
    source, table = listing(only_train(tmp_path))
    assert table["image_id"].to_pylist() == [
        f"train/{name}" for name in sorted(names, key=lambda name: name.split("/"))
    ]
    assert table["class_name"].to_pylist() == ["B", "a", "a b", "b", "b", "b", "b", None]
    assert table["size_bytes"].to_pylist() == [len(name) for name in table["image_id"].to_pylist()]
    assert (source.files, source.stamp, source.image_column) == ([], None, None)


def test_other_files_are_left_out_with_a_note_and_hidden_ones_without(tmp_path):
    place(tmp_path, "train/a/1.png", "train/a/notes.txt", "train/readme", "train/a/.2.png", "train/.cache/3.png")
    source, table = listing(only_train(tmp_path))
    assert table["image_id"].to_pylist() == ["train/a/1.png"]
    assert source.notes() == ["2 file(s) without an image suffix are left out, first a/notes.txt"]


@pytest.mark.parametrize("on", ["disk", "store"])
def test_an_empty_class_folder_is_a_class_and_one_with_other_files_is_none(tmp_path, request, on):
    place(tmp_path, "train/a/1.png", "train/c/1.png", "train/notes/readme.txt")
    (tmp_path / "train/b/deep").mkdir(parents=True)
    root = str(tmp_path)
    if on == "store":
        store = request.getfixturevalue("s3")
        root = store.new_bucket()
        store.upload(tmp_path, root)
        store.filesystem.create_dir(f"{root.removeprefix('s3://')}/train/b")
    source, _ = listing(only_train(root))
    assert source.class_names() == (["a", "b", "c"], [])
    assert "empty class folder(s): b" in source.notes()


def test_links_are_followed_and_a_folder_named_like_an_image_is_no_image(tmp_path):
    place(tmp_path, "elsewhere/1.png", "train/a/2.png", "train/a/x.png/2.png")
    (tmp_path / "train/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train/a/1.png").symlink_to(tmp_path / "elsewhere/1.png")
    names = ["train/a/1.png", "train/a/2.png", "train/a/x.png/2.png", "train/b/1.png"]
    assert ids(only_train(tmp_path)) == names
    assert column(only_train(tmp_path), "size_bytes") == [15, 13, 19, 15]


def test_links_to_nothing_and_pipes_do_not_vanish(tmp_path):
    place(tmp_path, "train/a/2.png")
    for name, target in (("a/1.png", "gone"), ("a/3.png", "3.png"), ("b", "unmounted")):
        (tmp_path / "train" / name).symlink_to(target)
    os.mkfifo(tmp_path / "train/a/4.png")
    source, table = listing(only_train(tmp_path))
    assert table["image_id"].to_pylist() == [f"train/a/{number}.png" for number in (1, 2, 3, 4)]
    assert table["size_bytes"].to_pylist() == [None, 13, None, None]
    assert source.notes() == ["1 link(s) to nothing or special file(s) without an image suffix are left out, first b"]
    found = list(ImageReader().read_many(table))
    reasons = ["there is no such file", b"train/a/2.png", "is a link that leads nowhere", "is no regular file"]
    assert [data if isinstance(data, bytes) else str(data) for data in found] == reasons


@pytest.mark.parametrize("target", ["..", "../..", "."])
def test_a_link_to_a_folder_that_it_lies_in_is_told(tmp_path, target):
    place(tmp_path, "train/a/1.png")
    (tmp_path / "train/a/b").symlink_to(target)
    with pytest.raises(InputError, match=r"/train/a/b.*: is a link to a folder that it lies in; remove the link"):
        listing(only_train(tmp_path))


def test_an_unreadable_folder_is_an_input_error(as_nobody):  # noqa: F811
    place(as_nobody, "train/a/1.png", "train/b/1.png")
    (as_nobody / "train/b").chmod(0)
    with pytest.raises(
        InputError, match=r"/train/b: cannot be listed \(.*denied.*\); check the address and the rights"
    ):
        listing(only_train(as_nobody))
    (as_nobody / "train/b").chmod(0o700)
    assert len(ids(only_train(as_nobody))) == 2


def test_a_name_that_is_no_text_is_told(tmp_path):
    place(tmp_path, "train/a/1.png")
    try:
        with open(os.fsencode(tmp_path) + b"/train/a/\xff.png", "wb"):
            pass
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(InputError, match=r"/train/a: holds a name that is no UTF-8 \(b'\\xff.png'\); rename it"):
        listing(only_train(tmp_path))


def test_a_folder_without_images_is_an_input_error(tmp_path):
    place(tmp_path, "train/a/0.parquet")
    with pytest.raises(
        InputError, match=r"/train: holds no image \(split `train`\); files that end in \.jpg.*a/0.parq"
    ):
        listing(only_train(tmp_path))


# --- Parquet


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
            r"no column of images' bytes \(looked for `photo`\); columns there: x \(string\), ",
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
    with pytest.raises(
        InputError, match=r"/train-1.parquet: has no column `label`, as the first file of the split has"
    ):
        listing(only_train(tmp_path))
    parquet(tmp_path, "train-1.parquet", img=BYTES)
    with pytest.raises(
        InputError, match=r"/train-1.parquet: has no column `image.*` of bytes, as .*train-0.parquet has"
    ):
        listing(only_train(tmp_path))
    (tmp_path / "train-1.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(InputError, match=r"/train-1.parquet: is no readable Parquet file .*write it anew"):
        listing(only_train(tmp_path))


def test_labels_are_listed_though_every_image_is_destroyed(tmp_path):
    """The listing does not read them."""
    images = [bytes([number]) * 5000 for number in range(250)]
    file = parquet(tmp_path, image=images, label=list(range(250)))
    data = file.read_bytes()
    for image in images:
        assert image[:50] in data or image[0] == 0
    start = pq.ParquetFile(file).metadata
    torn = bytearray(data)
    for group in range(start.num_row_groups):
        chunk = start.row_group(group).column(0)
        first = chunk.dictionary_page_offset or chunk.data_page_offset
        torn[first : first + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    file.write_bytes(torn)
    source, table = listing(only_train(tmp_path))
    assert table["class_index"].to_pylist() == list(range(250))
    assert all(isinstance(data, OSError) for data in ImageReader(source.image_column).read_many(table))


def test_the_shared_digits_list_as_they_are_described(shared):
    source, table = listing(
        DataConfig(root=str(shared / "data/mnist"), splits={"train": "train", "val": "test"}), "val"
    )
    assert (table.num_rows, source.image_column) == (5000, "image.bytes")
    assert set(table["class_index"].to_pylist()) == set(range(10))
    first = next(iter(ImageReader(source.image_column).read_many(table.slice(4999))))
    assert first.startswith(b"\x89PNG")


# --- WebDataset


def shard(tmp_path: Path, **members: str | bytes) -> DataConfig:
    """Members by name, `__` for the dot."""
    contents = [(name.replace("__", "."), data) for name, data in members.items()]
    write_tar(
        tmp_path / "train.tar", [(name, data.encode() if isinstance(data, str) else data) for name, data in contents]
    )
    return only_train(tmp_path, "train.tar")


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"cls": "7"}, (None, 7)),
        ({"cls": " -1\n"}, (None, -1)),
        ({"cls": "tabby cat\n"}, ("tabby cat", None)),
        ({"cls": ""}, (None, None)),
        ({"json": '{"label": 3, "cls": 4}'}, (None, 3)),
        ({"json": '{"class": "n01"}'}, ("n01", None)),
        ({"json": '{"label": null}'}, (None, None)),
        ({"json": '{"width": 3}'}, (None, None)),
        ({"json": '{"label": 3}', "cls": "5"}, (None, 5)),
        ({"txt": "a caption"}, (None, None)),
        ({}, (None, None)),
    ],
)
def test_a_label_stands_in_cls_or_json(tmp_path, members, expected):
    for names in (["a__jpg", *(f"a__{name}" for name in members)], [*(f"a__{name}" for name in members), "a__jpg"]):
        texts = {f"a__{name}": text for name, text in members.items()}
        row = listing(shard(tmp_path, **{name: texts.get(name, "image") for name in names}))[1].to_pylist()[0]
        assert (row["class_name"], row["class_index"]) == expected
        assert (tmp_path / "train.tar").read_bytes()[row["byte_offset"] :][: row["size_bytes"]] == b"image"


@pytest.mark.parametrize(
    ("label_column", "expected"), [("txt", ("cat", None)), ("id", (None, 9)), ("name", ("tom", None))]
)
def test_the_label_can_be_another_member_or_another_key(tmp_path, label_column, expected):
    data = shard(tmp_path, a__jpg="", a__cls="1", a__txt="cat", a__json='{"id": 9, "name": "tom"}')
    row = listing(data.model_copy(update={"label_column": label_column}))[1].to_pylist()[0]
    assert (row["class_name"], row["class_index"]) == expected


@pytest.mark.parametrize(
    ("members", "settings", "says"),
    [
        ({"a__jpg": "", "a__png": ""}, {}, r"`a` has several images \(jpg, png\); set data.image_column"),
        ({"a__jpg": "", "b__jpg": "", "a__cls": ""}, {}, r"`a` appears again after other samples; .*--sort=name"),
        ({"a__jpg": "", "a__JPG": ""}, {}, r"`a` has two members `jpg`; pack it anew"),
        ({"a__jpg": "", "a__json": "{"}, {}, r"`a` has no readable label: its member `json` cannot be read"),
        (
            {"a__jpg": "", "a__json": '{"cls": 1.5}'},
            {},
            r"`a` .*`cls` in its JSON is neither an integer nor a text: 1.5",
        ),
        ({"a__jpg": "", "a__cls": b"\xff"}, {}, r"`a` has no readable label: its member `cls` is no UTF-8"),
        ({"a__jpg": "", "a__cls": "9" * 12}, {}, r"`a` has no readable label: 9+ is no class number"),
        ({"a__jpg": ""}, {"label_column": "txt"}, r"no sample has a member or a JSON key `txt`; set data.label_column"),
        ({"a__txt": ""}, {}, r"holds no image .*members that end in .jpg, .jpeg, .png, .webp are looked for; 1 sample"),
        ({"a__jpg": ""}, {"image_column": "png"}, r"holds no image .*members that end in .png are looked for"),
    ],
)
def test_what_is_wrong_in_a_tar_file_is_told_with_the_sample(tmp_path, members, settings, says):
    data = shard(tmp_path, **members).model_copy(update=settings)
    with pytest.raises(InputError, match=rf"/train.tar: {says}"):
        listing(data)


def test_the_suffix_tells_which_of_several_images_is_meant(tmp_path):
    data = shard(tmp_path, a__jpg="j", a__seg__png="s", b__jpg="jj")
    for suffix, expected in (("auto", [b"j", b"jj"]), (".jpg", [b"j", b"jj"]), ("seg.png", [b"s"])):
        _, table = listing(data.model_copy(update={"image_column": suffix}))
        assert list(ImageReader().read_many(table)) == expected


def test_samples_without_an_image_are_counted(tmp_path):
    source, table = listing(shard(tmp_path, a__jpg="", b__txt="", c__v1__jpg="", d__cls="", _e="", __f__jpg=""))
    assert table["image_id"].to_pylist() == ["train.tar#a"]
    (note,) = source.notes()
    assert note.startswith("4 sample(s) without an image are left out, first train.tar#b (1 of them have images like")
    assert "c.v1.jpg, but a suffix begins at the first dot" in note


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0/.\n"), min_size=1), st.text("aé .", max_size=9))
def test_keys_and_class_names_survive_whatever_they_hold(tmp_path_factory, key, name):
    root = tmp_path_factory.mktemp("tar")
    write_tar(root / "train.tar", [(f"d.e/{key}.PNG", b"1"), (f"d.e/{key}.cls", name.encode())])
    row = listing(only_train(root, "train.tar"))[1].to_pylist()[0]
    assert (row["image_id"], row["class_name"]) == (f"train.tar#d.e/{key}", name.strip() or None)


def test_a_damaged_shard_ends_the_listing(tmp_path):
    for number, half in enumerate((some_pictures(20), [Picture("z.jpg", "z", b"1" * 9000)])):
        write_tar(tmp_path / f"train-{number}.tar", members_of(half), tarfile.GNU_FORMAT)
    whole = (tmp_path / "train-1.tar").read_bytes()
    (tmp_path / "train-1.tar").write_bytes(whole[:4000])
    with pytest.raises(InputError, match=r"/train-1.tar: ends early, after 4000 bytes and without its end mark"):
        listing(only_train(tmp_path))


def test_many_shards_keep_their_order(tmp_path):
    expected = []
    for number in range(40):
        keys = [f"{number:02d}-{index}" for index in range(40 - number)]
        write_tar(tmp_path / f"train-{number:02d}.tar", [(f"{key}.jpg", b"") for key in keys])
        expected += [f"train-{number:02d}.tar#{key}" for key in keys]
    assert ids(only_train(tmp_path)) == expected


def test_several_parquet_shards_number_their_rows_by_themselves(tmp_path):
    for number, half in enumerate((some_pictures(5), some_pictures(3))):
        write_parquet(tmp_path / f"train-{number}.parquet", half, sorted({one.label for one in half}))
    assert ids(only_train(tmp_path)) == [
        *(f"train-0.parquet#{row}" for row in range(5)),
        *(f"train-1.parquet#{row}" for row in range(3)),
    ]
