"""How the pass scales with its actors: the real pipeline, stand-ins for the classifier and for the images.

    python benchmarks/scaling.py [1 4 16 64] [--rows 1280000] [--rate 200] [--channels 64] [--unit 1024]

A stand-in actor sleeps for as long as a classifier of `--rate` images a second would compute, then publishes files of
synthetic features as the real one does; a stand-in decoder reads the manifest and makes pictures of a pixel. All else
is real: the listing, Ray Data, actors (one fake GPU each), the notes of attempts, Parquet files, their commits. A run
of fewer actors has fewer rows, so that all take about as long; decoding begins when all actors have started,
and runs at most three units an actor ahead of the commits.

Efficiency is images a second between 10 and 90 % of the rows over actors x rate; "decoded within" tells how many units
were decoded between the same two moments, of those committed: less than 100 % where decoding had run ahead. CPU and
memory are of the driver and of Ray's own two processes (raylet and GCS); the workers' are not looked at. The object
store holds units of one pixel an image here: of real ones it holds what Ray Data lets it, whatever their number.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any

import bench
import numpy as np
import pyarrow as pa

from epic_ray.stages.decode_unit import DecodeUnit
from epic_ray.stages.decoding import Decoded
from epic_ray.stages.unit_actor import Unit, UnitActor
from epic_ray.stages.units import UnitFacts

SECONDS_BETWEEN_LOOKS = 0.5
UNITS_AHEAD = 3  # of each actor: Ray Data hands it two
LEAST_EFFICIENCY = 0.9
MOST_DRIVER_BYTES = 2 * 1024**3


class StandInDecoder(DecodeUnit):
    """Reads a unit's rows of the manifest, and makes a picture of one pixel of each."""

    def _decode_rows(self, reader: Any, rows: pa.Table, careful: bool) -> Decoded:
        beside = Path(str(self._run_dir)).parent
        actors = int((beside / "actors").read_text())
        wait_for_all(beside / "ready", actors)
        while len(os.listdir(beside / "decoded")) >= count_commits(beside) + UNITS_AHEAD * actors:
            time.sleep(0.1)  # so that most decoding is within the clock, as in a pass whose decoding costs something
        (beside / "decoded" / str(rows["position"][0].as_py())).touch()
        decoded = Decoded.blank(rows.num_rows, self._preprocessing)
        decoded.sizes_px[:] = 500, 375
        return decoded


class StandInActor(UnitActor):
    """Sleeps for as long as a classifier would compute; publishes features drawn at random."""

    def __init__(self, run_dir: Any, attempts: Any, rate: float, channels: int, actors: int, ready: str) -> None:
        super().__init__(run_dir, attempts)
        self._rate, self._pooled = rate, np.random.default_rng(os.getpid()).random((8192, channels), np.float32)
        (Path(ready) / str(os.getpid())).touch()
        wait_for_all(Path(ready), actors)  # all begin together: their start is not what is measured

    def compute(self, unit: Unit, readable: np.ndarray) -> np.ndarray:
        time.sleep(len(readable) / self._rate)
        return self._pooled[: len(readable)]

    def publish(self, unit: Unit, readable: np.ndarray, results: np.ndarray) -> int:
        from epic_ray.run_dir import unit_file
        from epic_ray.tables import build_table, write_table

        count = len(readable)
        about = self.metadata(unit, UnitFacts(count, count, 0, 0.0, 0.0, count))
        named = {name: unit.rows[name] for name in ("split", "position", "image_id")}
        features = build_table("features", {**named, "pooled": results}, about)
        ones = np.ones(count, np.float32)
        columns: dict[str, Any] = {
            **named,
            "label": unit.rows["label"],
            "status": pa.array(["ok"] * count),
            "reason": pa.nulls(count, pa.string()),
            "width_px": unit.sizes_px[:, 0],
            "height_px": unit.sizes_px[:, 1],
            "predicted": np.zeros(count, np.int32),
            "logit": ones,
            "probability": ones,
            "split_difference": ones,
        }
        written = write_table(self.run_dir, unit_file("features", unit.split, unit.number), features)
        images = build_table("images", columns, about)
        return written + write_table(self.run_dir, unit_file("images", unit.split, unit.number), images)


def wait_for_all(ready: Path, actors: int) -> None:
    """Returns when as many actors have started."""
    while len(os.listdir(ready)) < actors:
        time.sleep(0.2)


def count_commits(folder: Path) -> int:
    """Units that are committed so far."""
    commits = folder / "run/tables/images/train"
    return sum(name.startswith("unit-") for name in os.listdir(commits)) if commits.exists() else 0


@dataclass(frozen=True)
class Look:
    """What had been done at a moment: CPU seconds of the driver and of Ray, units decoded and committed."""

    at: float
    driver_cpu: float
    ray_cpu: float
    decoded: int
    committed: int


