"""A cluster's file: read, told apart from files that are something else, and checked."""

import difflib
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from epic_ray.errors import ConfigError
from epic_ray.submission.options import ADDRESS_KEYS

EXPECTED = """\
expected an address file, a file of `ray up` (cluster_name, provider) or a KubeRay manifest (apiVersion: ray.io/v1, kind
RayCluster or RayJob). The shortest is an address file:
  address: http://127.0.0.1:8265      # of the Ray dashboard
  token_env: RAY_CLUSTER_TOKEN        # only where the cluster asks for a token: the variable that holds it
  in_image: false                     # whether its machines have epic-ray installed"""

_API_VERSION = "ray.io/v1"
_NAME_CHARACTERS = {"RayCluster": 53, "RayJob": 47}  # KubeRay's own limits
_LONGEST_BYTES = 4 * 1024**2


def read_documents(path: Path, origin: str) -> list[Any]:
    """The YAML documents of a file, empty ones left out. Raises ConfigError."""
    try:
        if path.is_dir():
            raise ConfigError(f"{origin}: is a folder; name a file in it\n{EXPECTED}")
        if path.exists() and path.stat().st_size > _LONGEST_BYTES:
            raise ConfigError(f"{origin}: is too large to be a cluster's file\n{EXPECTED}")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = f"; for an address write http://{origin}" if re.fullmatch(r"[\w.-]+:\d+", origin) else ""
        near = difflib.get_close_matches(origin, ["local"], n=1, cutoff=0.7)
        hint = "; did you mean `local`?" if near else hint
        raise ConfigError(
            f"--cluster {origin}: no such file{hint}\n`--cluster` takes a file, an address (http://HOST:8265) or the "
            "word local"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{origin}: is no text\n{EXPECTED}") from None
    except OSError as error:
        raise ConfigError(f"{origin}: cannot be read ({error.strerror})") from None
    try:
        return [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{origin}: is no YAML: {getattr(error, 'problem', None) or error}{place}") from None


def kuberay_document(documents: list[Any], origin: str) -> dict[str, Any] | None:
    """The one Ray document among a file's Kubernetes documents; None where there is none. Raises ConfigError."""
    found = [
        document
        for document in documents
        if isinstance(document, dict) and re.match(r"ray\.io(/|$)", str(document.get("apiVersion")))
    ]
    if not found:
        return None
    if len(found) > 1:
        kinds = ", ".join(str(document.get("kind")) for document in found)
        raise ConfigError(f"{origin}: holds {len(found)} Ray documents ({kinds}); keep one of them in the file")
    document = found[0]
    version, kind = document["apiVersion"], document.get("kind")
    if kind not in _NAME_CHARACTERS:
        what = "serves requests and runs no jobs" if kind == "RayService" else "is not a kind that runs one job"
        raise ConfigError(f"{origin}: a {kind} {what}; expected kind RayCluster or RayJob (see cluster/kuberay-*.yaml)")
    if version != _API_VERSION:
        raise ConfigError(
            f"{origin}: {kind} of {version}; expected apiVersion: {_API_VERSION}, which KubeRay has had since 1.0"
        )
    _check_spec(document, origin)
    return document


def _check_spec(document: dict[str, Any], origin: str) -> None:
    kind, spec = document["kind"], document.get("spec")
    if not isinstance(spec, dict):
        raise ConfigError(f"{origin}: the {kind} has no spec (see cluster/kuberay-*.yaml)")
    if kind == "RayCluster":
        _check_cluster(spec, f"{origin}: spec")
    elif isinstance(spec.get("rayClusterSpec"), dict):
        _check_cluster(spec["rayClusterSpec"], f"{origin}: spec.rayClusterSpec")
    elif not (isinstance(spec.get("clusterSelector"), dict) and spec["clusterSelector"].get("ray.io/cluster")):
        raise ConfigError(
            f"{origin}: the RayJob names no cluster; expected spec.rayClusterSpec, or spec.clusterSelector with "
            "`ray.io/cluster: NAME` of one that runs"
        )


def _check_cluster(spec: dict[str, Any], where: str) -> None:
    groups = spec.get("workerGroupSpecs") or []
    if not isinstance(spec.get("headGroupSpec"), dict):
        raise ConfigError(f"{where}.headGroupSpec: missing; every Ray cluster has a head (see cluster/kuberay-*.yaml)")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ConfigError(f"{where}.workerGroupSpecs: expected a list of worker groups")
    for number, group in enumerate(groups):
        for key in ("replicas", "minReplicas", "maxReplicas", "numOfHosts"):
            if key in group and (not isinstance(group[key], int) or isinstance(group[key], bool) or group[key] < 0):
                raise ConfigError(f"{where}.workerGroupSpecs[{number}].{key}: expected a whole number from 0 up")
    for group in (spec["headGroupSpec"], *groups):
        try:
            (container, *_) = group["template"]["spec"]["containers"]
            container.get("resources", {}).get("limits", {})
        except (KeyError, TypeError, ValueError, AttributeError):
            name = group.get("groupName", "headGroupSpec")
            raise ConfigError(
                f"{where}: {name}: expected template.spec.containers with Ray's container first"
            ) from None


class KubernetesName:
    """Name, annotations and further facts of a RayCluster or RayJob document. Raises ConfigError for a wrong name."""

    def __init__(self, document: dict[str, Any], origin: str):
        metadata = document.get("metadata")
        self.origin, self.document = origin, document
        self.metadata: dict[str, Any] = metadata if isinstance(metadata, dict) else {}
        kind, name = document["kind"], self.metadata.get("name")
        most = _NAME_CHARACTERS[kind]
        if not isinstance(name, str) or len(name) > most or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
            raise ConfigError(
                f"{origin}: metadata.name: {name!r} is no name of a {kind}; expected at most {most} small letters, "
                "digits and `-`, a letter first"
            )
        self.name = name

    @property
    def head_service(self) -> str:
        service = self.document["spec"]["headGroupSpec"].get("headService") or {}
        return str((service.get("metadata") or {}).get("name") or f"{self.name}-head-svc")

    def annotations(self, prefix: str) -> dict[str, Any]:
        """Those that begin with the prefix, as the keys of an address file; each value is YAML."""
        options = {}
        for key, text in (self.metadata.get("annotations") or {}).items():
            if str(key).startswith(prefix):
                name = str(key).removeprefix(prefix)
                if not isinstance(text, str):
                    raise ConfigError(f"{self.origin}: annotation {key}: Kubernetes takes text alone; quote the value")
                try:
                    options[name.replace("-", "_")] = yaml.safe_load(text)
                except yaml.YAMLError:
                    raise ConfigError(f"{self.origin}: annotation {key}: the value is no YAML") from None
        return options

    def runtime_env(self) -> dict[str, Any]:
        """The runtime environment that a RayJob has of its own."""
        try:
            values = yaml.safe_load(self.document["spec"].get("runtimeEnvYAML") or "{}")
        except (yaml.YAMLError, AttributeError):
            values = None
        if not isinstance(values, dict):
            raise ConfigError(f"{self.origin}: spec.runtimeEnvYAML: expected the text of a YAML mapping")
        return values


def check_launcher(document: dict[str, Any], origin: str) -> None:
    """Checks a launcher file against the schema that `ray up` uses. Raises ConfigError with every finding."""
    from jsonschema import Draft7Validator  # only here: its import takes a moment

    spec = find_spec("ray")
    folders = list(spec.submodule_search_locations or []) if spec else []
    schema = json.loads((Path(folders[0]) / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    findings = [_finding(error) for error in Draft7Validator(schema).iter_errors(document)]
    types = document.get("available_node_types")
    if not findings and types and document.get("head_node_type") not in types:
        findings.append("head_node_type: expected one of available_node_types: " + ", ".join(map(str, types)))
    if findings:
        raise ConfigError(f"{origin}: {len(findings)} wrong setting(s) for `ray up`\n  " + "\n  ".join(findings))


def _finding(error: Any) -> str:
    """One finding without the value itself, which may be a secret."""
    where = ".".join(map(str, error.absolute_path)) or "the file"
    if error.validator == "additionalProperties":
        known = list(error.schema.get("properties", {}))
        unknown = [str(key) for key in error.instance if key not in known]
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
        return f"{where}: unknown key {', '.join(unknown)}" + (f"; did you mean `{near[0]}`?" if near else "")
    if error.validator == "type":
        return f"{where}: expected {error.validator_value}, not {type(error.instance).__name__}"
    if error.validator == "required":
        return f"{where}: {error.message}"
    return f"{where}: against Ray's rule {error.validator}: {error.validator_value!r}"


def describe(documents: list[Any], origin: str) -> str:
    """What a file that names no cluster seems to be, and what was expected."""
    return f"{origin}: is {_found(documents)}\n{EXPECTED}"


def _found(documents: list[Any]) -> str:
    if not documents:
        return "empty"
    if len(documents) > 1:
        return f"a file of {len(documents)} YAML documents, none of them Ray's"
    document = documents[0]
    if not isinstance(document, dict):
        return "a list" if isinstance(document, list) else "a single value"
    keys = {str(key) for key in document}
    if keys & {"compute_config", "image_uri", "containerfile"}:
        return "an Anyscale job, which `anyscale job submit` takes and epic-ray does not"
    if keys & {"model", "data"}:
        return "a run file: it says what to do, and --cluster where (epic-ray submit train RUN.yaml --cluster FILE)"
    if "apiVersion" in keys:
        return f"a Kubernetes {document.get('kind')} ({document['apiVersion']})"
    if "services" in keys:
        return "a compose file of containers"
    if keys & {"run", "setup"} and keys & {"resources", "num_nodes", "workdir"}:
        return "a SkyPilot task"
    for has, lacks in (("cluster_name", "provider"), ("provider", "cluster_name")):
        if has in keys:
            return f"a file of `ray up` without `{lacks}`"
    for key in keys:
        near = difflib.get_close_matches(key, ["address"], n=1, cutoff=0.7)
        if near:
            return f"an address file without `address`, with `{key}` instead"
    if keys & set(ADDRESS_KEYS):
        return "an address file without `address`"
    return "a mapping of " + ", ".join(sorted(keys)[:8]) + (", ..." if len(keys) > 8 else "")
