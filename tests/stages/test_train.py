"""The whole training path on a real Ray, against plain loops over the same images."""

import re
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest
import torch
from conftest import small_settings
from PIL import Image

from epic_ray import pipeline
from epic_ray.config import RunConfig
from epic_ray.logs import Reporter
from epic_ray.method.solvers import FitState, SingleProcess, equal_weights, fit_procrustes, rank_weights
from epic_ray.report.explained import draw_split
from epic_ray.run_dir import RunDir
from epic_ray.stages.loading import load
from epic_ray.stages.rounds import read_basis
from epic_ray.tables import TABLES
from tests.method.sources import ArraySource

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def run_once(config: RunConfig) -> tuple[dict, RunDir]:
    record = pipeline.train(config, Reporter())
    return record, RunDir(f"{config.output.root}/{config.name}")


def all_rows(run_dir: RunDir, table: str) -> list[dict]:
    rows = ds.dataset(run_dir.path(f"tables/{table}")).to_table().to_pylist()
    keys = [key for key in ("basis", "split", "sign", "channel", "n", "rank", "round", "position") if key in rows[0]]
    return sorted(rows, key=lambda row: [row[key] for key in keys])


def tables_of(run_dir: RunDir) -> dict[str, list[dict]]:
    present = [name for name in TABLES if run_dir.list(f"tables/{name}")]
    return {name: all_rows(run_dir, name) for name in present}


def loop_over_images(config: RunConfig, split: str) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Ids, maps (N, S, D) and logits of a split by a plain loop, in the run's batches."""
    classifier = load(config.model)
    root, batch_size = Path(config.data.root), config.resources.batch_size
    files = sorted((root / split).rglob("*.png"), key=lambda file: file.relative_to(root / split).as_posix())
    maps, logits = [], []
    for unit in range(0, len(files), config.features.unit_size):
        paths = files[unit : unit + config.features.unit_size]
        for start in range(0, len(paths), batch_size):
            images = [Image.open(path).convert("RGB") for path in paths[start : start + batch_size]]
            pixels = np.stack([classifier.preprocessing.apply(image) for image in images])
            with torch.inference_mode():
                z, own = classifier(classifier.normalise(torch.from_numpy(pixels)))
            maps.append(z.flatten(2).transpose(1, 2))
            logits.append(own)
    return [file.relative_to(root).as_posix() for file in files], torch.cat(maps), torch.cat(logits)


@pytest.fixture(scope="module")
def undisturbed(patches, tmp_path_factory, ray_session) -> tuple[dict, RunDir]:
    """One run that the others are held against: one feature actor, one fitting process, all maps kept."""
    return run_once(small_settings(patches, tmp_path_factory.mktemp("undisturbed")))


@pytest.mark.parametrize("batch_size", [7, 64, 512])
def test_prototypes_equal_a_brute_force_loop(settings, batch_size):
    """Ids and order, with repeated images (ties) and 90 images in batches that do not divide them."""
    config = settings(name=f"batch-{batch_size}", resources={"batch_size": batch_size}, prototypes={"per_channel": 20})
    _, run_dir = run_once(config)
    ids, maps, _ = loop_over_images(config, "train")
    pooled = torch.tensor(np.stack([row["pooled"] for row in all_rows(run_dir, "features") if row["split"] == "train"]))
    assert (pooled - maps.mean(dim=1)).abs().max() < 1e-5
    rows = all_rows(run_dir, "prototypes")
    ties = 0
    for basis_name, basis in (("before", torch.eye(maps.shape[2])), ("after", read_basis(run_dir))):
        for sign_name, sign in (("positive", 1), ("negative", -1)):
            for channel in range(maps.shape[2]):
                values = [sign * float(v.double() @ basis[channel].double()) for v in pooled]
                order = sorted(range(len(ids)), key=lambda n: (-np.float32(values[n]), n))[:20]
                ties += len(order) - len({np.float32(values[n]) for n in order})
                key = (basis_name, sign_name, channel)
                found = [row for row in rows if (row["basis"], row["sign"], row["channel"]) == key]
                assert [row["rank"] for row in found] == list(range(1, 21))
                assert [row["image_id"] for row in found] == [ids[n] for n in order]
                for row, n in zip(found, order, strict=True):
                    cell = int((sign * (maps[n] @ basis[channel])).argmax())
                    z = maps[n, cell]
                    purity = float(sign * (z @ basis[channel]) / z.norm()) if z.norm() > 0 else 0.0
                    assert row["purity"] == pytest.approx(purity, abs=1e-5)
                    assert row["value"] == pytest.approx(sign * values[n], abs=1e-6)
                    assert row["position"] == n
                    np.testing.assert_allclose(row["heat"], maps[n] @ basis[channel], atol=1e-5)
                    assert row["cell_row"] * 8 + row["cell_col"] == cell or purity == pytest.approx(
                        float(sign * (maps[n, row["cell_row"] * 8 + row["cell_col"]] @ basis[channel]) / z.norm()),
                        abs=1e-5,
                    )
    assert ties > 20


