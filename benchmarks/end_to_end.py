"""A whole fit: `epic-ray train` against the published schedule, in time, forwards and purity.

    python benchmarks/end_to_end.py [cifar] [photos] [photos-purity] [--quick] [--repeats N] [--folder DIR]

The baseline is `published.py` beside this file: 12 passes over the training images and 1,720 D prototype forwards. It
has all cores, the fastest of three batch and decoding settings, and a loaded network before its clock starts; it does
the fit and nothing else. `epic-ray train` is timed as a user starts it, from a new process to its end: it also reads
the held-out split, writes all tables and proves the logits.

* cifar: both run whole (ResNet-56, D = 64); the script ends where what is counted is not what the formula says.
* photos: the baseline (ResNet-18, D = 512) would take hours. One selection pass, a part of the first epoch and a part
  of the measuring are timed, and their seconds an image are multiplied by the exact counts.
* photos-purity: the baseline's U for the photos, from maps that are kept, which gives the same U without its cost.

Forwards are counted where they happen. Purities of every U are taken in the same way from the features and maps of the
run, the strongest images chosen anew in each split; ours must equal those in `run.json`. The exit code is 1 where a
demand is not reached.
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench
import published
import torch
from runs import Features, FinishedRun, check_purity, train

from epic_ray.run import read_config
from epic_ray.stages.loading import load

PARTS = ("cifar", "photos", "photos-purity")
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
FEW_MAPS = {"features.map_budget_bytes": 0}

Row = dict[str, Any]


# --- what is fitted


@dataclass(frozen=True)
class Case:
    """A classifier and its images as settings of a run, the baseline's first n, and the ratio that is demanded.

    code: folder of the network's own code. tried: images on which the baseline's settings are tried. sampled_steps,
    measured: steps, and prototypes a channel, of a sample of the baseline.
    """

    name: str
    settings: dict[str, Any]
    start: int
    least_ratio: float
    code: Path
    tried: int
    sampled_steps: int = 10
    measured: int = published.MEASURED_PER_CHANNEL


def cifar(shared: Path, quick: bool) -> Case:
    model = {
        "architecture": "cifar_resnet:cifar_resnet",
        "source": "factory",
        "arguments": {"depth": 56},
        "weights": str(shared / "weights/cifar_resnet56.safetensors"),
        "classes": json.loads((shared / "data/cifar10/classes.json").read_text()),
        "preprocessing": {"resize": None, "crop": 32, **IMAGENET},
    }
    splits = {"train": "train-0000.tar" if quick else "train-*.tar", "val": "val-*.tar"}
    settings = {"model": model, "data": {"root": str(shared / "data/cifar10"), "splits": splits}}
    start, tried = (10, 256) if quick else (100, 2048)
    return Case("CIFAR-10, ResNet-56", settings, start, 10, shared / "weights", tried)


def photos(shared: Path, quick: bool, folder: Path) -> Case:
    model = {
        "architecture": "resnet18",
        "source": "torchvision",
        "weights": str(shared / "weights/resnet18_imagenette10.safetensors"),
        "class_count": 10,
        "preprocessing": {"resize": 224, "crop": 224, "interpolation": "bilinear", **IMAGENET},
    }
    root = _link_few(shared / "data/photos", folder / "few") if quick else shared / "data/photos"
    settings = {"model": model, "data": {"root": str(root)}}
    start, tried, *sampled = (20, 64, 2, 1) if quick else (100, 512)
    return Case("photos, ResNet-18", settings, start, 50, shared / "weights", tried, *sampled)


def _link_few(photos: Path, folder: Path) -> Path:
    """Links to the first 30 photos of each class, and to 10 held-out ones."""
    for split, count in (("train", 30), ("val", 10)):
        for photo in (path for group in (photos / split).iterdir() for path in sorted(group.iterdir())[:count]):
            link = folder / split / photo.parent.name / photo.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(photo)
    return folder


# --- what is measured


class Baseline:
    """The published fit over the images that a run of ours has listed, in its fastest setting."""

    def __init__(self, case: Case, ours: FinishedRun) -> None:
        torch.set_num_threads(bench.cores())
        sys.path.append(str(case.code))
        classifier = load(read_config(ours.run_dir).model)
        images = published.Images(list(ours.fitting_images()), classifier.preprocessing)
        self.images, self.channels = len(images), classifier.channel_count
        self.rounds = published.schedule(case.start)
        self.by_formula = published.forwards(self.images, self.channels, self.rounds)
        self._source, self.settings_tried = published.fastest(images, classifier, bench.cores(), case.tried)

    def fit(self) -> published.PublishedFit:
        """A fit at its start."""
        return published.PublishedFit(self._source, self.images, self.channels)

    def sample(self, steps: int, measured: int) -> tuple[dict[str, int], dict[str, float]]:
        """Forwards of a sample of each part, and the seconds of the whole part at the sample's seconds an image."""
        fit = self.fit()
        chosen = fit.select(self.rounds[0])
        fit.measure(chosen[:, :measured])
        fit.train(chosen, 0, 0, steps)
        costs = fit.costs | {published.MEASURING_PASSES: fit.costs[published.SELECTING]}  # a pass is a pass
        each = {part: cost.seconds / cost.forwarded for part, cost in costs.items()}
        counted = {part: cost.forwarded for part, cost in fit.costs.items()}
        return counted, {part: each[part] * count for part, count in self.by_formula.items()}


