"""Real photos on a real cluster of this machine, submitted, collected and explained; needs the shared data."""

import sys
from pathlib import Path

import pytest

from epic_ray import pipeline
from epic_ray.config import build_config, dump_config
from epic_ray.logs import Reporter
from epic_ray.run_dir import RunDir

sys.path.append(str(Path(__file__).resolve().parents[1] / "submission"))
from heads import client_environment, epic_ray, start_head
from test_cluster import basis, tables
from test_photos import few_photos

__all__ = ["few_photos"]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(900)]


def test_photos_give_the_same_tables_on_a_cluster_as_on_one_machine(shared, few_photos, tmp_path, ray_session):
    values = {
        "name": "photos",
        "model": {
            "architecture": "resnet18",
            "source": "torchvision",
            "weights": str(shared / "weights/resnet18_imagenette10.safetensors"),
            "class_count": 10,
            "preprocessing": {"resize": 224, "crop": 224, "interpolation": "bilinear"},
        },
        "data": {"root": str(few_photos)},
        "features": {"unit_size": 64},
        "resources": {"device": "cpu", "gpus_per_actor": 0, "threads_per_actor": 1},
        "output": {"root": str(tmp_path / "runs")},
    }
    (tmp_path / "run.yaml").write_text(dump_config(build_config(values, "test")), encoding="utf-8")
    alone = build_config(values | {"output": {"root": str(tmp_path / "alone")}}, "test")
    pipeline.train(alone, Reporter())
    run, record = pipeline.open_finished(RunDir(f"{tmp_path}/alone/photos"), Reporter())
    pipeline.explain(run, record, "val")

    with start_head(workers=2, cpus=2, head_cpus=0) as head:
        for words in (
            ("submit", "train", "--no-wait"),
            ("status",),
            ("logs", "-f"),
            ("collect", "photos", "copy"),
            ("submit", "explain", "--split", "val"),
            ("collect", "photos", "copy"),
        ):
            done = epic_ray(
                *words, "--address", head.address, folder=tmp_path, environment=client_environment(), seconds=600
            )
            assert done.returncode == 0, (words, done.stderr)
    # the literal command, in the laptop's folder, where the run and a copy of it are seen
    for words in (("explain", "--split", "val"), ("explain", "copy", "--split", "val")):
        done = epic_ray(*words, folder=tmp_path, seconds=600)
        assert done.returncode == 0, (words, done.stderr)
        assert "photos: " in done.stdout
    assert tables(tmp_path / "copy") == tables(tmp_path / "alone" / "photos")
    assert basis(tmp_path / "copy") == basis(tmp_path / "alone" / "photos")
