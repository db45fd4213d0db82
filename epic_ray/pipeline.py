"""A run, top to bottom: the stages in order, each reused where it was made from the same things.

    images -> features -> fit -> prototypes -> run.json            (train)
    run -> explanations of a split -> pictures                     (explain)

A stage that finds its own mark with the same fingerprint does nothing; a stage whose fingerprint differs runs anew and
with it all that depends on it. Nothing here computes: it says what is made from what.
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from safetensors.torch import save as save_tensors

from epic_ray import interrupts
from epic_ray.config import FITTING_SPLIT, PRECISION_TOLERANCES, RunConfig, dump_config, fingerprint
from epic_ray.errors import ConfigError, InputError, ResultError
from epic_ray.lock import Lock, hold
from epic_ray.logs import Reporter
from epic_ray.method.basis import orthogonality_error
from epic_ray.method.starts import TRIAL_PROTOTYPES
from epic_ray.record import basis_card, basis_notes, make_record
from epic_ray.run import TRAIN_STAGES, Run, open_run, read_config, run_folder
from epic_ray.run_dir import BASIS, BASIS_CARD, CONFIG, RUN, RunDir, split_files, table_file
from epic_ray.stages import explanations, features, fit, prototypes
from epic_ray.stages.classes import ClassNames
from epic_ray.stages.fit_worker import FitJob
from epic_ray.stages.image_pass import run_pass
from epic_ray.stages.images import Listing, UnitRange, cut_units
from epic_ray.stages.loading import load, model_facts
from epic_ray.stages.maps import map_bytes
from epic_ray.stages.resources import Resources, demand_seen, likely_device, resolve_resources, start_ray, take_threads
from epic_ray.stages.rounds import counts_so_far, read_basis
from epic_ray.stages.units import committed_units
from epic_ray.tables import build_table, read_table, write_table

# what a stage leaves beside the units of the pass and the manifest of each split
_FILES = {
    "images": [table_file("classes")],
    "fit": [BASIS, BASIS_CARD, table_file("history")],
    "prototypes": [table_file("prototypes"), table_file("purity")],
}

# --- train


def train(
    config: RunConfig, reporter: Reporter, force: bool = False, local: bool = True, retry_failed: bool = False
) -> dict[str, Any]:
    """Fits U and writes the run folder; gives what `run.json` says. A finished stage is reused.

    retry_failed: units with failed images are done again, and what depends on them.
    """
    start = time.monotonic()
    with _held(run_folder(config), "train", reporter) as lock:
        run = open_run(config, reporter, force)
        run.lock = lock
        return _train(run, local, start, retry_failed)


def _train(run: Run, local: bool, start: float, retry_failed: bool) -> dict[str, Any]:
    settings = dump_config(run.config).encode()
    if not run.run_dir.exists(CONFIG):
        run.run_dir.publish_bytes(CONFIG, settings)  # a place that cannot be written is told before anything starts
    run.run_dir.remove_temporaries()
    run.reporter.say(f"{run.config.name}: {_describe(run)}")
    start_ray(local)
    if not local:
        demand_shared(run, run.run_dir.read_bytes(CONFIG))
    resources = resolve_resources(run.config.resources)
    made_from = run.fingerprints(resources.device)
    if not all(run.reusable(name, made_from[name]) for name in TRAIN_STAGES):
        run.run_dir.delete([file for file in (RUN,) if run.run_dir.exists(file)])  # before its settings are replaced
    run.run_dir.publish_bytes(CONFIG, settings)
    # maps that were deleted to save space are made again only for a stage that reads them
    maps_wanted = run.maps_kept and not all(run.reusable(name, made_from[name]) for name in ("fit", "prototypes"))
    units_from = run.unit_fingerprint(resources.device)
    there = {name: partial(_there, run, name) for name in _FILES}
    marks = {"images": run.stage("images", made_from["images"], lambda: _images(run), there["images"])}
    if retry_failed:
        _forget_failed(run, units_from)
    marks |= {
        "features": run.stage(
            "features",
            made_from["features"],
            lambda: _features(run, resources, units_from),
            whole=lambda: not _units_to_do(run, units_from, maps_wanted),
        ),
    }
    passes = {split: features.finished_pass(run.run_dir, found, units_from) for split, found in run.images.items()}
    # of a reused pass too: the limit may have changed since
    features.check_failures(run.run_dir, passes.values(), run.config.data.max_failed_fraction)
    features.check_split(run.run_dir, passes.values(), _tolerance(run.config))
    judged = [passes[split] for split in (FITTING_SPLIT, run.config.held_out_split) if split]
    marks |= {
        "fit": run.stage(
            "fit",
            made_from["fit"],
            lambda: _fit(run, resources, passes[FITTING_SPLIT], made_from["fit"]),
            there["fit"],
        ),
        "prototypes": run.stage(
            "prototypes", made_from["prototypes"], lambda: _prototypes(run, resources, judged), there["prototypes"]
        ),
    }
    record = make_record(
        run.config,
        run.run_dir,
        run.classifier,
        run.classes,
        marks,
        made_from,
        passes,
        run.counts,
        resources,
        time.monotonic() - start,
    )
    interrupts.check()
    if run.lock:
        run.lock.demand()
    run.run_dir.remove_temporaries()  # of processes that were lost on the way
    run.run_dir.publish_json(RUN, record)
    return record


def _tolerance(config: RunConfig) -> float:
    return max(config.model.tolerance, PRECISION_TOLERANCES[config.resources.precision])


def _there(run: Run, stage: str) -> bool:
    """Whether a stage's files are there, as its mark says: a damaged one is removed to be made again."""
    names = [*_FILES[stage], *(table_file("manifest", split) for split in run.images if stage == "images")]
    return all(run.run_dir.exists(name) for name in names)


