"""Folders of images: their order, their classes, and what is no image."""

import os

import pytest
from stores import as_nobody, column, ids, listing, only_train, place, s3  # noqa: F401

from epic_ray.errors import InputError
from epic_ray.stages.reading import ImageReader


def test_images_are_sorted_by_the_parts_of_their_paths(tmp_path):
    names = ["B/1.tiff", "a/z.jpeg", "a b/1.png", "b/10.PNG", "b/2.png", "b/deep/er/1.webp", "b/deep.png", "c.png"]
    place(tmp_path / "train", *names)
    source, table = listing(only_train(tmp_path))
    expected = sorted(names, key=lambda name: name.split("/"))
    assert table["image_id"].to_pylist() == [f"train/{name}" for name in expected]
    assert table["class_name"].to_pylist() == ["B", "a", "a b", "b", "b", "b", "b", None]
    assert table["size_bytes"].to_pylist() == [len(name) for name in expected]
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
    with pytest.raises(InputError, match=r"/train/b: cannot be listed \(.*denied.*\); check the address and"):
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
    with pytest.raises(InputError, match=r"/train: holds no image \(split `train`\); files that end in \.jpg.*0.parq"):
        listing(only_train(tmp_path))
