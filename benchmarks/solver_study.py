"""Which start, schedule and weights of the fit end purest on images that it has not seen: docs/solver.md.

    python benchmarks/solver_study.py CACHE [--sets cifar r18] [--variants weights] [--partitions 0 1] [--minutes 8]

Works on the shared photos and weights (benchmarks/README.md). CACHE keeps the feature maps, 2 GB. Each row goes to
benchmarks/solver_study.csv as it is finished, and rows that are there are not made again: the study can be stopped at
any time. Partition 0 is the data set's own; the others deal all its images out at random, in the same numbers.
"""

import argparse
import csv
import io
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bench
import numpy as np
import pyarrow.parquet as pq
import solver_variants as V
import torch
from feature_maps import Maps, make_maps, split_images
from PIL import Image
from safetensors.torch import save_file
from solver import by_adam, by_defaults
from torch import Tensor

from epic_ray.demo import DIGIT_PREPROCESSING, DigitNet
from epic_ray.method.backbones import load_classifier
from epic_ray.method.classifier import SplitClassifier
from epic_ray.method.schedule import prototypes_per_round

RESULTS = Path(__file__).with_name("solver_study.csv")
COLUMNS = ("set", "partition", "variant", "fitting_5", "fitting_20", "held_out_5", "held_out_20", "seconds")
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
SETS = {"cifar": "cifar10", "mnist": "mnist", "r18": "photos", "insects": "insects", "mnv2": "photos"}


def main() -> None:
    """Fits every variant on every set and partition that is asked for, until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--variants", nargs="+", default=[""], help="those whose name contains one of these")
    parser.add_argument("--partitions", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", action="store_true", help="purity after each round, of a few variants")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    arguments = parser.parse_args()
    if arguments.rounds:
        trace(arguments.sets, arguments.cache)
        return
    end = time.monotonic() + 60 * arguments.minutes
    wanted = [name for name in VARIANTS if any(part in name for part in arguments.variants)]
    for name in arguments.sets:
        for number in arguments.partitions:
            done = finished()
            missing = [variant for variant in wanted if (name, str(number), variant) not in done]
            if missing and time.monotonic() < end:
                run(name, number, missing, arguments.cache, end)


def run(name: str, number: int, variants: list[str], cache: Path, end: float) -> None:
    """Fits the variants on one partition of one set and writes a row for each."""
    fitting, held_out = partition(name, number, cache)
    for variant in variants:
        if time.monotonic() > end:
            return
        start = time.perf_counter()
        basis = VARIANTS[variant](fitting)
        seconds = time.perf_counter() - start
        purities = [f"{value:.5f}" for maps in (fitting, held_out) for value in maps.purity(basis)]
        row = [name, number, variant, *purities, f"{seconds:.2f}"]
        print(*row, flush=True)
        new = not RESULTS.exists()
        with RESULTS.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, row] if new else [row])


def trace(sets: list[str], cache: Path) -> None:
    """Writes the purity after each round to benchmarks/solver_rounds.csv, of 30 rounds where n does not fall."""
    rows = []
    for name in sets:
        fitting, held_out = partition(name, 0, cache)
        for variant, (start, shape, weights, rounds) in TRACED.items():
            bases = [STARTS[start](fitting)]
            fitted(start, shape, weights, fitting, rounds, on_round=bases.append)
            for number, basis in enumerate(bases):
                purities = [f"{value:.5f}" for maps in (fitting, held_out) for value in maps.purity(basis)]
                rows.append([name, variant, number, *purities])
            print(*rows[-1], flush=True)
    with RESULTS.with_name("solver_rounds.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("set", "variant", "round", *COLUMNS[3:7]), *rows])


def finished() -> set[tuple[str, str, str]]:
    """Set, partition and variant of the rows that are there."""
    if not RESULTS.exists():
        return set()
    with RESULTS.open() as file:
        return {(row["set"], row["partition"], row["variant"]) for row in csv.DictReader(file)}


# --- what is fitted

SHAPES: dict[str, tuple[int, ...]] = {
    "n 100 to 20": prototypes_per_round(100, 20, 10, "linear", exact_end=True),
    "n 100 to 50": prototypes_per_round(100, 50, 10, "linear", exact_end=True),
    "published n": prototypes_per_round(100, 5, 10, "linear", exact_end=False),
    **{f"n {n}": (n,) * 10 for n in (5, 20, 50, 100, 200)},
}
STARTS: dict[str, V.Start] = {
    "identity": V.identity,
    "quartimax": V.quartimax(10),
    "quartimax 1": V.quartimax(1),
    "quartimax 3": V.quartimax(3),
    "quartimax 30": V.quartimax(30),
    "varimax": V.varimax(10),
    "quartimax of cells": V.quartimax_of_cells(10),
    "varimax of cells": V.varimax_of_cells(10),
    "sparse cells": V.sparse_cells(),
    "PCA": V.pca,
    "ICA": V.ica,
    "random": V.random,
}
WEIGHTS = {"root": V.root, "harmonic": V.harmonic, "linear": V.linear, "exponential": V.exponential}
OTHERS = {
    "20 rounds": {"rounds": 2},
    "40 rounds": {"rounds": 4},
    "3 cells": {"cells": 3},
    "damping 0.1": {"damping": 0.1},
    "damping 0.3": {"damping": 0.3},
    "M averaged": {"memory": 0.5},
    "U averaged": {"last_bases": 5},
    "3 updates": {"updates": 3},
}
TRACED = {
    "quartimax, n 100 to 20": ("quartimax", "n 100 to 20", V.equal, 1),
    "varimax, n 100, root": ("varimax", "n 100", V.root, 3),
    "identity, n 100, root": ("identity", "n 100", V.root, 3),
}


def fitted(start: str, shape: str, weights: V.Weights, maps: Maps, rounds: int = 1, **options: Any) -> Tensor:
    """A fit from a named start with a named schedule, each of its rounds done `rounds` times."""
    schedule = [n for n in SHAPES[shape] for _ in range(rounds)]
    return V.fit(maps, STARTS[start](maps), schedule, weights, **options)


def all_variants() -> dict[str, Callable[[Maps], Tensor]]:
    """Every variant by its name: start, schedule, weights, what else."""
    found: dict[str, Callable[[Maps], Tensor]] = {f"start: {name}": start for name, start in STARTS.items()}
    found |= {"adam": lambda maps: by_adam(maps)[0], "defaults": by_defaults}
    for start in ("identity", "quartimax"):
        for shape in SHAPES:
            found[f"{start}, {shape}"] = partial(fitted, start, shape, V.equal)
            found[f"{start}, {shape}, root"] = partial(fitted, start, shape, V.root)
    for name, weights in WEIGHTS.items():
        found[f"identity, n 100, {name}"] = partial(fitted, "identity", "n 100", weights)
    for start in STARTS:
        found.setdefault(f"{start}, n 100, root", partial(fitted, start, "n 100", V.root))
        found.setdefault(f"{start}, n 100 to 20", partial(fitted, start, "n 100 to 20", V.equal))
    for name, options in OTHERS.items():
        found[f"identity, n 100, root, {name}"] = partial(fitted, "identity", "n 100", V.root, **options)
    return found


VARIANTS = all_variants()


# --- what it is fitted on


def partition(name: str, number: int, cache: Path) -> tuple[Maps, Maps]:
    """Fitting and held-out maps of a set; partition 0 is the set's own."""
    paths = [cache / name / f"{split}.npy" for split in ("train", "val")]
    if not all(path.exists() for path in paths):
        root, classifier = bench.shared_folder() / "data" / SETS[name], network(name, cache)
        for path, split in zip(paths, ("train", "test" if name == "mnist" else "val"), strict=True):
            make_maps(classifier, split_images(root, split), path)
    parts = [Maps.open(path) for path in paths]
    if number == 0:
        return parts[0], parts[1]
    maps, pooled = np.concatenate([part.maps for part in parts]), torch.cat([part.pooled for part in parts])
    order = np.random.default_rng(number).permutation(len(maps))
    rows = [np.sort(half) for half in np.split(order, [len(parts[0].pooled)])]
    return Maps(maps[rows[0]], pooled[rows[0]]), Maps(maps[rows[1]], pooled[rows[1]])


