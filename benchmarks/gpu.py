"""What a GPU does: forwards, the pass from JPEGs to Parquet, the search, and the solver; each against its bare parts.

    python benchmarks/gpu.py [--architecture resnet50] [--repeats 5]

* Forwards: images a second of the classifier as the pass calls it (uint8 batches from memory through pinned buffers,
  feature map and logits) against the bare network on batches that already lie on the GPU, at the fastest of several
  batches, memory layouts and searches for the kernel.
* The pass: over synthetic JPEGs, where Ray is installed as the stage `features` of a real run; and in any case its
  parts without Ray, beside the decoding alone of the same processes.
* Search: the exact top-n of every channel over 1,281,167 x 2,048 features that lie on the GPU, in pinned memory and in
  pageable memory, against the bare product and topk of features on the GPU, at the fastest of several block sizes.
* Solver: rounds of the closed form on made-up maps with the polar factor by Newton's iteration and by SVD, steps of the
  paper's gradient descent; the polar factor alone.

It needs neither Ray nor pydantic nor an installed epic-ray. Weights are random: no figure here depends on them.
"""

import argparse
import copy
import importlib
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import bench
import gpu_fit
import numpy as np
import torch
from made_images import synthetic_jpeg
from rayless_pass import DecodePool, decode_only, make_jpegs, run_pass

from epic_ray.method.backbones import load_classifier
from epic_ray.method.basis import random_basis
from epic_ray.method.classifier import SplitClassifier
from epic_ray.method.staging import Staging
from epic_ray.method.topk import search

