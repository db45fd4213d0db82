"""From settings to a classifier in memory, and what features depend on."""

import hashlib
import os
import sys
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import torch

from epic_ray.config import ModelConfig, read_class_names
from epic_ray.method.backbones import load_classifier
from epic_ray.method.classifier import SplitClassifier


def load(model: ModelConfig, precision: str = "float32") -> SplitClassifier:
    """The classifier of the settings, its split proved in float32. Raises InputError, ConfigError."""
    if model.source == "factory" and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not look where it is started; `python -m` does
    overrides = model.preprocessing.overrides() if model.preprocessing != "auto" else None
    classifier = load_classifier(
        model.architecture,
        source=model.source,
        weights=model.weights,
        class_count=model.class_count,
        class_names=read_class_names(model.classes),
        preprocessing=overrides,
        arguments=dict(model.arguments),
        seed=model.seed,
        tolerance=model.tolerance,
    )
    classifier.precision = precision
    return classifier


def model_facts(model: ModelConfig, classifier: SplitClassifier) -> dict[str, Any]:
    """What features depend on: settings, preprocessing as resolved, the weights' bytes, the libraries' versions."""
    libraries = {name: version(name) for name in ("torch", "torchvision", "timm", "pillow")}
    chosen = model.model_dump(mode="json", include={"architecture", "source", "arguments"})
    return chosen | {
        "weights": _digest(classifier),
        "preprocessing": classifier.preprocessing.to_dict(),
        "libraries": libraries,
    }


@lru_cache(maxsize=2)
def _digest(classifier: SplitClassifier) -> str:
    """A hash of every weight and buffer in memory, wherever they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(classifier.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
