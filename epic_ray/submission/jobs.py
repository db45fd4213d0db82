"""Submitted jobs: what each is, the newest of a run, how one is sent and stopped.

An attempt at a run is a job with the id `<run>-<attempt>`; what it is made of stands in its metadata, so that every
command finds the newest one by the run's name, from any machine.
"""

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import epic_ray
from epic_ray.config import RunConfig
from epic_ray.errors import ClusterError, ConfigError
from epic_ray.job import EXPECTED_VERSION
from epic_ray.logs import PROGRESS_VARIABLE, RECORDS
from epic_ray.stages.resources import LIMITS_VARIABLE
from epic_ray.submission.connection import Connection

RUNNING = ("PENDING", "RUNNING")
ARCHIVE = "archive"
_PREFIX = "epic_ray."
_MOST_ATTEMPTS_AT_ONCE = 20
_STOP_SECONDS, _READY_SECONDS = 30.0, 60.0


@dataclass(frozen=True)
class Job:
    """A submitted job as its cluster knows it. Times are in seconds since 1970."""

    id: str
    run: str
    attempt: int
    what: str
    status: str
    root: str
    model: str
    data: str
    version: str
    started_at: float | None
    ended_at: float | None
    exit_code: int | None
    message: str
    ray_job_id: str | None = None
    node_id: str | None = None

    @property
    def is_running(self) -> bool:
        return self.status in RUNNING

    @property
    def seconds(self) -> float | None:
        """How long it has run."""
        if self.started_at is None:
            return None
        return max((self.ended_at or time.time()) - self.started_at, 0.0)

    def __str__(self) -> str:
        return f"{self.id} ({self.what})"


@dataclass(frozen=True)
class JobSpec:
    """A job to send.

    command: the shell words that start its script; arguments: those that follow, not quoted. folder: its working
    directory. runtime_env: further parts of Ray's runtime environment; its `env_vars` are kept.
    """

    what: str
    run: str
    root: str
    command: str
    arguments: Sequence[str]
    folder: Path
    runtime_env: dict[str, Any] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    limits: dict[str, float] | None = None

    @property
    def entrypoint(self) -> str:
        return " ".join([self.command, *(shlex.quote(word) for word in self.arguments)])

    def environment(self) -> dict[str, Any]:
        """The runtime environment: what the user asks for, our folder, and how progress is told."""
        own = {PROGRESS_VARIABLE: RECORDS, EXPECTED_VERSION: epic_ray.__version__, "PYTHONUNBUFFERED": "1"}
        if self.limits:
            own[LIMITS_VARIABLE] = json.dumps(self.limits)
        variables = own | dict(self.runtime_env.get("env_vars", {}))
        return {**self.runtime_env, "working_dir": str(self.folder), "env_vars": variables}

    def metadata(self, attempt: int) -> dict[str, str]:
        facts = {"run": self.run, "attempt": str(attempt), "job": self.what, "root": self.root}
        return {f"{_PREFIX}{key}": value for key, value in (facts | self.about).items()} | {
            f"{_PREFIX}version": epic_ray.__version__
        }


def about_run(config: RunConfig) -> dict[str, str]:
    """What the metadata of a run's jobs say of its settings."""
    return {"model": config.model.architecture, "data": config.data.root, "method": config.method}


def all_jobs(connection: Connection) -> list[Job]:
    """Every job of epic-ray that the cluster knows, the oldest first."""
    found = [_job(details) for details in connection.call(lambda client: client.list_jobs())]
    return sorted((job for job in found if job), key=lambda job: (job.started_at or 0.0, job.attempt))


def newest_job(connection: Connection, run: str | None = None) -> Job:
    """The newest attempt at a run, or the job of that id; None: the newest job of all. Raises ConfigError."""
    jobs = all_jobs(connection)
    chosen = [job for job in jobs if run == job.run or (run is None and job.what != ARCHIVE)]
    chosen = chosen or [job for job in jobs if run == job.id]  # a run of that name comes before a job of that id
    if chosen:
        return max(chosen, key=lambda job: (job.started_at or 0.0, job.attempt))
    if not jobs:
        raise ConfigError(
            f"{connection.origin}: the cluster knows no job of epic-ray; `epic-ray submit train` sends one"
        )
    known = ", ".join(sorted({job.run for job in jobs}))
    raise ConfigError(f"{run}: no such run on {connection.origin}; it knows {known}")


