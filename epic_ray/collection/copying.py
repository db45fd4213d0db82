"""What every copy of a run has in common: what is copied, what must hold of the source and of the place, the proof.

Used by `collection.py`, which copies file by file, and by `archive.py`, which copies through one file.
"""

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

import epic_ray
from epic_ray.collection.check import (
    COLLECTED,
    Finding,
    check_collection,
    check_contents,
    check_standing,
    digest_of,
    living_claims,
    read_collected,
    to_json,
)
from epic_ray.collection.staging import flush, put_in_place, writing
from epic_ray.errors import ConfigError, ResultError
from epic_ray.run_dir import CONFIG, RUN, RunDir
from epic_ray.storage import is_uri

_TO_GO_ON = ("tables/features/", "maps/", "fit/")
_NEVER = ("locks/", "attempts/", COLLECTED)
BLOCK_BYTES = 16 * 1024**2
_LISTED_FINDINGS = 5


@dataclass(frozen=True)
class CollectResult:
    """A collected folder. `findings` say why the run is half done; `replaced`: an earlier collection was there."""

    folder: Path
    source: str
    files: int
    size_bytes: int
    whole: bool
    findings: tuple[str, ...]
    replaced: bool
    seconds: float


@dataclass(frozen=True)
class Origin:
    """Where a copy is from, what was copied of it, and what was found against it on the way."""

    source: str
    everything: bool
    findings: tuple[Finding, ...] = ()
    via: str | None = None


@dataclass(frozen=True)
class FileFacts:
    size_bytes: int
    sha256: str


# --- the source


def begin(run_dir: RunDir, everything: bool, partial: bool) -> list[Finding]:
    """What stands against a run before it is read through. Raises ResultError where that ends it."""
    if not run_dir.exists(CONFIG):
        raise ConfigError(f"{run_dir}: no run there (a folder with {CONFIG})")
    found = []
    if run_dir.exists(COLLECTED):  # a collection may be collected again
        collected = read_collected(run_dir)
        if everything and not collected["everything"]:
            source = collected["source"]
            raise ConfigError(f"{run_dir}: was collected without features and maps; collect all from {source}")
        found = check_collection(run_dir, collected)
    found += check_standing(run_dir)
    if found and not partial:
        raise refusal(str(run_dir), found)
    return found


def refusal(where: str, found: Iterable[Finding | str]) -> ResultError:
    """The error for a run that is not whole."""
    lines = [f"  {finding}" for finding in found]
    more = [f"  and {len(lines) - _LISTED_FINDINGS} more"] if len(lines) > _LISTED_FINDINGS else []
    listed = "\n".join([*lines[:_LISTED_FINDINGS], *more])
    return ResultError(
        f"{where}: the run is half done or damaged\n{listed}\n"
        "train or submit the run again to finish it (a damaged file: remove it first), or take what is whole: --partial"
    )


def list_files(run_dir: RunDir, everything: bool) -> dict[str, tuple[int, int]]:
    """The files of a run that are copied, sorted, each with its size in bytes and the time of its last change."""
    selector = fs.FileSelector(run_dir.path(""), allow_not_found=True, recursive=True)
    infos = run_dir.ask("", lambda: run_dir.filesystem.get_file_info(selector))
    base = len(run_dir.path(""))
    files = {info.path[base:]: (info.size, info.mtime_ns) for info in infos if info.type == fs.FileType.File}
    left_out = _NEVER if everything else (*_NEVER, *_TO_GO_ON)
    return {
        file: files[file]
        for file in sorted(files)
        if not file.startswith(left_out) and not any(part.startswith(".") for part in file.split("/"))
    }


def demand_unchanged(run_dir: RunDir, everything: bool, before: dict[str, tuple[int, int]]) -> None:
    """Raises ResultError where the files of a run are no longer those that were listed."""
    after = list_files(run_dir, everything)
    changed = sorted(file for file in before.keys() | after.keys() if before.get(file) != after.get(file))
    if changed:
        raise changed_meanwhile(run_dir, changed[0])


