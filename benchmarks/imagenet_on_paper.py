"""A full run over ImageNet on paper: what each part takes on so many machines, and which part decides.

    python benchmarks/imagenet_on_paper.py [--gpus 1 8 64] [--decode 293] [--forward 3000] ...

Nothing is run. Each part's time is what it moves or computes over a rate; rates are arguments, and the first table
says where their defaults are from. The parts of the pass overlap, so that the slowest decides. The others follow one
another: gathering the maps of chosen images is decoding, forwarding and writing in turn, as `MapGatherer` does it; a
scan reads from disk what exceeds the feature cache. Schedule, start and cache are those of a run in which nothing is
set.
"""

import argparse
import math
from dataclasses import dataclass
from typing import Any

import bench

IMAGES, HELD_OUT = 1_281_167, 50_000
IMAGE_BYTES, CELLS, CLASSES, FLOAT_BYTES = 110_000, 49, 1000, 4
AIM_SECONDS = 600
TRIAL_STARTS, TRIAL_ROUNDS, TRIAL_PROTOTYPES = 2, 4, 20  # start: auto (epic_ray/method/starts.py)
ROTATION_SCANS, ROTATION_PRODUCTS = 12, 22  # moments, ten updates of two products each, third moments
TABLE_PROTOTYPES, HELD_OUT_PROTOTYPES = 20 + 5 + 5, 20 + 20  # a channel: before and after, both signs; not yet chosen
SCENARIOS: dict[str, dict[str, float]] = {
    "as it is: float32, the default cache": {},
    "tf32 (6,000 images/s assumed)": {"forward": 6000},
    "bfloat16 (10,000 images/s assumed)": {"forward": 10_000},
    "feature cache of 12 GB": {"cache": 12e9},
    "maps read from memory, features kept": {"maps": 10e9, "cache": 12e9},
    "tf32, maps read from memory, features kept": {"forward": 6000, "maps": 10e9, "cache": 12e9},
    "bfloat16, maps read from memory, features kept": {"forward": 10_000, "maps": 10e9, "cache": 12e9},
    "tf32, the run folder in memory too": {"forward": 6000, "maps": 10e9, "cache": 12e9, "disk": 10e9},
    "bfloat16, the run folder in memory too": {"forward": 10_000, "maps": 10e9, "cache": 12e9, "disk": 10e9},
}


@dataclass(frozen=True)
class Rate:
    """A rate, its meaning, and where it is from."""

    value: float
    meaning: str
    source: str = "assumed"


RATES = {
    "decode": Rate(
        293, "images/s of a core: decode, resize, crop", "measured: `decode.py`, 2-core AMD EPYC (310 to 370 there)"
    ),
    "forward": Rate(3000, "images/s of a GPU, ResNet-50, float32", "assumed; `gpu.py` measures it"),
    "product": Rate(30e12, "operations/s of a GPU, float32 matrix products"),
    "cpu-product": Rate(50e9, "operations/s of a core, float32 matrix products"),
    "disk": Rate(2e9, "bytes/s of a machine's reads and writes of the run folder"),
    "maps": Rate(2e9, "bytes/s of a machine's reads of chosen maps, in every round"),
    "store": Rate(1e9, "bytes/s of a machine's reads of the images"),
    "network": Rate(3e9, "bytes/s between machines"),
    "transfer": Rate(10e9, "bytes/s from pageable memory to a GPU"),
    "polar": Rate(1.0, "seconds of a polar factor by Newton's iteration, by one worker"),
    "driver": Rate(0.02, "seconds of the driver's core a unit"),
    "distinct": Rate(0.7, "distinct images among a round's prototypes"),
    "fresh": Rate(0.1, "share of a round's images that no round before it chose"),
}


