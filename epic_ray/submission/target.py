"""Naming a cluster: by a file, by the address of its dashboard, or by the word `local`.

A file is told apart by what it holds: an *address file* (`address: http://...`), a *launcher file* of Ray's own
(`cluster_name` and `provider`, what `ray up` takes), or a *KubeRay manifest* (`ray.io/v1`, RayCluster or RayJob).
Nothing is contacted here, and neither Ray nor torch is imported.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from epic_ray.errors import ConfigError
from epic_ray.submission.documents import KubernetesName, check_launcher, describe, kuberay_document, read_documents
from epic_ray.submission.limits import kuberay_limits, launcher_limits
from epic_ray.submission.options import Options, read_options

Kind = Literal["local", "address", "launcher", "raycluster", "rayjob"]

LOCAL_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLE, RAY_VARIABLE = "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"
ANNOTATION = "epic-ray/"

NO_CLUSTER = f"""\
no cluster is named; give one of
  --cluster FILE        an address file (one line, `address: http://HOST:8265`), a file of `ray up` (cluster_name,
                        provider), or a KubeRay manifest (RayCluster, RayJob); the folder cluster/ has one of each
  --cluster local       a Ray that runs on this machine ({LOCAL_ADDRESS})
  --address URL         the address of a Ray dashboard, http://HOST:8265
  {ADDRESS_VARIABLE}=URL in the environment"""


@dataclass(frozen=True)
class Target:
    """A cluster as it was named. What may hold secrets is left out of its text."""

    origin: str
    """What the person named, for messages."""
    kind: Kind
    address: str | None = None
    """Base URL of the dashboard, http(s)://host:port, where the text gives it."""
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    """HTTP headers of every request, the token's among them."""
    verify: bool | str = True
    """Whether TLS certificates are checked, or the file of the authority that signed them."""
    runtime_env: dict[str, Any] = field(default_factory=dict, repr=False)
    """What the cluster's file adds to the job's runtime environment."""
    document: dict[str, Any] = field(default_factory=dict, repr=False)
    """The whole file of a launcher, or the Ray document of a KubeRay file."""
    path: Path | None = None
    limits: dict[str, float] | None = None
    """Most CPUs and GPUs that its autoscaler may bring, the head's included; a key that cannot be known is absent."""
    in_image: bool = False
    """Whether its machines have epic-ray installed, so that no code need be sent."""
    dashboard_port: int = 8265
    """Port of the dashboard on the head."""
    tunnel: bool = True
    """Launcher: whether the dashboard is reached through ssh, or straight at the head's address."""

    @property
    def option(self) -> str:
        """The words that name the cluster again, with a space before them; none where the environment names it."""
        if self.path or self.kind == "local":
            return f" --cluster {self.origin}"
        return "" if "=" in self.origin else f" --address {self.address}"

    @property
    def name(self) -> str:
        """The name of the RayCluster or RayJob, or of the launcher's cluster; empty for others."""
        return str(self.document.get("cluster_name") or (self.document.get("metadata") or {}).get("name") or "")

    @property
    def namespace(self) -> str:
        """Kubernetes' namespace of a RayCluster or RayJob."""
        return str((self.document.get("metadata") or {}).get("namespace") or "default")


