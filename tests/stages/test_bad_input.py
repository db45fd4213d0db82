"""Images, networks and settings as they should not be: a status row, or the error and exit code of the design.

One data set of good, odd and broken images; one pass over it, stopped by a low limit and gone on with under a high one.
"""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest
from conftest import COLOURS, draw_patch, small_settings
from PIL import ExifTags, Image
from typer.testing import CliRunner

from epic_ray import pipeline
from epic_ray.cli import explain, train
from epic_ray.cli.app import app
from epic_ray.config import RunConfig, build_config, dump_config
from epic_ray.errors import ConfigError, InputError, RunFailed
from epic_ray.logs import Reporter
from epic_ray.run_dir import RunDir
from epic_ray.stages.features import FeatureActor
from epic_ray.stages.image_pass import run_pass
from epic_ray.stages.images import UnitRange
from epic_ray.stages.loading import load
from epic_ray.stages.resources import resolve_resources
from epic_ray.stages.rounds import read_basis

assert explain, train  # imported for the commands they add
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

GOOD = {"train": 8, "val": 4}  # images of each class
UNIT_SIZE = 8

# --- the images


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sixteen_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def palette_with_transparency(image: Image.Image) -> bytes:
    return encoded(image.quantize(16), "PNG", transparency=b"\x00\x80\xff")


def turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return encoded(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif.tobytes(), quality=95)


def odd_files(image: Image.Image) -> dict[str, bytes]:
    """The same picture in forms that are readable, but that many readers stumble over."""
    alpha = image.copy()
    alpha.putalpha(60)
    return {
        "plain.png": encoded(image, "PNG"),
        "misnamed png.jpg": encoded(image, "PNG"),
        "alpha.png": encoded(alpha, "PNG"),
        "palette.png": palette_with_transparency(image),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG", quality=95),
        "sixteen bits.png": encoded(sixteen_bits(image), "PNG"),
        "exif.jpg": turned(image),
        "größe & 日本 #1.png": encoded(image, "PNG"),
    }