PRECISIONS = ("float32", "tf32", "bfloat16")
HALVES = {"bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    model: dict[str, Any]
    images: int = 4096
    batches: tuple[int, ...] = (64, 256)
    processes: int = field(default_factory=bench.cores)
    jpegs: int = 20_000
    distinct_jpegs: int = 2000
    rows: int = 1_281_167
    channels: int = 2048
    prototypes: tuple[int, ...] = (20, 100)
    blocks: tuple[int, ...] = (8192, 32_768, 131_072)
    fit: gpu_fit.FitSizes = field(default_factory=gpu_fit.FitSizes)


def main() -> None:
    """Prints a table of each part as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="resnet50")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: tiny sizes, for a test
    arguments = parser.parse_args()
    device, repeats = torch.device(arguments.device), arguments.repeats
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; RESULTS.md keeps these rows empty until one is lent")
    sizes = Sizes({"architecture": arguments.architecture, "source": "torchvision"})
    if device.type == "cpu":
        sizes = tiny()
        torch.set_num_threads(1)
    print(bench.heading() + "\n")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # as the actors of a run
    classifier = load_classifier(**sizes.model, weights="random").to(device)
    bare, rows = forwards(classifier, sizes, repeats)
    show("Forwards", rows)
    show("Pass over JPEGs", passes(classifier, sizes, bare, min(repeats, 3)))
    show("Search", searches(sizes, device, repeats))
    show("Solver", gpu_fit.fits(sizes.fit, sizes.channels, device))
    show("Polar factor", gpu_fit.polar_factors(sizes.channels, device, repeats))


def tiny() -> Sizes:
    """Sizes that a CPU does in seconds, to try the script out."""
    from epic_ray.demo import DIGIT_PREPROCESSING

    model = {"architecture": "epic_ray.demo:digit_net", "source": "factory", "preprocessing": DIGIT_PREPROCESSING}
    fit = gpu_fit.FitSizes(images=64, cells=4, schedule=(6, 4), rounds_of_all=4, adam=(1, 33), repeats=1)
    return Sizes(model, 128, (64,), 1, 200, 20, 3000, 32, (5,), (512, 1024), fit)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """A table, at once: what comes later may fail."""
    print(f"{title}\n\n{bench.table(rows)}\n", flush=True)


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- forwards


def forwards(classifier: SplitClassifier, sizes: Sizes, repeats: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Images a second of the bare network for each precision, and the rows of the table."""
    rows, rates = [], {}
    shape = (sizes.images, *classifier.preprocessing.crop, 3)
    pixels = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    for precision in PRECISIONS:
        classifier.precision = precision
        setting = best_bare(classifier, pixels, precision, sizes.batches)
        bare = Bare(classifier, pixels, precision, *setting)
        told = f"batch {setting[0]}, {'channels last' if setting[1] else 'NCHW'}, cudnn.benchmark {setting[2]}"
        for batch in sizes.batches:

            def ours(batch: int = batch) -> None:
                staged_forwards(classifier, pixels, batch)

            pairs = bench.side_by_side(ours, bare.run, repeats)
            rates[precision] = sizes.images / statistics.median(pairs.baseline)
            rows.append(
                {
                    "precision": precision,
                    "batch": batch,
                    "ours images/s": f"{sizes.images / statistics.median(pairs.ours):,.0f}",
                    "bare images/s": f"{rates[precision]:,.0f}",
                    "ratio": f"{1 / statistics.median(pairs.ratios):.2f}",
                    "range": f"{1 / max(pairs.ratios):.2f} to {1 / min(pairs.ratios):.2f}",
                    "bare at its best": told,
                }
            )
    return rates, rows


def staged_forwards(classifier: SplitClassifier, pixels: np.ndarray, batch: int) -> None:
    """As the feature actor does it: staged batches, results fetched at the end."""
    staging, kept = Staging(batch, pixels.shape[1:], classifier.weight.device), []
    for start in range(0, len(pixels), batch):
        with torch.inference_mode():
            images = classifier.normalise(staging.send(pixels, np.arange(start, start + batch)))
            maps, logits = classifier(images)
            kept.append((maps.mean(dim=(2, 3)), logits))
    torch.cat([pooled for pooled, _ in kept]).cpu()


class Bare:
    """Forwards of as many images as `pixels` has, all of one batch that lies on the device normalised."""

    def __init__(
        self, classifier: SplitClassifier, pixels: np.ndarray, precision: str, batch: int, last: bool, seek: bool
    ) -> None:
        self._precision, self._seek = precision, seek
        layout = torch.channels_last if last else torch.contiguous_format
        self._model = copy.deepcopy(classifier.model).to(memory_format=layout)
        images = classifier.normalise(torch.from_numpy(pixels[:batch]).to(classifier.weight.device))
        self._images, self._times = images.contiguous(memory_format=layout), len(pixels) // batch

    def run(self) -> None:
        device, half = self._images.device, HALVES.get(self._precision)
        switches = torch.backends.cudnn, torch.backends.cuda.matmul
        torch.backends.cudnn.benchmark = self._seek
        for switch in switches:
            switch.allow_tf32 = self._precision == "tf32"
        with torch.inference_mode(), torch.autocast(device.type, half, enabled=half is not None):
            for _ in range(self._times):
                self._model(self._images)
        wait(device)
        for switch in switches:
            switch.allow_tf32 = False
        torch.backends.cudnn.benchmark = False


def best_bare(
    classifier: SplitClassifier, pixels: np.ndarray, precision: str, batches: tuple[int, ...]
) -> tuple[int, bool, bool]:
    """Batch, channels last, cudnn.benchmark: the fastest of all."""
    seconds = {}
    for setting in product(batches, (False, True), (False, True)):
        bare = Bare(classifier, pixels, precision, *setting)
        bare.run()
        begin = time.perf_counter()
        bare.run()
        seconds[setting] = time.perf_counter() - begin
    return min(seconds, key=seconds.__getitem__)


# --- the pass


def passes(classifier: SplitClassifier, sizes: Sizes, bare: dict[str, float], repeats: int) -> list[dict[str, Any]]:
    """Images a second from files to Parquet, with Ray where it is and without; beside them those of the parts alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = make_jpegs(folder, sizes.jpegs, sizes.distinct_jpegs, synthetic_jpeg, sizes.processes)
        rows = []
        with DecodePool(classifier.preprocessing, sizes.processes) as pool:
            for precision in PRECISIONS:
                classifier.precision = precision
                rows.append(rayless_pass(pool, files, classifier, sizes, folder, repeats, bare[precision]))
        return [*rows, ray_pass(sizes, folder)]


def rayless_pass(
    pool: DecodePool,
    files: list[str],
    classifier: SplitClassifier,
    sizes: Sizes,
    folder: Path,
    repeats: int,
    bare: float,
) -> dict[str, Any]:
    """The parts together, against the decoding alone."""

    def ours() -> None:
        run_pass(pool, files, classifier, max(sizes.batches), folder / "rayless")

    pairs = bench.side_by_side(ours, lambda: decode_only(pool, files), repeats)
    rate, decoded = (len(files) / statistics.median(seconds) for seconds in (pairs.ours, pairs.baseline))
    return {
        "what": "decode + forward + write, the pass's parts without Ray",
        "precision": classifier.precision,
        "images": len(files),
        "processes": sizes.processes,
        "images/s": f"{rate:,.0f}",
        "decode alone": f"{decoded:,.0f}",
        "bare model": f"{bare:,.0f}",
        "of the slower": f"{rate / min(decoded, bare):.2f}",
    }


def ray_pass(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """One run of the stage `features`, with as many decode tasks as it chooses."""
    row = {"what": "pass through Ray", "precision": "float32", "images": sizes.jpegs, "processes": ""}
    try:
        for name in ("ray", "pydantic"):
            importlib.import_module(name)
    except ImportError as error:
        return row | {"images/s": f"not measured, no {error.name} here"}
    whole, steady = importlib.import_module("pass").run_ours(sizes.model | {"weights": "random"}, folder, 512, "gpu")
    return row | {"images/s": f"{whole:,.0f}, once it runs at least {steady:,.0f}"}


# --- the search


def searches(sizes: Sizes, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Seconds of the exact search from each kind of memory, and of the bare product and topk of resident features."""
    generator = torch.Generator(device).manual_seed(0)
    resident = torch.rand(sizes.rows, sizes.channels, generator=generator, device=device).pow_(4)
    places = {"on the device": resident, "in pageable memory": resident.cpu()}
    if device.type == "cuda":
        places["in pinned memory"] = places["in pageable memory"].pin_memory()
    basis = random_basis(sizes.channels, 0).to(device)
    found = []
    for n in sizes.prototypes:
        rows = min(sizes.blocks, key=lambda size: bare_seconds(resident, basis, n, size))

        def bare(n: int = n, rows: int = rows) -> None:
            bare_search(resident, basis, n, rows)

        for place, features in places.items():

            def ours(features: torch.Tensor = features, n: int = n) -> None:
                search(blocks_of(features), basis, n).values.cpu()

            what = f"{sizes.rows:,} x {sizes.channels} {place}, n = {n}"
            found.append(bench.side_by_side(ours, bare, repeats).row(what) | {"baseline's blocks": rows})
    return found


def blocks_of(features: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """As the stages hand them to the search, 8,192 images at a time."""
    indices = torch.arange(len(features), device=features.device)
    return list(zip(indices.split(8192), features.split(8192), strict=True))


def bare_search(features: torch.Tensor, basis: torch.Tensor, n: int, rows: int) -> None:
    best = torch.full((len(basis), n), -torch.inf, device=basis.device)
    places = torch.zeros((len(basis), n), dtype=torch.int64, device=basis.device)
    for start in range(0, len(features), rows):
        values, found = (basis @ features[start : start + rows].T).topk(n, dim=1)
        best, order = torch.cat([best, values], dim=1).topk(n, dim=1)
        places = torch.cat([places, found + start], dim=1).gather(1, order)
    best.cpu(), places.cpu()


def bare_seconds(features: torch.Tensor, basis: torch.Tensor, n: int, rows: int) -> float:
    """Of the second of two, on the first rows."""
    some = features[: 4 * rows]
    bare_search(some, basis, n, rows)
    begin = time.perf_counter()
    bare_search(some, basis, n, rows)
    return (time.perf_counter() - begin) / len(some)


if __name__ == "__main__":
    main()
