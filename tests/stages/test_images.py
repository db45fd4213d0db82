"""From folders to a manifest: order, ids and labels, whatever the folders hold beside images."""

import os

import pyarrow as pa
import pytest
import torch

from epic_ray.config import DataConfig
from epic_ray.errors import InputError
from epic_ray.logs import Reporter
from epic_ray.method.backbones import load_classifier
from epic_ray.run_dir import RunDir
from epic_ray.stages.images import (
    build_manifest,
    class_folders,
    images_fingerprint,
    list_split,
    read_image_bytes,
    read_manifest,
    report_listing,
    write_manifests,
)
from epic_ray.stages.loading import ClassNames


class Listener(Reporter):
    def __init__(self) -> None:
        self.told: list[str] = []

    def say(self, text: str) -> None:
        self.told.append(text)


class Head:
    """What ClassNames asks of a classifier."""

    def __init__(self, class_count: int, class_names: tuple[str, ...] | None = None) -> None:
        self.class_count, self.class_names = class_count, class_names


def place(root, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())


def only_train(root, **more) -> DataConfig:
    return DataConfig(root=str(root), splits={"train": "train"}, **more)


def manifest_of(data: DataConfig, head: Head) -> pa.Table:
    listing = list_split(data, "train")
    classes = ClassNames.of(head, class_folders(data, [listing]))
    return build_manifest(data, listing, classes, data.root)


def test_images_are_sorted_by_path_and_named_by_it(tmp_path):
    place(tmp_path, "train/b/2.png", "train/b/10.PNG", "train/a/z.jpeg", "train/b/deep/er/1.webp", "train/B/1.tiff")
    data = only_train(tmp_path)
    table = manifest_of(data, Head(3, ("a", "b", "B")))
    assert table["image_id"].to_pylist() == [
        "train/B/1.tiff",
        "train/a/z.jpeg",
        "train/b/10.PNG",
        "train/b/2.png",
        "train/b/deep/er/1.webp",
    ]
    assert table["position"].to_pylist() == [0, 1, 2, 3, 4]
    assert table["label"].to_pylist() == [2, 0, 1, 1, 1]
    assert set(table["split"].to_pylist()) == {"train"}
    for image_id, uri, size in zip(*(table[key].to_pylist() for key in ("image_id", "uri", "size_bytes")), strict=True):
        assert read_image_bytes(uri) == image_id.encode()
        assert size == len(image_id)


def test_names_with_spaces_signs_and_other_scripts_are_read(tmp_path):
    root = tmp_path / "Bilder & Fotos 100%"
    names = ["train/große Katze/ä ö.jpg", "train/日本/写真 #1?.png", "train/a'b\"c/x%20y.gif"]
    place(root, *names)
    table = manifest_of(only_train(root), Head(3))
    assert sorted(table["image_id"].to_pylist()) == sorted(names)
    assert [read_image_bytes(uri).decode() for uri in table["uri"].to_pylist()] == table["image_id"].to_pylist()


def test_a_name_that_is_no_text_is_told(tmp_path):
    place(tmp_path, "train/a/1.png")
    try:
        with open(os.fsencode(tmp_path) + b"/train/a/\xff.png", "wb"):
            pass
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(InputError, match="holds a name that is no UTF-8"):
        list_split(only_train(tmp_path), "train")


def test_other_files_are_left_out_with_a_note_and_hidden_ones_without(tmp_path):
    place(tmp_path, "train/a/1.png", "train/a/notes.txt", "train/readme", "train/a/.2.png", "train/.cache/3.png")
    listing, listener = list_split(only_train(tmp_path), "train"), Listener()
    assert listing.paths == ["a/1.png"]
    report_listing(listener, listing)
    assert listener.told == ["train: 2 file(s) without an image suffix are left out, first a/notes.txt"]