def test_two_runs_of_one_configuration_give_identical_tables(settings, undisturbed):
    _, run_dir = run_once(settings())
    assert tables_of(run_dir) == tables_of(undisturbed[1])
    assert run_dir.read_bytes("basis/basis.safetensors") == undisturbed[1].read_bytes("basis/basis.safetensors")


def test_two_feature_actors_on_two_gpus_give_the_tables_of_one(settings, undisturbed):
    record, run_dir = run_once(settings(resources={"feature_actors": 2, "gpus_per_actor": 1}))
    # which of the two takes how many of the five units is Ray's affair: one may be ready first and take them all
    assert (record["resources"]["feature_actors"], record["resources"]["gpus_per_actor"]) == (2, 1)
    assert tables_of(run_dir) == tables_of(undisturbed[1])


def test_half_precision_gives_another_run_near_the_full_one_and_says_how_near(settings, undisturbed):
    record, run_dir = run_once(settings(resources={"precision": "bfloat16"}))
    exact, found = (
        np.stack([row["pooled"] for row in all_rows(where, "features")]) for where in (undisturbed[1], run_dir)
    )
    assert 0 < np.abs(exact - found).max() < 0.05
    assert 1e-4 < record["logits"]["max_abs_difference"] < 0.5
    assert undisturbed[0]["logits"]["max_abs_difference"] < 1e-4
    run, record = pipeline.open_finished(run_dir, Reporter())
    pipeline.explain(run, record, "val", limit=8)
    assert len(draw_split(run, "val", 8, 2, Reporter())) == 8, "its pictures add up as well as its logits do"


def test_another_batch_size_changes_features_by_rounding_alone(settings, undisturbed):
    _, run_dir = run_once(settings(resources={"batch_size": 5}, features={"unit_size": 17}))
    for mine, theirs in zip(all_rows(run_dir, "features"), all_rows(undisturbed[1], "features"), strict=True):
        assert mine["image_id"] == theirs["image_id"]
        assert np.allclose(mine["pooled"], theirs["pooled"], atol=1e-5)


def test_each_image_is_decoded_and_forwarded_once_when_the_maps_fit(undisturbed):
    record, _ = undisturbed
    assert record["maps_kept"]
    counts = record["counts"]
    assert counts["images"] == counts["decoded"] == counts["forwarded"] == 135
    assert counts["total"]["forwarded"] == 135


