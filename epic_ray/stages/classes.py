"""From class folders, names and numbers in a data set to the classes of a classifier's head."""

import difflib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from epic_ray.errors import InputError

if TYPE_CHECKING:
    from epic_ray.method.classifier import SplitClassifier


class ClassNames:
    """The classes of a head: what each is called, and which folder holds its images."""

    def __init__(self, names: list[str], folders: list[str | None], origin: str) -> None:
        self.names, self.folders, self.origin = names, folders, origin
        once = {name for name, count in Counter(names).items() if count == 1}
        self._shared = set(names) - once
        self._index = {name: index for index, name in enumerate(names) if name in once}
        self._index |= {folder: index for index, folder in enumerate(folders) if folder is not None}

    @classmethod
    def of(cls, classifier: "SplitClassifier", folders: list[str], index_names: Sequence[str] = ()) -> "ClassNames":
        """From the head's own names; else, where there are as many folders as classes, from the sorted folders; else
        from the names that the images' source gives to as many class numbers.

        The second is the convention of torchvision's ImageFolder, with which such heads are trained.
        """
        from epic_ray.method.backbones import imagenet_wnids, wnid_names  # brings torch, which a decode task needs not

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
