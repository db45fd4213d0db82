"""Copies of finished runs in local folders: whole, proved file by file, and in place in one step.

What only serves to go on with a run stays behind: pooled features, maps, rounds of the fit. The folder is a run that
can be read and explained with, and says in `collected.json` where it is from and what each of its files was.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

from epic_ray.collection.archive import ArchiveFacts, collect_archive, write_archive
from epic_ray.collection.check import Finding, check_collection, check_run
from epic_ray.collection.copying import (
    BLOCK_BYTES,
    CollectResult,
    FileFacts,
    Origin,
    begin,
    changed_meanwhile,
    demand_apart,
    demand_equal,
    demand_replaceable,
    demand_unchanged,
    finish,
    list_files,
    local_path,
    write_copy,
)
from epic_ray.collection.staging import staged, writing
from epic_ray.logs import Meter, Reporter
from epic_ray.run_dir import RunDir

__all__ = [
    "ArchiveFacts",
    "CollectResult",
    "Finding",
    "check_collection",
    "check_run",
    "collect",
    "collect_archive",
    "write_archive",
]

_LOCAL_THREADS, _STORE_THREADS = 3, 16

Result = TypeVar("Result")


def collect(
    run_dir: RunDir,
    destination: Path | str,
    *,
    partial: bool = False,
    everything: bool = False,
    reporter: Reporter | None = None,
) -> CollectResult:
    """Copies a run to a local folder that is there whole or not at all; an earlier collection there is replaced.

    everything: with features, maps and rounds. partial: of a half-done run what is whole, without `run.json`.
    Raises ConfigError for a destination that holds anything else, ResultError for a half-done or damaged run, or one
    that changed meanwhile, InputError and RunFailed for disks and stores.
    """
    start, folder = time.monotonic(), local_path(destination)
    demand_apart(run_dir, folder)
    reporter = reporter or Reporter()
    found = begin(run_dir, everything, partial)
    with staged(folder) as staging:
        replaced = demand_replaceable(folder)
        before = list_files(run_dir, everything)
        inner = staging / "run"
        with reporter.stage("collect", len(before), "files") as meter:
            copied = _copy_all(run_dir, list(before), inner, partial, meter)
        if not partial:
            demand_unchanged(run_dir, everything, before)
        vanished = tuple(Finding(file, "vanished while it was copied") for file in before if file not in copied)
        origin = Origin(run_dir.root, everything, (*found, *vanished))
        return finish(inner, folder, copied, origin, partial, replaced, start)


def _copy_all(run_dir: RunDir, files: list[str], inner: Path, partial: bool, meter: Meter) -> dict[str, FileFacts]:
    """Copies files at a time; those that vanish meanwhile are left out where the run is half done anyway."""
    with writing(inner):
        for folder in {inner, *((inner / file).parent for file in files)}:
            folder.mkdir(parents=True, exist_ok=True)

    def copy(file: str) -> FileFacts | None:
        try:
            facts = _fetch(run_dir, file, inner / file)
        except FileNotFoundError:
            if partial:
                return None
            raise changed_meanwhile(run_dir, file) from None
        demand_equal(inner / file, facts)
        return facts

    facts = _at_a_time(copy, files, _LOCAL_THREADS if run_dir.is_local else _STORE_THREADS, meter)
    return {file: found for file, found in zip(files, facts, strict=True) if found}


def _fetch(run_dir: RunDir, relative: str, target: Path) -> FileFacts:
    """Copies a file of a run and flushes it to disk; what it was is told by the bytes as they are read."""

    def copy() -> FileFacts:
        with run_dir.filesystem.open_input_stream(run_dir.path(relative), compression=None) as source:
            return write_copy(lambda: source.read(BLOCK_BYTES), target)

    return run_dir.ask(relative, copy)


def _at_a_time(work: Callable[[str], Result], files: list[str], threads: int, meter: Meter) -> list[Result]:
    """The results for all files, several worked on at a time; the first fault ends it."""
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work, file) for file in files]
        try:
            for future in as_completed(futures):
                future.result()
                meter.advance()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return [future.result() for future in futures]
