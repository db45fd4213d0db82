"""Images in tar files: samples, their labels, and what is no whole sample."""

import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import Picture, column, gated_s3, ids, listing, members_of, only_train, s3, some_pictures, write_tar  # noqa: F401

from epic_ray.config import DataConfig
from epic_ray.errors import InputError
from epic_ray.stages.reading import ImageReader


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
            r"`a` .*`cls` in its JSON is neither an integer nor a text",
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


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0/.\n"), min_size=1), st.text("aé .", max_size=9))
def test_keys_and_class_names_survive_whatever_they_hold(tmp_path_factory, key, name):
    root = tmp_path_factory.mktemp("tar")
    write_tar(root / "train.tar", [(f"d.e/{key}.PNG", b"1"), (f"d.e/{key}.cls", name.encode())])
    row = listing(only_train(root, "train.tar"))[1].to_pylist()[0]
    assert (row["image_id"], row["class_name"]) == (f"train.tar#d.e/{key}", name.strip() or None)


def test_small_samples_on_a_store_cost_few_requests(gated_s3, tmp_path):  # noqa: F811
    """A request for each header would take 40 seconds."""
    store, gate = gated_s3
    root, pictures = store.new_bucket(), [Picture(f"{number:03d}.jpg", "7", bytes(900)) for number in range(200)]
    write_tar(tmp_path / "train.tar", members_of(pictures))
    store.upload(tmp_path, root)
    gate.delay_seconds, start = 0.05, time.monotonic()
    assert column(only_train(root), "class_index") == [7] * 200
    assert time.monotonic() - start < 15


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