def test_without_room_for_maps_only_chosen_images_are_forwarded_again(settings, undisturbed):
    record, run_dir = run_once(settings(features={"map_budget_bytes": 0}, prototypes={"per_channel": 3}))
    assert not record["maps_kept"]
    stored = run_dir.list("maps")
    assert stored
    assert not [file for file in stored if "unit-" in file]
    rows = ds.dataset([run_dir.path(file) for file in stored], format="ipc").to_table(columns=["position"]).num_rows
    assert record["counts"]["forwarded"] == record["counts"]["decoded"] == 135 + rows
    per_split = {split: len({file for file in stored if f"/{split}/" in file}) for split in ("train", "val")}
    assert all(per_split.values())
    # each chosen image once: no position stands in two files of a split
    for split, images in (("train", 90), ("val", 45)):
        files = [run_dir.path(file) for file in stored if f"/{split}/" in file]
        positions = ds.dataset(files, format="ipc").to_table(columns=["position"])["position"].to_pylist()
        assert len(positions) == len(set(positions)) <= images
    # the forwarded again are the chosen of the rounds, and the fit does not change by it
    history = all_rows(run_dir, "history")
    assert history[0]["new_images"] == history[0]["images"] > 0
    assert sum(row["new_images"] for row in history) <= 90
    difference = read_basis(run_dir) - read_basis(undisturbed[1])
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("solver", ["procrustes", "adam"])
def test_a_fit_with_two_workers_equals_one_process(settings, solver):
    adam = {"batch_size": 64, "learning_rate": 1e-2}
    fit = {"solver": solver, "adam": adam, "prototypes_per_channel": {"start": 12, "end": 5, "rounds": 2}}
    alone, run_alone = run_once(settings(name="alone", fit=fit | {"workers": 0}))
    together, run_together = run_once(settings(name="together", fit=fit | {"workers": 2}))
    difference = read_basis(run_alone) - read_basis(run_together)
    assert difference.abs().max() <= 1e-5
    assert (read_basis(run_alone) - torch.eye(40)).abs().max() > 1e-2  # something was fitted
    for record in (alone, together):
        assert record["basis"]["orthogonality_error"] <= 1e-5


@pytest.mark.parametrize(("weights", "weigh"), [("rank", rank_weights), ("equal", equal_weights)])
def test_the_fit_weighs_prototypes_by_rank_or_equally_as_it_is_told(settings, weights, weigh):
    config = settings(
        fit={"start": "identity", "weights": weights, "prototypes_per_channel": {"start": 12, "end": 12, "rounds": 2}}
    )
    _, run_dir = run_once(config)
    source = ArraySource(loop_over_images(config, "train")[1])
    start = FitState.begin(torch.eye(40))
    expected = fit_procrustes(source, start, [12, 12], SingleProcess(), lambda state, record: None, weigh)
    torch.testing.assert_close(read_basis(run_dir), expected.basis, rtol=0, atol=1e-4)