def main() -> None:
    """Prints the rates, a row a number of GPUs, and what would be gained on one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--gpus-per-machine", type=int, default=8)
    parser.add_argument("--cores-per-gpu", type=int, default=16)
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--unit", type=int, default=512, help="images of a unit")
    parser.add_argument("--cache", type=float, help="bytes of features that a worker keeps (default: the setting's)")
    for name, rate in RATES.items():
        parser.add_argument(f"--{name}", type=float, default=rate.value, help=f"{rate.meaning}; {rate.source}")
    given = parser.parse_args()
    given.schedule, cache_bytes = defaults()
    given.cache = cache_bytes if given.cache is None else given.cache
    print(f"{bench.heading()}\n\nRates\n")
    print(bench.table(rate_rows(given)))
    rounds = ", ".join(map(str, given.schedule))
    print(f"\nRounds of {rounds} prototypes a channel; {given.cache:,.0f} bytes of features kept by each worker.")
    maps, features = _Work(1, given).maps_bytes() / 1e9, FLOAT_BYTES * given.channels * IMAGES / 1e9
    print(f"Maps of the images that the rounds choose: {maps:,.0f} GB; features: {features:,.1f} GB. What says memory")
    print("below needs room for both, and for the features again where they are kept.\n")
    print(bench.table([row(gpus, given) for gpus in given.gpus]))
    print(f"\nOne GPU with {given.cores_per_gpu} cores; the aim is {AIM_SECONDS / 60:.0f} minutes\n")
    print(bench.table([scenario(name, changed, given) for name, changed in SCENARIOS.items()]))


def defaults() -> tuple[tuple[int, ...], int]:
    """Prototypes a channel of each round, and bytes of the feature cache, where nothing is set."""
    from epic_ray.config import FitConfig, ResourcesConfig
    from epic_ray.method.schedule import prototypes_per_round

    schedule = FitConfig().prototypes_per_channel
    counts = prototypes_per_round(schedule.start, schedule.end, schedule.rounds, schedule.decay, schedule.exact_end)
    return counts, ResourcesConfig().feature_cache_bytes


def rate_rows(given: argparse.Namespace) -> list[dict[str, str]]:
    """What is put in, and where it is from."""
    rows = []
    for name, rate in RATES.items():
        value = getattr(given, name.replace("-", "_"))
        source = rate.source if value == rate.value else "given"
        rows.append({"rate": name, "value": f"{value:,g}", "of": rate.meaning, "from": source})
    return rows


def row(gpus: int, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each stage, and the part that takes longest."""
    stages = estimate(gpus, given)
    seconds = {stage: total(stage, parts) for stage, parts in stages.items()}
    return {
        "GPUs": gpus,
        "cores": gpus * given.cores_per_gpu,
        **{stage: f"{taken:,.0f} s" for stage, taken in seconds.items()},
        "all": f"{sum(seconds.values()) / 60:.1f} min",
        "bottleneck": bottleneck(stages),
    }


def scenario(name: str, changed: dict[str, float], given: argparse.Namespace) -> dict[str, str]:
    """One GPU with some rates changed."""
    stages = estimate(1, argparse.Namespace(**vars(given) | changed))
    seconds = sum(total(stage, parts) for stage, parts in stages.items())
    return {
        "what": name,
        "all": f"{seconds / 60:.1f} min",
        "aim": "reached on paper" if seconds <= AIM_SECONDS else "not reached",
        "bottleneck": bottleneck(stages),
    }


def total(stage: str, parts: dict[str, float]) -> float:
    """Seconds of a stage: its slowest part where they overlap, else all."""
    return max(parts.values()) if stage == "pass" else sum(parts.values())


def bottleneck(stages: dict[str, dict[str, float]]) -> str:
    """The part that takes longest of the whole run."""
    seconds = {f"{stage}: {part}": value for stage, parts in stages.items() for part, value in parts.items()}
    longest = max(seconds, key=seconds.__getitem__)
    return f"{longest}, {seconds[longest]:,.0f} s"


# --- the parts


