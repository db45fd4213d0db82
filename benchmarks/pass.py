"""The feature pass against a bare loop that decodes and infers the same files on the same cores.

    python benchmarks/pass.py [--images 1536] [--units 128 256] [--repeats 5] [--photos]

The bare loop reads, decodes and forwards the files and keeps pooled features and predictions in memory; it writes
nothing, checks nothing and loses everything when it dies. It has all cores, in the fastest of several settings: one
process with all threads, a process a core, or (from 8 cores) processes of four threads; batches small or large;
decoding in line or ahead. Its imports and the loading of its model are not counted, and no Ray stands beside it.

Ours is the pass of the stage `features`, from listed images to committed Parquet files, for each size of unit. Three
figures, each over the bare loop's images/s of the same pair:

* whole: all images over all seconds, the start of the actors (imports, loading) included; that of Ray is not.
* steady: the images committed after every actor had its first unit done (commit number `actors`), over the seconds
  from then to the last commit. What was decoded beyond those first units by then is charged: its images over the
  images/s of decoding alone are added to the seconds. This is the figure of the demand.
* at least: as steady, but what was decoded before the window does not count at all, although it is forwarded within; 0
  where all of it was.

Images are synthetic JPEGs of 500 x 375, or with --photos those beside the repository; the network is ResNet-18.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench
import pyarrow as pa
from bare_loop import BareLoops, Loop, best_loop
from made_images import synthetic_jpeg

from epic_ray.run_dir import unit_file
from epic_ray.stages.decode_unit import DecodeUnit
from epic_ray.stages.images import UnitRange
from epic_ray.stages.resources import available_cores

LEAST_RATIO = 0.9
FIGURES = ("whole", "steady", "at least")


def main() -> None:
    """Finds the bare loop's best setting, then times both in turn for each size of unit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1536, help="images of a run")
    parser.add_argument("--units", type=int, nargs="+", default=[128, 256], help="images of a unit, several to try")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each")
    parser.add_argument("--photos", action="store_true", help="the shared photos and weights")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, files = prepare(folder, arguments.images, arguments.photos)
        print(bench.heading() + "\n")
        with BareLoops(model, available_cores()) as loops:
            loop, trials = best_loop(loops, files)
            print(bench.table([{"bare loop": str(tried), "images/s": f"{rate:.1f}"} for tried, rate in trials.items()]))
            print(f"\nThe bare loop from here on: {loop}; {len(files)} images.\n", flush=True)
            pairs = {
                unit: [compare(loops, model, files, loop, unit, folder, run) for run in range(arguments.repeats)]
                for unit in arguments.units
            }
            forwards = statistics.median(loops.run(files, loop, "compute") for _ in range(3))
    print(bench.table(row for unit in pairs for row in rows_of(unit, pairs[unit])) + "\n")
    decode = statistics.median(pair.decode for unit in pairs for pair in pairs[unit])
    alone = {"decode": decode, "forwards": forwards}
    print(bench.table([{"part alone": name, "images/s": f"{rate:.1f}"} for name, rate in alone.items()]))
    bench.conclude(verdict(pairs))


def prepare(folder: Path, count: int, photos: bool) -> tuple[dict[str, Any], list[str]]:
    """The settings of the model, and the files: under `train` of `folder`, so that a run finds them."""
    if photos:
        shared = bench.shared_folder()
        found = sorted((shared / "data/photos/train").glob("*/*"))[:count]
        for file in found:
            target = folder / "images/train" / file.parent.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
        weights, classes, resize = str(shared / "weights/resnet18_imagenette10.safetensors"), 10, 224
    else:
        for number in range(count):
            target = folder / f"images/train/class{number % 10}/{number:06d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(synthetic_jpeg(number))
        weights, classes, resize = "random", 10, 256
    model = {
        "architecture": "resnet18",
        "source": "torchvision",
        "weights": weights,
        "class_count": classes,
        "preprocessing": {"resize": resize, "crop": 224, "interpolation": "bilinear"},
    }
    return model, sorted(str(file) for file in (folder / "images").rglob("*.*"))


class TimedDecode(DecodeUnit):
    """Decodes as ever, and notes beside the run when it did."""

    def _decode(self, unit: UnitRange) -> pa.Table:
        begin = time.time()
        rows = super()._decode(unit)
        about = {"split": unit.split, "number": unit.number, "rows": unit.count, "begin": begin, "end": time.time()}
        text = json.dumps(about).encode()
        self._run_dir.publish(
            f"timed/{unit.split}-{unit.number}", lambda file: file.write(text) and None, durable=False
        )
        return rows


