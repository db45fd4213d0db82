"""A training job as a KubeRay RayJob: rendered from a cluster's manifest, and handed to kubectl.

A RayJob takes no files along. Its code lies in the image or in an archive at an address, and the run file travels as
text, in an environment variable of the job.
"""

import base64
import copy
import hashlib
import re
import shutil
import subprocess
from typing import Any
from urllib.parse import urlsplit

import yaml

from epic_ray.errors import ClusterError, ConfigError
from epic_ray.submission.target import ANNOTATION, Target

RUN_FILE_VARIABLE = "EPIC_RAY_RUN_FILE"
LONGEST_NAME = 47
_LONGEST_RUN_FILE = 64 * 1024  # Linux takes 128 KiB for one variable, and the job's command holds it too
_ARCHIVES = ("https", "s3", "gs", "azure", "abfss", "file")
_APPLY_SECONDS = 120.0


def pack_run_file(text: str) -> str:
    """A run file's text as the value of EPIC_RAY_RUN_FILE: base64, which no shell on the way changes."""
    packed = base64.b64encode(text.encode()).decode("ascii")
    if len(packed) > _LONGEST_RUN_FILE:
        raise ConfigError(
            f"the run file has {len(text.encode()) // 1024} KiB, and {_LONGEST_RUN_FILE * 3 // 4 // 1024} KiB travel "
            "with a RayJob; put long lists (model.classes) into a file that the cluster sees"
        )
    return packed


def unpack_run_file(value: str) -> str:
    """The run file's text of a value of EPIC_RAY_RUN_FILE. Raises ConfigError."""
    try:
        return base64.b64decode(value.strip(), validate=True).decode()
    except ValueError:
        raise ConfigError(
            f"{RUN_FILE_VARIABLE}: holds no run file in base64; `epic-ray submit train` sets it"
        ) from None


def job_name(name: str) -> str:
    """A name that Kubernetes and KubeRay take: small letters, digits and `-`, a letter first, at most 47 of them.

    A name that had to be changed ends with six digits of its hash, so that two runs do not share one.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not plain[:1].isalpha():
        plain = f"run-{plain}".rstrip("-")
    if plain == name and len(plain) <= LONGEST_NAME:
        return plain
    digits = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{plain[: LONGEST_NAME - 7].rstrip('-')}-{digits}"


def render_job(
    target: Target,
    name: str,
    entrypoint: str,
    runtime_env: dict[str, Any],
    metadata: dict[str, str],
    *,
    new_cluster: bool = False,
) -> dict[str, Any]:
    """The RayJob that runs `entrypoint`; `runtime_env` is the whole one, the file's part merged in.

    From a RayCluster: a job on the cluster of that name, or on a new one like it (`new_cluster`), which goes when the
    job ends. From a RayJob: the same with entrypoint, runtime environment, metadata and name replaced. KubeRay runs a
    RayJob once, so a second start needs another name. Raises ConfigError for code that cannot come along.
    """
    _check_code(target, runtime_env)
    given = copy.deepcopy(target.document)
    spec: dict[str, Any]
    if target.kind == "rayjob":
        spec = given["spec"]
        if spec.get("submissionMode") == "InteractiveMode":
            raise ConfigError(
                f"{target.origin}: spec.submissionMode InteractiveMode waits for a person; use K8sJobMode or HTTPMode"
            )
        spec.pop("jobId", None)  # of another submission
    elif new_cluster:
        spec = {"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": 60, "rayClusterSpec": given["spec"]}
    else:
        spec = {"clusterSelector": {"ray.io/cluster": target.name}}
    head: dict[str, Any] = {"name": job_name(name), "namespace": target.namespace}
    for key in ("labels", "annotations"):
        if kept := _kept(given["metadata"].get(key)):
            head[key] = kept
    own = {
        "entrypoint": entrypoint,
        "runtimeEnvYAML": yaml.safe_dump(runtime_env, sort_keys=False),
        "metadata": {str(key): str(value) for key, value in metadata.items()},
    }
    rest = {key: value for key, value in spec.items() if key not in own}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": head, "spec": {**own, **rest}}


def dump(manifest: dict[str, Any]) -> str:
    """The manifest as YAML, as `kubectl apply -f -` reads it."""
    return yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True, width=120)


def apply(manifest: dict[str, Any]) -> None:
    """Creates the job by kubectl, in the cluster of its current context. Raises ConfigError, ClusterError."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise ConfigError(
            "kubectl is not on PATH; install it, or use --dry-run and pipe what it prints to `kubectl apply -f -` on a "
            "machine that has it"
        )
    name = manifest["metadata"]["name"]
    try:
        done = subprocess.run(
            [kubectl, "apply", "-f", "-"], input=dump(manifest), capture_output=True, text=True, timeout=_APPLY_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ClusterError(
            f"RayJob {name}: kubectl did not end within {_APPLY_SECONDS:.0f} s; does `kubectl get nodes` answer?"
        ) from None
    if done.returncode:
        raise ClusterError(f"RayJob {name}: kubectl did not take it: {_reason(done.stderr)}")


def _reason(told: str) -> str:
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    reason = lines[-1] if lines else "it said nothing"
    if "no matches for kind" in told or "ensure CRDs are installed" in told:
        reason += "; is the KubeRay operator installed in this cluster?"
    return reason


def _kept(values: Any) -> dict[str, str]:
    """Labels or annotations without our own and without what kubectl remembers."""
    ours = (ANNOTATION, "kubectl.kubernetes.io/last-applied-configuration")
    return {key: value for key, value in (values or {}).items() if not str(key).startswith(ours)}


def _check_code(target: Target, runtime_env: dict[str, Any]) -> None:
    """Code that a RayJob cannot take along, or that is nowhere."""
    places = [runtime_env.get("working_dir"), *(runtime_env.get("py_modules") or [])]
    given = [str(place) for place in places if place]
    for place in given:
        if urlsplit(place).scheme not in _ARCHIVES or not urlsplit(place).path.endswith((".zip", ".whl", ".tar.gz")):
            raise ConfigError(
                f"{target.origin}: a RayJob uploads nothing, and {place} is no archive at an address. Build an image "
                "with epic-ray in it (docker build -f cluster/Dockerfile ...) and leave it out, or name an archive: "
                "runtime_env: {working_dir: https://.../code.zip} (https, s3 or gs)"
            )
    if not given and not target.in_image:
        raise ConfigError(
            f"{target.origin}: a RayJob uploads nothing, and nothing says where its code is. Build an image with "
            "epic-ray in it (docker build -f cluster/Dockerfile ...) and say so by the annotation "
            f'{ANNOTATION}in-image: "true", or name an archive as runtime_env.working_dir'
        )
