"""The feature pass against a bare loop that decodes and infers the same files on the same cores.

    python benchmarks/pass.py [--images 1024] [--units 64 128] [--repeats 5] [--photos]

The bare loop is the best of several: one process with all threads or a process a core, small batches or large, decoding
in line or ahead. It reads, decodes and forwards the files and keeps pooled features and predictions in memory; it
writes nothing, checks nothing and loses everything when it dies. Its imports and the loading of its model are not
counted. Ours is the stage `features` of a real run, from images to committed Parquet files: as a whole, with the start
of its actors, and at its steady rate, from the first commit of every actor to the last of all.

Images are synthetic JPEGs of 500 x 375, or with --photos those beside the repository; the network is ResNet-18.
"""

import argparse
import io
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import bench
import numpy as np
from PIL import Image

TRIAL_IMAGES = 128
LONGEST_SECONDS = 3600  # that one loop may take


@dataclass(frozen=True)
class Loop:
    """How the bare loop works: processes, threads of each, images of a batch, whether another thread decodes ahead."""

    processes: int
    threads: int
    batch: int
    ahead: bool

    def __str__(self) -> str:
        decode = "decoding ahead" if self.ahead else "decoding in line"
        return f"{self.processes} process(es) x {self.threads} thread(s), batch {self.batch}, {decode}"


def main() -> None:
    """Finds the bare loop's best setting, then times both in turn for each size of unit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024, help="images of a run")
    parser.add_argument("--units", type=int, nargs="+", default=[64, 128], help="images of a unit, several to try")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each")
    parser.add_argument("--photos", action="store_true", help="the shared photos and weights")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, files = prepare(Path(folder), arguments.images, arguments.photos)
        print(bench.heading() + "\n")
        with BareLoops(model, bench.cores()) as loops:
            loop, trials = best_loop(loops, files)
            print(bench.table([{"bare loop": str(tried), "images/s": f"{rate:.1f}"} for tried, rate in trials.items()]))
            print(f"\nThe bare loop from here on: {loop}; {len(files)} images.\n", flush=True)
            rows = [
                compare(loops, model, files, loop, unit, arguments.repeats, Path(folder)) for unit in arguments.units
            ]
            parts = alone(loops, files, loop)
    print(bench.table(rows) + "\n")
    print(bench.table([{"part alone": name, "images/s": f"{rate:.1f}"} for name, rate in parts.items()]))


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


def synthetic_jpeg(seed: int, size: tuple[int, int] = (500, 375)) -> bytes:
    """A picture with coarse and fine structure; at 500 x 375 of about the bytes of an ImageNet file."""
    rng, (width, height) = np.random.default_rng(seed), size
    coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
    pixels = pixels + rng.integers(-24, 24, (height, width, 1), np.int16)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


# --- the bare loop


class BareLoops:
    """Processes that wait with a loaded network for a loop to run. They are started once, and not timed."""

    def __init__(self, model: dict[str, Any], count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._answers = context.Queue()
        self._orders = [context.Queue() for _ in range(count)]
        self._workers = [
            context.Process(target=_serve, args=(model, orders, self._answers), daemon=True) for orders in self._orders
        ]
        for worker in self._workers:
            worker.start()

    def __enter__(self) -> "BareLoops":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.terminate()
            worker.join()

    def run(self, files: list[str], loop: Loop, part: str = "") -> float:
        """Images a second of the loop, or of a part of it (`decode`, `compute`) alone."""
        orders = self._orders[: loop.processes]
        for number, order in enumerate(orders):
            order.put((asdict(loop), files[number :: loop.processes], part))
        self._collect(loop.processes)  # all have warmed up
        for order in orders:
            order.put("go")
        spans = self._collect(loop.processes)
        return len(files) / (max(end for _, end in spans) - min(begin for begin, _ in spans))

    def _collect(self, count: int) -> list[Any]:
        return [self._answers.get(timeout=LONGEST_SECONDS) for _ in range(count)]


def best_loop(loops: BareLoops, files: list[str]) -> tuple[Loop, dict[Loop, float]]:
    """The fastest of the settings on some of the files, and the images/s of each."""
    cores = bench.cores()
    shapes = [(1, cores)] + ([(cores, 1)] if cores > 1 else [])
    some = files[:: max(1, len(files) // TRIAL_IMAGES)][:TRIAL_IMAGES]
    settings = [Loop(*shape, batch, ahead) for shape, batch, ahead in product(shapes, (16, 64), (False, True))]
    trials = {loop: loops.run(some, loop) for loop in settings}
    return max(trials, key=lambda loop: trials[loop]), trials


def _serve(model: dict[str, Any], orders: Any, answers: Any) -> None:
    import torch

    from epic_ray.config import ModelConfig
    from epic_ray.stages.loading import load

    classifier = load(ModelConfig.model_validate(model))
    network = classifier.model.to(memory_format=torch.channels_last)
    pooled: list[torch.Tensor] = []
    pool = next(module for name, module in network.named_modules() if name == "avgpool")
    pool.register_forward_hook(lambda module, taken, found: pooled.append(found.flatten(1)))
    while True:
        loop, files, part = orders.get()
        torch.set_num_threads(loop["threads"])
        still = torch.zeros((loop["batch"], *classifier.preprocessing.crop, 3), dtype=torch.uint8)
        with torch.inference_mode():
            network(classifier.normalise(still))
            pooled.clear()
            answers.put("ready")
            orders.get()
            begin = time.time()
            for images in _batches(
                files, loop["batch"], classifier, loop["ahead"], still if part == "compute" else None
            ):
                if part != "decode":
                    network(classifier.normalise(images)).argmax(dim=1)
            answers.put((begin, time.time()))
        pooled.clear()


def _batches(files: list[str], size: int, classifier: Any, ahead: bool, still: Any) -> Iterator[Any]:
    import torch

    from epic_ray.method.preprocessing import decode_image

    def read(paths: list[str]) -> torch.Tensor:
        if still is not None:
            return still[: len(paths)]
        return torch.from_numpy(
            np.stack([classifier.preprocessing.apply(decode_image(Path(path).read_bytes())) for path in paths])
        )

    chunks = [files[place : place + size] for place in range(0, len(files), size)]
    if not ahead:
        yield from map(read, chunks)
        return
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read, chunks[0])
        for chunk in chunks[1:]:
            images, coming = coming.result(), pool.submit(read, chunk)
            yield images
        yield coming.result()


def alone(loops: BareLoops, files: list[str], loop: Loop) -> dict[str, float]:
    """Images a second of decoding alone and of forwards alone, each in the loop's processes."""
    return {"decode": loops.run(files, loop, "decode"), "forwards": loops.run(files, loop, "compute")}


