"""A run in progress: its settings, classifier and images, and which of its stages may be reused."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from epic_ray import interrupts
from epic_ray.config import (
    FITTING_SPLIT,
    RunConfig,
    build_config,
    differences,
    fingerprint,
    override_config,
    resolve_paths,
)
from epic_ray.errors import ConfigError, ResultError
from epic_ray.lock import Lock
from epic_ray.logs import Reporter
from epic_ray.method.classifier import SplitClassifier
from epic_ray.run_dir import CONFIG, PICTURES, RUN, RunDir
from epic_ray.stages.classes import ClassNames
from epic_ray.stages.images import Listing, SplitImages
from epic_ray.stages.loading import load, model_facts
from epic_ray.stages.maps import keep_all_maps
from epic_ray.storage import join, resolve_root

TRAIN_STAGES = ("images", "features", "fit", "prototypes")

# Settings that decide where and how fast, but not what: a run may be continued with others.
_FREE_SETTINGS = (
    "data.max_failed_fraction",
    "resources.feature_actors",
    "resources.gpus_per_actor",
    "resources.feature_cache_bytes",
    "fit.workers",
    "explain.",
    "output.",
)


@dataclass
class Run:
    """A run in progress: its settings, the classifier, the images, and the fingerprints of its stages."""

    config: RunConfig
    run_dir: RunDir
    reporter: Reporter
    classifier: SplitClassifier
    classes: ClassNames
    images: dict[str, SplitImages]
    listing: Listing | None = None
    lock: Lock | None = None
    counts: dict[str, int] = field(default_factory=lambda: {"decoded": 0, "forwarded": 0})

    @property
    def maps_kept(self) -> bool:
        counts = [images.rows for images in self.images.values()]
        return keep_all_maps(counts, self.classifier, self.config.features.map_budget_bytes)

    def fingerprints(self, device: str) -> dict[str, str]:
        """What each stage is made from, computed on `device`; a stage's own contains those it builds on."""
        config, units_from = self.config, self.unit_fingerprint(device)
        listed = fingerprint("images", config.data.root, {split: found.digest for split, found in self.images.items()})
        named = fingerprint(listed, self.classes.names, self.classes.folders)
        passed = fingerprint(listed, units_from)
        own = {split: fingerprint(units_from, images.digest) for split, images in self.images.items()}
        # the maps of a pass and those made later come from other batches: equal, but for the last bits at times
        fitted = fingerprint(own[FITTING_SPLIT], self.maps_kept, config.fit.model_dump(exclude={"workers"}))
        held_out = config.held_out_split
        final = fingerprint(fitted, config.prototypes.model_dump(), held_out, own[held_out] if held_out else None)
        return {"images": named, "features": passed, "fit": fitted, "prototypes": final}

    def unit_fingerprint(self, device: str) -> str:
        """What the results of any unit of the pass are made from, beside its images: so that another image elsewhere
        leaves them as they are."""
        config, resources = self.config, self.config.resources
        return fingerprint(
            config.data.root,
            model_facts(config.model, self.classifier),
            config.features.model_dump(include={"dtype", "unit_size"}),
            (device, resources.model_dump(include={"batch_size", "precision", "threads_per_actor"})),
        )

    def reusable(self, name: str, made_from: str) -> dict[str, Any] | None:
        """The mark of a stage that was made from the same things, or None."""
        mark = self.run_dir.read_mark(name)
        return mark if mark and mark["fingerprint"] == made_from else None

    def stage(
        self, name: str, made_from: str, work: Callable[[], dict[str, Any]], whole: Callable[[], bool] | None = None
    ) -> dict[str, Any]:
        """The mark of a stage: its own of old if nothing changed and all is `whole`, else the work done now."""
        interrupts.check()
        if self.lock:
            self.lock.demand()
        mark = self.reusable(name, made_from)
        if mark and (whole is None or whole()):
            self.reporter.say(f"{name}: reused")
            return mark
        self.run_dir.drop_mark(name)
        if name in TRAIN_STAGES:
            self._drop_what_follows(name)
        start = time.monotonic()
        facts = work()
        if self.lock:
            self.lock.demand()
        return self.run_dir.write_mark(name, made_from, time.monotonic() - start, **facts)

    def _drop_what_follows(self, name: str) -> None:
        """The folder is unfinished until a new record stands, and explanations by another U would mislead beside it."""
        if self.run_dir.exists(RUN):
            self.run_dir.delete([RUN])
        if name != "fit":
            return
        old = self.run_dir.list("tables/explanations") + self.run_dir.list(PICTURES)
        if old:
            self.reporter.say(f"explanations: {len(old)} file(s) of the run as it was are removed; explain it again")
            self.run_dir.delete(old)
        for mark in self.run_dir.list("marks"):
            if mark.startswith("marks/explanations-"):
                self.run_dir.delete([mark])

    def count(self, decoded: int, forwarded: int) -> None:
        self.counts["decoded"] += decoded
        self.counts["forwarded"] += forwarded


def run_folder(config: RunConfig) -> RunDir:
    """Where the run of these settings lies."""
    return RunDir(join(resolve_root(config.output.root), config.name))


def open_run(config: RunConfig, reporter: Reporter, force: bool = False) -> Run:
    """Loads the classifier and lists the images; writes nothing. Raises what stands against the run."""
    config = resolve_paths(config)
    run_dir = run_folder(config)
    _demand_same_settings(config, run_dir, force)
    return prepare(config, run_dir, reporter)


def prepare(config: RunConfig, run_dir: RunDir, reporter: Reporter) -> Run:
    """The run's classifier, proved, and its images, listed."""
    listing = Listing(config.data, config.data.splits, reporter, run_dir)
    classifier = load(config.model, config.resources.precision)
    classes = ClassNames.of(classifier, listing.class_names, listing.index_names)
    images = listing.label(classes, config.features.unit_size)
    return Run(config, run_dir, reporter, classifier, classes, images, listing)


def with_free_settings(config: RunConfig, settings: Iterable[str]) -> RunConfig:
    """A finished run's settings with `a.b=value` on top. Raises ConfigError for one that decides what the run is."""
    new = override_config(config, settings, "settings")
    changed = [line for line in differences(config, new) if not line.startswith(_FREE_SETTINGS)]
    if changed:
        free = ", ".join(f"{name}*" if name.endswith(".") else name for name in _FREE_SETTINGS)
        raise ConfigError(f"{changed[0]}: decides what the run is; of a finished run only these may change: {free}")
    return new


def _demand_same_settings(config: RunConfig, run_dir: RunDir, force: bool) -> None:
    if force or not run_dir.exists(CONFIG):
        return
    changed = [line for line in differences(read_config(run_dir), config) if not line.startswith(_FREE_SETTINGS)]
    if changed:
        listed = "\n".join(f"  {line}" for line in changed)
        raise ConfigError(
            f"{run_dir}: holds a run with other settings\n{listed}\n"
            "choose another name (--set name=...), or pass --force to redo here what depends on them"
        )


def read_config(run_dir: RunDir) -> RunConfig:
    """The settings that a run was made with. Raises ResultError for a file that is no YAML, ConfigError for others."""
    where = run_dir.show(CONFIG)
    try:
        values = yaml.safe_load(run_dir.read_bytes(CONFIG))
    except yaml.YAMLError as error:
        raise ResultError(f"{where}: is no YAML ({error}); remove it and run again") from None
    return build_config(values, where)
