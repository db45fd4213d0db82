"""Following a job from elsewhere: its log as it grows, its progress as bars or lines, and the code that it ended with.

A log stream that drops is taken up again where it was; a head that is away is waited for.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import aiohttp

from epic_ray.errors import TERMINATED_EXIT_CODE, ClusterError, EpicError, RunFailed
from epic_ray.logs import Meter, Progress, Reporter
from epic_ray.storage import patience_seconds
from epic_ray.submission.connection import Connection, parse_json
from epic_ray.submission.jobs import Job, find_job, look_up, lost

# a stream that is silent for so long may be one that hangs
_SILENT_SECONDS = 45.0
_RETRY_SECONDS = 1.0
# the log of a job that has ended is given up, where it lay on a machine that is gone
_MOST_IN_VAIN = 3
# the driver's end and its entry in the job table are not one moment
_SETTLE_SECONDS = 20.0
_STATUS_LINES = 400
_MOST_ACTORS = 10_000


class Replay:
    """Shows the log of a job through a reporter: news as they are, records as progress."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._name: str | None = None
        self._stage: AbstractContextManager[Meter] | None = None
        self._meter = Meter()
        self._rest = ""

    def feed(self, text: str) -> None:
        """More of the log, cut anywhere."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            progress = Progress.of(line)
            if progress is None:
                self._reporter.say(line)
            else:
                self._show(progress)

    def close(self) -> None:
        """No more will come."""
        if self._rest:
            self.feed("\n")
        self._leave(ended=False)

    def _show(self, progress: Progress) -> None:
        if self._stage and self._name != progress.stage:
            self._leave(ended=False)
        if self._stage is None:
            self._name = progress.stage
            self._stage = self._reporter.stage(
                progress.stage, progress.total, progress.unit, progress.brief, progress.already
            )
            self._meter = self._stage.__enter__()
        self._meter.advance(progress.done - self._meter.done, progress.note, progress.seconds)
        if progress.ended:
            self._leave(ended=True)

    def _leave(self, ended: bool) -> None:
        """A stage that has not ended is left as one that fails: no line says that it did."""
        if self._stage:
            broken = None if ended else _Broken()
            self._stage.__exit__(type(broken) if broken else None, broken, None)
            self._stage = None


class _Broken(Exception):
    pass


def follow(connection: Connection, job: Job, reporter: Reporter) -> Job:
    """Shows a job's log until it has ended; gives it as it then is. Raises ClusterError where the head stays away."""
    replay = Replay(reporter)
    seen = in_vain = 0
    try:
        while True:
            before = seen
            try:
                seen, whole = asyncio.run(_stream(connection, job.id, seen, replay.feed)), True
            except _Dropped as drop:
                seen, whole = drop.seen, False
            job = _wait_for_answer(connection, job, reporter)
            in_vain = 0 if seen > before or job.is_running else in_vain + 1
            if not job.is_running and whole:
                return job
            if not job.is_running and in_vain == _MOST_IN_VAIN:  # no stream comes through: the log as a whole
                replay.feed(log_of(connection, job)[seen:])
                return job
            time.sleep(_RETRY_SECONDS)
    finally:
        replay.close()


def _wait_for_answer(connection: Connection, job: Job, reporter: Reporter) -> Job:
    """The job as it is now, a head that is away waited for. Raises ClusterError where it stays away."""
    deadline = time.monotonic() + patience_seconds()
    told = False
    while True:
        try:
            found = find_job(connection, job.id)
        except ClusterError as error:
            if time.monotonic() > deadline:
                raise
            if not told:
                reporter.say(f"{error} Waiting for it.")
            told = True
            time.sleep(_RETRY_SECONDS)
        else:
            if found and found.started_at and job.started_at and found.started_at != job.started_at:
                found = None  # a job of the same id on a head that was started anew
            if found is None:
                raise ClusterError(lost(connection, job.id))
            return found


class _Dropped(Exception):
    def __init__(self, seen: int) -> None:
        self.seen = seen


async def _stream(connection: Connection, job_id: str, seen: int, feed: Callable[[str], None]) -> int:
    """Feeds what comes after the first `seen` characters of a log until the stream ends; gives the characters seen.

    Raises _Dropped for a stream that breaks or is silent for long.
    """
    place = 0
    stream = connection.client.tail_job_logs(job_id)
    try:
        while True:
            try:
                text = await asyncio.wait_for(anext(stream), _SILENT_SECONDS)
            except StopAsyncIteration:
                return max(seen, place)
            if place + len(text) > seen:
                feed(text[max(seen - place, 0) :])
            place += len(text)
    except (TimeoutError, RuntimeError, OSError, aiohttp.ClientError) as error:
        raise _Dropped(max(seen, place)) from error
    finally:
        await stream.aclose()


def log_of(connection: Connection, job: Job) -> str:
    """The whole log of a job so far. Raises ClusterError."""
    try:
        return str(connection.call(lambda client: client.get_job_logs(job.id)))
    except ClusterError as error:
        raise ClusterError(f"{error}: the log of {job.id} cannot be had") from None


