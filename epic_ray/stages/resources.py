"""Ray itself: started or joined, what it has, what each actor gets, and the first cause of what failed on it."""

import hashlib
import json
import logging
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from epic_ray import interrupts
from epic_ray.config import ResourcesConfig
from epic_ray.errors import ClusterError, EpicError, RunFailed
from epic_ray.logs import quiet_ray

MIB = 1024**2
_LOCAL_OBJECT_STORE_BYTES = 2 * 1024**3
# below, a matrix product takes less time than its threads wait for one another on a busy machine
_CHANNELS_WORTH_THREADS = 256
# reads, decoding and the workers of the fit would wait for one another with fewer
_LEAST_LOGICAL_CPUS = 4
# set by `epic-ray submit`: what the cluster's file allows its autoscaler
LIMITS_VARIABLE = "EPIC_RAY_CLUSTER_LIMITS"
_LOOK_SECONDS = 60.0


# on a CPU the activations of more images leave its caches
_BATCH_SIZES = {"cuda": 64, "cpu": 16}


@dataclass(frozen=True)
class Resources:
    """What the settings' `auto`s come to on the machines at hand."""

    feature_actors: int
    """The most; of these `actors_at_once` can start now, the others when the cluster has grown."""
    actors_at_once: int
    gpus_per_actor: float
    device: str
    threads: int
    batch_size: int
    precision: str
    cluster_cpus: int
    cluster_gpus: int


def start_ray(local: bool = True) -> None:
    """Starts a Ray of this process's own, or joins the cluster whose job this process is; keeps one that runs."""
    if ray.is_initialized():
        return
    quiet_ray()
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    where: dict[str, Any] = {}
    if local:
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        where = {
            "address": "local",
            "num_cpus": max(_LEAST_LOGICAL_CPUS, available_cores()),
            "object_store_memory": _LOCAL_OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    with _held_back_stderr():
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **where)
    interrupts.rearm()


@contextmanager
def _held_back_stderr() -> Iterator[None]:
    """Shows what is written to stderr, also from C++, only if what is done meanwhile fails."""
    sys.stderr.flush()
    real = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(real, held.read())
            raise
        finally:
            os.dup2(real, 2)
            os.close(real)