def demand_shared(run: Run, settings: bytes) -> None:
    """Raises ClusterError where a machine of the cluster does not see the images, the weights or the run folder."""
    config = run.config
    places = {"data.root": config.data.root, "model.weights": config.model.weights}
    local = {name: place for name, place in places.items() if Path(place).is_absolute()}
    proof = (run.run_dir.path(CONFIG), hashlib.sha256(settings).hexdigest()) if run.run_dir.is_local else None
    demand_seen(local, proof)


@contextmanager
def _held(run_dir: RunDir, what: str, reporter: Reporter) -> Iterator[Lock]:
    """The run folder, for this start alone, from before anything of it is read."""
    with hold(run_dir, what) as lock:
        for sentence in lock.freed:
            reporter.say(sentence)
        yield lock


def _describe(run: Run) -> str:
    counts = ", ".join(f"{split} {images.rows}" for split, images in run.images.items())
    height, width = run.classifier.grid
    maps = "all maps kept" if run.maps_kept else "maps of chosen images only"
    return (
        f"{run.config.model.architecture} ({run.classifier.channel_count} channels, {height}x{width} cells, "
        f"{run.classifier.class_count} classes), images: {counts}; {maps}"
    )


def _images(run: Run) -> dict[str, Any]:
    for split in {file.split("/")[2].removesuffix(".parquet") for file in run.run_dir.list("tables/manifest")}:
        if split not in run.images:
            run.run_dir.delete(split_files(run.run_dir, split))  # a split that the settings no longer have
    classes = {
        "class_index": pa.array(range(len(run.classes.names)), pa.int32()),
        "name": run.classes.names,
        "folder": pa.array(run.classes.folders, pa.string()),
    }
    size_bytes = write_table(run.run_dir, table_file("classes"), build_table("classes", classes))
    if run.listing:
        size_bytes += run.listing.publish(run.classes)
    rows = {split: images.rows for split, images in run.images.items()}
    return {"rows": rows, "bytes": size_bytes, "class_names_from": run.classes.origin}


def _units_to_do(run: Run, made_from: str, maps_wanted: bool) -> list[UnitRange]:
    return [
        unit
        for images in run.images.values()
        for unit in features.units_to_do(run.run_dir, images, made_from, maps_wanted)
    ]


def _units_done(run: Run, made_from: str) -> tuple[int, int]:
    """How many units of the pass have their features, and how many there are."""
    done = [features.count_done(run.run_dir, images, made_from) for images in run.images.values()]
    return sum(done), sum(len(images.unit_digests) for images in run.images.values())


def _features(run: Run, resources: Resources, made_from: str) -> dict[str, Any]:
    arguments = {
        "run_dir": run.run_dir,
        "model": run.config.model,
        "resources": resources,
        "keep_maps": run.maps_kept,
        "dtype": run.config.features.dtype,
    }
    done, units = _units_done(run, made_from)
    if done:
        run.reporter.say(f"features: {done} of {units} units are there already")
    totals = run_pass(
        "features",
        features.FeatureActor,
        arguments,
        lambda: _units_to_do(run, made_from, run.maps_kept),
        run.classifier.preprocessing,
        resources,
        run.reporter,
        sum(images.rows for images in run.images.values()),
    )
    run.count(totals.decoded, totals.forwarded)
    passes = [features.finished_pass(run.run_dir, images, made_from) for images in run.images.values()]
    return {
        "rows": sum(passed.rows for passed in passes),
        "bytes": totals.bytes_written,
        "failed": sum(passed.failed for passed in passes),
        "failures": features.count_failures(run.run_dir, passes),
        "images_done_here": totals.images,
        "units": sum(len(passed.units) for passed in passes),
        "units_redone": totals.units_redone,
        "maps_kept": run.maps_kept,
        "actors": len(totals.actors),
        "peak_memory_bytes": totals.peak_memory_bytes,
    }


