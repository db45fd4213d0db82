"""Nothing old, torn or lost is taken for a result of the run as it is now; each test a fault that a review found."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import torch
from conftest import small_settings, write_patches
from PIL import Image

from epic_ray import pipeline
from epic_ray.config import build_config, load_config
from epic_ray.errors import ClusterError, ConfigError, InputError, ResultError
from epic_ray.logs import Reporter
from epic_ray.report.explained import Illustrator, draw_split
from epic_ray.run_dir import RUN, RunDir
from epic_ray.stages.classes import ClassNames
from epic_ray.stages.images import Address
from epic_ray.stages.loading import load, model_facts
from epic_ray.stages.maps import MapStore, write_maps
from epic_ray.stages.rounds import read_basis, read_round

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def train(config, force: bool = False) -> tuple[dict, RunDir]:
    record = pipeline.train(config, Reporter(), force)
    return record, RunDir(f"{config.output.root}/{config.name}")


@pytest.fixture
def few(tmp_path) -> Path:
    """Images of the test's own, to break."""
    return write_patches(tmp_path / "few", {"train": 8, "val": 6})


def test_an_explanation_that_failed_for_bad_images_fails_again(few, tmp_path):
    config = small_settings(few, tmp_path / "runs")
    _, run_dir = train(config)
    for file in sorted((few / "val").rglob("*.png"))[:9]:
        file.write_bytes(b"no image")
    run, record = pipeline.open_finished(run_dir, Reporter())
    for _ in range(2):
        with pytest.raises(InputError, match="val: 9 of 18 images failed"):
            pipeline.explain(run, record, "val")


def test_a_resumed_explanation_reports_the_whole_split(few, tmp_path):
    config = small_settings(few, tmp_path / "runs", features={"unit_size": 6}, data={"max_failed_fraction": 0.2})
    _, run_dir = train(config)
    next((few / "val/blue").iterdir()).write_bytes(b"no image")
    run, record = pipeline.open_finished(run_dir, Reporter())
    whole = pipeline.explain(run, record, "val")
    assert (whole.failed, whole.top1_agreement, whole.forwarded) == (1, 1.0, 17)
    run_dir.delete(run_dir.list("tables/explanations/val")[1:])
    run_dir.drop_mark("explanations-val")
    again = pipeline.explain(run, record, "val")
    assert again.forwarded == 12
    assert (again.failed, again.top1_agreement, again.max_abs_difference) == (1, 1.0, whole.max_abs_difference)


def test_a_new_fit_leaves_no_explanation_or_picture_of_the_old_one(few, tmp_path):
    config = small_settings(few, tmp_path / "runs")
    _, run_dir = train(config)
    run, record = pipeline.open_finished(run_dir, Reporter())
    pipeline.explain(run, record, "val")
    draw_split(run, "val", 1, 2, Reporter())
    refit = small_settings(few, tmp_path / "runs", fit={"start": "quartimax"})
    train(refit, force=True)
    assert run_dir.list("tables/explanations") == run_dir.list("pictures") == []
    assert run_dir.read_mark("explanations-val") is None


def test_another_split_costs_its_own_pass_and_no_fit_or_explanation(few, tmp_path):
    _, run_dir = train(small_settings(few, tmp_path / "runs"))
    run, record = pipeline.open_finished(run_dir, Reporter())
    pipeline.explain(run, record, "val")
    before = run_dir.list("tables/explanations"), run_dir.read_mark("fit"), run_dir.read_mark("prototypes")
    (few / "test").symlink_to(few / "val")
    splits = {"train": "train", "val": "val", "test": "test"}
    record, _ = train(small_settings(few, tmp_path / "runs", data={"splits": splits}), force=True)
    assert record["counts"]["forwarded"] == 18
    assert (run_dir.list("tables/explanations"), run_dir.read_mark("fit"), run_dir.read_mark("prototypes")) == before


def test_an_added_image_costs_its_own_unit(few, tmp_path):
    config = small_settings(few, tmp_path / "runs", features={"unit_size": 8})
    train(config)
    Image.open(next((few / "train/red").iterdir())).save(few / "train/red/zz.png")
    planned = pipeline.plan(config, Reporter())
    assert planned["stages"][1] == planned["stages"][1] | {"units": 7, "units_done": 6, "reused": False}
    record, run_dir = train(config)
    assert record["counts"]["forwarded"] == 1
    assert run_dir.list("tables/images/train")[-1].endswith("unit-000003.parquet")


def test_images_that_failed_for_a_while_are_read_again_when_asked(few, tmp_path):
    config = small_settings(few, tmp_path / "runs", features={"unit_size": 8}, data={"max_failed_fraction": 0.5})
    file = sorted((few / "train/blue").iterdir())[0]
    whole = file.read_bytes()
    file.write_bytes(bytes(len(whole)))  # of the same size, so that nothing else tells
    record, run_dir = train(config)
    assert record["counts"]["failed"] == 1
    file.write_bytes(whole)
    again, _ = train(config)
    assert (again["counts"]["failed"], again["counts"]["forwarded"]) == (1, 0)
    mended = pipeline.train(config, Reporter(), retry_failed=True)
    assert (mended["counts"]["failed"], mended["counts"]["forwarded"]) == (0, 8)
    undisturbed, other = train(small_settings(few, tmp_path / "others", features={"unit_size": 8}))
    assert run_dir.read_bytes("basis/basis.safetensors") == other.read_bytes("basis/basis.safetensors")
    assert mended["purity"] == undisturbed["purity"] != record["purity"]


