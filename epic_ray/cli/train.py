"""`init`, `validate`, `plan` and `train`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from epic_ray.cli.app import Json, Quiet, app, guarded, print_json
from epic_ray.errors import ConfigError

DEFAULT_RUN_FILE = Path("run.yaml")

RunFile = Annotated[
    Path | None, typer.Argument(metavar="[RUN.yaml]", help="Run file; default ./run.yaml where there is one.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=value", help="Override a setting; may be repeated.")
]
Force = Annotated[bool, typer.Option("--force", help="Redo what other settings change in an existing run folder.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Read failed images again.")]

RUN_TEMPLATE = """\
# A run of epic-ray. Only model.architecture and data.root have no default; `epic-ray plan` shows what would happen.
name: my-run                  # the run folder is <output.root>/<name>
model:
  architecture: resnet50      # a timm or torchvision name
  source: auto                # auto (timm, then torchvision) | timm | torchvision | factory (package.module:function)
  weights: pretrained         # pretrained | random | a .safetensors, .pth, .pt or .bin file
  class_count: null           # classes of the head, where the weights have another head than the library's
  classes: null               # the head's class names in order (list or file), where the library does not know them
  preprocessing: auto         # the weights' own, or {resize: 256, crop: 224, interpolation: bilinear, ...}
data:
  root: path/to/images        # a folder, s3:// or gs://: <split>/<class>/<image>, or Parquet, tar or CSV files
  format: auto                # auto | imagefolder | parquet | webdataset | csv
  splits: {train: train, val: val}    # each split's folder, file, or pattern such as data/train-*.parquet
  max_failed_fraction: 0.01
fit: {solver: procrustes, start: auto, seed: 42}
prototypes: {per_channel: 5}
explain: {channels_per_image: 4, pictures: 20}
resources: {feature_actors: auto, batch_size: auto}
output: {root: runs}
"""


@app.command(epilog="epic-ray init  ·  epic-ray init photos.yaml")
@guarded
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = DEFAULT_RUN_FILE,
    force: Annotated[bool, typer.Option("--force", help="Overwrite.")] = False,
) -> None:
    """Write a commented run file to fill in."""
    if path.exists() and not force:
        raise ConfigError(f"{path}: exists already; give another name, or --force to overwrite it")
    try:
        path.write_text(RUN_TEMPLATE, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error})") from None
    print(path)


@app.command(epilog="epic-ray validate  ·  epic-ray validate run.yaml --set model.weights=net.pth")
@guarded
def validate(run_file: RunFile = None, settings: Settings = None, as_json: Json = False) -> None:
    """Check settings, images and classifier without running anything."""
    config = read_run_file(run_file, settings)

    from epic_ray import pipeline
    from epic_ray.logs import make_reporter

    run = pipeline.open_run(config, make_reporter(), force=True)
    facts: dict[str, Any] = {
        "name": run.config.name,
        "model": run.classifier.origin,
        "largest_difference": run.classifier.split.largest_difference,
        "images": {split: images.rows for split, images in run.images.items()},
    }
    if as_json:
        print_json(facts)
        return
    images = ", ".join(f"{count} in {split}" for split, count in facts["images"].items())
    print(f"{facts['name']}: settings, images ({images}) and classifier are in order")
    print(f"  {facts['model']}; split exact to {facts['largest_difference']:.1e}")


@app.command(epilog="epic-ray plan  ·  epic-ray plan run.yaml --set fit.solver=adam --json")
@guarded
def plan(run_file: RunFile = None, settings: Settings = None, force: Force = False, as_json: Json = False) -> None:
    """Show the stages of a run, what would be reused, and rough sizes; nothing is written."""
    config = read_run_file(run_file, settings)

    from epic_ray import pipeline
    from epic_ray.logs import make_reporter

    planned = pipeline.plan(config, make_reporter(), force)
    if as_json:
        print_json(planned)
        return
    print(f"{planned['run']}\n  {planned['model']}")
    for stage in planned["stages"]:
        todo = "reused" if stage["reused"] else "to do"
        there = f"; {stage['units_done']} of {stage['units']} units are there" if stage.get("units_done") else ""
        print(f"  {stage['stage']:<12} {todo:<8} about {show_bytes(stage['rough_bytes'])}{there}")


@app.command(epilog="epic-ray train run.yaml  ·  epic-ray train --set model.architecture=resnet18 --set data.root=DIR")
@guarded
def train(
    run_file: RunFile = None,
    settings: Settings = None,
    force: Force = False,
    retry_failed: RetryFailed = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit the basis on this machine: one pass over the images, the fit, prototypes and purity."""
    config = read_run_file(run_file, settings)  # before torch is imported: wrong settings are told at once

    from epic_ray import pipeline
    from epic_ray.logs import make_reporter
    from epic_ray.storage import join

    record = pipeline.train(config, make_reporter(quiet), force, retry_failed=retry_failed)
    if as_json:
        print_json(record)
    else:
        print(summary(record, join(config.output.root, config.name)))


def read_run_file(run_file: Path | None, settings: list[str] | None) -> Any:
    """The settings a command was given. Raises ConfigError where there is neither a file nor a setting."""
    from epic_ray.config import load_config

    if run_file is None and DEFAULT_RUN_FILE.exists():
        run_file = DEFAULT_RUN_FILE
    if run_file is None and not settings:
        raise ConfigError("no run.yaml here; `epic-ray init` writes one, or name a run file or pass --set settings")
    return load_config(run_file, settings or ())


def summary(record: dict[str, Any], where: str) -> str:
    """What a person wants to know of a finished run."""
    from epic_ray.storage import join

    lines = [f"{record['name']}: done in {record['seconds']['this_start']:.0f} s"]
    for split, top1 in record["top1"].items():
        if top1 is not None:
            own = record["backbone_top1"][split]
            lines.append(f"  accuracy {split:<9} {top1:.2%} (the classifier's own {own:.2%})")
    for split in record["purity"]["after"]:
        before, after = record["purity"]["before"][split], record["purity"]["after"][split]
        steps = [f"@{n} {before[f'at_{n}']:.3f} -> {after[f'at_{n}']:.3f}" for n in (5, 20)]
        lines.append(f"  purity {split:<11} {', '.join(steps)}")
    logits, counts = record["logits"], record["counts"]
    if logits["max_abs_difference"] is not None:
        lines.append(
            f"  logits             largest difference {logits['max_abs_difference']:.1e} over {logits['images']} "
            f"{logits['split']} images, same top-1 in {logits['top1_agreement']:.2%}"
        )
    lines.append(f"  basis              largest entry of U·Uᵀ - I {record['basis']['orthogonality_error']:.1e}")
    lines.append(
        f"  work               {counts['images']} images, {counts['decoded']} decoded, {counts['forwarded']} "
        f"forwarded, {counts['failed']} failed; {record['images_per_second']:.0f} images/s in the pass"
    )
    peak = max(record["peak_memory_bytes"].values())
    lines.append(f"  peak memory        {show_bytes(peak)} (largest process)")
    lines.append(f"  tables             {join(where, 'tables')}")
    lines.append(f"  next               epic-ray explain {where} --split {list(record['top1'])[-1]}")
    return "\n".join(lines)


def show_bytes(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
