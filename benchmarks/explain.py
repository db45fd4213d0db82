"""Explaining: one new image by a finished run, and a whole split against the feature pass.

    python benchmarks/explain.py [--images 1024] [--repeats 5] [--photos]

One image: the command `epic-ray explain RUN IMAGE`, from the shell, and what of it comes after its imports: opening the
run, loading and proving the classifier, the explanation, its picture with the prototypes. A split: the pass of
`epic-ray explain --split val` against the pass that `train` makes of as many images of the same kind, in turn; whole
and steady are what pass.py calls so, with decoding ahead charged to both. Images and network as in pass.py.
"""

import argparse
import importlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import bench
from bare_loop import BareLoops, Loop

from epic_ray.stages.resources import available_cores

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
        decode = decoding_alone(model, files[: arguments.images])
        hold_out_half(folder, files)
        run = train(model, folder, arguments.unit)
        image = next((folder / "images/val").rglob("*.*"))
        one = [explain_one(run, image) for _ in range(arguments.repeats)]
        passes = [
            (explain_split(run), pass_benchmark.time_pass(model, folder, arguments.unit, f"pass-{number}"))
            for number in range(arguments.repeats)
        ]
    after, whole = (statistics.median(times) for times in zip(*one, strict=True))
    print(bench.table([{"one image": "after imports", "s": f"{after:.2f}"}, {"one image": "all", "s": f"{whole:.2f}"}]))
    print(f"\n{arguments.images} images to fit on, as many to explain, units of {arguments.unit}\n")
    pairs = [(explained.rates(decode), passed.rates(decode)) for explained, passed in passes]
    print(bench.table(row(pairs, figure) for figure in ("whole", "steady")))
    ratio = statistics.median(ours["steady"] / base["steady"] for ours, base in pairs)
    bench.conclude(
        [
            bench.verdict("s of one image, after imports", "≤ 2", f"{after:.2f}", after <= 2),
            bench.verdict("images/s over those of the pass, steady", "≥ 0.85", f"{ratio:.2f}", ratio >= 0.85),
        ]
    )


def row(pairs: list[tuple[dict[str, float], dict[str, float]]], figure: str) -> dict[str, Any]:
    """A figure of both passes; the ratio is of each pair."""
    ratios = [ours[figure] / base[figure] for ours, base in pairs]
    return {
        "figure": figure,
        "explain images/s": f"{statistics.median(ours[figure] for ours, _ in pairs):.1f}",
        "pass images/s": f"{statistics.median(base[figure] for _, base in pairs):.1f}",
        "ratio": f"{statistics.median(ratios):.2f}",
        "range": f"{min(ratios):.2f} to {max(ratios):.2f}",
        "runs": len(ratios),
    }


def decoding_alone(model: dict[str, Any], files: list[str]) -> float:
    """Images a second of decoding alone, a process a core."""
    with BareLoops(model, available_cores()) as loops:
        loop = Loop(available_cores(), 1, 64, False)
        return statistics.median(loops.run(files, loop, "decode") for _ in range(3))


def hold_out_half(folder: Path, files: list[str]) -> None:
    """Every other file becomes one of `val`."""
    for file in map(Path, files[1::2]):
        target = folder / "images/val" / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)


def train(model: dict[str, Any], folder: Path, unit: int) -> Path:
    """A finished run."""
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
    return folder / "runs/run"


def explain_one(run: Path, image: Path) -> tuple[float, float]:
    """Seconds after imports, and of the whole command."""
    words = ["explain", str(run), str(image), "--out", str(run.parent)]
    timed = subprocess.run([sys.executable, "-c", TIMED, *words], capture_output=True, text=True, check=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "epic_ray", *words], stdout=subprocess.DEVNULL, check=True)
    return float(timed.stderr.rsplit("after imports: ", 1)[1]), time.perf_counter() - start


def explain_split(run: Path) -> Any:
    """The pass of `explain`, timed (`Passed` of pass.py); what it left before is removed first."""
    from epic_ray import pipeline
    from epic_ray.logs import Reporter
    from epic_ray.run_dir import RunDir

    shutil.rmtree(run / "tables/explanations", ignore_errors=True)
    seen: list[Any] = []

    def timed_pass(*arguments: Any) -> Any:
        start = time.perf_counter()
        totals = run_pass(*arguments, decoder=pass_benchmark.TimedDecode)
        seen.append((len(totals.actors), time.perf_counter() - start))
        return totals

    run_pass = pipeline.run_pass
    opened, record = pipeline.open_finished(RunDir(str(run)), Reporter())
    with mock.patch.object(pipeline, "run_pass", timed_pass):
        pipeline.explain(opened, record, "val")
    return pass_benchmark.Passed.of(run, "explanations", *seen[0])


if __name__ == "__main__":
    main()
