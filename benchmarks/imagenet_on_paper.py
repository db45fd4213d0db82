"""A full run over ImageNet on paper: what each part takes on so many machines, and which part decides.

    python benchmarks/imagenet_on_paper.py [--gpus 1 8 64] [--decode 293] [--forward 3000] ...

Nothing is run. Each part's time is what it moves or computes over a rate; the rates are arguments, their defaults are
assumptions, near what was measured where a benchmark of its own is named. Parts of the pass overlap, so that the
slowest decides; the parts of the fit follow one another, round by round.
"""

import argparse
import math
from typing import Any

import bench

IMAGES, HELD_OUT = 1_281_167, 50_000
IMAGE_BYTES, INPUT_BYTES = 110_000, 224 * 224 * 3
CELLS, CLASSES, FLOAT_BYTES = 49, 1000, 4
SCHEDULE = tuple(math.floor(100 - 80 * t / 9 + 1e-9) for t in range(10))  # the default: 100 to 20 in ten rounds
QUARTIMAX_STEPS = 10
RATES = {
    "decode": (293.0, "images/s of a core: decode, resize, crop (decode.py measures it)"),
    "forward": (3000.0, "images/s of a GPU, ResNet-50 float32 (assumed until gpu.py was run)"),
    "product": (30e12, "operations/s of a GPU in float32 matrix products (assumed)"),
    "disk": (2e9, "bytes/s of a machine's reads and writes of the run folder (assumed)"),
    "store": (1e9, "bytes/s of a machine's reads of the images (assumed)"),
    "network": (3e9, "bytes/s between machines (assumed)"),
    "transfer": (20e9, "bytes/s from memory to a GPU (assumed)"),
    "svd": (6.0, "seconds of one polar factor at the channels given (assumed; taken once, by one worker)"),
    "driver": (0.02, "seconds of the driver's core a unit (assumed; scaling.py measures it)"),
}


def main() -> None:
    """Prints a row a number of GPUs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--gpus-per-machine", type=int, default=8)
    parser.add_argument("--cores-per-gpu", type=int, default=16)
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--unit", type=int, default=1024)
    parser.add_argument("--distinct", type=float, default=0.7, help="distinct images among a round's prototypes")
    for name, (rate, meaning) in RATES.items():
        parser.add_argument(f"--{name}", type=float, default=rate, help=f"{meaning}; default {rate:g}")
    arguments = parser.parse_args()
    rows = [estimate(gpus, arguments) for gpus in arguments.gpus]
    print(bench.table(rows))


def estimate(gpus: int, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each part on so many GPUs."""
    machines, cores = math.ceil(gpus / given.gpus_per_machine), gpus * given.cores_per_gpu
    images, channels = IMAGES + HELD_OUT, given.channels
    features = FLOAT_BYTES * channels * images + FLOAT_BYTES * CLASSES * HELD_OUT
    parts = {
        "decode": images / (given.decode * cores),
        "images read": images * IMAGE_BYTES / (given.store * machines),
        "forwards": images / (given.forward * gpus),
        "features written": features / (given.disk * machines),
        "driver": images / given.unit * given.driver,
    }
    passed = max(parts.values())
    chosen = min(IMAGES, given.distinct * channels * SCHEDULE[0])
    map_bytes = FLOAT_BYTES * CELLS * channels
    maps = max(chosen / (given.decode * cores), 2 * chosen * map_bytes / (given.disk * machines))
    product = 2 * IMAGES * channels**2 / (given.product * gpus)
    scan = max(product, FLOAT_BYTES * channels * IMAGES / (given.transfer * gpus))
    read = FLOAT_BYTES * channels * IMAGES / (given.disk * machines)
    update = given.svd + _all_reduce(gpus, given)
    maps_read = given.distinct * channels * sum(SCHEDULE) * map_bytes / (given.disk * machines)
    rounds = maps_read + len(SCHEDULE) * (scan + update)
    start = QUARTIMAX_STEPS * (2 * scan + update)
    proof = max(read, 2 * images * channels * (channels + CLASSES) / (given.product * gpus))
    total = passed + maps + read + start + rounds + proof
    return {
        "GPUs": gpus,
        "cores": cores,
        "pass": f"{passed:,.0f} s",
        "decided by": max(parts, key=lambda name: parts[name]),
        **{name: f"{seconds:,.0f}" for name, seconds in parts.items()},
        "maps of chosen": f"{maps:,.0f} s",
        "start": f"{start:,.0f} s",
        "rounds": f"{rounds:,.0f} s",
        "proof": f"{proof:,.0f} s",
        "all": f"{total / 60:.1f} min",
    }


def _all_reduce(gpus: int, given: argparse.Namespace) -> float:
    """Seconds of the sum of one channels x channels matrix in float64 and the broadcast of one in float32."""
    if gpus == 1:
        return 0.0
    return float((2 * 8 + 4) * given.channels**2 / given.network)


if __name__ == "__main__":
    main()
