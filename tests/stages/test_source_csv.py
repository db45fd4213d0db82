"""Images that the lines of CSV and TSV files name: addresses, labels, sizes, and lines that do not serve."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import column, ids, listing, only_train, place, s3  # noqa: F401

from epic_ray.config import DataConfig
from epic_ray.errors import ConfigError, InputError
from epic_ray.stages.reading import ImageReader
from epic_ray.stages.sources import find_source


def lines(root: Path, *texts: str, name: str = "train.csv", end: str = "\n") -> DataConfig:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(end.join(texts).encode())
    return only_train(root, name)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "texts",
    [
        ["uri,label", "1.png,ants", "2.png,bees"],
        ["\ufeffuri,label", "1.png,ants", "2.png,bees", ""],
        ['"label","x"," path"', 'ants,"many, \n words","1.png"', "", "bees,,2.png"],
        ["file,split,class", "1.png,train, ants", "2.png,train,bees "],
    ],
)
def test_the_customary_columns_are_found(tmp_path, texts, end):
    place(tmp_path, "1.png", "2.png")
    source, table = listing(lines(tmp_path, *texts, end=end))
    assert table["image_id"].to_pylist() == ["1.png", "2.png"]
    assert table["uri"].to_pylist() == [f"{tmp_path}/1.png", f"{tmp_path}/2.png"]
    assert table["class_name"].to_pylist() == ["ants", "bees"]
    assert table["size_bytes"].to_pylist() == [5, 5]
    assert source.class_names() == (["ants", "bees"], [])


def test_columns_can_be_named_and_tabs_separate_in_tsv(tmp_path):
    data = lines(tmp_path, "uri\twhere\tspecies", 'x\ta,b "c".png\t1', name="train.tsv")
    data = data.model_copy(update={"image_column": "where", "label_column": "species"})
    assert listing(data)[1].to_pylist() == [
        {
            "image_id": 'a,b "c".png',
            "uri": f'{tmp_path}/a,b "c".png',
            "byte_offset": None,
            "row": None,
            "size_bytes": None,
            "class_name": None,
            "class_index": 1,
        }
    ]


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["0", " 2", ""], [None] * 3, [0, 2, None]),
        (["0", "2", "x"], ["0", "2", "x"], [None] * 3),
        (["1.0", "2", "3"], ["1.0", "2", "3"], [None] * 3),
        (["-1", "007", "3"], [None] * 3, [-1, 7, 3]),
        (["", "", ""], [None] * 3, [None] * 3),
    ],
)
def test_labels_are_class_numbers_where_all_are_integers(tmp_path, labels, names, numbers):
    texts = [f"{number}.png,{label}" for number, label in enumerate(labels)]
    _, table = listing(lines(tmp_path, "uri,label", *texts))
    assert (table["class_name"].to_pylist(), table["class_index"].to_pylist()) == (names, numbers)


def test_a_column_of_addresses_alone_has_no_labels(tmp_path):
    _, table = listing(lines(tmp_path, "uri", "1.png", "2.png"))
    assert table["class_name"].null_count == table["class_index"].null_count == 2


def test_addresses_are_relative_to_the_file_and_ids_to_the_root(tmp_path):
    root = tmp_path / "root"
    place(tmp_path, "out.png", "root/in.png", "root/lists/here.png", "root/lists/a b#?%20.png")
    addresses = ["here.png", "./a b#?%20.png", "../in.png", "../../out.png", f"{tmp_path}/x/../y.png", f"{root}/z.png"]
    data = lines(root, "uri", *addresses, f"file://{root}/w%20.png", name="lists/train.csv")
    _, table = listing(data)
    expected = {
        "lists/here.png": f"{root}/lists/here.png",
        "lists/a b#?%20.png": f"{root}/lists/a b#?%20.png",
        "in.png": f"{root}/in.png",
        f"{tmp_path}/out.png": f"{tmp_path}/out.png",
        f"{tmp_path}/y.png": f"{tmp_path}/y.png",
        "z.png": f"{root}/z.png",
        "w .png": f"{root}/w .png",
    }
    assert dict(zip(table["image_id"].to_pylist(), table["uri"].to_pylist(), strict=True)) == expected
    assert table["size_bytes"].to_pylist() == [19, 23, 11, 7, None, None, None]
    found = list(ImageReader().read_many(table))
    assert found[:4] == [b"root/lists/here.png", b"root/lists/a b#?%20.png", b"root/in.png", b"out.png"]
    assert [str(error) for error in found[4:]] == ["there is no such file"] * 3


def test_addresses_on_a_store(tmp_path, s3):  # noqa: F811
    bucket = s3.new_bucket()
    names = ["data/lists/1#.png", "data/2.png", "3.png", "data/4.png", "data/5%.png"]
    place(tmp_path, *names)
    place(tmp_path / "local", "6.png")
    addresses = ["1#.png", "../2.png", "../../3.png", f"{bucket}/data/4.png", f"{bucket}/data/5%25.png"]
    addresses.append(f"{tmp_path}/local/6.png")
    lines(tmp_path, "uri", *addresses, name="data/lists/train.csv")
    s3.upload(tmp_path, bucket)
    _, table = listing(only_train(f"{bucket}/data", "lists/train.csv"))
    expected = ["lists/1#.png", "2.png", f"{bucket}/3.png", "4.png", "5%.png", f"{tmp_path}/local/6.png"]
    assert table["image_id"].to_pylist() == expected
    assert table["size_bytes"].to_pylist() == [None] * 5 + [5]
    assert list(ImageReader().read_many(table)) == [*(name.encode() for name in names), b"6.png"]
    s3.put(f"{bucket.removeprefix('s3://')}/data/train.csv", b"uri\n../../../1.png")
    with pytest.raises(InputError, match=r"/data/train.csv: line 2: .*1.png leaves the bucket; give the whole address"):
        listing(only_train(f"{bucket}/data", "train.csv"))


def test_an_address_below_the_root_is_read_as_the_root_is(tmp_path, s3):  # noqa: F811
    """With the store's endpoint, that is."""
    bucket = s3.new_bucket()
    s3.put(f"{bucket.removeprefix('s3://')}/train.csv", f"uri\n{bucket}/1.png".encode())
    query = f"?endpoint_override={s3.endpoint}&region=us-east-1"
    assert column(only_train(f"{bucket}{query}", "train.csv"), "uri") == [f"{bucket}/1.png{query}"]