def network(name: str, cache: Path) -> SplitClassifier:
    """The classifier whose features a set is of."""
    shared = bench.shared_folder()
    if name == "cifar":
        sys.path.insert(0, str(shared / "weights"))
        return load_classifier(
            "cifar_resnet:cifar_resnet",
            source="factory",
            arguments={"depth": 56},
            weights=shared / "weights/cifar_resnet56.safetensors",
            class_names=json.loads((shared / "data/cifar10/classes.json").read_text()),
            preprocessing={"resize": None, "crop": 32, **IMAGENET},
        )
    if name == "mnist":
        weights = trained_digit_net(shared / "data/mnist/data/train-00000-of-00002.parquet", cache / "digit_net")
        return load_classifier(
            "epic_ray.demo:digit_net", source="factory", weights=weights, preprocessing=DIGIT_PREPROCESSING
        )
    resnet = name in ("r18", "insects")
    return load_classifier(
        "resnet18" if resnet else "mobilenet_v2",
        source="torchvision",
        weights=shared / "weights" / ("resnet18_imagenette10.safetensors" if resnet else "mobilenet_v2.safetensors"),
        class_count=10 if resnet else 1000,
        preprocessing={"resize": 224 if name == "r18" else 256, "crop": 224},
    )


def trained_digit_net(digits: Path, path: Path) -> Path:
    """Weights of the demo's network, trained on the first 6,000 digits of MNIST."""
    rows = pq.read_table(digits).slice(0, 6000).to_pylist()
    opened = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB").resize((32, 32), 2) for row in rows]
    images = (torch.from_numpy(np.stack([np.asarray(image) for image in opened])).permute(0, 3, 1, 2) / 255 - 0.5) * 2
    labels = torch.tensor([row["label"] for row in rows])
    torch.manual_seed(0)
    net = DigitNet()
    batches = torch.cat([torch.randperm(len(images)) for _ in range(4)]).split(64)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=len(batches))
    for batch in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


if __name__ == "__main__":
    main()