def settled(connection: Connection, job: Job) -> Job:
    """The job with its driver's exit code, which comes a moment after its end."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while not job.is_running and job.status == "FAILED" and job.exit_code is None and time.monotonic() < deadline:
        if "exit code" not in job.message and "exited" not in job.message:
            return job  # it never had a driver
        time.sleep(_RETRY_SECONDS)
        job = look_up(connection, job.id)
    return job


def fault_of(log: str) -> str:
    """What a job's log says of its failure: the lines from its last fault on."""
    lines = [line for line in log.splitlines() if Progress.of(line) is None]
    kinds = tuple(f"{kind.__name__}: " for kind in EpicError.__subclasses__())
    starts = [place for place, line in enumerate(lines) if line.startswith(kinds)]
    return "\n".join(lines[starts[-1] :] if starts else lines[-1:])


def exit_code_of(job: Job) -> int:
    """The exit code that a command which followed a job ends with: its driver's own."""
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        return job.exit_code or TERMINATED_EXIT_CODE
    if job.exit_code is not None and 0 < job.exit_code < 256:
        return job.exit_code
    return RunFailed.exit_code


def ending_of(job: Job) -> str:
    """How a job ended, in a sentence for a person."""
    if job.status == "SUCCEEDED":
        return f"{job.id}: finished in {job.seconds or 0:.0f} s"
    if job.status == "STOPPED":
        return f"{job.id}: was stopped; what is finished is kept, the same submission goes on from there"
    if job.exit_code:
        return f"{job.id}: failed with exit code {job.exit_code}"
    return f"{job.id}: failed without a driver's exit code: {_last_line(job.message)}"


@dataclass(frozen=True)
class Standing:
    """How a job stands: the last progress of each stage it came to, in their order, and the actors that live."""

    job: Job
    stages: list[Progress]
    actors_alive: int | None

    @property
    def stage(self) -> Progress | None:
        return self.stages[-1] if self.stages else None

    def facts(self) -> dict[str, Any]:
        """For `--json`."""
        stage = self.stage
        return {
            "run": self.job.run,
            "id": self.job.id,
            "job": self.job.what,
            "status": self.job.status,
            "exit_code": self.job.exit_code,
            "seconds": self.job.seconds,
            "root": self.job.root,
            "stage": stage.stage if stage else None,
            "unit": stage.unit if stage else None,
            "done": stage.done if stage else None,
            "total": stage.total if stage else None,
            "rate": round(stage.rate, 3) if stage else None,
            "seconds_left": round(stage.seconds_left, 1) if stage and stage.seconds_left is not None else None,
            "note": stage.note if stage else None,
            "failed": _failed(self.stages),
            "actors_alive": self.actors_alive,
            "stages": {each.stage: each.done for each in self.stages},
        }


def standing(connection: Connection, job: Job) -> Standing:
    """How a job stands now, by the end of its log and the actors that Ray knows."""
    stages: dict[str, Progress] = {}
    records = list(_records(_log_end(connection, job)))
    if not any(_is_pass(progress) for progress in records):  # it ended long ago
        records = list(_records(log_of(connection, job)))
    for progress in records:
        stages.pop(progress.stage, None)
        stages[progress.stage] = progress
    return Standing(job, list(stages.values()), _actors_alive(connection, job))


def _records(text: str) -> Iterator[Progress]:
    for line in text.splitlines():
        progress = Progress.of(line)
        if progress:
            yield progress


def _failed(stages: list[Progress]) -> int | None:
    """The failed images of the last pass that tells of some, 0 where none does; None before any pass."""
    passes = [each for each in stages if _is_pass(each)]
    if not passes:
        return None
    counts = [int(each.note.split()[0]) for each in passes if each.note.endswith(" failed")]
    return counts[-1] if counts else 0


def _is_pass(progress: Progress) -> bool:
    return progress.unit == "images" and not progress.brief


def _log_end(connection: Connection, job: Job) -> str:
    if job.node_id is None:
        return ""
    name = f"job-driver-{job.id}.log"
    try:
        response = connection.get("/api/v0/logs/file", node_id=job.node_id, filename=name, lines=_STATUS_LINES)
    except ClusterError:
        return log_of(connection, job)  # of a machine that is gone, the head may still have it
    return response.content.decode(errors="replace")


def _actors_alive(connection: Connection, job: Job) -> int | None:
    if not job.is_running or job.ray_job_id is None:
        return None if job.is_running else 0
    answer = parse_json(
        connection.get(
            "/api/v0/actors",
            limit=_MOST_ACTORS,
            filter_keys=["job_id", "state"],
            filter_predicates=["=", "="],
            filter_values=[job.ray_job_id, "ALIVE"],
        )
    )
    try:
        actors = answer["data"]["result"]["result"]
    except (KeyError, TypeError):
        raise ClusterError(f"{connection.origin}: the list of actors has no form that is known") from None
    return sum("Worker" in actor["class_name"] for actor in actors)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no reason given"