def test_a_column_of_sizes_is_believed_and_makes_the_stamp_sound(tmp_path):
    place(tmp_path, "1.png")
    data = lines(tmp_path, "uri,size_bytes", "1.png,77", "2.png,")
    assert column(data, "size_bytes") == [77, None]
    stamp = find_source(data, "train").stamp
    lines(tmp_path, "uri,size_bytes", "1.png,77", "2.png,1")
    assert stamp != find_source(data, "train").stamp != None  # noqa: E711


def test_several_files_are_one_split(tmp_path):
    lines(tmp_path, "uri,label", "1.png,7", name="a/2.csv")
    lines(tmp_path, "label,uri", "x,3.png", name="a/1.csv")
    source, table = listing(only_train(tmp_path, "a"))
    assert table["image_id"].to_pylist() == ["a/3.png", "a/1.png"]
    assert table["class_name"].to_pylist() == ["x", "7"]
    assert [Path(file).name for file in source.files] == ["1.csv", "2.csv"]
    lines(tmp_path, "uri,label", "3.png,7", name="a/2.csv")
    with pytest.raises(InputError, match=r"a/2.csv: line 2: a/3.png is listed again, first in line 2 of a/1.csv;"):
        listing(only_train(tmp_path, "a"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"uri,label\n1.png,a\n\n2.png,b,c\n", "line 4 has 3 values, and the header 2; quote values that hold the sep"),
        (b"uri,label\n1.png\n", "line 2 has 1 values"),
        (b"uri,label\n1.png,a\n ,b\n", "line 3 names no image; fill it in or remove the line"),
        (b'uri,label\n"a\nb.png",a\n2.png,b\n./2.png,c', "line 5: 2.png is listed again, first in line 4; remove one"),
        (b"uri,label\n1.png,a\n\xff.png,b\n", r"no UTF-8 soon after line \d .*save it as UTF-8"),
        ("uri,label\n1.png,a\n".encode("utf-16"), r"no UTF-8 soon after line \d .*save it as UTF-8"),
        (b'uri,label\n"1".png,a\n', "line 2 cannot be read .*check its quotes"),
        (b'uri,label\n"1.png,a\n', r"line \d cannot be read .*check its quotes"),
        (b"uri,size_bytes\n1.png,many\n", "line 2: `many` in size_bytes is no number of bytes"),
        (b"uri,label\n1.png,99999999999\n", "line 2: 99999999999 is no class number"),
        (b"uri,label\nhttp2://x/1.png,1\n", "line 2: http2://x/1.png: no filesystem for this address|line 2: http2:"),
        (b"uri;label\n1.png;a\n", "has no column uri or path .*; columns there: uri;label; write a header, or set"),
        (b"", "has no column uri or .*; it is empty; write a header"),
        (b"uri,label\n", r"holds no image \(split `train`\); lines below the header are looked for"),
    ],
)
def test_lines_that_do_not_serve_are_told_by_their_number(tmp_path, text, says):
    (tmp_path / "train.csv").write_bytes(text)
    with pytest.raises(InputError, match=rf"/train.csv: {says}"):
        listing(only_train(tmp_path))


def test_columns_that_are_set_must_be_there(tmp_path):
    data = lines(tmp_path, "uri,label", "1.png,a")
    with pytest.raises(InputError, match=r"train.csv: has no column photo; columns there: uri, label; write a header"):
        find_source(data.model_copy(update={"image_column": "photo"}), "train")
    with pytest.raises(InputError, match=r"train.csv: has no column species; columns there: uri, label; set data."):
        find_source(data.model_copy(update={"label_column": "species"}), "train")


def test_credentials_in_an_address_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"s3://\.\.\.@bucket/1.png: holds credentials"):
        listing(lines(tmp_path, "uri", "s3://key:secret@bucket/1.png"))


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/\r\n"), min_size=1, max_size=40).filter(
    lambda name: name.strip(" .") and not name[0].isspace() and name.isprintable()
)


@settings(deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=9, unique=True))
def test_any_name_survives_quoted(tmp_path_factory, names):
    quoted = ['"{}"'.format(name.replace('"', '""')) for name in names]
    assert ids(lines(tmp_path_factory.mktemp("csv"), "uri", *quoted)) == names


def test_every_repeated_line_is_found_among_many(tmp_path):
    names = [f"{number}.png" for number in range(20_000)]
    data = lines(tmp_path, "uri,size_bytes", *(f"{name},1" for name in names))
    assert ids(data) == names  # and no hash is taken for a name
    lines(tmp_path, "uri,size_bytes", *(f"{name},1" for name in [*names, "x/../77.png"]))
    with pytest.raises(InputError, match=r"line 20002: 77.png is listed again, first in line 79; remove one"):
        ids(data)
