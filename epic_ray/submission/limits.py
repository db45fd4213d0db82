"""The most CPUs and GPUs that a cluster's autoscaler may bring, read from its file."""

import math
import re
from typing import Any

_RESOURCES = ("CPU", "GPU")
_LAUNCHER_MAX_WORKERS = 2  # Ray's own default
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|)")


def launcher_limits(document: dict[str, Any]) -> dict[str, float] | None:
    """Of a launcher file. A resource that some node type leaves to detection is unknown, and absent; None: all are.

    Raises nothing: the file has been checked against Ray's schema.
    """
    types: dict[str, Any] = document.get("available_node_types") or {}
    head, most = document.get("head_node_type"), document.get("max_workers", _LAUNCHER_MAX_WORKERS)
    if head not in types:
        return None
    brought = {name: int(kind.get("max_workers", 0 if name == head else most)) for name, kind in types.items()}
    limits = {}
    for resource in _RESOURCES:
        each = {
            name: kind.get("resources", {}).get(resource)
            for name, kind in types.items()
            if name == head or brought[name]
        }
        if all(isinstance(amount, int | float) for amount in each.values()):
            limits[resource] = float(each[head] + _best(each, brought, most))
    return limits or None


def _best(each: dict[str, Any], brought: dict[str, int], most: int) -> float:
    """The largest sum that `most` workers of these types can have."""
    total, left = 0.0, most
    for name in sorted(each, key=lambda name: -each[name]):
        count = min(brought[name], left)
        total, left = total + count * each[name], left - count
    return total


def kuberay_limits(spec: dict[str, Any]) -> dict[str, float] | None:
    """Of a RayCluster's spec: the head and every worker group at its most."""
    autoscaled = bool(spec.get("enableInTreeAutoscaling"))
    counted: list[tuple[dict[str, Any], int | None]] = [(spec.get("headGroupSpec") or {}, 1)]
    for group in spec.get("workerGroupSpecs") or []:
        replicas = group.get("maxReplicas") if autoscaled else group.get("replicas", group.get("minReplicas", 0))
        hosts = int(group.get("numOfHosts", 1))
        counted.append((group, None if replicas is None else int(replicas) * hosts))
    limits = {}
    for resource in _RESOURCES:
        amounts = [_pod(group, resource) for group, _ in counted]
        known = [
            0.0 if amount == 0 else None if amount is None or count is None else amount * count
            for amount, (_, count) in zip(amounts, counted, strict=True)
        ]
        if None not in known:
            limits[resource] = float(sum(amount for amount in known if amount is not None))
    return limits or None


def _pod(group: dict[str, Any], resource: str) -> float | None:
    """What KubeRay tells Ray of one pod: its start parameters, its group's resources, else its first container's."""
    stated = (group.get("rayStartParams") or {}).get("num-gpus" if resource == "GPU" else "num-cpus")
    stated = (group.get("resources") or {}).get(resource, stated)
    if stated is not None:
        return _quantity(stated)
    containers = ((group.get("template") or {}).get("spec") or {}).get("containers") or [{}]
    resources = containers[0].get("resources") or {}
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    if resource == "CPU":
        amount = _quantity(limits.get("cpu", requests.get("cpu")))
        return None if amount is None else math.ceil(amount)
    # a container without a GPU resource gets none
    return sum(_quantity(value) or 0.0 for key, value in limits.items() if key.endswith("gpu"))


def _quantity(value: Any) -> float | None:
    """A Kubernetes quantity of CPUs or GPUs: `4`, `"500m"`; None for what is no such quantity."""
    found = _QUANTITY.fullmatch(str(value).strip('"'))
    return float(found[1]) * {"m": 1e-3, "k": 1e3, "": 1.0}[found[2]] if found else None
