"""What a GPU does: forwards, search, polar factor; and, where Ray is installed, the pass from JPEGs to committed files.

    python benchmarks/gpu.py [--architecture resnet50] [--rows 1281167] [--channels 2048] [--jpegs 20000]

* Forwards: images a second of the classifier as the pass calls it (uint8 batches from memory through pinned buffers,
  feature map and logits) against the bare network on batches that already lie on the GPU, for each precision and batch.
* Search: the exact top-n over rows x channels of features on the GPU, block by block from memory, against the bare
  product and topk.
* Polar factor of a channels x channels matrix, as the fit takes it, against the bare decomposition.
* The pass: the stage `features` of a real run over synthetic JPEGs, with as many decode tasks as there are cores.

Weights are random: no figure here depends on them.
"""

import argparse
import importlib
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import bench
import numpy as np
import torch

from epic_ray.method.backbones import load_classifier
from epic_ray.method.basis import polar_factor, random_basis
from epic_ray.method.staging import Staging
from epic_ray.method.topk import search

BLOCK = 8192
DEVICE = torch.device("cuda")


def main() -> None:
    """Prints a table of each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="resnet50")
    parser.add_argument("--rows", type=int, default=1_281_167)
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--jpegs", type=int, default=20_000, help="images of the pass; 0 leaves it out")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; RESULTS.md keeps these rows empty until one is lent")
    print(bench.heading() + "\n")
    print(bench.table(forwards(arguments.architecture, arguments.repeats)) + "\n")
    print(bench.table(searches(arguments.rows, arguments.channels, arguments.repeats)) + "\n")
    print(bench.table(polar_factors(arguments.channels, arguments.repeats)))
    if arguments.jpegs and importlib.util.find_spec("ray"):
        print("\n" + bench.table([jpeg_pass(arguments.architecture, arguments.jpegs)]))


def forwards(architecture: str, repeats: int) -> list[dict[str, Any]]:
    """Images a second, as the pass calls the classifier and bare."""
    classifier = load_classifier(architecture, source="torchvision", weights="random").to(DEVICE)
    rows = []
    for precision, batch in product(("float32", "tf32", "bfloat16"), (64, 256)):
        classifier.precision = precision
        count = 32 * batch
        pixels = np.random.default_rng(0).integers(0, 255, (count, *classifier.preprocessing.crop, 3), np.uint8)
        on_device = classifier.normalise(torch.from_numpy(pixels[:batch]).to(DEVICE))

        def ours(pixels: np.ndarray = pixels, batch: int = batch) -> None:
            staged_forwards(classifier, pixels, batch)

        def bare(images: torch.Tensor = on_device, precision: str = precision) -> None:
            bare_forwards(classifier.model, images, 32, precision)

        pairs = bench.side_by_side(ours, bare, repeats)
        rows.append(
            {
                "precision": precision,
                "batch": batch,
                "ours images/s": f"{count / statistics.median(pairs.ours):,.0f}",
                "bare images/s": f"{count / statistics.median(pairs.baseline):,.0f}",
                "ratio": f"{1 / statistics.median(pairs.ratios):.2f}",
            }
        )
    return rows


def staged_forwards(classifier: Any, pixels: np.ndarray, batch: int) -> None:
    """As the feature actor does it: staged batches, results fetched at the end."""
    staging, kept = Staging(batch, pixels.shape[1:], DEVICE), []
    for start in range(0, len(pixels), batch):
        with torch.inference_mode():
            images = classifier.normalise(staging.send(pixels, np.arange(start, start + batch)))
            maps, logits = classifier(images)
            kept.append((maps.mean(dim=(2, 3)), logits))
    torch.cat([pooled for pooled, _ in kept]).cpu()


def bare_forwards(model: torch.nn.Module, images: torch.Tensor, times: int, precision: str) -> None:
    halves = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    with torch.inference_mode(), torch.autocast("cuda", halves.get(precision), enabled=precision in halves):
        for _ in range(times):
            model(images)
    torch.cuda.synchronize()


def searches(rows: int, channels: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of the exact search and of the bare product and topk, from main memory."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(rows, channels, generator=generator).pow_(4)
    basis = random_basis(channels, 0).to(DEVICE)
    indices = torch.arange(rows)
    blocks = [(indices[start : start + BLOCK], features[start : start + BLOCK]) for start in range(0, rows, BLOCK)]
    found = []
    for n in (20, 100):

        def ours(n: int = n) -> None:
            search(blocks, basis, n).values.cpu()

        def bare(n: int = n) -> None:
            best = torch.full((channels, n), -torch.inf, device=DEVICE)
            for _, part in blocks:
                best = torch.cat([best, basis @ part.to(DEVICE).T], dim=1).topk(n, dim=1).values
            best.cpu()

        found.append(bench.side_by_side(ours, bare, repeats).row(f"search {rows:,} x {channels}, n = {n}"))
    return found


def polar_factors(channels: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of the fit's polar factor and of the bare decomposition."""
    matrix = torch.randn(channels, channels, device=DEVICE)

    def timed(work: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            work()
            torch.cuda.synchronize()

        return run

    pairs = bench.side_by_side(timed(lambda: polar_factor(matrix)), timed(lambda: torch.linalg.svd(matrix)), repeats)
    return [pairs.row(f"polar factor {channels} x {channels}")]


def jpeg_pass(architecture: str, count: int) -> dict[str, Any]:
    """Images a second of the pass over JPEGs, as a whole and steady."""
    made = importlib.import_module("pass")
    with tempfile.TemporaryDirectory() as folder:
        model, files = made.prepare(Path(folder), count, False)
        model |= {"architecture": architecture}
        start = time.monotonic()
        whole, steady = made.run_ours(model, Path(folder), 512, "gpu")
    return {
        "images": len(files),
        "decode tasks": bench.cores(),
        "images/s": f"{whole:,.0f}",
        "steady": f"{steady:,.0f}",
        "run s": f"{time.monotonic() - start:.0f}",
    }


if __name__ == "__main__":
    main()