def has_target(cluster: str | None, address: str | None, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether anything names a cluster; the names themselves are not checked."""
    return bool(cluster or address or environ.get(ADDRESS_VARIABLE) or _is_http(environ.get(RAY_VARIABLE, "")))


def resolve_target(cluster: str | None, address: str | None, environ: Mapping[str, str] = os.environ) -> Target:
    """The cluster that `--cluster` or `--address` names, or else the environment.

    Raises ConfigError where nothing or too much is named, and for a file that names no cluster.
    """
    if cluster and address:
        raise ConfigError(f"--cluster {cluster} and --address {address} name a cluster each; leave one of them out")
    if cluster == "local":
        return Target("local", "local", LOCAL_ADDRESS)
    if cluster:
        return _of_url(cluster, "--cluster") if "://" in cluster else _of_file(cluster, environ)
    if address:
        return _of_url(address, "--address")
    if environ.get(ADDRESS_VARIABLE):
        return _of_url(environ[ADDRESS_VARIABLE], ADDRESS_VARIABLE)
    if _is_http(environ.get(RAY_VARIABLE, "")):
        return _of_url(environ[RAY_VARIABLE], RAY_VARIABLE)
    raise ConfigError(NO_CLUSTER)


def _is_http(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _of_url(text: str, where: str) -> Target:
    address = check_url(text, where)
    return Target(address if where.startswith("-") else f"{where}={address}", "address", address)


def check_url(text: str, where: str) -> str:
    """A dashboard's base URL without a slash at its end. Raises ConfigError for anything else."""
    shown = re.sub(r"//[^/@]*@", "//...@", text)
    if text.startswith("ray://"):
        raise ConfigError(
            f"{where}: {shown} is the address of a Ray client; jobs go to the dashboard, http://HOST:8265"
        )
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ConfigError(f"{where}: {shown} is no address ({_EXPECTED_URL})") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"\s", text):
        hint = f"; did you mean http://{text}?" if re.fullmatch(r"[\w.-]+(:\d+)?", text) else ""
        raise ConfigError(f"{where}: {shown} is no address of a dashboard ({_EXPECTED_URL}){hint}")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            f"{where}: {shown} holds credentials, and addresses are printed; leave them out, and name the environment "
            "variable that holds the token by `token_env` in an address file"
        )
    if parts.query or parts.fragment:
        raise ConfigError(f"{where}: {shown} has a part after `?` or `#`; give the base address ({_EXPECTED_URL})")
    if port == 0:
        raise ConfigError(f"{where}: {shown} has port 0; Ray's dashboard listens on 8265 unless told otherwise")
    return text.rstrip("/")


_EXPECTED_URL = "expected http://HOST:8265 or https://HOST"


def _of_file(text: str, environ: Mapping[str, str]) -> Target:
    path = Path(text).expanduser()
    documents = read_documents(path, text)
    named = Target(text, "address", path=path)
    ray = kuberay_document(documents, text)
    if ray is not None:
        return _of_kuberay(replace(named, document=ray), environ)
    if len(documents) == 1 and isinstance(documents[0], dict):
        document = documents[0]
        if {"cluster_name", "provider"} <= set(document):
            return _of_launcher(replace(named, kind="launcher", document=document), environ)
        if "address" in document and not {"model", "data", "apiVersion"} & set(document):
            return _with(named, read_options(document, text, path.parent, environ, address_file=True))
    raise ConfigError(describe(documents, text))


def _of_launcher(target: Target, environ: Mapping[str, str]) -> Target:
    check_launcher(target.document, target.origin)
    values = (target.document.get("metadata") or {}).get("epic_ray")
    options = read_options(
        {} if values is None else values, f"{target.origin}: metadata.epic_ray", _folder(target), environ
    )
    return _with(replace(target, limits=launcher_limits(target.document)), options)


def _of_kuberay(target: Target, environ: Mapping[str, str]) -> Target:
    document, where = target.document, target.origin
    name = KubernetesName(document, where)
    values = name.annotations(ANNOTATION)
    options = read_options(values, f"{where}: metadata.annotations {ANNOTATION}...", _folder(target), environ)
    if document["kind"] == "RayCluster":
        target = replace(target, kind="raycluster", limits=kuberay_limits(document["spec"]))
        target = _with(target, options)
        if target.address is None:
            host = f"{name.head_service}.{target.namespace}.svc.cluster.local"
            target = replace(target, address=f"http://{host}:{target.dashboard_port}")
        return target
    spec = document["spec"]
    limits = kuberay_limits(spec["rayClusterSpec"]) if "rayClusterSpec" in spec else None
    target = replace(target, kind="rayjob", limits=limits, in_image=True, runtime_env=name.runtime_env())
    return _with(target, options)


def _folder(target: Target) -> Path:
    return target.path.parent if target.path else Path()


def _with(target: Target, options: Options) -> Target:
    """The target with what the file sets; what it does not set stays."""
    given = {key: value for key, value in vars(options).items() if value is not None}
    if "address" in given:
        given["address"] = check_url(given["address"], f"{target.origin}: address")
    return replace(target, **given)