class Watch:
    """Looks at a pass while it runs, again and again, and keeps the peaks of memory."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._ended = folder, Event()
        self._ray = ray_processes()
        self.looks: list[Look] = []
        self.store_bytes, self.ray_bytes = 0.0, 0
        self._thread = Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        import ray

        whole, ended = ray.cluster_resources()["object_store_memory"], False
        while not ended:
            ended = self._ended.wait(SECONDS_BETWEEN_LOOKS)
            committed, decoded = count_commits(self._folder), len(os.listdir(self._folder / "decoded"))
            ray_cpu = sum(sum(process.cpu_times()[:2]) for process in self._ray)
            self.looks.append(Look(time.monotonic(), cpu_seconds(), ray_cpu, decoded, committed))
            self.ray_bytes = max(self.ray_bytes, sum(process.memory_info().rss for process in self._ray))
            self.store_bytes = max(
                self.store_bytes, whole - ray.available_resources().get("object_store_memory", whole)
            )

    def between(self, low: float, high: float, units: int) -> Look:
        """What was done, and the seconds (`at`), between two shares of the units."""
        first = next(look for look in self.looks if look.committed >= low * units)
        last = next(look for look in self.looks if look.committed >= high * units)
        return Look(*(end - begin for begin, end in zip(astuple(first), astuple(last), strict=True)))


def ray_processes() -> list[Any]:
    """The raylet and the GCS that this process has started."""
    import psutil

    found = [process for process in psutil.Process().children() if process.name() in ("raylet", "gcs_server")]
    if len(found) != 2:
        sys.exit(f"Ray's own processes: {len(found)} of raylet and gcs_server are children of this one")
    return found


def main() -> None:
    """Runs the pass for each number of actors, one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("actors", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--rows", type=int, default=1_280_000, help="images of the run with the most actors")
    parser.add_argument("--rate", type=float, default=200, help="images a second of one actor")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--unit", type=int, default=1024, help="images of a unit")
    arguments = parser.parse_args()
    import ray

    from epic_ray.logs import quiet_ray

    quiet_ray()
    ray.init(
        address="local", num_cpus=max(4, bench.cores()), num_gpus=max(arguments.actors), include_dashboard=False,
        object_store_memory=2 * 1024**3, log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    print(bench.heading() + "\n")
    rows, verdicts = [], []
    for actors in sorted(arguments.actors):
        count = arguments.rows * actors // max(arguments.actors)
        with tempfile.TemporaryDirectory() as folder:
            row, verdicts = measure(Path(folder), actors, count, arguments)
            rows.append(row)
    print(bench.table(rows))
    bench.conclude(verdicts)


def measure(
    folder: Path, actors: int, count: int, arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """One pass: a row of the table, and the demands at its size."""
    from epic_ray.logs import Reporter
    from epic_ray.method.preprocessing import Preprocessing
    from epic_ray.run_dir import RunDir
    from epic_ray.stages.image_pass import run_pass
    from epic_ray.stages.images import cut_units
    from epic_ray.stages.resources import Resources
    from epic_ray.stages.units import committed_units

    run_dir, ready = RunDir(str(folder / "run")), folder / "ready"
    ready.mkdir()
    (folder / "decoded").mkdir()
    units = cut_units(list_images(folder, run_dir, count, arguments.unit), "stand-in")

    def to_do() -> list[Any]:
        done = committed_units(run_dir, "images", units)
        return [unit for unit in units if unit.number not in done]

    (folder / "actors").write_text(str(min(actors, len(units))))
    stand_in = {
        "run_dir": run_dir,
        "rate": arguments.rate,
        "channels": arguments.channels,
        "actors": min(actors, len(units)),
        "ready": str(ready),
    }
    resources = Resources(actors, actors, 1.0, "cpu", 1, 64, "float32", 4, actors)
    start = time.monotonic()
    with Watch(folder) as watch:
        run_pass(
            "features", StandInActor, stand_in, to_do, Preprocessing(None, (1, 1)), resources, Reporter(), count,
            StandInDecoder,
        )  # fmt: skip
    within = watch.between(0.1, 0.9, len(units))
    rate = within.committed * arguments.unit / within.at
    efficiency, peak = rate / (actors * arguments.rate), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {
        "actors": actors,
        "images": f"{count:,}",
        "units": len(units),
        "images/s": f"{rate:,.0f}",
        "efficiency": f"{efficiency:.0%}",
        "decoded within": f"{within.decoded / within.committed:.0%}",
        "driver CPU": f"{within.driver_cpu / within.at:.0%} of a core",
        "driver ms a unit": f"{1000 * within.driver_cpu / within.committed:.0f}",
        "driver peak": f"{peak / 2**20:,.0f} MiB",
        "raylet + GCS CPU": f"{within.ray_cpu / within.at:.0%} of a core",
        "raylet + GCS peak": f"{watch.ray_bytes / 2**20:,.0f} MiB",
        "object store peak, tiny units": f"{watch.store_bytes / 2**20:,.0f} MiB",
        "whole pass s": f"{time.monotonic() - start:.0f}",
    }
    size = f"{actors} actors of {arguments.rate:g} images/s, D = {arguments.channels}"
    shown = f"≥ {LEAST_EFFICIENCY:.0%}", f"{efficiency:.1%}"
    limit = f"≤ {MOST_DRIVER_BYTES / 2**20:,.0f}", f"{peak / 2**20:,.0f}"
    return row, [
        bench.verdict(f"efficiency between 10 and 90 % of the rows, {size}", *shown, efficiency >= LEAST_EFFICIENCY),
        bench.verdict(f"MiB of the driver at {count:,} rows", *limit, peak <= MOST_DRIVER_BYTES),
    ]


def list_images(folder: Path, run_dir: Any, count: int, unit: int) -> Any:
    """The manifest of as many images as asked, listed from a CSV of addresses that nobody reads."""
    from epic_ray.config import DataConfig
    from epic_ray.logs import Reporter
    from epic_ray.stages.classes import ClassNames
    from epic_ray.stages.images import Listing

    data = folder / "data"
    data.mkdir()
    lines = (f"n{number % 1000:08d}/n{number % 1000:08d}_{number}.JPEG,{number % 10}\n" for number in range(count))
    with open(data / "train.csv", "w") as file:
        file.write("uri,label\n")
        file.writelines(lines)
    listing = Listing(DataConfig(root=str(data), splits={"train": "train.csv"}), ["train"], Reporter(), run_dir)
    classes = ClassNames([str(number) for number in range(10)], [None] * 10, "numbers")
    images = listing.label(classes, unit)["train"]
    listing.publish(classes)
    return images


def cpu_seconds() -> float:
    """What this process has used so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
