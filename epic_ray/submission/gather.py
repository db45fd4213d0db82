"""Collecting a run's output: straight from its folder, or, where only the cluster sees that, through a small job.

The job packs the output into an archive among the logs of its machine, from where Ray's dashboard gives it out; what
arrives is checked byte by byte before anything of it is published.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from epic_ray.collection import CollectResult, collect, collect_archive
from epic_ray.errors import ClusterError, EpicError, ResultError, RunFailed
from epic_ray.logs import Reporter
from epic_ray.run_dir import RunDir
from epic_ray.storage import is_uri
from epic_ray.submission.connection import Connection
from epic_ray.submission.follow import ending_of, exit_code_of, log_of
from epic_ray.submission.jobs import Job, all_jobs, look_up, stop
from epic_ray.submission.send import find_submitted, send_archive
from epic_ray.submission.target import Target

DEFAULT_FOLDER = Path("collected")
_MARK = "@epic-ray-archive "
_POLL_SECONDS = 1.0
_BLOCK_BYTES = 4 * 1024**2


@dataclass(frozen=True)
class Archive:
    """Where an archive lies: the machine, the file's name among its logs, and its bytes."""

    node_id: str
    name: str
    size_bytes: int


def gather(
    run_dir: RunDir, destination: Path | None, reporter: Reporter, partial: bool, everything: bool
) -> dict[str, Any]:
    """Collects a run that is seen from here. Raises as `collect` does."""
    target = destination or DEFAULT_FOLDER / run_dir.name
    return _facts(collect(run_dir, target, partial=partial, everything=everything, reporter=reporter), run_dir.name)


def gather_remote(
    connection: Connection,
    target: Target,
    run: str | None,
    destination: Path | None,
    reporter: Reporter,
    partial: bool,
    everything: bool,
    through_job: bool = False,
) -> dict[str, Any]:
    """Collects a run of a cluster: from its address in a store, or this machine's disk if the cluster is this machine;
    else through a job, since a folder of the same path here may be another one."""
    found = find_submitted(connection, run, all_jobs(connection))
    name, root = found.name, found.root
    if not through_job and (is_uri(root) or target.kind == "local"):
        return gather(RunDir(root), destination, reporter, partial, everything)
    words = [flag for flag, given in (("--all", everything), ("--partial", partial)) if given]
    with tempfile.TemporaryDirectory(prefix="epic-ray-collect-") as folder:
        file = Path(folder) / "run.tar"
        with _archive(connection, target, name, root, words, reporter) as archive:
            _download(connection, archive, file, reporter)
        result = collect_archive(file, destination or DEFAULT_FOLDER / name, partial=partial, reporter=reporter)
    return _facts(result, name)


def announce(file: Path, size_bytes: int) -> None:
    """Says, in the log of the job that made it, where an archive lies."""
    import ray

    archive = Archive(ray.get_runtime_context().get_node_id(), file.name, size_bytes)
    print(_MARK + json.dumps(asdict(archive)), flush=True)


def session_logs() -> Path:
    """The folder of this machine's Ray logs, which the dashboard gives out."""
    import ray

    node = ray._private.worker._global_node
    if node is None:
        raise RunFailed("archive: Ray has not started in this process")
    return Path(node.get_logs_dir_path())


@contextmanager
def _archive(
    connection: Connection, target: Target, name: str, root: str, words: list[str], reporter: Reporter
) -> Iterator[Archive]:
    """An archive that a job makes and keeps, until the block ends."""
    job = send_archive(connection, target, name, root, words)
    try:
        archive = _wait_for_archive(connection, job)
        reporter.say(f"{root}: packed there by {job.id}")
        yield archive
    finally:
        with suppress(ClusterError):
            stop(connection, job)


def _wait_for_archive(connection: Connection, job: Job) -> Archive:
    while True:
        log = log_of(connection, job)
        found = [line for line in log.splitlines() if line.startswith(_MARK)]
        if found:
            return Archive(**json.loads(found[-1].removeprefix(_MARK)))
        if not look_up(connection, job.id).is_running:
            raise _failure(connection, look_up(connection, job.id))
        time.sleep(_POLL_SECONDS)


def _failure(connection: Connection, job: Job) -> EpicError:
    """The fault of an archive job as its own kind, with the job's words."""
    log = log_of(connection, job)
    code = exit_code_of(job)
    for kind in EpicError.__subclasses__():
        start = f"{kind.__name__}: "
        if kind.exit_code == code and start in log:
            return kind(log[log.index(start) + len(start) :].strip())
    return RunFailed(f"{ending_of(job)}; `epic-ray logs {job.id}{connection.option}` shows why")


def _download(connection: Connection, archive: Archive, file: Path, reporter: Reporter) -> None:
    query = {"node_id": archive.node_id, "filename": archive.name, "lines": -1}
    with (
        connection.get("/api/v0/logs/file", stream=True, **query) as response,
        file.open("wb") as target,
        reporter.stage("download", archive.size_bytes, "bytes") as meter,
    ):
        for block in connection.iterate(response, _BLOCK_BYTES):
            target.write(block)
            meter.advance(len(block))
    if file.stat().st_size != archive.size_bytes:
        raise ResultError(
            f"{archive.name}: {file.stat().st_size} of {archive.size_bytes} bytes arrived; run the command again"
        )


def _facts(result: CollectResult, run: str) -> dict[str, Any]:
    return {"run": run} | {key: str(value) if isinstance(value, Path) else value for key, value in vars(result).items()}