# --- ours


def compare(
    loops: BareLoops, model: dict[str, Any], files: list[str], loop: Loop, unit: int, repeats: int, folder: Path
) -> dict[str, Any]:
    """A row of the table: both in turn, `repeats` times."""
    whole, steady, bare = [], [], []
    for number in range(repeats):
        ours = run_ours(model, folder, unit, f"run-{unit}-{number}")
        whole.append(ours[0])
        steady.append(ours[1])
        bare.append(loops.run(files, loop))
    ratios = [mine / theirs for mine, theirs in zip(steady, bare, strict=True)]
    return {
        "unit": unit,
        "bare images/s": f"{statistics.median(bare):.1f}",
        "ours, steady": f"{statistics.median(steady):.1f}",
        "ratio": f"{statistics.median(ratios):.2f}",
        "range": f"{min(ratios):.2f} to {max(ratios):.2f}",
        "ours, with the start of actors": f"{statistics.median(whole):.1f}",
        "runs": repeats,
    }


def run_ours(model: dict[str, Any], folder: Path, unit: int, name: str) -> tuple[float, float]:
    """Images a second of the stage `features`, as a whole and at its steady rate."""
    from epic_ray import pipeline
    from epic_ray.config import build_config
    from epic_ray.logs import Reporter

    settings = {
        "name": name,
        "model": model,
        "data": {"root": str(folder / "images"), "splits": {"train": "train"}, "labels": "none"},
        "features": {"unit_size": unit, "map_budget_bytes": 0},
        "fit": {"start": "identity", "prototypes_per_channel": {"start": 1, "end": 1, "rounds": 1}},
        "prototypes": {"per_channel": 1},
        "output": {"root": str(folder / "runs")},
    }
    record = pipeline.train(build_config(settings, "benchmark"), Reporter())
    commits = sorted(file.stat().st_mtime for file in (folder / "runs" / name / "tables/images").rglob("unit-*"))
    actors = json.loads((folder / "runs" / name / "marks/features.json").read_text())["actors"]
    images = record["counts"]["images"]
    steady = (images - actors * unit) / (commits[-1] - commits[actors - 1])
    return images / record["seconds"]["features"], steady


if __name__ == "__main__":
    main()
