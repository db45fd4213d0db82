"""From a listing to a manifest: labels, digests of units, what is listed anew, and finding images again."""

import os
import shutil
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epic_ray.config import DataConfig
from epic_ray.errors import InputError, ResultError
from epic_ray.logs import Reporter
from epic_ray.method.backbones import load_classifier
from epic_ray.run_dir import RunDir
from epic_ray.stages.classes import ClassNames
from epic_ray.stages.images import (
    Listing,
    _Digests,
    cut_units,
    find_images,
    read_positions,
    read_unit,
)
from epic_ray.tables import read_table


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
    return DataConfig(root=str(root), **{"splits": {"train": "train"}} | more)


def listed(data: DataConfig, tmp_path, head: Head, unit_size: int = 512):
    """The run folder with its manifests, the images, and what was said."""
    listener, run_dir = Listener(), RunDir(str(tmp_path / "run"))
    listing = Listing(data, data.splits, listener, run_dir)
    classes = ClassNames.of(head, listing.class_names, listing.index_names)
    images = listing.label(classes, unit_size)
    listing.publish(classes)
    return run_dir, images, listener


def manifest_of(data: DataConfig, tmp_path, head: Head) -> pa.Table:
    return read_table(listed(data, tmp_path, head)[0], "tables/manifest/train.parquet")


def test_the_manifest_names_places_and_labels_every_image(tmp_path):
    place(tmp_path, "train/b/2.png", "train/a/z.jpeg", "train/c/deep/1.webp")
    table = manifest_of(only_train(tmp_path), tmp_path, Head(3, ("a", "c", "b")))
    assert table["image_id"].to_pylist() == ["train/a/z.jpeg", "train/b/2.png", "train/c/deep/1.webp"]
    assert table["label"].to_pylist() == [0, 2, 1]
    assert table["position"].to_pylist() == [0, 1, 2]
    assert table["uri"].to_pylist() == [f"{tmp_path}/{name}" for name in table["image_id"].to_pylist()]
    assert table["size_bytes"].to_pylist() == [len(name) for name in table["image_id"].to_pylist()]


def test_images_in_the_splits_own_folder_have_no_label(tmp_path):
    place(tmp_path, "train/1.png", "train/a/2.png")
    table = manifest_of(only_train(tmp_path), tmp_path, Head(2, ("b", "a")))
    labels = dict(zip(table["image_id"].to_pylist(), table["label"].to_pylist(), strict=True))
    assert labels == {"train/1.png": None, "train/a/2.png": 1}


def test_without_labels_folders_mean_nothing(tmp_path):
    place(tmp_path, "train/2026/1.png", "train/x/2.png")
    table = manifest_of(only_train(tmp_path, labels="none"), tmp_path, Head(2, ("a", "b")))
    assert table["label"].to_pylist() == [None, None]


def test_a_folder_that_matches_no_class_is_named_with_what_is_near(tmp_path):
    place(tmp_path, "train/tabby cat/1.png", "train/gren/1.png")
    with pytest.raises(InputError) as caught:
        listed(only_train(tmp_path), tmp_path, Head(2, ("green", "tabby cat")))
    assert str(caught.value).startswith(f"{tmp_path}/train: class `gren` matches no class of the head (2 classes, ")
    assert "; near: green; give the head's names in order as model.classes, or set data.labels=none" in str(
        caught.value
    )


def test_as_many_folders_as_classes_give_the_classes_their_names(tmp_path):
    place(tmp_path, "train/red/1.png", "train/blue/1.png")
    data = only_train(tmp_path)
    assert manifest_of(data, tmp_path, Head(2))["label"].to_pylist() == [0, 1]
    with pytest.raises(InputError, match="numbers: no names are known"):
        listed(data, tmp_path / "other", Head(3))


def test_an_empty_class_folder_is_a_class_without_images(tmp_path):
    """The classes of a head trained on such a folder keep their places."""
    place(tmp_path, "train/a/1.png", "train/c/1.png", "train/notes/readme.txt")
    (tmp_path / "train" / "b").mkdir()
    run_dir, _, listener = listed(only_train(tmp_path), tmp_path, Head(3))
    assert read_table(run_dir, "tables/manifest/train.parquet")["label"].to_pylist() == [0, 2]
    assert any("empty class folder(s): b" in text for text in listener.told)


def test_class_folders_of_all_splits_count(tmp_path):
    place(tmp_path, "train/a/1.png", "val/b/1.png")
    run_dir, _, _ = listed(DataConfig(root=str(tmp_path)), tmp_path, Head(2))
    labels = [
        read_table(run_dir, f"tables/manifest/{split}.parquet")["label"].to_pylist() for split in ("train", "val")
    ]
    assert labels == [[0], [1]]