def _forget_failed(run: Run, made_from: str) -> None:
    """Makes the units with failed images, and what was made from them, undone."""
    forgotten = sum(features.forget_failed(run.run_dir, images, made_from) for images in run.images.values())
    run.reporter.say(f"features: {forgotten} unit(s) with failed images are done again")
    if forgotten:
        for name in ("features", "fit", "prototypes"):
            run.run_dir.drop_mark(name)
        run.run_dir.delete(run.run_dir.list("fit"))


def _fit(run: Run, resources: Resources, passed: features.FeaturePass, made_from: str) -> dict[str, Any]:
    job = FitJob(run.run_dir, run.config, resources, passed, made_from)
    before = counts_so_far(run.run_dir, made_from)
    result = fit.fit_basis(job, run.reporter)
    run.count(result.decoded - before["decoded"], result.forwarded - before["forwarded"])
    error = orthogonality_error(result.basis)
    history = {name: [row[name] for row in result.history] for name in result.history[0]}
    write_table(run.run_dir, table_file("history"), build_table("history", history))
    tensors = save_tensors({"U": result.basis.contiguous()}, basis_notes(run.config))
    size_bytes = run.run_dir.publish_bytes(BASIS, tensors)
    run.run_dir.publish_bytes(BASIS_CARD, basis_card(run.config, run.classifier, error).encode())
    return {
        "rows": len(result.history),
        "bytes": size_bytes,
        "basis_sha256": hashlib.sha256(tensors).hexdigest(),
        "orthogonality_error": error,
        "start": result.start,
        "peak_memory_bytes": result.peak_memory_bytes,
    }


def _prototypes(run: Run, resources: Resources, passes: list[features.FeaturePass]) -> dict[str, Any]:
    job = prototypes.PrototypesJob(
        run.run_dir, run.config, resources, run.classifier.preprocessing, run.classifier.grid, passes
    )
    take_threads(run.classifier.channel_count)
    rows = prototypes.make_prototypes(job, read_basis(run.run_dir), run.reporter)
    run.count(job.forwarded, job.forwarded)
    return {"rows": rows}


# --- plan