@dataclass(frozen=True)
class Passed:
    """A pass that was timed. The window is from the first commit of every actor to the last of all.

    ahead: images beyond those first units that were decoded when the window opened.
    """

    images: int
    seconds: float
    window_images: int
    window_seconds: float
    ahead: float

    @classmethod
    def of(cls, run: Path, table: str, actors: int, seconds: float) -> "Passed":
        """From the notes of `TimedDecode` and the files of the table that commits a unit."""
        notes = [json.loads(file.read_text()) for file in (run / "timed").iterdir()]
        commits = [(run / unit_file(table, note["split"], note["number"])).stat().st_mtime for note in notes]
        if len(notes) <= actors:
            sys.exit(f"{len(notes)} unit(s) for {actors} actor(s): nothing to time; more --images, or smaller units")
        opens = sorted(commits)[actors - 1]
        within = sum(note["rows"] for note, commit in zip(notes, commits, strict=True) if commit > opens)
        images = sum(note["rows"] for note in notes)
        decoded = sum(
            note["rows"] * min(1.0, max(0.0, (opens - note["begin"]) / (note["end"] - note["begin"]))) for note in notes
        )
        return cls(images, seconds, within, max(commits) - opens, max(0.0, decoded - (images - within)))

    def rates(self, decode: float) -> dict[str, float]:
        """Images a second: the three figures. decode: images a second of decoding alone."""
        steady = self.window_images / (self.window_seconds + self.ahead / decode)
        least = (self.window_images - self.ahead) / self.window_seconds
        return dict(zip(FIGURES, (self.images / self.seconds, steady, least), strict=True))


@dataclass(frozen=True)
class Pair:
    """Ours and the bare loop, one after the other; decode: images a second of the loop's decoding alone."""

    ours: dict[str, float]
    bare: float
    decode: float


def compare(
    loops: BareLoops, model: dict[str, Any], files: list[str], loop: Loop, unit: int, folder: Path, run: int
) -> Pair:
    """Both in turn; no Ray is left standing beside the bare loop."""
    import ray

    passed = time_pass(model, folder, unit, f"run-{unit}-{run}")
    ray.shutdown()
    decode = loops.run(files, loop, "decode")
    return Pair(passed.rates(decode), loops.run(files, loop), decode)


def rows_of(unit: int, pairs: list[Pair]) -> list[dict[str, Any]]:
    """The three figures of a size of unit."""
    rows = []
    for figure in FIGURES:
        ratios = [pair.ours[figure] / pair.bare for pair in pairs]
        rows.append(
            {
                "unit": unit,
                "ours": figure,
                "ours images/s": f"{statistics.median(pair.ours[figure] for pair in pairs):.1f}",
                "bare images/s": f"{statistics.median(pair.bare for pair in pairs):.1f}",
                "ratio": f"{statistics.median(ratios):.2f}",
                "range": f"{min(ratios):.2f} to {max(ratios):.2f}",
                "runs": len(pairs),
            }
        )
    return rows


def verdict(pairs: dict[int, list[Pair]]) -> list[dict[str, Any]]:
    """The demand, at the larger size of unit."""
    unit = max(pairs)
    ratio = statistics.median(pair.ours["steady"] / pair.bare for pair in pairs[unit])
    demand = f"images/s over the bare loop's, steady, units of {unit}"
    return [bench.verdict(demand, f"≥ {LEAST_RATIO:.2f}", f"{ratio:.2f}", ratio >= LEAST_RATIO)]


def run_ours(model: dict[str, Any], folder: Path, unit: int, name: str) -> tuple[float, float]:
    """Images a second of the pass, as a whole and (at least) steady."""
    passed = time_pass(model, folder, unit, name)
    rates = passed.rates(float("inf"))
    return rates["whole"], rates["at least"]


def time_pass(model: dict[str, Any], folder: Path, unit: int, name: str) -> Passed:
    """The pass of a new run over the images of `train`, as the stage `features` makes it; Ray is left running."""
    from epic_ray.config import build_config
    from epic_ray.logs import Reporter
    from epic_ray.run import open_run
    from epic_ray.stages import features
    from epic_ray.stages.image_pass import run_pass
    from epic_ray.stages.resources import resolve_resources, start_ray

    settings = {
        "name": name,
        "model": model,
        "data": {"root": str(folder / "images"), "splits": {"train": "train"}, "labels": "none"},
        "features": {"unit_size": unit},
        "output": {"root": str(folder / "runs")},
    }
    run = open_run(build_config(settings, "benchmark"), Reporter())
    run.listing.publish(run.classes)
    start_ray()
    resources = resolve_resources(run.config.resources)
    images, made_from = run.images["train"], run.unit_fingerprint(resources.device)
    given = {"run_dir": run.run_dir, "model": run.config.model, "resources": resources}
    start = time.perf_counter()
    totals = run_pass(
        "features",
        features.FeatureActor,
        given | {"keep_maps": False, "dtype": run.config.features.dtype},
        lambda: features.units_to_do(run.run_dir, images, made_from, False),
        run.classifier.preprocessing,
        resources,
        Reporter(),
        images.rows,
        TimedDecode,
    )
    return Passed.of(folder / "runs" / name, "images", len(totals.actors), time.perf_counter() - start)


if __name__ == "__main__":
    main()