def broken_files(image: Image.Image) -> dict[str, tuple[bytes, str]]:
    """Files that no reader can read, each with how its reason begins."""
    png, jpeg = encoded(image, "PNG"), encoded(image, "JPEG")
    return {
        "empty.jpg": (b"", "empty file"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated JPEG: "),
        "truncated.png": (png[: len(png) // 2], "truncated PNG: "),
        "header only.png": (png[:20], "damaged header: "),
        "text.jpg": (b"this is a text, not a picture\n" * 9, "not an image: 270 bytes that begin with "),
        "page.gif": (b"<html>404</html>", "not an image: 16 bytes"),
        "kaputt ß.jpg": (jpeg[:100], ""),
        "white.png": (encoded(Image.new("RGB", (40, 40), "white"), "PNG"), "the classifier's features or logits are"),
    }


PICTURE = draw_patch(COLOURS["green"], 7)
BROKEN = broken_files(PICTURE)


@pytest.fixture(scope="module")
def odd_images(tmp_path_factory) -> Path:
    """Good patches; every odd and every broken kind in train; the broken kinds in val.

    The broken ones come first in train, so that they make up a whole unit of the pass.
    """
    root = tmp_path_factory.mktemp("Bilder mit Lücken")
    for split, count in GOOD.items():
        for number, (name, colour) in enumerate(sorted(COLOURS.items())):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                draw_patch(colour, 100 * number + index).save(folder / f"good-{index}.png")
        for name, (content, _) in BROKEN.items():
            (root / split / "blue" / f"0-{name}").write_bytes(content)
    for name, content in odd_files(PICTURE).items():
        (root / "train" / "green" / name).write_bytes(content)
    (root / "train" / "green" / "x.png").mkdir()
    return root


# --- the run


def odd_settings(images: Path, output: Path, **sections) -> RunConfig:
    model = {"architecture": "tests.stages.networks:odd_net"}
    return small_settings(
        images,
        output,
        **{
            "model": model,
            "features": {"unit_size": UNIT_SIZE},
            "fit": {"prototypes_per_channel": {"start": 100, "end": 40, "rounds": 2}},
            "prototypes": {"per_channel": 50},
        }
        | sections,
    )


class Listener(Reporter):
    def __init__(self) -> None:
        self.told: list[str] = []

    def say(self, text: str) -> None:
        self.told.append(text)

    @property
    def reused(self) -> list[str]:
        return [line.removesuffix(": reused") for line in self.told if line.endswith(": reused")]


class Attempt:
    """A start of the run that stops at the limit, then one under a limit that lets it through."""

    def __init__(self, images: Path, output: Path) -> None:
        low, high = ({"root": str(images), "max_failed_fraction": limit} for limit in (0.1, 0.7))
        self.config = odd_settings(images, output, data=high)
        run_file = output / "run.yaml"
        run_file.write_text(dump_config(odd_settings(images, output, data=low)), encoding="utf-8")
        self.stopped = CliRunner().invoke(app, ["train", str(run_file), "--quiet"])
        self.listener = Listener()
        self.record = pipeline.train(self.config, self.listener)
        self.run_dir = RunDir(f"{output}/small")

    def rows(self, table: str) -> list[dict]:
        return ds.dataset(self.run_dir.path(f"tables/{table}")).to_table().to_pylist()

    def status(self) -> dict[str, dict]:
        return {row["image_id"]: row for row in self.rows("images")}


@pytest.fixture(scope="module")
def attempt(odd_images, tmp_path_factory, ray_session) -> Attempt:
    return Attempt(odd_images, tmp_path_factory.mktemp("Ausgabe 1"))


def test_too_many_bad_images_end_with_3_naming_count_and_examples(attempt):
    assert attempt.stopped.exit_code == 3
    first_line = attempt.stopped.stderr.splitlines()[0]
    assert first_line.startswith(
        "InputError: train: 8 of 40 images failed (20.0%, data.max_failed_fraction is 10.0%): "
    )
    assert "train/blue/0-empty.jpg (empty file), train/blue/0-header only.png (damaged header: " in first_line
    assert f"all are listed in {attempt.run_dir}/tables/images/train; mend them or raise the limit" in first_line
    assert "Traceback" not in attempt.stopped.stderr


def test_with_the_limit_raised_the_same_command_goes_on_without_reading_an_image_again(attempt):
    assert attempt.listener.reused == ["images", "features"]
    assert attempt.record["counts"]["forwarded"] == 0


def test_with_the_limit_lowered_a_finished_run_is_refused(attempt, odd_images, tmp_path):
    copied = shutil.copytree(attempt.run_dir.root, tmp_path / "small")
    config = odd_settings(odd_images, copied.parent, data={"max_failed_fraction": 0.5})
    with pytest.raises(InputError, match=r"^val: 8 of 20 images|^train: 8 of 40 images") as caught:
        pipeline.train(odd_settings(odd_images, copied.parent, data={"max_failed_fraction": 0.0}), Reporter())
    assert "data.max_failed_fraction is 0.0%" in str(caught.value)
    assert pipeline.train(config, Reporter())["counts"]["failed"] == 16


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_broken_image_is_a_row_with_its_reason(attempt, name):
    for split in ("train", "val"):
        row = attempt.status()[f"{split}/blue/0-{name}"]
        assert row["status"] == "failed"
        assert row["reason"].startswith(BROKEN[name][1])
        assert "\n" not in row["reason"]
        assert row["predicted"] is row["logit"] is row["probability"] is None
        assert row["label"] == 0


@pytest.mark.parametrize("name", sorted(odd_files(PICTURE)))
def test_an_odd_but_readable_image_is_read(attempt, name):
    rows = attempt.status()
    row, plain = rows[f"train/green/{name}"], rows["train/green/plain.png"]
    assert (row["status"], row["reason"]) == ("ok", None)
    assert (row["width_px"], row["height_px"]) == PICTURE.size == (plain["width_px"], plain["height_px"])
    pooled = {row["image_id"]: np.array(row["pooled"]) for row in attempt.rows("features")}
    mine, theirs = pooled[f"train/green/{name}"], pooled["train/green/plain.png"]
    assert np.isfinite(mine).all()
    exact = name in ("misnamed png.jpg", "alpha.png", "größe & 日本 #1.png")
    if name != "sixteen bits.png":  # grey
        assert np.abs(mine - theirs).max() <= (1e-6 if exact else 0.3 * theirs.max())


def test_every_image_has_one_row_and_every_readable_one_features(attempt):
    rows = attempt.rows("images")
    assert len(rows) == len({row["image_id"] for row in rows}) == 60
    readable = {row["image_id"] for row in rows if row["status"] == "ok"}
    assert {row["image_id"] for row in attempt.rows("features")} == readable
    counts = attempt.record["counts"]
    assert (counts["images"], counts["failed"]) == (60, 2 * len(BROKEN))
    assert sum(attempt.record["failures"].values()) == counts["failed"]


def test_a_unit_without_a_readable_image_is_committed_all_the_same(attempt):
    assert "tables/images/train/unit-000000.parquet" in attempt.run_dir.list("tables/images")
    assert "tables/features/train/unit-000000.parquet" not in attempt.run_dir.list("tables/features")


def test_bad_images_are_no_prototypes(attempt):
    failed = {row["image_id"] for row in attempt.rows("images") if row["status"] == "failed"}
    shown = {row["image_id"] for row in attempt.rows("prototypes")}
    assert shown
    assert not shown & failed


def test_a_channel_that_is_never_active_is_fitted_and_has_purity_0(attempt):
    basis = read_basis(attempt.run_dir)
    assert basis.isfinite().all()
    assert attempt.record["basis"]["orthogonality_error"] <= 1e-5
    before = [row for row in attempt.rows("prototypes") if row["basis"] == "before" and row["channel"] == 0]
    assert before
    assert {row["purity"] for row in before} == {row["value"] for row in before} == {0.0}
    for row in attempt.rows("purity") + attempt.rows("prototypes"):
        assert np.isfinite(row["purity"])
        assert -1 <= row["purity"] <= 1
    assert {row["purity"] for row in attempt.rows("purity") if (row["basis"], row["channel"]) == ("before", 0)} == {0.0}
    for row in attempt.rows("history"):
        assert np.isfinite([row[key] for key in ("purity_start", "purity_end", "moved", "orthogonality_error")]).all()


def test_fewer_images_than_prototypes_asked_are_told_by_their_count(attempt):
    """32 readable images to fit on, 12 held out; asked are 100 to 40 in the rounds, 20 for purity, 50 in the table."""
    counts = {(row["split"], row["n"]): row["prototype_count"] for row in attempt.rows("purity")}
    assert counts == {("train", 5): 5, ("train", 20): 20, ("val", 5): 5, ("val", 20): 12}
    ranks = [row["rank"] for row in attempt.rows("prototypes") if row["channel"] == 1]
    assert sorted(set(ranks)) == list(range(1, 33))
    assert [row["prototypes_per_channel"] for row in attempt.rows("history")] == [100, 40]
    assert [row["images"] for row in attempt.rows("history")] == [32, 32]


def test_explanations_leave_bad_images_out_and_count_them(attempt):
    run, record = pipeline.open_finished(attempt.run_dir, Reporter())
    result = pipeline.explain(run, record, "val")
    assert (result.images, result.failed, result.top1_agreement) == (20, 8, 1.0)
    assert 0 <= result.max_abs_difference < 1e-4
    rows = attempt.rows("explanations")
    assert {row["image_id"] for row in rows} == {
        image_id for image_id, row in attempt.status().items() if row["split"] == "val" and row["status"] == "ok"
    }
    assert np.isfinite([[row["share"], row["score"], row["purity"]] for row in rows]).all()


def test_a_split_without_any_readable_image_is_refused_whatever_the_limit(tmp_path):
    for name in ("empty.jpg", "white.png"):
        for split in GOOD:
            path = tmp_path / "data" / split / "green" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(BROKEN[name][0])
    config = odd_settings(tmp_path / "data", tmp_path, data={"max_failed_fraction": 1.0, "labels": "none"})
    with pytest.raises(InputError, match=r"^train: 2 of 2 images failed"):
        pipeline.train(config, Reporter())


# --- faults inside Ray


def test_a_fault_in_an_actor_keeps_its_kind_and_its_message(odd_images, tmp_path, capfd):
    """A folder that turns unwritable under the pass; Ray's own talk is no part of what a person sees."""
    config = odd_settings(odd_images, tmp_path, data={"max_failed_fraction": 0.7})
    blocked = tmp_path / "small" / "tables" / "features"
    blocked.parent.mkdir(parents=True)
    blocked.write_bytes(b"a file where a folder is needed")
    with pytest.raises(InputError, match=r"tables/features/.*: cannot be written .*check rights and free space"):
        pipeline.train(config, Reporter())
    assert capfd.readouterr().err == ""


def test_a_bug_in_an_actor_is_a_failed_run_that_names_it(attempt, tmp_path, capfd):
    arguments = {"run_dir": attempt.run_dir, "model": "no settings of a model"}
    units = [UnitRange("manifest", "val", 0, 0, 8, "made anew")]
    preprocessing = load(attempt.config.model).preprocessing
    resources = resolve_resources(attempt.config.resources)
    with pytest.raises(RunFailed, match=r"^features: TypeError: .*missing \d required positional arguments"):
        run_pass("features", FeatureActor, arguments, lambda: units, preprocessing, resources, Reporter(), 0)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_images_that_change_under_a_run_are_told_by_the_fit(patches, tmp_path, workers):
    """Same sizes, other bytes: seen when the maps of the chosen images are wanted."""
    images = Path(shutil.copytree(patches, tmp_path / "patches"))
    config = small_settings(images, tmp_path, features={"map_budget_bytes": 0}, fit={"workers": workers})
    pipeline.train(config, Reporter())
    run_dir = RunDir(str(tmp_path / "small"))
    for folder in ("maps", "fit"):
        run_dir.delete_folder(folder)
    for stage in ("fit", "prototypes"):
        run_dir.drop_mark(stage)
    for file in images.rglob("*.png"):
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(InputError, match=r"was read in the pass, but cannot be read again .*the data set changed"):
        pipeline.train(config, Reporter())


# --- a run folder that holds another configuration


@pytest.fixture
def again(attempt, odd_images, tmp_path) -> Callable[..., tuple[Listener, RunDir]]:
    """Starts the finished run anew in a copy of its folder, with other settings."""
    copied = shutil.copytree(attempt.run_dir.root, tmp_path / "small")

    def start(force: bool = True, **sections) -> tuple[Listener, RunDir]:
        values = attempt.config.model_dump()
        values["output"] = {"root": str(tmp_path)}
        for name, section in sections.items():
            values[name] = values[name] | section
        listener = Listener()
        pipeline.train(build_config(values, "test"), listener, force)
        return listener, RunDir(str(copied))

    return start


def test_another_configuration_in_the_folder_is_refused_naming_what_differs(again):
    with pytest.raises(ConfigError) as caught:
        again(force=False, fit={"seed": 1}, prototypes={"per_channel": 3}, explain={"pictures": 1})
    assert caught.value.exit_code == 2
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("holds a run with other settings")
    assert lines[1:3] == ["  fit.seed: 42 -> 1", "  prototypes.per_channel: 50 -> 3"]
    assert lines[3:] == ["choose another name (--set name=...), or pass --force to redo here what depends on them"]


def test_settings_that_decide_where_and_how_fast_may_change(again):
    listener, _ = again(force=False, resources={"feature_actors": 2}, fit={"workers": 0}, explain={"pictures": 1})
    assert listener.reused == ["images", "features", "fit", "prototypes"]


def test_force_redoes_only_what_depends_on_the_changed_setting(again, attempt):
    listener, run_dir = again(prototypes={"per_channel": 3})
    assert listener.reused == ["images", "features", "fit"]
    table = ds.dataset(run_dir.path("tables/prototypes")).to_table(columns=["rank"])
    assert max(table["rank"].to_pylist()) == 3
    assert run_dir.read_mark("fit") == attempt.run_dir.read_mark("fit")
    listener, run_dir = again(prototypes={"per_channel": 3}, fit={"seed": 1})
    assert listener.reused == ["images", "features"]
    assert run_dir.read_mark("features") == attempt.run_dir.read_mark("features")


def test_force_leaves_no_file_of_the_settings_before(again):
    """Larger units are fewer files: those of the smaller ones must not be read along."""
    listener, run_dir = again(features={"unit_size": 64})
    assert listener.reused == ["images"]
    for table in ("images", "features"):
        files = run_dir.list(f"tables/{table}")
        assert files == [f"tables/{table}/{split}/unit-000000.parquet" for split in ("train", "val")]