def test_the_run_record_says_what_a_plain_loop_finds(undisturbed):
    record, run_dir = undisturbed
    config = pipeline.read_config(run_dir)
    classifier = load(config.model)
    basis = read_basis(run_dir)
    ids, maps, logits = loop_over_images(config, "val")
    rebuilt = (maps.mean(dim=1) @ basis.T) @ (classifier.weight @ basis.T).T + classifier.bias
    labels = torch.tensor([("blue", "green", "red").index(name.split("/")[1]) for name in ids])
    assert record["backbone_top1"]["val"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert record["top1"]["val"] == record["backbone_top1"]["val"]
    assert record["logits"]["images"] == 45
    assert record["logits"]["top1_agreement"] == 1.0
    assert record["logits"]["max_abs_difference"] <= 1e-4
    assert record["logits"]["max_abs_difference"] == pytest.approx(float((rebuilt - logits).abs().max()), abs=2e-6)
    by_id = {row["image_id"]: row for row in all_rows(run_dir, "images")}
    for name, own in zip(ids, logits, strict=True):
        assert by_id[name]["predicted"] == int(own.argmax())
        assert by_id[name]["logit"] == pytest.approx(float(own.max()), abs=1e-5)
    # purity, held out: the top 5 of each channel chosen anew among the held-out images
    rotated = torch.einsum("nsd,kd->nsk", maps, basis)
    purity = []
    for channel in range(len(basis)):
        top = rotated[:, :, channel].mean(dim=1).topk(5).indices
        cells = rotated[top, :, channel].argmax(dim=1)
        z = maps[top, cells]
        purity.append(float(((z @ basis[channel]) / z.norm(dim=1).clamp(min=1e-12)).mean()))
    assert record["purity"]["after"]["val"]["at_5"] == pytest.approx(float(np.mean(purity)), abs=1e-4)
    assert record["purity"]["after"]["train"]["at_5"] > record["purity"]["before"]["train"]["at_5"]


def test_a_second_start_reuses_every_stage_and_forwards_nothing(settings):
    config = settings()
    run_once(config)
    told: list[str] = []

    class Listener(Reporter):
        def say(self, text: str) -> None:
            told.append(text)

    record = pipeline.train(config, Listener())
    assert [text for text in told if text.endswith("reused")] == [
        f"{stage}: reused" for stage in ("images", "features", "fit", "prototypes")
    ]
    assert record["counts"]["forwarded"] == 0
    assert record["counts"]["total"]["forwarded"] == 135


def test_a_killed_pass_and_a_killed_fit_go_on_where_they_stopped(settings, undisturbed):
    """Unit files and rounds that were committed are kept; the rest is made again, and the tables come out equal."""
    config = settings()
    _, run_dir = run_once(config)
    lost = run_dir.list("tables/images/train")[1:] + run_dir.list("tables/images/val")[:1]
    run_dir.delete(lost)
    run_dir.delete(["fit/round-003.pt"])
    for stage in ("features", "fit", "prototypes"):
        run_dir.drop_mark(stage)
    record, _ = run_once(config)
    assert record["counts"]["forwarded"] == 58 + 32
    assert tables_of(run_dir) == tables_of(undisturbed[1])


def test_a_torn_unit_file_is_made_again(settings, undisturbed):
    config = settings()
    _, run_dir = run_once(config)
    victim = Path(run_dir.path(run_dir.list("tables/images/train")[0]))
    victim.write_bytes(victim.read_bytes()[:100])
    run_dir.drop_mark("features")
    record, _ = run_once(config)
    assert record["counts"]["forwarded"] == 32
    assert tables_of(run_dir) == tables_of(undisturbed[1])


def test_pandas_polars_and_duckdb_read_every_table(undisturbed):
    import duckdb
    import pandas
    import polars

    _, run_dir = undisturbed
    for name in sorted({file.split("/")[1] for file in run_dir.list("tables")}):
        files = [run_dir.path(file) for file in run_dir.list(f"tables/{name}")]
        count = len(all_rows(run_dir, name))
        assert sum(len(pandas.read_parquet(file)) for file in files) == count
        assert sum(polars.read_parquet(file).height for file in files) == count
        assert duckdb.sql(f"select count(*) from read_parquet({files}, union_by_name = true)").fetchall() == [(count,)]
    boxes = polars.read_parquet(run_dir.path("tables/prototypes/prototypes.parquet"))["box_xyxy_px"].to_numpy()
    assert boxes.shape[1:] == (4,)
    assert (boxes[:, :2] < boxes[:, 2:]).all()


def test_the_fitted_channels_stand_in_the_history(undisturbed):
    record, run_dir = undisturbed
    history = all_rows(run_dir, "history")
    assert [row["round"] for row in history] == [1, 2, 3]
    assert [row["prototypes_per_channel"] for row in history][::2] == [12, 5]
    assert all(row["purity_end"] >= row["purity_start"] - 1e-6 for row in history)
    assert all(row["orthogonality_error"] <= 1e-5 for row in history)
    assert record["basis"]["orthogonality_error"] <= 1e-5


def test_the_readme_names_every_key_of_the_record(undisturbed):
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    section = readme.split("### run.json")[1].split("### The tables")[0]
    record, _ = undisturbed
    named = set(re.findall(r"[a-z_0-9]+", " ".join(re.findall(r"`([^`]+)`", section))))
    nested = ("model", "logits", "basis", "purity", "counts", "peak_memory_bytes")
    keys = set(record) | {key for name in nested for key in record[name]}
    assert keys <= named