def test_files_that_are_none_of_ours_are_left_alone(few, tmp_path):
    config = small_settings(few, tmp_path / "runs")
    _, run_dir = train(config)
    strangers = [f"{folder}/.DS_Store" for folder in ("tables/images/train", "tables/features/val", "maps/train")]
    for stranger in strangers:
        run_dir.publish_bytes(stranger, b"not ours")
    record, _ = train(config)
    assert record["counts"]["forwarded"] == 0
    assert all(run_dir.exists(stranger) for stranger in strangers)


def test_a_run_that_was_trained_anew_meanwhile_is_not_explained_by_halves(few, tmp_path):
    _, run_dir = train(small_settings(few, tmp_path / "runs"))
    run, record = pipeline.open_finished(run_dir, Reporter())
    train(small_settings(few, tmp_path / "runs", fit={"start": "quartimax"}), force=True)
    with pytest.raises(ResultError, match="was trained anew since it was opened; run the command again"):
        pipeline.explain(run, record, "val")


def test_a_split_that_the_settings_lost_leaves_no_file(few, tmp_path):
    _, run_dir = train(small_settings(few, tmp_path / "runs"))
    train(small_settings(few, tmp_path / "runs", data={"splits": {"train": "train"}}), force=True)
    assert not [file for file in run_dir.list("tables") + run_dir.list("maps") if "/val" in file]
    assert run_dir.list("tables/images/train")


def test_a_refused_start_keeps_no_old_record_beside_new_settings(few, tmp_path):
    _, run_dir = train(small_settings(few, tmp_path / "runs"))
    other = small_settings(
        few, tmp_path / "runs", fit={"start": "quartimax"}, resources={"feature_actors": 99, "gpus_per_actor": 1}
    )
    with pytest.raises(ClusterError, match="99 actor"):
        train(other, force=True)
    assert run_dir.exists(RUN)
    assert pipeline.read_config(run_dir).fit.start == "auto"


def test_torn_or_lost_features_are_made_again_not_left_out(few, tmp_path):
    config = small_settings(few, tmp_path / "runs", features={"unit_size": 8})
    _, run_dir = train(config)
    basis = run_dir.read_bytes("basis/basis.safetensors")
    files = run_dir.list("tables/features/train")
    Path(run_dir.path(files[0])).write_bytes(b"torn")
    run_dir.delete([files[1]])
    run_dir.delete(run_dir.list("maps/val")[:1])
    again, _ = train(config)
    assert again["counts"]["forwarded"] == 8 + 8 + 8
    assert len(run_dir.list("tables/features/train")) == 3
    assert run_dir.read_bytes("basis/basis.safetensors") == basis


def test_a_retrained_network_behind_the_same_factory_is_another_classifier(settings):
    config = settings()
    one, other = load(config.model), load(config.model.model_copy(update={"seed": 7}))
    assert model_facts(config.model, one) == model_facts(config.model, load(config.model))
    assert model_facts(config.model, one) != model_facts(config.model, other)


def test_new_class_names_reach_the_table_without_a_new_pass(few, tmp_path):
    none = {"labels": "none"}
    _, run_dir = train(small_settings(few, tmp_path / "runs", data=none))
    named = small_settings(few, tmp_path / "runs", data=none)
    named = named.model_copy(update={"model": named.model.model_copy(update={"classes": ["uno", "dos", "tres"]})})
    record, _ = train(named, force=True)
    assert record["counts"]["forwarded"] == 0
    run, _ = pipeline.open_finished(run_dir, Reporter())
    assert run.classes.names == ["uno", "dos", "tres"]


def test_a_folder_that_names_two_classes_is_refused():
    names = ClassNames(["crane", "crane", "tench"], [None, None, None], "the names of the head's classes")
    assert names.index_of("tench", "train") == 2
    with pytest.raises(InputError, match="`crane` could be any of 2 classes"):
        names.index_of("crane", "train")


def test_an_empty_split_folder_is_refused_before_it_cuts_letters_off():
    with pytest.raises(ConfigError, match=r"write `\.` for the data set's root itself"):
        load_config(None, ["model.architecture=a", "data.root=b", "data.splits={train: ''}"])


def test_more_workers_than_there_are_cpus_is_told_not_waited_for(few, tmp_path):
    with pytest.raises(ClusterError, match=r"fit\.workers: 50 asked, but Ray has 4 CPU"):
        train(small_settings(few, tmp_path / "runs", fit={"workers": 50}))


def test_torn_rounds_and_maps_are_named(tmp_path):
    run_dir = RunDir(str(tmp_path))
    run_dir.publish_bytes("fit/round-001.pt", b"torn")
    with pytest.raises(ResultError, match=r"round-001.pt: is no whole round"):
        read_round(run_dir, 1)
    run_dir.publish_bytes("maps/train/unit-000000.arrow", b"torn")
    with pytest.raises(ResultError, match=r"unit-000000.arrow: is no whole file of maps"):
        MapStore(run_dir, "train", {"any"})


