"""Explaining: one new image by a finished run, and a whole split against the feature pass.

    python benchmarks/explain.py [--images 1024] [--repeats 5] [--photos]

One image: the command `epic-ray explain RUN IMAGE`, from the shell, and what of it comes after its imports: opening the
run, loading and proving the classifier, the explanation, its picture with the prototypes. A split: images a second of
`epic-ray explain --split val`, steady, against those of the pass that `train` made of as many images of the same kind.
Images and network as in pass.py.
"""

import argparse
import importlib
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench

pass_benchmark = importlib.import_module("pass")

TIMED = """
import sys, time
import timm, torch, torchvision
from epic_ray import pipeline
from epic_ray.cli import explain, main
from epic_ray.report import explained
from epic_ray.method import backbones
start = time.perf_counter()
try:
    main()
finally:
    print(f"after imports: {time.perf_counter() - start:.3f}", file=sys.stderr)
"""


def main() -> None:
    """Trains a run, then times both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024, help="images of each split")
    parser.add_argument("--unit", type=int, default=128, help="images of a unit")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each")
    parser.add_argument("--photos", action="store_true", help="the shared photos and weights")
    arguments = parser.parse_args()
    print(bench.heading() + "\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, files = pass_benchmark.prepare(folder, 2 * arguments.images, arguments.photos)
        hold_out_half(folder, files)
        run, passed = train(model, folder, arguments.unit)
        one = [explain_one(run, next((folder / "images/val").rglob("*.*"))) for _ in range(arguments.repeats)]
        rates = [explain_split(run) for _ in range(arguments.repeats)]
    print(f"{arguments.images} images to fit on, as many to explain, units of {arguments.unit}\n")
    rows = [
        {"what": "one image, after imports", "median": f"{statistics.median(part for part, _ in one):.2f} s"},
        {"what": "one image, the command", "median": f"{statistics.median(whole for _, whole in one):.2f} s"},
        {"what": "the pass of train, steady", "median": f"{passed:.1f} images/s"},
        {"what": "explain --split val, steady", "median": f"{statistics.median(rates):.1f} images/s"},
        {"what": "ratio", "median": f"{statistics.median(rates) / passed:.2f}"},
    ]
    print(bench.table(rows))


def hold_out_half(folder: Path, files: list[str]) -> None:
    """Every other file becomes one of `val`."""
    for file in map(Path, files[1::2]):
        target = folder / "images/val" / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)


def train(model: dict[str, Any], folder: Path, unit: int) -> tuple[Path, float]:
    """A finished run, and the steady rate of its pass in images a second."""
    from epic_ray import pipeline
    from epic_ray.config import build_config
    from epic_ray.logs import Reporter

    settings = {
        "name": "run",
        "model": model,
        "data": {"root": str(folder / "images"), "labels": "none"},
        "features": {"unit_size": unit, "map_budget_bytes": 0},
        "output": {"root": str(folder / "runs")},
    }
    pipeline.train(build_config(settings, "benchmark"), Reporter())
    return folder / "runs/run", steady_rate(folder / "runs/run/tables/images", unit)


def explain_one(run: Path, image: Path) -> tuple[float, float]:
    """Seconds after imports, and of the whole command."""
    words = ["explain", str(run), str(image), "--out", str(run.parent)]
    timed = subprocess.run([sys.executable, "-c", TIMED, *words], capture_output=True, text=True, check=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "epic_ray", *words], stdout=subprocess.DEVNULL, check=True)
    return float(timed.stderr.rsplit("after imports: ", 1)[1]), time.perf_counter() - start


def explain_split(run: Path) -> float:
    """The steady rate of the pass of `explain`, in images a second; what it left is removed first."""
    from epic_ray import pipeline
    from epic_ray.logs import Reporter
    from epic_ray.run_dir import RunDir

    where = RunDir(str(run))
    where.delete_folder("tables/explanations")
    opened, record = pipeline.open_finished(where, Reporter())
    pipeline.explain(opened, record, "val")
    return steady_rate(run / "tables/explanations", opened.config.features.unit_size)


def steady_rate(folder: Path, unit: int) -> float:
    """Images a second from the commit of every actor's first unit to the last."""
    import ray

    actors = max(1, min(bench.cores(), int(ray.cluster_resources().get("GPU", 0)) or bench.cores()))
    commits = sorted(file.stat().st_mtime for file in folder.rglob("unit-*"))
    return (len(commits) - actors) * unit / (commits[-1] - commits[actors - 1])


if __name__ == "__main__":
    main()