@dataclass
class Measured:
    """Runs of both in turn, and the baseline's last counts and U.

    seconds: of the baseline, by part. counted: its forwards by part, of the sample where it was not run whole.
    """

    ours: list[FinishedRun] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)
    counted: dict[str, int] = field(default_factory=dict)
    basis: torch.Tensor | None = None

    @property
    def whole_seconds(self) -> float:
        return statistics.median(sum(parts.values()) for parts in self.seconds)

    def times_as_long(self, parts: tuple[str, ...] = published.PARTS) -> list[float]:
        """The baseline's seconds over ours, of each pair."""
        pairs = zip(self.seconds, self.ours, strict=True)
        return [sum(seconds[part] for part in parts) / run.seconds for seconds, run in pairs]


def measure(case: Case, folder: Path, repeats: int, sampled: bool) -> tuple[Baseline, Measured]:
    """Ours and the baseline in turn, whole or a sample of it."""
    baseline, found = None, Measured()
    for number in range(repeats):
        found.ours.append(train(case.settings, folder, f"ours-{number}", case.code))
        baseline = baseline or Baseline(case, found.ours[0])
        if sampled:
            found.counted, seconds = baseline.sample(case.sampled_steps, case.measured)
        else:
            fit = baseline.fit()
            found.basis = fit.run(baseline.rounds)
            found.counted = {part: cost.forwarded for part, cost in fit.costs.items()}
            if found.counted != baseline.by_formula:
                sys.exit(f"{case.name}: forwards counted {found.counted}, by formula {baseline.by_formula}")
            seconds = {part: cost.seconds for part, cost in fit.costs.items()}
        found.seconds.append(seconds)
    return baseline, found


# --- the tables


def our_row(name: str, runs: list[FinishedRun]) -> Row:
    seconds, last = statistics.median(run.seconds for run in runs), runs[-1]
    return _row(name, seconds, last.pass_forwards, last.images, last.prototype_forwards)


def published_row(name: str, baseline: Baseline, seconds: float, counts: dict[str, int]) -> Row:
    passes = sum(count for part, count in counts.items() if part.endswith("passes"))
    return _row(name, seconds, passes, baseline.images, sum(counts.values()) - passes)


def _row(name: str, seconds: float, passes: int, images: int, prototypes: int) -> Row:
    return {
        "": name,
        "s": f"{seconds:,.1f}",
        "pass forwards": f"{passes:,}",
        "an image": f"{passes / images:.3g}",
        "prototype forwards": f"{prototypes:,}",
    }


def time_rows(found: Measured) -> list[Row]:
    """How many times as long the baseline takes, whole and without what it only measures."""
    rows = []
    alone = (published.SELECTING, published.TRAINING)
    for name, parts in (("whole", published.PARTS), ("its 10 selections and 20 epochs alone", alone)):
        times = found.times_as_long(parts)
        rows.append(
            {
                "the published schedule": name,
                "its s": f"{statistics.median(sum(each[part] for part in parts) for each in found.seconds):,.0f}",
                "`epic-ray train` s": f"{statistics.median(run.seconds for run in found.ours):,.1f}",
                "times as long": f"{statistics.median(times):.1f}",
                "range": f"{min(times):.1f} to {max(times):.1f}",
                "runs": len(times),
            }
        )
    return rows


def part_rows(baseline: Baseline, found: Measured) -> list[Row]:
    return [
        {
            "part of the baseline": part,
            "forwards counted": f"{found.counted[part]:,}",
            "of the whole by formula": f"{count:,}",
            "s of the whole": f"{statistics.median(seconds[part] for seconds in found.seconds):,.0f}",
        }
        for part, count in baseline.by_formula.items()
    ]


def stage_rows(runs: list[FinishedRun]) -> list[Row]:
    """Where the last run of ours spent its time."""
    run = runs[-1]
    stages = {name: seconds for name, seconds in run.record["seconds"].items() if name != "this_start"}
    stages["start, proof and end"] = run.seconds - sum(stages.values())
    return [{"stage of `epic-ray train`": name, "s": f"{seconds:,.1f}"} for name, seconds in stages.items()]


def purity_rows(purities: dict[str, dict[str, float]]) -> list[Row]:
    return [{"": name} | {key: f"{value:.4f}" for key, value in found.items()} for name, found in purities.items()]


def cost_verdict(case: Case, found: Measured) -> list[Row]:
    passes = found.ours[-1].pass_forwards / found.ours[-1].images
    ratio = statistics.median(found.times_as_long())
    return [
        bench.verdict("pass forwards an image", "1", f"{passes:.3g}", passes == 1),
        bench.verdict(
            "times as fast as the baseline", f"≥ {case.least_ratio:g}", f"{ratio:.1f}", ratio >= case.least_ratio
        ),
    ]