def changed_meanwhile(run_dir: RunDir, file: str) -> ResultError:
    return ResultError(
        f"{run_dir}: was trained or explained anew while it was collected ({file} changed); run the command again"
    )


def write_copy(read: Callable[[], bytes], target: Path) -> FileFacts:
    """Writes the blocks that `read` gives, up to an empty one, to a new file, flushed to disk."""
    digest, size_bytes = hashlib.sha256(), 0
    with writing(target):
        file = target.open("wb")
    with file:
        while block := read():
            digest.update(block)
            size_bytes += len(block)
            with writing(target):
                file.write(block)
    with writing(target):
        flush(target)
    return FileFacts(size_bytes, digest.hexdigest())


def demand_equal(path: Path, facts: FileFacts) -> None:
    """Raises ResultError where a file on this disk does not read as it was written."""
    if FileFacts(*digest_of(RunDir(str(path.parent)), path.name)) != facts:
        raise ResultError(f"{path}: does not read as it was written; is this disk (or memory) sound?")


# --- the destination


def local_path(destination: Path | str) -> Path:
    if is_uri(str(destination)):
        raise ConfigError(f"{destination}: runs are collected to a local folder; name a path")
    return Path(destination).expanduser().resolve()


def demand_apart(run_dir: RunDir, folder: Path) -> None:
    """Raises ConfigError for a folder that is the run itself, or lies in it."""
    if run_dir.is_local and folder.is_relative_to(Path(run_dir.path("")).resolve()):
        raise ConfigError(f"{folder}: is the run itself or lies in it; name a folder elsewhere")


def demand_replaceable(folder: Path) -> bool:
    """Whether an earlier collection is there that may go. Raises ConfigError for anything else than that or nothing."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / COLLECTED).is_file():
        raise ConfigError(f"{folder}: is there already and was not collected from a run; name another folder")
    there = RunDir(str(folder))
    try:
        listed = read_collected(there)["files"]
    except ResultError as error:
        raise ConfigError(f"{error}; remove {folder}, or name another folder") from None
    claims = living_claims(there)
    if claims:
        raise ConfigError(f"{folder}: {claims[0]} is writing to it; wait for it, or name another folder")
    changed = [
        file
        for file, (size_bytes, _) in list_files(there, everything=True).items()
        if file not in listed or listed[file]["size_bytes"] != size_bytes
    ]
    if changed:
        raise ConfigError(
            f"{folder}: was worked in since it was collected ({changed[0]}, {len(changed)} file(s)); remove it or name "
            "another folder"
        )
    return True


def finish(
    inner: Path,
    folder: Path,
    copied: dict[str, FileFacts],
    origin: Origin,
    partial: bool,
    replaced: bool,
    start: float,
) -> CollectResult:
    """Proves the copy, lists it in `collected.json` and puts it in place. Raises ResultError where it is not whole."""
    found = [*origin.findings, *check_contents(RunDir(str(inner)), origin.everything)]
    if found and not partial:
        raise refusal(origin.via or origin.source, found)
    if found:
        # without its record nobody takes it for a finished run
        for file in {RUN, *(finding.file for finding in found if finding.damaged)} & copied.keys():
            del copied[file]
            (inner / file).unlink()
    texts = tuple(str(finding) for finding in found)
    values: dict[str, Any] = {
        "source": origin.source,
        "via": origin.via,
        "collected_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "epic_ray": epic_ray.__version__,
        "everything": origin.everything,
        "whole": not found,
        "findings": texts,
        "files": {file: vars(facts) for file, facts in sorted(copied.items())},
    }
    blocks = iter([to_json(values), b""])
    write_copy(lambda: next(blocks), inner / COLLECTED)
    if replaced or folder.exists():
        replaced = demand_replaceable(folder)  # once more: somebody may have begun to work there
    put_in_place(inner, folder)
    size_bytes = sum(facts.size_bytes for facts in copied.values())
    seconds = time.monotonic() - start
    return CollectResult(folder, origin.source, len(copied), size_bytes, not found, texts, replaced, seconds)
