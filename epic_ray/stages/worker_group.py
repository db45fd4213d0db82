"""A group of worker processes under Ray Train: room for it, its run to the end, and what ended it before.

Ray Train's own restarts (`FailureConfig.max_failures`) start the group anew 5 s sooner, but after every fault alike,
an unreadable image too, and without a word. So a group that lost a worker ends here, with `WorkerLost`.
"""

import os
import re
import textwrap
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
import ray.train
import torch.distributed as dist
from ray import exceptions as ray_errors
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckTimeoutError,
)
from ray.util.placement_group import (
    PlacementGroup,
    PlacementGroupID,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from epic_ray import interrupts
from epic_ray.errors import ClusterError, EpicError
from epic_ray.logs import Reporter
from epic_ray.stages.resources import causes, first_cause

ROOM_SECONDS = 300.0
PATIENT_SECONDS = 10.0
_ABORT_SECONDS = 15.0
_LOSSES = (
    ray_errors.RayActorError,
    ray_errors.NodeDiedError,
    ray_errors.WorkerCrashedError,
    ray_errors.ObjectLostError,
    ray_errors.OutOfMemoryError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckTimeoutError,
)
# what gloo and NCCL say in the workers that are left; of types that many other faults have too
_BROKEN_CONNECTION = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket (closed|timeout)|remote process exited|ncclRemoteError"
    r"|timed out waiting|watchdog caught collective operation timeout",
    re.IGNORECASE,
)


class WorkerLost(Exception):
    """A worker process or its machine is gone: no fault of the work, which may start anew. Says what is known of it."""


def run_group(
    loop: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    workers: int | tuple[int, int],
    on_gpu: bool,
    stage: str,
    storage_path: str,
) -> None:
    """Runs `loop(settings)` to its end in every worker of a new group (0 workers: in this process).

    Raises WorkerLost, or the first cause of another failure as an EpicError. Whatever ends it, no process is left.
    """
    # it reads of lost machines late, and would wait a minute for them
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    size: Any = workers
    # without a limit of 0, Ray tries for ever to start a group for which there is no room
    failures: dict[str, Any] = {"max_failures": 0, "controller_failure_limit": 0}
    trainer = _Trainer(
        loop,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(
            num_workers=size, use_gpu=on_gpu and workers != 0, resources_per_worker=None if on_gpu else {"CPU": 1}
        ),
        torch_config=None if on_gpu else TorchConfig(backend="gloo"),
        run_config=ray.train.RunConfig(
            # under a name of old Ray would restore what it knows of the old group
            name=f"{stage}-{uuid.uuid4().hex[:8]}",
            storage_path=storage_path,
            failure_config=ray.train.FailureConfig(**failures),
        ),
    )
    try:
        trainer.fit()
    except EpicError:
        raise
    except Exception as error:
        loss = worker_loss(error) if workers else None
        if loss:
            raise WorkerLost(loss) from error
        raise first_cause(error, stage) from error


class _Trainer(TorchTrainer):
    """Ends as any other call does when it is interrupted, and leaves no process behind.

    Ray's own handler of Ctrl-C ends the whole command, with the exit code of success, and outlives the training.
    """

    _controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def fit(self) -> ray.train.Result:
        before = _own_reservations()
        try:
            return super().fit()
        except Exception:
            raise
        except BaseException:
            self._abort()
            self._free(before)
            raise
        finally:
            if self._controller is not None:
                ray.kill(self._controller)

    def _free(self, before: set[str]) -> None:
        """Gives back what the controller has reserved: one that is aborted while its workers start forgets it."""
        with suppress(Exception):  # an interrupt is what is to be told, whatever else goes wrong
            if self._controller is not None:
                ray.kill(self._controller)
            for left in _own_reservations() - before:
                remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(left))))

    def _abort(self) -> None:
        if self._controller is not None:
            with suppress(ray_errors.RayError):  # it ends itself, so the answer is always an error
                ray.get(self._controller.abort.remote(), timeout=_ABORT_SECONDS)


def _own_reservations() -> set[str]:
    """The placement groups of this job that are not removed, by their ids, which end with the job's."""
    job = ray.get_runtime_context().get_job_id()
    return {key for key, facts in placement_group_table().items() if facts["state"] != "REMOVED" and key.endswith(job)}


def worker_loss(error: BaseException) -> str | None:
    """What is known of the worker whose loss ended a group; None where something else did.

    A loss is told by all that the workers report together: where one is gone, the errors of those that waited for it
    say nothing. An EpicError has a cause of its own and is none, whatever else is reported.
    """
    found = causes(error)
    if any(isinstance(cause, EpicError) for cause in found):
        return None
    for cause in found:
        if isinstance(cause, _LOSSES):
            lines = str(cause).strip().splitlines() or [type(cause).__name__]
            return textwrap.shorten(lines[-1], 160, placeholder=" ...")
    # a machine that is gone is missed by its peers at once, and by Ray after ten seconds
    reported = list(getattr(error, "worker_failures", {}).values()) or found[-1:]
    broken = [_broken_connection(failure) for failure in reported]
    return broken[0] if all(broken) else None


def _broken_connection(error: BaseException) -> str | None:
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return type(error).__name__
    told = _BROKEN_CONNECTION.search(str(error)) if isinstance(error, RuntimeError) else None
    return told[0] if told else None


def room(on_gpu: bool) -> int:
    """Workers that the machines of now could hold if nothing else ran on them."""
    return int(ray.cluster_resources().get("GPU" if on_gpu else "CPU", 0))


def wait_for_room(wanted: Callable[[], int], on_gpu: bool, setting: str, reporter: Reporter) -> int:
    """Returns as soon as there is room for the workers wanted, with their number; it may change with the machines.

    Raises ClusterError where there never will be, or after five minutes of waiting: for others' work to end, or, in a
    cluster of several machines, for a lost one to be replaced.
    """
    start, told = time.monotonic(), False
    while True:
        workers = wanted()
        if room(on_gpu) < workers and len(ray.nodes()) == 1:  # machines that are gone are counted too
            raise ClusterError(f"{_lack(workers, on_gpu, setting)}; ask for fewer, or for [least, most]")
        # a reservation, so that a cluster that can grow is told to
        reservation = placement_group([{"GPU" if on_gpu else "CPU": 1}] * workers)
        try:
            while wanted() == workers:
                if reservation.wait(1):
                    return workers
                interrupts.check()
                waited = time.monotonic() - start
                if waited > ROOM_SECONDS:
                    lack = f"{_lack(workers, on_gpu, setting)}, and {ROOM_SECONDS:.0f} s did not change that"
                    raise ClusterError(f"{lack}; ask for fewer, or for [least, most], or start again later")
                if waited > PATIENT_SECONDS and not told:
                    told = True
                    reporter.say(f"{_lack(workers, on_gpu, setting)}; waiting for at most {ROOM_SECONDS:.0f} s")
        finally:
            remove_placement_group(reservation)


def _lack(workers: int, on_gpu: bool, setting: str) -> str:
    have, kind = room(on_gpu), "GPU" if on_gpu else "CPU"
    return f"{setting}: {workers} asked, but Ray has {have} {kind}(s)" + (", not all free" if have >= workers else "")