def test_imagenet_folders_are_matched_by_wordnet_id_and_shown_in_english(tmp_path):
    place(tmp_path, "train/n01440764/1.png", "train/n02102040/1.png")
    imagenet = load_classifier("resnet18", source="torchvision", weights="random", seed=1)
    assert manifest_of(only_train(tmp_path), tmp_path, imagenet)["label"].to_pylist() == [0, 217]
    classes = ClassNames.of(imagenet, [])
    assert (classes.names[0], classes.folders[0]) == ("tench", "n01440764")
    assert torch.is_tensor(imagenet.weight)


def csv_of(tmp_path, labels: list) -> DataConfig:
    place(tmp_path, *(f"{number}.png" for number in range(len(labels))))
    lines = [f"{number}.png,{label}" for number, label in enumerate(labels)]
    (tmp_path / "train.csv").write_text("\n".join(["uri,label", *lines]))
    return only_train(tmp_path, splits={"train": "train.csv"})


def test_numbers_are_places_in_the_head_and_minus_one_is_no_label(tmp_path):
    assert manifest_of(csv_of(tmp_path, [1, -1, 0]), tmp_path, Head(2))["label"].to_pylist() == [1, None, 0]


@pytest.mark.parametrize("labels", [[0, 2], [0, -2]])
def test_a_number_that_is_no_class_is_told_with_the_range(tmp_path, labels):
    with pytest.raises(InputError, match=rf"labels go from {min(labels)} to {max(labels)}, but the head has 2 classes"):
        listed(csv_of(tmp_path, labels), tmp_path, Head(2))


def test_names_in_a_label_column_are_matched_like_folders(tmp_path):
    assert manifest_of(csv_of(tmp_path, ["bees", "ants"]), tmp_path, Head(2))["label"].to_pylist() == [1, 0]


def test_splits_that_share_a_file_are_refused(tmp_path):
    data = csv_of(tmp_path, [0]).model_copy(update={"splits": {"train": "train.csv", "val": "*.csv"}})
    with pytest.raises(InputError, match=r"train.csv: is part of split `train` and of split `val`"):
        listed(data, tmp_path, Head(2))


# --- units


def digests_of(tables, size: int) -> list[str]:
    digests = _Digests(size, {})
    for table in tables:
        digests.add(table)
    return digests.end()


def rows(ids: list[str], label: int = 0) -> pa.Table:
    count = len(ids)
    return pa.table(
        {
            "position": pa.array(range(count), pa.int64()),
            "image_id": ids,
            "uri": ids,
            "label": pa.array([label] * count, pa.int32()),
            "size_bytes": pa.array([None] * count, pa.int64()),
            "byte_offset": pa.array(range(count), pa.int64()),
            "row": pa.array([None] * count, pa.int64()),
        }
    )


@given(st.integers(1, 40), st.integers(1, 9), st.lists(st.integers(0, 40), max_size=6))
def test_a_digest_does_not_depend_on_how_a_listing_is_cut(count, size, cuts):
    table = rows([f"image-{number}" for number in range(count)])
    ends = sorted({0, count, *(min(cut, count) for cut in cuts)})
    pieces = [table.slice(low, high - low) for low, high in pairwise(ends)]
    assert digests_of(pieces, size) == digests_of([table], size)
    assert len(digests_of(pieces, size)) == -(-count // size)


def test_a_digest_tells_other_names_labels_and_places():
    base = digests_of([rows(["ab", "c"])], 9)
    others = [rows(["a", "bc"]), rows(["ab", "c"], label=1), rows(["c", "ab"]), rows(["ab"])]
    assert len({*base, *(digest for other in others for digest in digests_of([other], 9))}) == 5


def test_another_image_changes_its_unit_and_no_other(tmp_path):
    place(tmp_path, *(f"train/a/{number:02d}.png" for number in range(10)))
    _, images, _ = listed(only_train(tmp_path), tmp_path, Head(1), unit_size=4)
    before = cut_units(images["train"], "made from")
    assert [(unit.start, unit.count) for unit in before] == [(0, 4), (4, 4), (8, 2)]
    (tmp_path / "train/a/05.png").write_bytes(b"other bytes, of another size")
    _, images, _ = listed(only_train(tmp_path), tmp_path, Head(1), unit_size=4)
    after = cut_units(images["train"], "made from")
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True]


def test_a_unit_reads_its_own_rows(tmp_path):
    place(tmp_path, *(f"train/a/{number:02d}.png" for number in range(10)))
    run_dir, images, _ = listed(only_train(tmp_path), tmp_path, Head(1), unit_size=4)
    found = [read_unit(run_dir, unit)["position"].to_pylist() for unit in cut_units(images["train"], "x")]
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert read_positions(run_dir, "train", np.array([1, 9]))["image_id"].to_pylist() == [
        "train/a/01.png",
        "train/a/09.png",
    ]