def estimate(gpus: int, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of each part of each stage."""
    work = _Work(gpus, given)
    d, schedule = given.channels, given.schedule
    trials, trial = TRIAL_STARTS * TRIAL_ROUNDS, work.chosen(min(schedule[0], TRIAL_PROTOTYPES))
    tables = given.distinct * d * TABLE_PROTOTYPES + min(HELD_OUT, given.distinct * d * HELD_OUT_PROTOTYPES)
    update = given.polar + work.all_reduce()
    return {
        "pass": work.image_pass(),
        "gathering of maps": work.gather(work.forwarded_again()),  # those of the trials are mostly among them
        "start": work.scans(ROTATION_SCANS + trials, ROTATION_PRODUCTS + trials)
        | {"maps read": trials * work.maps_read(trial), "updates": (10 + trials) * update},
        "rounds": work.scans(len(schedule), len(schedule))
        | {"maps read": sum(work.maps_read(work.chosen(n)) for n in schedule), "updates": len(schedule) * update},
        "tables": work.table_scans() | work.gather(tables) | {"maps read": work.maps_read(tables)},
        "proof": {"product": 2 * HELD_OUT * d * (d + CLASSES) / (given.cpu_product * given.cores_per_gpu)},
    }


class _Work:
    """Seconds of pieces of work on so many GPUs."""

    def __init__(self, gpus: int, given: argparse.Namespace) -> None:
        self._gpus, self._given = gpus, given
        self._machines, self._cores = math.ceil(gpus / given.gpus_per_machine), gpus * given.cores_per_gpu
        self._map_bytes = FLOAT_BYTES * CELLS * given.channels
        self._features_bytes = FLOAT_BYTES * given.channels * IMAGES
        self._product = 2 * IMAGES * given.channels**2

    def chosen(self, n: int) -> float:
        """Distinct images among n prototypes of each channel."""
        return min(IMAGES, self._given.distinct * self._given.channels * n)

    def forwarded_again(self) -> float:
        """Images that some round chooses."""
        first, *others = (self.chosen(n) for n in self._given.schedule)
        return min(IMAGES, first + self._given.fresh * sum(others))

    def maps_bytes(self) -> float:
        return self.forwarded_again() * self._map_bytes

    def image_pass(self) -> dict[str, float]:
        given, images = self._given, IMAGES + HELD_OUT
        written = FLOAT_BYTES * (given.channels * images + CLASSES * HELD_OUT)
        return {
            "decode": images / (given.decode * self._cores),
            "images read": images * IMAGE_BYTES / (given.store * self._machines),
            "forwards": images / (given.forward * self._gpus),
            "features written": written / (given.disk * self._machines),
            "driver": images / given.unit * given.driver,
        }

    def gather(self, images: float) -> dict[str, float]:
        given = self._given
        return {
            "maps: decode": images / (given.decode * self._cores),
            "maps: forwards": images / (given.forward * self._gpus),
            "maps: written": images * self._map_bytes / (given.disk * self._machines),
        }

    def maps_read(self, images: float) -> float:
        return images * self._map_bytes / (self._given.maps * self._machines)

    def scans(self, count: int, products: int) -> dict[str, float]:
        """Scans by the workers of the fit: reading, and beside it what is sent to the GPU or multiplied there."""
        given = self._given
        uncached = max(0.0, self._features_bytes - given.cache * self._gpus)
        read = count * uncached / (given.disk * self._machines)
        sent = count * self._features_bytes / (given.transfer * self._gpus)
        multiplied = products * self._product / (given.product * self._gpus)
        return {"features read": read, "features sent and multiplied": max(0.0, sent + multiplied - read)}

    def table_scans(self) -> dict[str, float]:
        """One read of the features, one product, on the CPUs; the identity's scores are a transpose."""
        read = self._features_bytes / (self._given.disk * self._machines)
        return {"scan": max(read, self._product / (self._given.cpu_product * self._cores))}

    def all_reduce(self) -> float:
        """Of the sum of one channels x channels matrix in float64 and the broadcast of one in float32."""
        if self._gpus == 1:
            return 0.0
        return float((2 * 8 + 4) * self._given.channels**2 / self._given.network)


if __name__ == "__main__":
    main()
