"""Fitting U under Ray Train: groups of workers, started again from the newest round where one is lost."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from epic_ray.errors import RunFailed
from epic_ray.logs import Reporter
from epic_ray.stages.fit_worker import FitJob, work
from epic_ray.stages.rounds import finished_rounds, newest_round, read_own_round, read_round
from epic_ray.stages.worker_group import WorkerLost, room, run_group, wait_for_room

_POLL_SECONDS = 0.5
_RAY_TRAIN_FOLDER = ".ray-train"
_MOST_RESTARTS = 3


@dataclass(frozen=True)
class FitResult:
    basis: torch.Tensor
    start: str
    history: list[dict[str, Any]]
    decoded: int
    forwarded: int
    peak_memory_bytes: int
    restarts: int


def fit_basis(job: FitJob, reporter: Reporter) -> FitResult:
    """Runs the fit under Ray Train to its end, from its newest round. Raises the first cause of a failure.

    A group that lost a worker starts anew and goes on from its newest round. ClusterError: no room for the group.
    """
    rounds = job.config.fit.prototypes_per_channel.rounds
    if job.config.fit.start == "auto" and newest_round(job.run_dir) is None:
        reporter.say("fit: trying its two starts for a few rounds each, the network's own channels and varimax")
    with _progress(job, rounds, reporter):
        restarts = _run_rounds(job, rounds, reporter)
    last = read_own_round(job.run_dir, rounds, job.fingerprint)
    return FitResult(
        last["basis"],
        _name_of(last["start"], job.config.fit.start),
        last["history"],
        last["decoded"],
        last["forwarded"],
        last["peak_memory_bytes"],
        restarts,
    )


def _name_of(start: torch.Tensor, asked: str) -> str:
    """The start that `auto` came to, or the one that was asked for."""
    if asked != "auto":
        return asked
    return "identity" if torch.equal(start, torch.eye(len(start))) else "varimax"


def _run_rounds(job: FitJob, rounds: int, reporter: Reporter) -> int:
    """Starts groups of workers until the last round is done; gives how many were started after a loss."""
    restarts, in_vain, reached = 0, 0, finished_rounds(job.run_dir)
    while finished_rounds(job.run_dir) < rounds:
        workers = _worker_count(job, reporter)
        try:
            job.run_dir.delete_folder(_RAY_TRAIN_FOLDER)
            on_gpu = job.resources.device == "cuda"
            run_group(work, {"job": job}, workers, on_gpu, "fit", job.run_dir.show(_RAY_TRAIN_FOLDER))
            if finished_rounds(job.run_dir) < rounds:
                raise RunFailed(
                    f"fit: its workers ended, but round {rounds} is not in {job.run_dir.show('fit')}; "
                    "is it a folder that all machines share?"
                )
        except WorkerLost as loss:
            done = finished_rounds(job.run_dir)
            # only losses without a finished round between them add up: a long fit on spot machines sees many
            in_vain, reached = (in_vain + 1 if done == reached else 1), done
            if in_vain > _MOST_RESTARTS:
                raise RunFailed(
                    f"fit: round {done + 1} lost a worker {in_vain} times ({loss}); ask for fewer (fit.workers) where "
                    "machines are short of memory; Ray's logs lie under /tmp/ray/session_latest/logs"
                ) from loss
            restarts += 1
            again = f"restart {in_vain} of {_MOST_RESTARTS}"
            reporter.say(f"fit: a worker was lost ({loss}); going on from round {done + 1}, {again}")
        finally:
            job.run_dir.delete_folder(_RAY_TRAIN_FOLDER)
    return restarts


def _worker_count(job: FitJob, reporter: Reporter) -> int | tuple[int, int]:
    """Processes of the fit, or the least and the most of them, for which there is room now. Raises ClusterError."""
    on_gpu = job.resources.device == "cuda"
    asked = job.config.fit.workers

    def wanted() -> int:
        if isinstance(asked, str):
            return max(1, room(on_gpu))
        return asked[0] if isinstance(asked, list) else asked

    # auto: in this process where it can do the work itself: no start-up, nothing to send
    here = not on_gpu or (torch.cuda.is_available() and room(on_gpu) <= 1)
    if asked == 0 or (asked == "auto" and here):
        return 0
    count = wait_for_room(wanted, on_gpu, "fit.workers", reporter)
    return (count, asked[1]) if isinstance(asked, list) else count


@contextmanager
def _progress(job: FitJob, rounds: int, reporter: Reporter) -> Iterator[None]:
    """Shows finished rounds, wherever they are computed: their files tell."""
    with reporter.stage("fit", rounds, "rounds", already=finished_rounds(job.run_dir)) as meter:

        def look() -> None:
            done = finished_rounds(job.run_dir)
            if done > meter.done:
                record = read_round(job.run_dir, done)["history"][-1]
                meter.advance(done - meter.done, f"purity {record['purity_start']:.3f} -> {record['purity_end']:.3f}")

        watcher = _Watcher(look)
        watcher.start()
        try:
            yield
        finally:
            watcher.end()
            if watcher.fault is not None:
                reporter.say(f"fit: the rounds could not be shown ({watcher.fault})")


class _Watcher(threading.Thread):
    """Looks again and again until it is ended, and once more; a look that fails is no fault of what it looks at.

    fault: what the last look failed with; an earlier one has been made good since.
    """

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._look, self._ended = look, threading.Event()
        self.fault: Exception | None = None

    def run(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            self._try()

    def end(self) -> None:
        self._ended.set()
        self.join()
        self._try()

    def _try(self) -> None:
        try:
            self._look()
            self.fault = None
        except Exception as error:
            self.fault = error
