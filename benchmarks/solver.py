"""The closed form against the paper's gradient descent on one folder of photos, and the polar factor's two routes.

    python benchmarks/solver.py [PHOTOS WEIGHTS] [--architecture resnet18 --classes 10 --resize 224] [--cache FOLDER]

PHOTOS holds the splits `train` and `val` (folders, Parquet files or tars). Without it and WEIGHTS, the shared ones
beside the repository are taken. The feature maps of all images are made once, then both solvers fit on them, in turn.
Our `adam` measures the purity before and after each round, which the fit itself does not need: its time is told
with and without that, and judged without. Ends with 1 where an aim is missed. `--polar-only` leaves the fits out.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bench
import torch
from feature_maps import Maps, make_maps, split_images

from epic_ray.method import solvers
from epic_ray.method.backbones import load_classifier
from epic_ray.method.basis import orthogonality_error, polar_by_newton, polar_by_svd
from epic_ray.method.schedule import prototypes_per_round
from epic_ray.method.solvers import FitState, SingleProcess, fit_adam, fit_procrustes, rank_weights
from epic_ray.method.starts import purest_start, varimax_start

ALONE = SingleProcess()
COUNTS = (5, 20)
POLAR_CHANNELS = (512, 1280, 2048)
MOST_TIME = 1 / 20
OURS, PAPERS = "procrustes, defaults", "adam, published schedule"


def main() -> int:
    """Prints the tables; 1 where an aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, nargs="?", help="folder with the splits train and val")
    parser.add_argument("weights", nargs="?", help="weights of the network, or `pretrained`")
    parser.add_argument("--architecture", default="resnet18")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--resize", type=int, default=224, help="short side before the crop, in pixels")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--cache", type=Path, help="folder that keeps the feature maps (default: a temporary one)")
    parser.add_argument("--runs", type=int, default=3, help="pairs of fits that are timed")
    parser.add_argument("--polar-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.polar_only and not arguments.weights:
        if arguments.photos:
            parser.error("PHOTOS need the WEIGHTS of a network")
        arguments.photos = bench.shared_folder() / "data/photos"
        arguments.weights = str(bench.shared_folder() / "weights/resnet18_imagenette10.safetensors")
    print(bench.heading(), end="\n\n")
    verdicts: list[dict[str, str]] = []
    if not arguments.polar_only:
        with tempfile.TemporaryDirectory() as temporary:
            verdicts = compare_solvers(*open_maps(arguments, arguments.cache or Path(temporary)), arguments.runs)
    print(bench.table(polar_rows()))
    return int(any(row["reached"] == "no" for row in verdicts))


def open_maps(arguments: argparse.Namespace, folder: Path) -> tuple[Maps, Maps]:
    """The maps of the fitting and the held-out images, made where they are not there yet."""
    classifier = load_classifier(
        arguments.architecture,
        source="torchvision",
        weights=arguments.weights,
        class_count=arguments.classes,
        preprocessing={"resize": arguments.resize, "crop": arguments.crop},
    )
    for split in ("train", "val"):
        make_maps(classifier, split_images(arguments.photos, split), folder / f"{split}.npy")
    return Maps.open(folder / "train.npy"), Maps.open(folder / "val.npy")


def compare_solvers(fitting: Maps, held_out: Maps, runs: int) -> list[dict[str, str]]:
    """Prints the purity that each reaches, and the time of one against the other; gives the verdicts."""
    bases: dict[str, torch.Tensor] = {"own channels": torch.eye(fitting.pooled.shape[1])}
    measuring: list[float] = []

    def ours() -> None:
        bases[OURS] = by_defaults(fitting)

    def papers() -> None:
        bases[PAPERS], seconds = by_adam(fitting)
        measuring.append(seconds)

    pairs = bench.side_by_side(ours, papers, runs, warm_up=0)
    purities = {
        name: {
            f"{split} @{n}": purity
            for split, maps in (("fitting", fitting), ("held out", held_out))
            for n, purity in zip(COUNTS, maps.purity(basis, COUNTS), strict=True)
        }
        for name, basis in bases.items()
    }
    rows = [
        {"basis": name}
        | {what: f"{purity:.4f}" for what, purity in purities[name].items()}
        | {"max of U·Uᵀ − I": f"{orthogonality_error(basis):.0e}"}
        for name, basis in bases.items()
    ]
    count, held_out_count = len(fitting.pooled), len(held_out.pooled)
    print(f"Purity at D = {fitting.pooled.shape[1]}, {count} images fitted on and {held_out_count} held out.\n")
    print(bench.table(rows), end="\n\n")
    bare = bench.Pairs(pairs.ours, [all_of - own for all_of, own in zip(pairs.baseline, measuring, strict=True)])
    print(
        bench.table(
            [time_row(pairs, "as it runs", 0.0), time_row(bare, "less its measuring", statistics.median(measuring))]
        )
    )
    verdicts = judge(purities, statistics.median(bare.ratios))
    print(f"\n{bench.table(verdicts)}\n", flush=True)
    return verdicts


def time_row(pairs: bench.Pairs, how: str, taken_off: float) -> dict[str, Any]:
    """The times; ratios far below 1 need their own digits."""
    ratios = pairs.ratios
    return {
        "what": f"fit: procrustes against adam, {how}",
        "ours s": f"{statistics.median(pairs.ours):.3g}",
        "adam s": f"{statistics.median(pairs.baseline):.3g}",
        "taken off s": f"{taken_off:.3g}",
        "ratio": f"{statistics.median(ratios):.3g}",
        "range": f"{min(ratios):.3g} to {max(ratios):.3g}",
        "runs": len(ratios),
    }


def judge(purities: dict[str, dict[str, float]], ratio: float) -> list[dict[str, str]]:
    """Purer than adam everywhere, in a twentieth of its time."""
    rows = [
        {"aim": f"purity {what} above adam's {other:.4f}", "found": f"{purities[OURS][what]:.4f}"}
        | {"reached": "yes" if purities[OURS][what] > other else "no"}
        for what, other in purities[PAPERS].items()
    ]
    told = {"aim": f"time at most {MOST_TIME:g} of adam's", "found": f"{ratio:.3g}"}
    return [*rows, told | {"reached": "yes" if ratio <= MOST_TIME else "no"}]


def by_defaults(maps: Maps) -> torch.Tensor:
    """U as `epic-ray train` fits it where nothing is set: `start: auto`, `weights: rank`."""
    from epic_ray.config import FitConfig  # here: --polar-only does without pydantic

    schedule = FitConfig().prototypes_per_channel
    counts = prototypes_per_round(schedule.start, schedule.end, schedule.rounds, schedule.decay, schedule.exact_end)
    identity = torch.eye(maps.pooled.shape[1])
    starts = [identity, varimax_start(maps.pooled_blocks, len(identity), 10, ALONE)]
    start = starts[purest_start(maps, starts, schedule.start, ALONE, rank_weights)]
    return fit_procrustes(maps, FitState.begin(start), counts, ALONE, lambda state, record: None).basis


def by_adam(maps: Maps) -> tuple[torch.Tensor, float]:
    """U as the paper's code fits it, and the seconds of measuring purity before and after each round."""
    from epic_ray.config import FitConfig

    settings, counts = FitConfig().adam, prototypes_per_round(100, 5, 10, "linear", exact_end=False)
    measure, seconds = solvers.peak_directions, 0.0

    def timed(*arguments: Any) -> Any:
        nonlocal seconds
        begin = time.perf_counter()
        found = measure(*arguments)
        seconds += time.perf_counter() - begin
        return found

    with patch.object(solvers, "peak_directions", timed):
        state = fit_adam(
            maps,
            FitState.begin(torch.eye(maps.pooled.shape[1])),
            counts,
            ALONE,
            lambda state, record: None,
            seed=FitConfig().seed,
            epochs_per_round=settings.epochs_per_round,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
    return state.basis, seconds


def polar_rows() -> list[dict[str, Any]]:
    """The polar factor of M + 0.001 U by SVD and by Newton's iteration, on the CPU and on a GPU where there is one."""
    rows = []
    names = {"ours s": "Newton s", "baseline s": "SVD s"}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for channels in POLAR_CHANNELS:
            matrix = peak_directions(channels).to(device)
            pairs = bench.side_by_side(
                waited(polar_by_newton, matrix), waited(polar_by_svd, matrix), 5 if channels <= 1280 else 3
            )
            exact = polar_by_svd(matrix.double())
            row = {"device": device, "D": channels}
            row |= {names.get(key, key): value for key, value in pairs.row("").items() if key != "what"}
            for name, polar in (("Newton", polar_by_newton), ("SVD", polar_by_svd)):
                factor = polar(matrix)
                row[f"{name}: U·Uᵀ − I"] = f"{orthogonality_error(factor):.0e}"
                row[f"{name}: from float64"] = f"{float((factor - exact).abs().max()):.0e}"
            rows.append(row)
    return rows


def peak_directions(channels: int) -> torch.Tensor:
    """A matrix like M + 0.001 U of a first round: unit-length-bounded rows, non-negative, of low numerical rank."""
    generator = torch.Generator().manual_seed(0)
    concepts = torch.rand(channels // 2, channels, generator=generator) ** 3
    means = torch.rand(channels, channels // 2, generator=generator) ** 2 @ concepts
    return 0.5 * means / means.norm(dim=1, keepdim=True) + 1e-3 * torch.eye(channels)


def waited(polar: Callable[[torch.Tensor], torch.Tensor], matrix: torch.Tensor) -> Callable[[], None]:
    """The call, until the device has done it."""

    def work() -> None:
        polar(matrix)
        if matrix.is_cuda:
            torch.cuda.synchronize()

    return work


if __name__ == "__main__":
    sys.exit(main())