# --- listing again


def parquet_data(tmp_path, count: int = 6) -> DataConfig:
    images = pa.array([{"bytes": bytes([number]), "path": None} for number in range(count)])
    pq.write_table(
        pa.table({"image": images, "label": [number % 2 for number in range(count)]}), tmp_path / "t.parquet"
    )
    return only_train(tmp_path, splits={"train": "t.parquet"})


def opened(tmp_path, monkeypatch) -> list[str]:
    """The sources whose rows are listed from now on."""
    from epic_ray.stages.sources.parquet import ParquetSource

    found: list[str] = []
    batches = ParquetSource.batches
    monkeypatch.setattr(ParquetSource, "batches", lambda self: found.append(self.split) or batches(self))
    return found


def test_unchanged_files_of_many_images_are_not_listed_again(tmp_path, monkeypatch):
    data = parquet_data(tmp_path)
    _, first, _ = listed(data, tmp_path, Head(2))
    found = opened(tmp_path, monkeypatch)
    _, second, _ = listed(data, tmp_path, Head(2))
    assert (second, found) == (first, [])
    _, third, _ = listed(data, tmp_path, Head(2), unit_size=2)
    assert (third["train"].digest, len(third["train"].unit_digests), found) == (first["train"].digest, 3, [])
    listed(data, tmp_path, Head(2, ("zero", "one")))
    assert found == ["train"]


def test_a_changed_parquet_file_is_another_data_set_though_its_labels_are_the_same(tmp_path, monkeypatch):
    data = parquet_data(tmp_path)
    _, first, _ = listed(data, tmp_path, Head(2))
    os.utime(tmp_path / "t.parquet", ns=(1, 1))
    found = opened(tmp_path, monkeypatch)
    _, second, _ = listed(data, tmp_path, Head(2))
    assert found == ["train"]
    assert second["train"].digest != first["train"].digest


def test_another_column_of_images_is_another_data_set(tmp_path):
    data = parquet_data(tmp_path)
    table = pq.read_table(tmp_path / "t.parquet")
    pq.write_table(table.append_column("thumb", table["image"]), tmp_path / "t.parquet")
    _, first, _ = listed(data, tmp_path, Head(2))
    _, second, _ = listed(data.model_copy(update={"image_column": "thumb"}), tmp_path, Head(2))
    assert first["train"].digest != second["train"].digest
    assert set(first["train"].unit_digests).isdisjoint(second["train"].unit_digests)


def test_images_are_found_by_their_ids(tmp_path):
    data = parquet_data(tmp_path)
    run_dir, _, _ = listed(data, tmp_path, Head(2))
    found = find_images(run_dir, "manifest", "train", ["t.parquet#3", "t.parquet#0"])
    assert {name: address.read() for name, address in found.items()} == {"t.parquet#0": b"\x00", "t.parquet#3": b"\x03"}
    with pytest.raises(ResultError, match=r"manifest/train.parquet: does not list x; the run's tables do not belong"):
        find_images(run_dir, "manifest", "train", ["x"])


@pytest.mark.parametrize("limit", [None, 4])
def test_a_selection_spreads_over_the_split_and_keeps_positions(tmp_path, limit):
    place(tmp_path, *(f"train/a/{number:02d}.png" for number in range(10)))
    data, run_dir = only_train(tmp_path), RunDir(str(tmp_path / "run"))
    listing = Listing(data, data.splits, Reporter(), run_dir)
    images = listing.select("train", ClassNames.of(Head(1), ["a"]), 3, limit)
    positions = read_table(run_dir, "tables/selection/train.parquet")["position"].to_pylist()
    assert positions == (list(range(10)) if limit is None else [0, 2, 5, 7])
    assert (images.rows, len(images.unit_digests)) == (len(positions), -(-len(positions) // 3))


def test_an_image_that_moved_to_another_place_is_selected_anew():
    """Otherwise explanations would name the place where it was before others were added."""
    table = rows(["x"])
    moved = table.set_column(table.column_names.index("position"), "position", pa.array([5], pa.int64()))
    assert digests_of([table], 9) != digests_of([moved], 9)


def test_a_folder_that_was_emptied_is_an_input_error(tmp_path):
    place(tmp_path, "train/a/1.png")
    listed(only_train(tmp_path), tmp_path, Head(1))
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(InputError, match=r"/train: no such folder \(split `train`\)"):
        listed(only_train(tmp_path), tmp_path, Head(1))