def plan(config: RunConfig, reporter: Reporter, force: bool = False) -> dict[str, Any]:
    """What `train` would do: stages, what is reused, rows, rough bytes. Reads no image and writes nothing."""
    run = open_run(config, reporter, force)
    rows = sum(images.rows for images in run.images.values())
    channels, classes = run.classifier.channel_count, run.classifier.class_count
    # at most so many images are chosen in the first round; later rounds bring few more
    schedule = config.fit.prototypes_per_channel
    tried = 2 * min(schedule.start, TRIAL_PROTOTYPES) if config.fit.start == "auto" else 0
    most = channels * (schedule.start + tried)
    chosen = 0 if run.maps_kept else min(run.images[FITTING_SPLIT].rows, most)
    logit_bytes = 4 * classes * (rows - run.images[FITTING_SPLIT].rows)
    pooled_bytes = {"float32": 4, "float16": 2}[config.features.dtype] * channels * rows
    size = {
        "images": 200 * rows,
        "features": pooled_bytes + logit_bytes + map_bytes(run.classifier) * rows * run.maps_kept,
        "fit": 4 * channels**2 * schedule.rounds + chosen * map_bytes(run.classifier),
        "prototypes": (100 + map_bytes(run.classifier) // channels) * channels * 4 * run.config.prototypes.per_channel,
    }
    device = likely_device(config.resources)
    stages: list[dict[str, Any]] = []
    for name, made_from in run.fingerprints(device).items():
        reused = run.reusable(name, made_from) is not None
        stages.append({"stage": name, "reused": reused, "rough_bytes": size[name]})
    done, units = _units_done(run, run.unit_fingerprint(device))
    stages[1] |= {"reused": stages[1]["reused"] and done == units, "units": units, "units_done": done}
    return {
        "run": str(run.run_dir),
        "model": _describe(run),
        "images": {split: images.rows for split, images in run.images.items()},
        "maps_kept": run.maps_kept,
        "stages": stages,
    }


# --- explain


@dataclass(frozen=True)
class ExplainResult:
    """What an explanation pass left: where, how many, and how exactly the shares rebuilt the logits."""

    split: str
    images: int
    failed: int
    forwarded: int
    max_abs_difference: float
    top1_agreement: float
    seconds: float


def open_finished(run_dir: RunDir, reporter: Reporter) -> tuple[Run, dict[str, Any]]:
    """A finished run, its classifier loaded and found unchanged. Raises ResultError or InputError."""
    if not run_dir.exists(RUN):
        raise ResultError(f"{run_dir}: the run is not finished (no {RUN}); `epic-ray train` finishes it")
    record = run_dir.read_json(RUN)
    config = read_config(run_dir)
    classifier = load(config.model, config.resources.precision)
    if fingerprint(model_facts(config.model, classifier)) != record["fingerprints"]["model"]:
        raise InputError(
            f"{run_dir}: the classifier is not the one that was fitted (weights, preprocessing or library versions "
            "changed); bring it back, or train a new run"
        )
    table = read_table(run_dir, table_file("classes"))
    names = ClassNames(table["name"].to_pylist(), table["folder"].to_pylist(), record["class_names_from"])
    return Run(config, run_dir, reporter, classifier, names, {}), record


def explain(
    run: Run, record: dict[str, Any], split: str, limit: int | None = None, local: bool = True
) -> ExplainResult:
    """Explains every image of a split (or `limit` of them, spread evenly) into the table `explanations`."""
    config = run.config
    if split not in config.data.splits:
        raise ConfigError(f"split `{split}`: the run has {', '.join(config.data.splits)}; add it to data.splits")
    with finished(run, record):
        return _explain(run, record, split, limit, local)


@contextmanager
def finished(run: Run, record: dict[str, Any]) -> Iterator[None]:
    """A finished run, for this start alone. Raises ResultError where it is no longer the one that was opened."""
    with _held(run.run_dir, "explain", run.reporter) as run.lock:
        if not run.run_dir.exists(RUN) or run.run_dir.read_json(RUN)["fingerprints"] != record["fingerprints"]:
            raise ResultError(f"{run.run_dir}: was trained anew since it was opened; run the command again")
        yield


def _explain(run: Run, record: dict[str, Any], split: str, limit: int | None, local: bool) -> ExplainResult:
    config = run.config
    listing = Listing(config.data, [split], run.reporter, run.run_dir)
    images = listing.select(split, run.classes, config.features.unit_size, limit)
    settings = (config.explain.channels_per_image, config.explain.rank_by)
    made_from = fingerprint(record["fingerprints"]["fit"], settings)
    units = cut_units(images, made_from)
    start_ray(local)
    if not local:
        demand_shared(run, run.run_dir.read_bytes(CONFIG))
    resources = resolve_resources(config.resources)

    def units_to_do() -> list[UnitRange]:
        done = committed_units(run.run_dir, "explanations", units)
        return [unit for unit in units if unit.number not in done]

    def work() -> dict[str, Any]:
        arguments = {
            "run_dir": run.run_dir,
            "model": config.model,
            "resources": resources,
            "channels_per_image": settings[0],
            "rank_by": settings[1],
        }
        preprocessing = run.classifier.preprocessing
        totals = run_pass(
            f"explain {split}",
            explanations.ExplainActor,
            arguments,
            units_to_do,
            preprocessing,
            resources,
            run.reporter,
            images.rows,
        )
        facts = committed_units(run.run_dir, "explanations", units).values()
        failed, readable = sum(unit.failed for unit in facts), sum(unit.readable for unit in facts)
        _demand_few_failures(failed, images.rows, split, config.data.max_failed_fraction)
        return {
            "rows": images.rows,
            "failed": failed,
            "forwarded": totals.forwarded,
            "max_abs_difference": max((unit.max_abs_difference for unit in facts), default=0.0),
            "top1_agreement": sum(unit.agreeing for unit in facts) / max(readable, 1),
        }

    mark = run.stage(f"explanations-{split}", fingerprint(made_from, images.digest), work, lambda: not units_to_do())
    run.run_dir.remove_temporaries()
    names = ("rows", "failed", "forwarded", "max_abs_difference", "top1_agreement", "seconds")
    return ExplainResult(split, *(mark[name] for name in names))


def _demand_few_failures(failed: int, images: int, split: str, max_failed_fraction: float) -> None:
    if failed > max_failed_fraction * images:
        raise InputError(
            f"{split}: {failed} of {images} images failed, above data.max_failed_fraction "
            f"({max_failed_fraction:.1%}); mend them or raise the limit"
        )