def resolve_resources(config: ResourcesConfig) -> Resources:
    """The settings against what Ray has. Raises ClusterError where it has less than is asked for."""
    have, most = ray.cluster_resources(), cluster_limits()
    cpus, gpus_now = int(have.get("CPU", 0)), float(have.get("GPU", 0))
    gpus = int(max(gpus_now, most.get("GPU", 0)))
    _demand_room(config, max(cpus, most.get("CPU", 0)), gpus_now, gpus)
    cores = available_cores()
    # few threads an actor: those of one forward wait for one another, those of two actors do not
    threads = max(1, min(4, cores // 4)) if config.threads_per_actor == "auto" else config.threads_per_actor
    gpus_per_actor: float = 1.0 if gpus and config.device != "cpu" else 0.0
    if config.gpus_per_actor != "auto":
        gpus_per_actor = config.gpus_per_actor
    actors = int(gpus / gpus_per_actor) if gpus_per_actor else _cpu_actors(max(cpus, int(most.get("CPU", 0))), threads)
    actors = max(1, actors) if config.feature_actors == "auto" else config.feature_actors
    if actors * gpus_per_actor > gpus:
        grown = f", and can have {gpus}," if gpus > gpus_now else ""
        raise ClusterError(
            f"resources: {actors} actor(s) x {gpus_per_actor:g} GPU(s) asked, but Ray has {gpus_now:g}{grown}; "
            "lower resources.feature_actors or resources.gpus_per_actor"
        )
    if config.device == "cuda" and not gpus_per_actor:
        raise ClusterError("resources: device is cuda, but no actor holds a GPU; set resources.gpus_per_actor")
    now = int(gpus_now / gpus_per_actor) if gpus_per_actor else _cpu_actors(cpus, threads)
    device = config.device if config.device != "auto" else ("cuda" if gpus_per_actor else "cpu")
    return Resources(
        feature_actors=actors,
        actors_at_once=max(1, min(now, actors)),
        gpus_per_actor=gpus_per_actor,
        device=device,
        threads=threads,
        batch_size=_BATCH_SIZES[device] if config.batch_size == "auto" else config.batch_size,
        precision=config.precision,
        cluster_cpus=cpus,
        cluster_gpus=gpus,
    )


def _demand_room(config: ResourcesConfig, cpus: float, gpus_now: float, gpus: float) -> None:
    """Raises ClusterError for what could only wait for ever: no CPU for decoding, an actor that fits no machine."""
    if cpus < 1:
        raise ClusterError(
            "resources: Ray has no CPU for decoding, and no autoscaler that would bring one; add a machine with some"
        )
    largest = max((node["Resources"].get("GPU", 0.0) for node in alive_nodes()), default=0.0)
    if config.gpus_per_actor != "auto" and gpus <= gpus_now and largest < config.gpus_per_actor <= gpus:
        raise ClusterError(
            f"resources: an actor is to hold {config.gpus_per_actor:g} GPUs, but the largest machine has {largest:g}; "
            "lower resources.gpus_per_actor"
        )


def _cpu_actors(cpus: int, threads: int) -> int:
    """Actors without GPUs: on one machine as many as its cores hold, whatever number of CPUs Ray was told."""
    return (cpus if len(alive_nodes()) > 1 else min(available_cores(), cpus)) // threads


def cluster_limits() -> dict[str, float]:
    """The most CPUs and GPUs that the cluster's autoscaler may bring, as far as it is known."""
    told: dict[str, float] = json.loads(os.environ.get(LIMITS_VARIABLE, "{}"))
    known = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return {name: max(told.get(name, 0.0), float(known.get(name, 0.0))) for name in ("CPU", "GPU")}


def alive_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def demand_seen(folders: dict[str, str], proof: tuple[str, str] | None) -> None:
    """Raises ClusterError for a machine of the cluster that does not see what all must see.

    folders: local paths by the settings that name them. proof: a file of the run, and the digest of its content, which
    another disk under the same path would not have.
    """
    nodes = alive_nodes()
    if len(nodes) < 2:
        return
    look = ray.remote(_unseen)
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        on_node = look.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
        asked[node["NodeID"]] = (node["NodeManagerAddress"], on_node.remote(folders, proof))
    for address, answer in asked.values():
        try:
            unseen = ray.get(answer, timeout=_LOOK_SECONDS)
        except (ray.exceptions.RayError, TimeoutError):
            continue  # it left meanwhile, or is busy: the pass will tell
        if unseen:
            raise ClusterError(
                f"{unseen}: not seen by the machine {address} of the cluster; every machine must see the same files "
                "under this path (one shared disk), or give an address such as s3://"
            )


def _unseen(folders: dict[str, str], proof: tuple[str, str] | None) -> str | None:
    """What this machine does not see, with the setting that names it."""
    for setting, path in folders.items():
        place = Path(path)
        if not place.exists() or (place.is_dir() and not any(place.iterdir())):  # a disk that is not mounted
            return f"{setting}: {path}"
    if proof:
        file, digest = Path(proof[0]), proof[1]
        if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            return f"output.root: {file.parent}"
    return None


def likely_device(config: ResourcesConfig) -> str:
    """The device that a run would use here, without asking Ray: for plans."""
    import torch

    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() and config.gpus_per_actor != 0 else "cpu"


def available_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def take_device(device: str, threads: int) -> Any:
    """The torch device of this process, its threads set. Raises ClusterError if cuda is asked for and absent."""
    import torch

    torch.set_num_threads(threads)
    # TensorFloat-32 has 10 bits of mantissa: not what precision float32 says
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if device == "cuda" and not torch.cuda.is_available():
        raise ClusterError(
            "resources: the device is cuda, but torch sees no GPU here; install a CUDA build of torch on that machine, "
            "or set resources.device=cpu"
        )
    return torch.device(device)


def take_threads(channels: int, sharing: int = 1) -> None:
    """Sets the threads of this process's matrix products, on whose number their last bits depend: always the same, be
    it the process that has fitted or one that goes on from there. sharing: processes that do so at once."""
    import torch

    torch.set_num_threads(max(1, available_cores() // sharing) if channels >= _CHANNELS_WORTH_THREADS else 1)


def peak_memory_bytes() -> int:
    """Largest resident memory that this process has had."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def first_cause(error: BaseException, stage: str) -> EpicError:
    """The fault behind what Ray raised: the first EpicError in the chain, else RunFailed with the innermost message."""
    found = causes(error)
    for cause in found:
        if isinstance(cause, EpicError):
            return cause
    innermost = found[-1]
    text = (str(innermost).strip() or type(innermost).__name__).splitlines()[-1]
    return RunFailed(f"{stage}: {type(innermost).__name__}: {text}; Ray's logs lie under /tmp/ray/session_latest/logs")


def causes(error: BaseException) -> list[BaseException]:
    """An error and all that Ray and Ray Train wrapped in it, outermost first."""
    found: list[BaseException] = []
    queue = [error]
    while queue:
        outer = queue.pop(0)
        if outer in found:
            continue
        found.append(outer)
        failures = getattr(outer, "worker_failures", None) or {}
        wrapped = [getattr(outer, name, None) for name in ("cause", "controller_failure", "health_check_failure")]
        wrapped += [outer.__cause__, *failures.values()]
        queue += [inner for inner in wrapped if isinstance(inner, BaseException)]
    return found
