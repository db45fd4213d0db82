"""The closed form against the paper's gradient descent on one folder of photos, and the polar factor's two routes.

    python benchmarks/solver.py [PHOTOS WEIGHTS] [--architecture resnet18 --classes 10 --resize 224] [--cache FOLDER]

PHOTOS holds the splits `train` and `val` (folders, Parquet files or tars). Without it and WEIGHTS, the shared ones
beside the repository are taken. The feature maps of all images are made once, then both solvers fit on them, in turn.
`--polar-only` leaves the fits out.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench
import torch
from feature_maps import Maps, make_maps, split_images

from epic_ray.config import FitConfig
from epic_ray.method.backbones import load_classifier
from epic_ray.method.basis import orthogonality_error, polar_by_newton, polar_by_svd
from epic_ray.method.schedule import prototypes_per_round
from epic_ray.method.solvers import FitState, SingleProcess, fit_adam, fit_procrustes, rank_weights
from epic_ray.method.starts import purest_start, varimax_start

ALONE = SingleProcess()
COUNTS = (5, 20)
POLAR_CHANNELS = (512, 1280, 2048)


def main() -> None:
    """Prints two tables."""
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
    if not arguments.polar_only:
        with tempfile.TemporaryDirectory() as temporary:
            compare_solvers(*open_maps(arguments, arguments.cache or Path(temporary)), arguments.runs)
    print(bench.table(polar_rows()))


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


def compare_solvers(fitting: Maps, held_out: Maps, runs: int) -> None:
    """Prints the purity that each reaches, and the time of one against the other."""
    bases: dict[str, torch.Tensor] = {"own channels": torch.eye(fitting.pooled.shape[1])}

    def ours() -> None:
        bases["procrustes, defaults"] = by_defaults(fitting)

    def papers() -> None:
        bases["adam, published schedule"] = by_adam(fitting)

    pairs = bench.side_by_side(ours, papers, runs, warm_up=0)
    rows = []
    for name, basis in bases.items():
        row: dict[str, Any] = {"basis": name}
        for split, maps in (("fitting", fitting), ("held out", held_out)):
            row |= {f"{split} @{n}": f"{p:.4f}" for n, p in zip(COUNTS, maps.purity(basis, COUNTS), strict=True)}
        rows.append(row | {"max of U·Uᵀ − I": f"{orthogonality_error(basis):.0e}"})
    count, held_out_count = len(fitting.pooled), len(held_out.pooled)
    print(f"Purity at D = {fitting.pooled.shape[1]}, {count} images fitted on and {held_out_count} held out.\n")
    print(bench.table(rows), end="\n\n")
    print(bench.table([pairs.row("fit: procrustes against adam")]), end="\n\n")


def by_defaults(maps: Maps) -> torch.Tensor:
    """U as `epic-ray train` fits it where nothing is set: `start: auto`, `weights: rank`."""
    schedule = FitConfig().prototypes_per_channel
    counts = prototypes_per_round(schedule.start, schedule.end, schedule.rounds, schedule.decay, schedule.exact_end)
    identity = torch.eye(maps.pooled.shape[1])
    starts = [identity, varimax_start(maps.pooled_blocks, len(identity), 10, ALONE)]
    start = starts[purest_start(maps, starts, schedule.start, ALONE, rank_weights)]
    return fit_procrustes(maps, FitState.begin(start), counts, ALONE, lambda state, record: None).basis


def by_adam(maps: Maps) -> torch.Tensor:
    """U as the paper's code fits it."""
    settings, counts = FitConfig().adam, prototypes_per_round(100, 5, 10, "linear", exact_end=False)
    start = FitState.begin(torch.eye(maps.pooled.shape[1]))
    state = fit_adam(
        maps,
        start,
        counts,
        ALONE,
        lambda state, record: None,
        seed=FitConfig().seed,
        epochs_per_round=settings.epochs_per_round,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    return state.basis


def polar_rows() -> list[dict[str, Any]]:
    """The polar factor of M + 0.001 U by SVD and by Newton's iteration, on the CPU and on a GPU where there is one."""
    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for channels in POLAR_CHANNELS:
            matrix = peak_directions(channels).to(device)
            pairs = bench.side_by_side(
                waited(polar_by_newton, matrix), waited(polar_by_svd, matrix), 5 if channels <= 1280 else 3
            )
            exact = polar_by_svd(matrix.double())
            row = {"device": device, "D": channels} | pairs.row("")
            row |= {"ours": "Newton", "baseline": "SVD"}
            for name, polar in (("Newton", polar_by_newton), ("SVD", polar_by_svd)):
                factor = polar(matrix)
                row[f"{name}: U·Uᵀ − I"] = f"{orthogonality_error(factor):.0e}"
                row[f"{name}: from float64"] = f"{float((factor - exact).abs().max()):.0e}"
            del row["what"], row["ours"], row["baseline"]
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
    main()
