"""The same images give the same tables, whichever source holds them, and wherever the run is written."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CLASSES, small_settings, write_patches
from stores import Store, s3  # noqa: F401

from epic_ray import pipeline
from epic_ray.config import RunConfig
from epic_ray.logs import Reporter
from epic_ray.report.explained import draw_split
from epic_ray.run_dir import RunDir
from epic_ray.storage import join
from epic_ray.tables import read_tables

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
KEPT = {"train": 12, "val": 6}  # of each class
MAPS = {"map_budget_bytes": 0, "unit_size": 16}  # chosen images are read a second time, here and there


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_patches(tmp_path_factory.mktemp("equal") / "patches", KEPT)


def files_of(folder: Path, split: str) -> list[Path]:
    return sorted((folder / split).rglob("*.png"), key=lambda path: path.parts)


def as_parquet(folder: Path, target: Path) -> dict:
    """Two files a split, several row groups each."""
    for split in KEPT:
        files = files_of(folder, split)
        for number, part in enumerate((files[:10], files[10:])):
            images = pa.array([{"bytes": file.read_bytes(), "path": file.name} for file in part])
            labels = pa.array([CLASSES.index(file.parent.name) for file in part], pa.int64())
            target.mkdir(exist_ok=True)
            table = pa.table({"image": images, "label": labels})
            pq.write_table(table, target / f"{split}-{number:05d}.parquet", row_group_size=4)
    return {"root": str(target), "splits": {split: f"{split}-*.parquet" for split in KEPT}}


def as_webdataset(folder: Path, target: Path) -> dict:
    target.mkdir()
    for split in KEPT:
        files = files_of(folder, split)
        for number, part in enumerate((files[:10], files[10:])):
            with tarfile.open(target / f"{split}-{number:04d}.tar", "w") as tar:
                for file in part:
                    for suffix, data in (("png", file.read_bytes()), ("cls", file.parent.name.encode())):
                        member = tarfile.TarInfo(f"{file.parent.name}/{file.stem}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
    return {"root": str(target), "splits": {split: f"{split}-*.tar" for split in KEPT}}


def as_csv(folder: Path, target: Path) -> dict:
    for split in KEPT:
        rows = [f"{file.relative_to(folder)},{file.parent.name}" for file in files_of(folder, split)]
        (folder / f"{split}.csv").write_text("\n".join(["uri,label", *rows]) + "\n")
    return {"root": str(folder), "splits": {split: f"{split}.csv" for split in KEPT}}


@pytest.fixture(scope="module")
def tables(folder, tmp_path_factory) -> Callable[..., dict[str, pa.Table]]:
    """Runs a configuration to its end, with an explanation of `val`; gives its tables, ids replaced by positions."""

    def run(config: RunConfig) -> dict[str, pa.Table]:
        pipeline.train(config, Reporter())
        run_dir = RunDir(join(config.output.root, config.name))
        run, record = pipeline.open_finished(run_dir, Reporter())
        pipeline.explain(run, record, "val")
        assert len(draw_split(run, "val", 1, 2, Reporter())) == 1
        assert run_dir.list("attempts") == run_dir.list("locks") == []
        return tables_of(run_dir)

    return run


def tables_of(run_dir: RunDir) -> dict[str, pa.Table]:
    names = {}
    for split in KEPT:
        manifest = read_tables(run_dir, [f"tables/manifest/{split}.parquet"])
        positions = zip(manifest["image_id"].to_pylist(), manifest["position"].to_pylist(), strict=True)
        names |= {name: f"{split} {position}" for name, position in positions}
    found = {}
    for name in ("images", "features/train", "features/val", "prototypes", "purity", "history", "explanations"):
        table = read_tables(run_dir, run_dir.list(f"tables/{name}"))
        if "image_id" in table.column_names:
            ids = pa.array([names[image_id] for image_id in table["image_id"].to_pylist()])
            table = table.set_column(table.column_names.index("image_id"), "image_id", ids)
        found[name] = table.combine_chunks()
    return found


@pytest.fixture(scope="module")
def reference(folder, tables, tmp_path_factory) -> dict[str, pa.Table]:
    """The tables of the folders."""
    return tables(small_settings(folder, tmp_path_factory.mktemp("reference"), features=MAPS))


@pytest.mark.parametrize("form", [as_parquet, as_webdataset, as_csv])
def test_the_same_images_give_the_same_tables_from_any_source(form, folder, tables, reference, tmp_path):
    data = form(folder, tmp_path / "data")
    same(tables(small_settings(Path(data["root"]), tmp_path / "runs", data=data, features=MAPS)), reference)


def same(found: dict[str, pa.Table], expected: dict[str, pa.Table]) -> None:
    for name, table in expected.items():
        assert found[name].equals(table), name
    assert {name: table.num_rows for name, table in found.items()}["images"] == 3 * (12 + 6)


@pytest.mark.parametrize("form", [None, as_parquet, as_webdataset])
def test_images_and_run_on_an_object_store_give_the_same_tables(form, folder, tables, reference, tmp_path, s3: Store):  # noqa: F811
    """Both on the store; the maps kept there too."""
    query = f"?endpoint_override={s3.endpoint}&region=us-east-1"
    bucket = s3.new_bucket().partition("?")[0]
    data = form(folder, tmp_path / "data") if form else {"root": str(folder)}
    s3.upload(Path(data["root"]), f"{bucket}/images")
    data["root"] = f"{bucket}/images{query}"
    features = MAPS if form else {"unit_size": 16}
    config = small_settings(Path("unused"), Path("unused"), data=data, features=features)
    found = tables(
        config.model_copy(update={"output": config.output.model_copy(update={"root": f"{bucket}/runs{query}"})})
    )
    same(found, reference)