def test_links_are_followed(tmp_path):
    place(tmp_path, "elsewhere/1.png", "train/a/2.png")
    (tmp_path / "train" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "a" / "1.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    assert list_split(only_train(tmp_path), "train").paths == ["a/1.png", "a/2.png", "b/1.png"]


def test_a_folder_named_like_an_image_is_no_image(tmp_path):
    place(tmp_path, "train/a/1.png", "train/a/x.png/2.png")
    assert list_split(only_train(tmp_path), "train").paths == ["a/1.png", "a/x.png/2.png"]


def test_an_empty_class_folder_is_a_class_without_images(tmp_path):
    """The classes of a head trained on such a folder keep their places."""
    place(tmp_path, "train/a/1.png", "train/c/1.png", "train/notes/readme.txt")
    (tmp_path / "train" / "b").mkdir()
    data, listener = only_train(tmp_path), Listener()
    assert manifest_of(data, Head(3))["label"].to_pylist() == [0, 2]
    report_listing(listener, list_split(data, "train"))
    assert "train: empty class folder(s): b" in listener.told
    assert manifest_of(data, Head(2, ("a", "c")))["label"].to_pylist() == [0, 1]


def test_images_in_the_splits_own_folder_have_no_label(tmp_path):
    place(tmp_path, "train/1.png", "train/a/2.png")
    table = manifest_of(only_train(tmp_path), Head(2, ("b", "a")))
    assert table["image_id"].to_pylist() == ["train/1.png", "train/a/2.png"]
    assert table["label"].to_pylist() == [None, 1]


def test_without_labels_folders_mean_nothing(tmp_path):
    place(tmp_path, "train/2026/1.png", "train/x/2.png")
    data = only_train(tmp_path, labels="none")
    assert class_folders(data, [list_split(data, "train")]) == []
    assert manifest_of(data, Head(2, ("a", "b")))["label"].to_pylist() == [None, None]


def test_a_folder_that_matches_no_class_is_named_with_what_is_near(tmp_path):
    place(tmp_path, "train/tabby cat/1.png", "train/gren/1.png")
    with pytest.raises(InputError) as caught:
        manifest_of(only_train(tmp_path), Head(2, ("green", "tabby cat")))
    assert str(caught.value).startswith(f"{tmp_path}/train: folder `gren` matches no class of the head (2 classes, ")
    assert "; near: green; give the head's names in order as model.classes, or set data.labels=none" in str(
        caught.value
    )


def test_as_many_folders_as_classes_give_the_classes_their_names(tmp_path):
    place(tmp_path, "train/red/1.png", "train/blue/1.png")
    folders = class_folders(only_train(tmp_path), [list_split(only_train(tmp_path), "train")])
    classes = ClassNames.of(Head(2), folders)
    assert classes.names == ["blue", "red"]
    assert classes.origin.startswith("the sorted class folders")
    assert manifest_of(only_train(tmp_path), Head(2))["label"].to_pylist() == [0, 1]
    with pytest.raises(InputError, match="numbers: no names are known"):
        manifest_of(only_train(tmp_path), Head(3))


def test_class_folders_of_all_splits_count(tmp_path):
    place(tmp_path, "train/a/1.png", "val/b/1.png")
    data = DataConfig(root=str(tmp_path))
    assert class_folders(data, [list_split(data, split) for split in data.splits]) == ["a", "b"]


def test_imagenet_folders_are_matched_by_wordnet_id_and_shown_in_english(tmp_path):
    place(tmp_path, "train/n01440764/1.png", "train/n02102040/1.png")
    imagenet = load_classifier("resnet18", source="torchvision", weights="random", seed=1)
    assert manifest_of(only_train(tmp_path), imagenet)["label"].to_pylist() == [0, 217]
    classes = ClassNames.of(imagenet, [])
    assert (classes.names[0], classes.folders[0]) == ("tench", "n01440764")
    assert torch.is_tensor(imagenet.weight)


@pytest.mark.parametrize("there", [[], ["val/a/1.png"]])
def test_a_split_without_a_folder_says_which_folders_there_are(tmp_path, there):
    place(tmp_path, *there)
    says = "folders there: val" if there else "the data set's root has no folders"
    with pytest.raises(InputError, match=rf"/train: no such folder \(split `train`\); {says}"):
        list_split(only_train(tmp_path), "train")


def test_a_root_that_is_absent_or_a_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        list_split(only_train(tmp_path / "absent"), "train")
    place(tmp_path, "file", "train")
    with pytest.raises(InputError, match=r"no such folder .*file is a file"):
        list_split(only_train(tmp_path / "file"), "train")
    with pytest.raises(InputError, match="no such folder"):
        list_split(only_train(tmp_path), "train")


def test_a_folder_without_images_is_an_input_error(tmp_path):
    place(tmp_path, "train/a/notes.txt")
    with pytest.raises(InputError, match=r"/train: holds no image \(split `train`\); files that end in \.jpg"):
        list_split(only_train(tmp_path), "train")


def test_a_manifest_is_kept_and_its_fingerprint_tells_other_data(tmp_path):
    place(tmp_path / "data", "train/a/1.png", "train/a/2.png")
    data = only_train(tmp_path / "data")
    first = {"train": manifest_of(data, Head(1))}
    run_dir = RunDir(str(tmp_path / "run"))
    assert write_manifests(run_dir, first) > 0
    assert read_manifest(run_dir, "train").equals(first["train"])
    assert images_fingerprint(data, first) == images_fingerprint(data, {"train": manifest_of(data, Head(1))})
    (tmp_path / "data" / "train/a/2.png").write_bytes(b"longer than it was before")
    assert images_fingerprint(data, first) != images_fingerprint(data, {"train": manifest_of(data, Head(1))})
