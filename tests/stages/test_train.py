"""The whole training path on a real Ray, against plain loops over the same images."""

from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest
import torch
from PIL import Image

from epic_ray import pipeline
from epic_ray.config import RunConfig
from epic_ray.logs import Reporter
from epic_ray.run_dir import RunDir
from epic_ray.stages.loading import load
from epic_ray.tables import TABLES, read_table

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def run_once(config: RunConfig) -> tuple[dict, RunDir]:
    record = pipeline.train(config, Reporter())
    return record, RunDir(f"{config.output.root}/{config.name}")


def all_rows(run_dir: RunDir, table: str) -> list[dict]:
    rows = ds.dataset(run_dir.path(f"tables/{table}")).to_table().to_pylist()
    keys = [key for key in ("basis", "split", "sign", "position", "channel", "n", "rank", "round") if key in rows[0]]
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


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [7, 64, 512])
def test_prototypes_equal_a_brute_force_loop(settings, batch_size):
    """Ids and order, with repeated images (ties) and 90 images in batches that do not divide them."""
    config = settings(name=f"batch-{batch_size}", resources={"batch_size": batch_size}, prototypes={"per_channel": 20})
    _, run_dir = run_once(config)
    ids, maps, _ = loop_over_images(config, "train")
    for basis_name, basis in (("before", torch.eye(maps.shape[2])), ("after", pipeline.read_basis(run_dir))):
        rotated = torch.einsum("nsd,kd->nsk", maps, basis)
        for sign_name, sign in (("positive", 1), ("negative", -1)):
            table = [
                row
                for row in all_rows(run_dir, "prototypes")
                if (row["basis"], row["sign"]) == (basis_name, sign_name)
            ]
            for channel in range(maps.shape[2]):
                mean = sign * rotated[:, :, channel].mean(dim=1)
                rows = [row for row in table if row["channel"] == channel]
                assert [row["rank"] for row in rows] == list(range(1, 21))
                found = [ids.index(row["image_id"]) for row in rows]
                values = mean[found]
                # the run's order is right, and nothing better was left out; what is equal goes by position
                assert (values[:-1] - values[1:] >= -2e-6).all()
                rest = mean[[n for n in range(len(ids)) if n not in found]]
                assert rest.max() <= values[-1] + 2e-6
                order = sorted(range(len(ids)), key=lambda n: (-round(float(mean[n]), 5), n))[:20]
                if len({round(float(value), 5) for value in mean}) == len(mean):
                    assert found == order
                for row, n in zip(rows, found, strict=True):
                    cell = int((sign * rotated[n, :, channel]).argmax())
                    z = maps[n, cell]
                    purity = float(sign * (z @ basis[channel]) / z.norm()) if z.norm() > 0 else 0.0
                    assert row["purity"] == pytest.approx(purity, abs=1e-5)
                    assert row["value"] == pytest.approx(float(sign * mean[n]), abs=1e-5)
