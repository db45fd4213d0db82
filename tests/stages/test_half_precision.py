"""Runs whose features are stored in half precision, and runs that keep more or less of them in memory."""

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import torch
from conftest import small_settings, write_patches
from PIL import Image

from epic_ray import pipeline
from epic_ray.config import RunConfig
from epic_ray.errors import ConfigError
from epic_ray.logs import Reporter
from epic_ray.method.topk import search
from epic_ray.run_dir import RunDir
from epic_ray.stages.features import NON_FINITE, TOO_LARGE
from epic_ray.stages.rounds import read_basis

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def run_once(config: RunConfig) -> tuple[dict, RunDir]:
    return pipeline.train(config, Reporter()), RunDir(f"{config.output.root}/{config.name}")


def rows_of(run_dir: RunDir, table: str, split: str | None = None) -> list[dict]:
    rows = ds.dataset(run_dir.path(f"tables/{table}")).to_table().to_pylist()
    return [row for row in rows if split in (None, row.get("split"))]


def pooled_of(run_dir: RunDir, split: str) -> np.ndarray:
    rows = sorted(rows_of(run_dir, "features", split), key=lambda row: row["position"])
    return np.stack([row["pooled"] for row in rows])


@pytest.fixture(scope="module")
def single(patches, tmp_path_factory, ray_session) -> tuple[dict, RunDir]:
    return run_once(small_settings(patches, tmp_path_factory.mktemp("single")))


@pytest.fixture(scope="module")
def half(patches, tmp_path_factory, ray_session) -> tuple[dict, RunDir]:
    return run_once(small_settings(patches, tmp_path_factory.mktemp("half"), features={"dtype": "float16"}))


def test_features_in_half_precision_are_those_of_single_rounded(single, half):
    schema = ds.dataset(half[1].path("tables/features")).schema
    assert schema.field("pooled").type == pa.fixed_shape_tensor(pa.float16(), [40])
    for split in ("train", "val"):
        mine, theirs = pooled_of(half[1], split), pooled_of(single[1], split)
        assert (mine == theirs.astype(np.float16)).all()
        assert (mine != theirs).any()
    logits = [[row["logits"] for row in rows_of(run, "features/val")] for _, run in (half, single)]
    assert logits[0] == logits[1]


def test_prototypes_are_the_exact_top_of_the_features_as_stored(half):
    """Scores in single precision from features in half: what a plain search of the table finds."""
    pooled = torch.tensor(pooled_of(half[1], "train"))
    rows = rows_of(half[1], "prototypes")
    for name, basis in (("before", torch.eye(40)), ("after", read_basis(half[1]))):
        for sign_name, sign in (("positive", 1), ("negative", -1)):
            found = search([(torch.arange(len(pooled)), pooled)], basis, 5, sign)
            own = [row for row in rows if (row["basis"], row["sign"]) == (name, sign_name)]
            values = torch.tensor([row["value"] for row in sorted(own, key=lambda row: (row["channel"], row["rank"]))])
            assert (values.view(40, 5) - sign * found.values).abs().max() < 1e-6


def test_a_run_in_half_precision_explains_the_same_classifier(single, half):
    for mine, theirs in zip(rows_of(half[1], "images"), rows_of(single[1], "images"), strict=True):
        assert mine == theirs  # the classifier's own logits and their split are measured before anything is rounded
    record = half[0]
    assert record["top1"] == single[0]["top1"]
    assert record["logits"]["top1_agreement"] == 1.0
    assert 1e-6 < record["logits"]["max_abs_difference"] < 1e-2  # from the features as stored: the README says so
    assert record["basis"]["orthogonality_error"] < 1e-5


def test_another_type_of_features_is_another_run(patches, half):
    config = small_settings(patches, str(half[1]).rsplit("/", 1)[0])
    with pytest.raises(ConfigError, match=r"features.dtype: 'float16' -> 'float32'"):
        pipeline.train(config, Reporter())


def test_an_image_beyond_half_precision_is_a_failed_row_that_says_so(tmp_path):
    root = write_patches(tmp_path / "images", {"train": 6, "val": 3})
    Image.new("RGB", (40, 40), "white").save(root / "train" / "red" / "white.png")
    Image.new("RGB", (40, 40), "black").save(root / "train" / "blue" / "black.png")
    never = {"train/blue/black.png": NON_FINITE}
    for dtype, reasons in (("float16", never | {"train/red/white.png": TOO_LARGE}), ("float32", never)):
        config = small_settings(
            root,
            tmp_path / dtype,
            model={"architecture": "tests.stages.networks:loud_net", "tolerance": 1e-3},
            data={"root": str(root), "max_failed_fraction": 0.2},
            features={"dtype": dtype},
            fit={"prototypes_per_channel": {"start": 5, "end": 5, "rounds": 1}},
        )
        record, run_dir = run_once(config)
        failed = [row for row in rows_of(run_dir, "images") if row["status"] == "failed"]
        assert {row["image_id"]: row["reason"] for row in failed} == reasons
        assert record["counts"]["failed"] == len(reasons)
        assert np.isfinite(pooled_of(run_dir, "train")).all()


def test_a_plan_halves_the_bytes_of_features_in_half_precision(patches, tmp_path):
    sizes = {}
    for dtype in ("float32", "float16"):
        config = small_settings(patches, tmp_path, features={"dtype": dtype, "map_budget_bytes": 0})
        sizes[dtype] = pipeline.plan(config, Reporter())["stages"][1]["rough_bytes"]
    assert sizes["float32"] - sizes["float16"] == 2 * 40 * 135


def test_what_the_fit_keeps_in_memory_changes_nothing(patches, single, tmp_path):
    _, run_dir = run_once(small_settings(patches, tmp_path, resources={"feature_cache_bytes": 0}))
    for name in ("features", "prototypes", "purity", "history"):
        assert rows_of(run_dir, name) == rows_of(single[1], name)
    assert torch.equal(read_basis(run_dir), read_basis(single[1]))


def test_a_finished_run_goes_on_with_another_cache(patches, single):
    folder = str(single[1]).rsplit("/", 1)[0]
    record = pipeline.train(small_settings(patches, folder, resources={"feature_cache_bytes": 1000}), Reporter())
    assert record["counts"]["forwarded"] == 0