def find_job(connection: Connection, job_id: str) -> Job | None:
    """A job as it is now; None for one that the cluster does not know (any more). Raises ClusterError."""
    try:
        return _job(connection.call(lambda client: client.get_job_info(job_id)))
    except ClusterError as error:
        if "does not exist" in str(error):
            return None
        raise


def look_up(connection: Connection, job_id: str) -> Job:
    """A job as it is now. Raises ClusterError, also for one that the cluster does not know (any more)."""
    job = find_job(connection, job_id)
    if job is None:
        raise ClusterError(lost(connection, job_id))
    return job


def lost(connection: Connection, job_id: str) -> str:
    """What to say of a job that is no longer known."""
    return (
        f"{connection.origin}: knows no job {job_id}; was its head started anew? Submit the run again: it goes on from "
        "what is committed"
    )


def demand_free(connection: Connection, run: str) -> None:
    """Raises ConfigError while an attempt at the run is under way."""
    for job in all_jobs(connection):
        if job.run == run and job.is_running:
            raise ConfigError(
                f"{run}: {job} is {job.status.lower()} on {connection.origin}; follow it by `epic-ray logs -f {run}"
                f"{connection.option}`, end it by `epic-ray stop {run}{connection.option}`, or choose another name "
                "(--set name=...)"
            )


def send(connection: Connection, spec: JobSpec) -> Job:
    """Uploads and starts a job under the next free id of its run. Raises ConfigError, ClusterError."""
    taken = [job.attempt for job in all_jobs(connection) if job.run == spec.run]
    first = max(taken, default=0) + 1
    for attempt in range(first, first + _MOST_ATTEMPTS_AT_ONCE):
        job_id = f"{spec.run}-{attempt}"
        job = {"submission_id": job_id, "metadata": spec.metadata(attempt)}
        try:
            _submit_patiently(connection, entrypoint=spec.entrypoint, runtime_env=spec.environment(), **job)
        except ClusterError as error:
            if "already exists" not in str(error):
                raise
            continue  # someone was quicker, or a job that is no longer listed had it
        return look_up(connection, job_id)
    raise ClusterError(f"{connection.origin}: {spec.run}-{first} and those after it are taken; try again")


def _submit_patiently(connection: Connection, **job: Any) -> None:
    """A head that has just started answers before it can take jobs."""
    deadline = time.monotonic() + _READY_SECONDS

    def submit(client: Any) -> None:
        client.submit_job(**job)

    while True:
        try:
            return connection.call(submit)
        except ClusterError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{connection.origin}: the head answers, but its agent, which starts jobs, does not: see "
                    "dashboard_agent.log on it (is its port taken by another Ray of that machine?)"
                ) from None
        time.sleep(1.0)


def stop(connection: Connection, job: Job) -> Job:
    """Asks a job to end and waits until it has. Raises ClusterError for one that does not."""
    connection.call(lambda client: client.stop_job(job.id))
    deadline = time.monotonic() + _STOP_SECONDS
    while (now := look_up(connection, job.id)).is_running:
        if time.monotonic() > deadline:
            raise ClusterError(f"{connection.origin}: {job} has not ended {_STOP_SECONDS:.0f} s after it was asked to")
        time.sleep(0.5)
    return now


def _job(details: Any) -> Job | None:
    """A job of ours from what the SDK gives; None for one of others."""
    about = {
        key.removeprefix(_PREFIX): value for key, value in (details.metadata or {}).items() if key.startswith(_PREFIX)
    }
    if "run" not in about or not details.submission_id:
        return None
    return Job(
        id=details.submission_id,
        run=about["run"],
        attempt=int(about.get("attempt", "1")),
        what=about.get("job", "train"),
        status=str(getattr(details.status, "value", details.status)),
        root=about.get("root", ""),
        model=about.get("model", ""),
        data=about.get("data", ""),
        version=about.get("version", ""),
        started_at=_seconds(details.start_time),
        ended_at=_seconds(details.end_time),
        exit_code=details.driver_exit_code,
        message=(details.message or "").strip(),
        ray_job_id=details.job_id,
        node_id=details.driver_node_id,
    )


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None