def test_a_share_without_pairs_reads_no_map(tmp_path):
    assert MapStore(RunDir(str(tmp_path)), "train", {"any"}).read(np.empty(0, np.int64)).shape[0] == 0


def test_a_peak_in_the_padding_is_drawn_without_an_outline(tmp_path):
    """A photo smaller than the crop gets a black border, where a channel may well be strongest."""
    images = write_patches(tmp_path / "images", {"train": 4, "val": 2})
    for file in images.rglob("*.png"):
        Image.open(file).crop((0, 0, 12, 9)).save(file)
    config = small_settings(images, tmp_path / "runs")
    values = config.model_dump()
    values["model"]["preprocessing"] |= {"resize": None}
    _, run_dir = train(build_config(values, "test"))
    run, record = pipeline.open_finished(run_dir, Reporter())
    pipeline.explain(run, record, "val")
    assert len(draw_split(run, "val", 6, 5, Reporter())) == 6
    uri = next(iter((images / "val").rglob("*.png")))
    seen, _ = Illustrator(run, 1).explain(Address(str(uri)), 1, "share")
    left, top, right, bottom = run.classifier.preprocessing.grid_box(seen.image.size)
    assert (left, top, right, bottom) == pytest.approx((-10, -12, 22, 20), abs=1)


def test_shares_that_do_not_make_the_logit_are_refused(few, tmp_path):
    _, run_dir = train(small_settings(few, tmp_path / "runs"))
    run, _ = pipeline.open_finished(run_dir, Reporter())
    illustrator = Illustrator(run, 1)
    row = {
        "label": None, "predicted": 0, "logit": 99.0, "probability": 1.0, "rank": 1, "channel": 0, "sign": "positive",
        "share": 0.1, "score": 0.1, "value": 0.1, "purity": 0.1, "cell_row": 0, "cell_col": 0,
        "box_xyxy_px": [0.0, 0.0, 4.0, 4.0],
    }  # fmt: skip
    with pytest.raises(ResultError, match="explain the split again"):
        illustrator.draw("x", Address(str(next((few / "val").rglob("*.png")))), [row])


def test_features_are_computed_in_full_float32():
    from epic_ray.stages.resources import take_device

    torch.backends.cudnn.allow_tf32 = True
    take_device("cpu", 1)
    assert not torch.backends.cudnn.allow_tf32


def test_maps_deleted_to_save_space_are_made_again_only_for_a_stage_that_reads_them(few, tmp_path):
    config = small_settings(few, tmp_path / "runs")
    _, run_dir = train(config)
    run_dir.delete_folder("maps")
    record, _ = train(config)
    assert record["counts"]["forwarded"] == 0
    more = small_settings(few, tmp_path / "runs", prototypes={"per_channel": 7})
    record, _ = train(more, force=True)
    assert record["counts"]["forwarded"] == 42


def test_a_resumed_fit_finds_the_maps_that_it_gathers_itself(few, tmp_path):
    """The files of a resumed fit took the names of its first start's: the maps it forwarded were not seen."""
    config = small_settings(few, tmp_path / "runs", features={"map_budget_bytes": 0})
    _, run_dir = train(config)
    basis = read_basis(run_dir)
    kept, *later = sorted(
        (file for file in run_dir.list("maps/train")), key=lambda file: Path(run_dir.path(file)).stat().st_mtime_ns
    )
    made_from = pa.ipc.open_file(run_dir.open(kept)).schema.metadata[b"epic_ray.fingerprint"].decode()
    partial = MapStore(run_dir, "train", {made_from})
    positions = np.arange(24)
    few_maps = positions[:3]
    write_maps(run_dir, kept, few_maps, partial.read(few_maps), made_from)  # as if killed early on
    run_dir.delete([*later, "fit/round-003.pt", "fit/round-002.pt"])
    for stage in ("fit", "prototypes"):
        run_dir.drop_mark(stage)
    record, _ = train(config)
    assert (read_basis(run_dir) - basis).abs().max() < 1e-4
    files = [run_dir.path(file) for file in run_dir.list("maps/train")]
    found = ds.dataset(files, format="ipc").to_table(columns=["position"])["position"].to_pylist()
    assert len(found) == len(set(found))
    assert record["counts"]["forwarded"] < record["counts"]["total"]["forwarded"]


def test_a_damaged_file_that_was_removed_is_made_again_to_the_same_bytes(few, tmp_path):
    config = small_settings(few, tmp_path / "runs")
    _, run_dir = train(config)
    names = ["basis/basis.safetensors"]
    names += [f"tables/{name}/{name}.parquet" for name in ("classes", "history", "prototypes", "purity")]
    names += ["tables/manifest/val.parquet"]
    before = {name: run_dir.read_bytes(name) for name in names}
    for name in names:
        run_dir.delete([name])
        train(config)
        assert run_dir.read_bytes(name) == before[name], name
