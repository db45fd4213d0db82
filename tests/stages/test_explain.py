"""Explanations of a split and of single images, on a real Ray, against the classifier itself."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_settings, write_patches
from PIL import Image

from epic_ray import pipeline
from epic_ray.errors import ConfigError
from epic_ray.logs import Reporter
from epic_ray.report.explained import Illustrator, draw_split, rows_of
from epic_ray.run_dir import RunDir
from epic_ray.stages.images import Address
from epic_ray.stages.rounds import read_basis
from epic_ray.tables import read_tables

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, ray_session) -> tuple[pipeline.Run, dict]:
    """A finished run over images of its own, so that tests may take some away."""
    folder = tmp_path_factory.mktemp("explain")
    images = write_patches(folder / "images", {"train": 20, "val": 10})
    pipeline.train(small_settings(images, folder / "runs"), Reporter())
    return pipeline.open_finished(RunDir(f"{folder}/runs/small"), Reporter())


@pytest.fixture(scope="module")
def explained(finished) -> tuple[pipeline.ExplainResult, list[dict]]:
    run, record = finished
    result = pipeline.explain(run, record, "val")
    return result, read_tables(run.run_dir, run.run_dir.list("tables/explanations/val")).to_pylist()


def test_every_held_out_image_has_its_strongest_channels(finished, explained):
    run, _ = finished
    result, rows = explained
    assert (result.images, result.failed, result.forwarded) == (30, 0, 30)
    assert result.max_abs_difference <= 1e-4
    assert result.top1_agreement == 1.0
    assert len(rows) == 30 * 4
    basis, classifier = read_basis(run.run_dir), run.classifier
    weight = classifier.weight @ basis.T
    for first in range(0, len(rows), 4):
        mine = rows[first : first + 4]
        assert [row["rank"] for row in mine] == [1, 2, 3, 4]
        image = Image.open(Path(run.config.data.root) / mine[0]["image_id"]).convert("RGB")
        pixels = torch.from_numpy(classifier.preprocessing.apply(image)[None])
        with torch.inference_mode():
            maps, logits = classifier(classifier.normalise(pixels))
        predicted, pooled = int(logits.argmax()), basis @ maps.mean(dim=(2, 3))[0]
        shares = weight[predicted] * pooled
        assert float(shares.sum() + classifier.bias[predicted]) == pytest.approx(float(logits.max()), abs=1e-4)
        strongest = shares.argsort(descending=True)[:4].tolist()
        assert [row["channel"] for row in mine] == strongest
        for row in mine:
            channel = row["channel"]
            assert row["predicted"] == predicted
            assert row["share"] == pytest.approx(float(shares[channel]), abs=1e-5)
            assert row["score"] == pytest.approx(float(weight[predicted, channel] * pooled[channel].relu()), abs=1e-5)
            assert row["sign"] == ("negative" if pooled[channel] < 0 else "positive")
            rotated = torch.einsum("d,dhw->hw", basis[channel], maps[0])
            extreme = rotated.min() if row["sign"] == "negative" else rotated.max()
            assert float(rotated[row["cell_row"], row["cell_col"]]) == pytest.approx(float(extreme), abs=1e-5)
            left, top, right, bottom = row["box_xyxy_px"]
            assert 0 <= left < right <= image.width
            assert 0 <= top < bottom <= image.height


def test_explaining_reads_no_training_image_but_those_it_draws(finished, explained):
    run, record = finished
    train = Path(run.config.data.root) / "train"
    away = train.with_name("away")
    prototypes = {
        row["image_id"] for row in read_tables(run.run_dir, run.run_dir.list("tables/prototypes")).to_pylist()
    }
    train.rename(away)
    try:
        assert pipeline.explain(run, record, "val", limit=6).images == 6
        for image_id in prototypes:
            target = Path(run.config.data.root) / image_id
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(away / Path(image_id).relative_to("train"), target)
        illustrator = Illustrator(run, 5)
        for row in explained[1][:8]:
            picture = illustrator.compose(row["image_id"], Address(f"{run.config.data.root}/{row['image_id']}"), [row])
            assert all(tile.image is not None for tile in picture.rows[0].prototypes)
    finally:
        shutil.rmtree(train, ignore_errors=True)
        away.rename(train)


def test_each_prototype_is_drawn_from_the_image_its_row_names(finished, explained):
    """The published code looked training indices up in the validation set and showed wrong pictures."""
    run, _ = finished
    illustrator = Illustrator(run, 5)
    table = read_tables(run.run_dir, run.run_dir.list("tables/prototypes")).to_pylist()
    for row in explained[1][:20]:
        picture = illustrator.compose(row["image_id"], Address(f"{run.config.data.root}/{row['image_id']}"), [row])
        (shown,) = picture.rows
        expected = [
            entry
            for entry in table
            if (entry["basis"], entry["channel"], entry["sign"]) == ("after", row["channel"], row["sign"])
        ]
        expected.sort(key=lambda entry: entry["rank"])
        assert len(shown.prototypes) == len(expected) == 5
        for tile, entry in zip(shown.prototypes, expected, strict=True):
            original = Image.open(Path(run.config.data.root) / entry["image_id"]).convert("RGB")
            assert np.array_equal(np.asarray(tile.image), np.asarray(original))
            assert entry["image_id"].rsplit("/", 1)[-1] in tile.caption
            assert f"{entry['purity']:.2f}" in tile.caption
            assert list(tile.peak_box_xyxy_px) == pytest.approx(list(entry["box_xyxy_px"]))
            peak = np.unravel_index(np.argmax(tile.heat), tile.heat.shape)
            assert tile.heat[entry["cell_row"], entry["cell_col"]] == pytest.approx(tile.heat[peak], abs=1e-5)
        parts = picture.bias + picture.rest + shown.share
        assert parts == pytest.approx(picture.logit, abs=1e-3)


def test_a_prototype_that_has_vanished_is_shown_as_missing(finished, explained, tmp_path):
    run, _ = finished
    row = explained[1][0]
    picture = Illustrator(run, 1).compose(row["image_id"], Address(f"{run.config.data.root}/{row['image_id']}"), [row])
    name = picture.rows[0].prototypes[0].caption.rsplit(" · ", 1)[-1]
    (victim,) = Path(run.config.data.root, "train").rglob(name)
    victim.rename(tmp_path / name)
    try:
        again = Illustrator(run, 1).compose(
            row["image_id"], Address(f"{run.config.data.root}/{row['image_id']}"), [row]
        )
        assert again.rows[0].prototypes[0].image is None
        assert name in again.rows[0].prototypes[0].caption
    finally:
        (tmp_path / name).rename(victim)


def test_pictures_are_spread_over_the_split_and_old_ones_are_replaced(finished):
    run, record = finished
    pipeline.explain(run, record, "val")
    files = draw_split(run, "val", 5, 3, Reporter())
    assert [file.split("/")[-1][:6] for file in files] == ["000000", "000006", "000012", "000018", "000024"]
    for file in files:
        with Image.open(run.run_dir.path(file)) as picture:
            assert min(picture.size) > 600
    assert len(draw_split(run, "val", 2, 3, Reporter())) == 2
    assert len(run.run_dir.list("pictures/val")) == 2


def test_one_new_image_gets_the_explanation_it_has_in_the_split(finished, explained):
    run, _ = finished
    rows = explained[1][40:44]
    seen, result = Illustrator(run, 2).explain(Address(f"{run.config.data.root}/{rows[0]['image_id']}"), 4, "share")
    mine = rows_of(result, run, seen.image.size)
    for own, row in zip(mine, rows, strict=True):
        assert (own["channel"], own["sign"], own["predicted"]) == (row["channel"], row["sign"], row["predicted"])
        assert own["share"] == pytest.approx(row["share"], abs=1e-5)
        assert own["box_xyxy_px"] == pytest.approx(list(row["box_xyxy_px"]))


def test_a_limit_takes_images_at_even_steps(finished):
    run, record = finished
    assert pipeline.explain(run, record, "val", limit=3).images == 3
    rows = read_tables(run.run_dir, run.run_dir.list("tables/explanations/val")).to_pylist()
    assert sorted({row["image_id"].split("/")[1] for row in rows}) == ["blue", "green", "red"]


def test_an_unknown_split_is_named_with_those_there_are(finished):
    run, record = finished
    with pytest.raises(ConfigError, match="split `test`: the run has train, val"):
        pipeline.explain(run, record, "test")
