"""Peak memory of the driver against the number of images: a real run over a synthetic data set of each size.

    python benchmarks/driver_memory.py 10000 200000 1280000 [--folder DIR]

The images are tiny PNGs in Parquet files, 10,000 different ones repeated; the network is the demo's. What grows with
the number of images in the process that drives the run would stop it at ImageNet's size; nothing should.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROWS_PER_FILE = 64_000
DIFFERENT = 10_000


def main() -> None:
    """Makes the data sets, runs `epic-ray train` on each in a process of its own, prints a row a size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=int, nargs="+", help="images of each run")
    parser.add_argument("--folder", type=Path, help="where data and runs go (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        images = encode(DIFFERENT)
        rows = [row(folder, images, count) for count in arguments.rows]
    print(f"{bench.heading()}\n\n{bench.table(rows)}")


def row(folder: Path, images: list[bytes], count: int) -> dict[str, Any]:
    """A run over so many images, told on stderr as soon as it is done."""
    record, seconds = measure(folder / str(count), images, count)
    peak = record["peak_memory_bytes"]
    told = {
        "images": f"{count:,}",
        "units": record["units"]["all"],
        "listing s": f"{record['seconds']['images']:.1f}",
        "pass s": f"{record['seconds']['features']:.0f}",
        "images/s": f"{record['images_per_second']:,.0f}",
        "driver peak": f"{peak['driver'] / 2**20:,.0f} MiB",
        "actor peak": f"{peak['feature_actor'] / 2**20:,.0f} MiB",
        "run s": f"{seconds:.0f}",
    }
    print(told, file=sys.stderr, flush=True)
    return told


def encode(count: int) -> list[bytes]:
    """Small pictures of one blurred spot each, as PNG."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((32, 32)).save(buffer, "PNG", compress_level=1)
        encoded.append(buffer.getvalue())
    return encoded


def measure(folder: Path, images: list[bytes], rows: int) -> tuple[dict, float]:
    """The record of one run, and its seconds as a whole."""
    write_split(folder / "images", "train", images, rows * 9 // 10)
    write_split(folder / "images", "val", images, rows - rows * 9 // 10)
    settings = {
        "name": "run",
        "model.architecture": "epic_ray.demo:digit_net",
        "model.source": "factory",
        "model.weights": "random",
        "model.preprocessing": {"resize": None, "crop": 32, "mean": [0.5] * 3, "std": [0.5] * 3},
        "data.root": str(folder / "images"),
        "data.splits": {"train": "train-*.parquet", "val": "val-*.parquet"},
        "features.map_budget_bytes": 0,
        "fit.prototypes_per_channel": {"start": 20, "end": 5, "rounds": 3},
        "output.root": str(folder / "runs"),
    }
    command = [sys.executable, "-m", "epic_ray", "train", "--quiet"]
    for key, value in settings.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    return json.loads((folder / "runs/run/run.json").read_text()), seconds


def write_split(folder: Path, split: str, images: list[bytes], rows: int) -> None:
    """Parquet files in the layout of the Hugging Face hub."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, rows, ROWS_PER_FILE)):
        places = range(start, min(start + ROWS_PER_FILE, rows))
        column = pa.array([{"bytes": images[place % len(images)], "path": None} for place in places])
        labels = pa.array([place % 10 for place in places], pa.int64())
        table = pa.table({"image": column, "label": labels})
        pq.write_table(table, folder / f"{split}-{number:05d}.parquet", row_group_size=1000)


if __name__ == "__main__":
    main()
