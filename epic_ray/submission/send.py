"""From settings to a job on a cluster: what is checked here, what travels, and under which name."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epic_ray.config import RunConfig, dump_config
from epic_ray.errors import ClusterError, ConfigError
from epic_ray.job import FROM_ENVIRONMENT
from epic_ray.storage import is_uri, join, last_name
from epic_ray.submission import kuberay
from epic_ray.submission.connection import Connection
from epic_ray.submission.jobs import Job, JobSpec, about_run, send
from epic_ray.submission.package import RUN_FILE, job_folder, script
from epic_ray.submission.target import Target


def send_train(connection: Connection, target: Target, config: RunConfig, flags: list[str]) -> Job:
    """Sends the training job of portable settings. Raises ConfigError, ClusterError."""
    _demand_own_folder(target)
    with job_folder(config, target.in_image) as folder:
        return send(connection, _train_spec(target, config, flags, folder))


def send_explain(connection: Connection, target: Target, run: "KnownRun", words: list[str]) -> Job:
    """Sends the job that explains a run. Raises ConfigError, ClusterError."""
    _demand_own_folder(target)
    with job_folder(None, target.in_image, run.model) as folder:
        command, about = script("explain", target.in_image), {"model": run.model or ""}
        spec = JobSpec("explain", run.name, run.root, command, [run.root, *words], folder, target.runtime_env, about)
        return send(connection, spec)


def send_archive(connection: Connection, target: Target, run: str, root: str, words: list[str]) -> Job:
    """Sends the small job that packs the output of a run where only the cluster sees it."""
    with job_folder(None, target.in_image) as folder:
        command = script("archive", target.in_image)
        return send(
            connection, JobSpec("archive", f"{run}-collect", root, command, [root, *words], folder, target.runtime_env)
        )


def render_train(target: Target, config: RunConfig, flags: list[str]) -> dict[str, Any]:
    """The RayJob of a training run. Raises ConfigError for what cannot travel with one."""
    demand_resources(config, target)
    spec = _train_spec(target, config, flags, Path())
    environment = spec.environment()
    environment.pop("working_dir")
    environment |= {key: target.runtime_env[key] for key in ("working_dir",) if key in target.runtime_env}
    environment["env_vars"][kuberay.RUN_FILE_VARIABLE] = kuberay.pack_run_file(dump_config(config))
    entrypoint = spec.entrypoint.replace(f" {RUN_FILE}", f" {FROM_ENVIRONMENT}", 1)
    name = f"{config.name}-{time.strftime('%m%d-%H%M%S')}"  # KubeRay runs a RayJob once: each start is one of its own
    return kuberay.render_job(target, name, entrypoint, environment, spec.metadata(1))


def demand_resources(config: RunConfig, target: Target) -> None:
    """Raises ClusterError where the settings ask for more than the cluster's file allows it to grow to."""
    limits, asked = target.limits or {}, config.resources
    most = limits.get("GPU")
    if most is None or asked.device == "cpu":
        return
    per_actor = 1.0 if asked.gpus_per_actor == "auto" else float(asked.gpus_per_actor)
    actors = 1 if asked.feature_actors == "auto" else int(asked.feature_actors)
    wanted = actors * per_actor if asked.device == "cuda" or asked.gpus_per_actor != "auto" else 0.0
    if wanted > most:
        raise ClusterError(
            f"resources: {actors} actor(s) x {per_actor:g} GPU(s) asked, but {target.origin} allows the cluster "
            f"{most:g}; lower resources.feature_actors or resources.gpus_per_actor, or raise its max_workers"
        )


def _demand_own_folder(target: Target) -> None:
    if "working_dir" in target.runtime_env:
        raise ConfigError(
            f"{target.origin}: runtime_env.working_dir: the job's folder is what epic-ray sends; name further code as "
            "py_modules, or have it installed on the machines and set in_image: true without a working_dir"
        )


def root_of(config: RunConfig) -> str:
    return join(config.output.root, config.name)


def sharing_note(config: RunConfig, target: Target) -> str | None:
    """What a person should know where the paths of the settings are local ones; None where they are not."""
    local = [path for path in (config.data.root, config.output.root) if not is_uri(path)]
    if not local or target.kind == "local":
        return None
    return f"every machine of the cluster must see {' and '.join(dict.fromkeys(local))}, as one shared disk"


def _train_spec(target: Target, config: RunConfig, flags: list[str], folder: Path) -> JobSpec:
    return JobSpec(
        "train",
        config.name,
        root_of(config),
        script("train", target.in_image),
        [RUN_FILE, *flags],
        folder,
        target.runtime_env,
        about_run(config),
        target.limits,
    )


@dataclass(frozen=True)
class KnownRun:
    """A run of a cluster: its name, the address of its folder, and its architecture where a job tells it."""

    name: str
    root: str
    model: str | None


def find_submitted(connection: Connection, run: str | None, jobs: list[Job]) -> KnownRun:
    """The run that a command means: an address, or the newest attempt at a name. Raises ConfigError."""
    is_address = run is not None and (is_uri(run) or "/" in run)
    root = run.rstrip("/") if run and is_address else None
    trained = [job for job in jobs if job.what == "train"]
    meant = [job for job in trained if (job.root == root if is_address else run in (None, job.run))]
    meant = meant or [job for job in trained if job.id == run]
    if meant:
        newest = max(meant, key=lambda job: (job.started_at or 0.0, job.attempt))
        return KnownRun(newest.run, newest.root, newest.model)
    if root:
        return KnownRun(last_name(root), root, None)
    known = ", ".join(sorted({job.run for job in trained})) or "none"
    raise ConfigError(
        f"{run or 'RUN'}: no training job of that name on {connection.origin} (it knows: {known}); name the run's "
        "folder or address"
    )