def purity_verdict(ours: dict[str, float], theirs: dict[str, float]) -> list[Row]:
    return [
        bench.verdict(f"purity {key}", f"≥ {theirs[key]:.4f}", f"{ours[key]:.4f}", ours[key] >= theirs[key])
        for key in theirs
    ]


def show_verdict(rows: list[Row]) -> bool:
    """Whether all demands are reached."""
    show("Verdict.", rows)
    return all(row["reached"] == "yes" for row in rows)


def show(title: str, rows: list[Row]) -> None:
    print(f"\n{title}\n\n{bench.table(rows)}", flush=True)


def show_case(case: Case, ours: FinishedRun, how: str) -> None:
    print(f"\n### {case.name} (D = {ours.record['model']['channels']}), {ours.images:,} images in both splits: {how}")


# --- the parts


def compare_whole(case: Case, folder: Path, repeats: int) -> bool:
    """Both whole, in turn, and the purity of both; whether all demands are reached."""
    baseline, found = measure(case, folder, repeats, sampled=False)
    few_maps = train(case.settings | FEW_MAPS, folder, "few-maps", case.code)
    show_case(case, found.ours[0], "both run whole")
    rows = [published_row("the published schedule", baseline, found.whole_seconds, found.counted)]
    show_costs(baseline, found, few_maps, rows)
    verdict = compare_purity(found.ours[-1], Features(found.ours[-1]), found.basis)
    return show_verdict(cost_verdict(case, found) + verdict)


def compare_sampled(case: Case, folder: Path, repeats: int) -> bool:
    """Ours whole; of the baseline a sample, multiplied by the exact counts."""
    baseline, found = measure(case, folder, repeats, sampled=True)
    few_maps = train(case.settings | FEW_MAPS, folder, "few-maps", case.code)
    show_case(case, found.ours[0], "the baseline EXTRAPOLATED")
    all_steps = -(-baseline.rounds[0] * baseline.channels // published.PAIRS_PER_STEP)
    print(
        f"\nTimed of the baseline: one selection pass, {case.sampled_steps} of the {all_steps} steps of the first "
        f"epoch, and the measuring of {found.counted[published.MEASURING]:,} prototypes; their seconds an image are "
        "multiplied by the counts of the whole."
    )
    name = "the published schedule, counts by formula"
    show_costs(baseline, found, few_maps, [published_row(name, baseline, found.whole_seconds, baseline.by_formula)])
    return show_verdict(cost_verdict(case, found))


def show_costs(baseline: Baseline, found: Measured, few_maps: FinishedRun, rows: list[Row]) -> None:
    """The tables that both cases have."""
    rows += [our_row("`epic-ray train`", found.ours), our_row("the same, maps of chosen images only", [few_maps])]
    show("Forwards, ours as counted.", rows)
    show("Time.", time_rows(found))
    show("Where the time goes.", part_rows(baseline, found))
    show("Of ours, in the last run.", stage_rows(found.ours))
    show("Settings tried for the baseline; the fastest is taken.", baseline.settings_tried)


def compare_purity(ours: FinishedRun, features: Features, basis: torch.Tensor) -> list[Row]:
    """Shows the purities of both and of the network's own channels; gives the verdict."""
    mine, theirs = check_purity(ours, features), features.purity(basis)
    own = features.purity(torch.eye(len(basis)))
    purities = {"the network's own channels": own, "the published schedule": theirs, "`epic-ray train`": mine}
    show("Purity, the strongest images chosen anew in each split.", purity_rows(purities))
    return purity_verdict(mine, theirs)


def compare_purity_alone(case: Case, folder: Path) -> bool:
    """The baseline's U from the maps that a run of ours has kept."""
    ours = train(case.settings, folder, "ours", case.code)
    features = Features(ours)
    torch.set_num_threads(bench.cores())
    maps = features.maps["train"]
    fit = published.PublishedFit(published.Kept(maps), len(maps), maps.shape[2])
    basis = fit.run(published.schedule(case.start))
    show_case(case, ours, "purity alone, the baseline on kept maps")
    return show_verdict(compare_purity(ours, features, basis))


def main() -> None:
    """Prints Markdown, part by part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer images and prototypes: no figures to quote")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each, in turn (default: 3)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the runs go (default: a temporary folder)")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    shared, quick = bench.shared_folder(), arguments.quick
    print(f"## End to end{', QUICK: fewer images and prototypes, no figures to quote' if quick else ''}\n")
    print(bench.heading(), flush=True)
    reached = []
    for part in arguments.parts or PARTS:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            folder = Path(temporary)
            if part == "cifar":
                reached.append(compare_whole(cifar(shared, quick), folder, arguments.repeats))
            elif part == "photos":
                reached.append(compare_sampled(photos(shared, quick, folder), folder, arguments.repeats))
            else:
                reached.append(compare_purity_alone(photos(shared, quick, folder), folder))
    sys.exit(0 if all(reached) else 1)


if __name__ == "__main__":
    main()
