"""From settings to a classifier in memory, and from folder names to classes of its head."""

import difflib
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from epic_ray.config import ModelConfig, read_class_names
from epic_ray.errors import InputError
from epic_ray.method.backbones import imagenet_wnids, load_classifier, wnid_names
from epic_ray.method.classifier import SplitClassifier


def load(model: ModelConfig) -> SplitClassifier:
    """The classifier of the settings, its split proved. Raises InputError, ConfigError."""
    if model.source == "factory" and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not look where it is started; `python -m` does
    overrides = model.preprocessing.overrides() if model.preprocessing != "auto" else None
    return load_classifier(
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


class ClassNames:
    """The classes of a head: what each is called, and which folder holds its images."""

    def __init__(self, names: list[str], folders: list[str | None], origin: str) -> None:
        self.names, self.folders, self.origin = names, folders, origin
        once = {name for name, count in Counter(names).items() if count == 1}
        self._shared = set(names) - once
        self._index = {name: index for index, name in enumerate(names) if name in once}
        self._index |= {folder: index for index, folder in enumerate(folders) if folder is not None}

    @classmethod
    def of(cls, classifier: SplitClassifier, folders: list[str], index_names: Sequence[str] = ()) -> "ClassNames":
        """From the head's own names; else, where there are as many folders as classes, from the sorted folders; else
        from the names that the images' source gives to as many class numbers.

        The second is the convention of torchvision's ImageFolder, with which such heads are trained.
        """
        names, count = classifier.class_names, classifier.class_count
        english = wnid_names()
        if names is not None:
            wnids = imagenet_wnids()
            own = [name if name in english else None for name in names]
            if len(names) == len(wnids) and not any(own):
                own = list(wnids)
            return cls([english.get(name, name) for name in names], own, "the names of the head's classes")
        if len(folders) == count:
            named = [english.get(folder, folder) for folder in folders]
            return cls(named, list(folders), "the sorted class folders (the head has as many classes)")
        if len(index_names) == count:
            return cls(list(index_names), [None] * count, "the names of the labels in the data set")
        return cls([f"class {index}" for index in range(count)], [None] * count, "numbers: no names are known")

    def labels(self, rows: pa.Table, where: str) -> pa.Array:
        """The labels (int32, null where there is none) of listed images: by `class_name`, else by `class_index`.

        Raises InputError for a name or a number that is no class of the head.
        """
        names = rows["class_name"].combine_chunks().unique().drop_null()
        indices = pa.array([self.index_of(name, where) for name in names.to_pylist()], pa.int32())
        by_name = pc.take(indices, pc.index_in(rows["class_name"], value_set=names)) if len(names) else None
        given = rows["class_index"]
        numbers = pc.if_else(pc.equal(given, -1), None, given)  # the custom of data sets whose labels are kept back
        bounds = pc.min_max(numbers)
        low, high = bounds["min"].as_py(), bounds["max"].as_py()
        if high is not None and not 0 <= low <= high < len(self.names):
            raise InputError(
                f"{where}: labels go from {low} to {high}, but the head has {len(self.names)} classes, from 0 on; "
                "set data.label_column to another column, or data.labels=none"
            )
        labels = numbers if by_name is None else pc.coalesce(by_name, numbers)
        return labels.combine_chunks() if isinstance(labels, pa.ChunkedArray) else labels

    def index_of(self, folder: str, where: str) -> int:
        """The class of a folder. Raises InputError naming the folder where no class has that name."""
        if folder in self._index:
            return self._index[folder]
        if folder in self._shared:
            raise InputError(
                f"{where}: class `{folder}` could be any of {self.names.count(folder)} classes of that name; "
                "name it by its WordNet id, or give names that differ as model.classes"
            )
        near = difflib.get_close_matches(folder, [name for name in self._index if name], n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise InputError(
            f"{where}: class `{folder}` matches no class of the head ({len(self.names)} classes, "
            f"{self.origin}){hint}; give the head's names in order as model.classes, or set data.labels=none"
        )
