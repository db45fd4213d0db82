"""The usual forms of an image data set, each listed by a `Source`; `find_source` tells which one is at hand."""

import fnmatch
import glob
import posixpath
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pyarrow import fs

from epic_ray import storage
from epic_ray.config import DataConfig
from epic_ray.errors import InputError, RunFailed
from epic_ray.stages.sources.base import IMAGE_SUFFIXES, LISTED, Place, Shard, Source
from epic_ray.stages.sources.csv_file import CsvSource
from epic_ray.stages.sources.files import Entry, list_folder
from epic_ray.stages.sources.imagefolder import ImageFolderSource
from epic_ray.stages.sources.parquet import ParquetSource
from epic_ray.stages.sources.webdataset import WebDatasetSource

__all__ = ["IMAGE_SUFFIXES", "LISTED", "Source", "find_source"]

_SHARDED: dict[str, Callable[..., Source]] = {
    "parquet": ParquetSource,
    "webdataset": WebDatasetSource,
    "csv": CsvSource,
}
_SUFFIXES = {".parquet": "parquet", ".tar": "webdataset", ".csv": "csv", ".tsv": "csv"}
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
# the places that Hugging Face, WebDataset and CSV users give a split
_CUSTOMARY = ("{}.csv", "{}.tsv", "{}*.tar", "{}*.parquet", "data/{}*.parquet")
_SHOWN = 8


class _Found(NamedTuple):
    """The files at a place; `note` says where they were found if not there itself."""

    place: Place
    names: list[str]
    note: str = ""


def find_source(data: DataConfig, split: str) -> Source:
    """The images of a split, told from the settings and from what lies at its place: a folder, a file or a pattern.

    Raises InputError where nothing lies there, or several forms do; RunFailed for a store that stays away.
    """
    relative = posixpath.normpath(data.splits[split].strip("/"))
    place = Place(split, storage.resolve_root(data.root), "" if relative == "." else relative)
    try:
        return _find(data, place)
    except storage.StorageAway as error:
        raise RunFailed(str(error)) from error


def _find(data: DataConfig, place: Place) -> Source:
    kind = _kind(place)
    if kind == fs.FileType.Directory:
        return _in_folder(data, place)
    is_pattern = kind != fs.FileType.File and glob.has_magic(place.relative)
    found = _Found(place, list(_matches(place.root, place.relative)) if is_pattern else [place.relative])
    if not found.names or (kind == fs.FileType.NotFound and not is_pattern):
        found = _at_customary_places(place) if data.format == "auto" else _Found(place, [])
    if not found.names:
        raise _nothing(place)
    form = _form_of_files(found) if data.format == "auto" else data.format
    if form == "imagefolder":
        raise InputError(
            f"{place.where}: no such folder (split `{place.split}`), but {_some(found.names)}; name the folder that "
            "holds the class folders, or set data.format"
        )
    return _sharded(data, form, found)


def _in_folder(data: DataConfig, place: Place) -> Source:
    try:
        entries = list_folder(place.address)
    except (FileNotFoundError, NotADirectoryError):
        raise _nothing(place) from None
    form = _form_of_folder(place, entries) if data.format == "auto" else data.format
    if form == "imagefolder":
        return ImageFolderSource(data, place)
    names = [entry.name for entry in entries if not entry.is_folder and _form(entry.name) == form]
    if not names:
        suffixes = " or ".join(suffix for suffix, its in _SUFFIXES.items() if its == form)
        there = _some([entry.name for entry in entries]) if entries else "it is empty"
        raise InputError(
            f"{place.where}: holds no {suffixes} file (split `{place.split}`, data.format is {form}), but {there}; set "
            "data.format or data.splits"
        )
    return _sharded(data, form, _Found(place, [posixpath.join(place.relative, name) for name in names]))


def _sharded(data: DataConfig, form: str, found: _Found) -> Source:
    names = sorted(found.names, key=lambda name: name.split("/"))
    for name in names:
        if form == "webdataset" and name.lower().endswith(_PACKED):
            raise InputError(
                f"{storage.join(found.place.root, name)}: is compressed, and its images cannot be read at their "
                "places; unpack it to .tar (images hardly shrink by it)"
            )
    shards = _shards(found.place, names)
    return _SHARDED[form](data, found.place, shards, [found.note] if found.note else [])


def _shards(place: Place, names: list[str]) -> list[Shard]:
    uris = [storage.join(place.root, name) for name in names]
    filesystem, _ = storage.locate(place.root)
    paths = [storage.locate(uri)[1] for uri in uris]
    infos = _ask(place, lambda: filesystem.get_file_info(paths))
    return [
        Shard(name, uri, f"{info.size} {info.mtime_ns}") for name, uri, info in zip(names, uris, infos, strict=True)
    ]


# --- which form


def _form(name: str) -> str | None:
    """The form of a file with many images, by its suffix."""
    if name.lower().endswith(_PACKED):
        return "webdataset"
    return _SUFFIXES.get(posixpath.splitext(name)[1].lower())


def _form_of_files(found: _Found) -> str:
    """The one form of some files; `imagefolder` where they are none that hold many images."""
    forms = {_form(name) or "imagefolder" for name in found.names}
    if len(forms) > 1:
        raise InputError(
            f"{found.place.where}: matches files of several forms (split `{found.place.split}`): "
            f"{_some(found.names)}; set data.splits to a pattern that matches one"
        )
    return forms.pop()


def _form_of_folder(place: Place, entries: list[Entry]) -> str:
    """The one form of a folder's contents; CSV files beside images or shards only describe them."""
    folders = [entry.name for entry in entries if entry.is_folder]
    by_form: dict[str, list[str]] = {}
    for entry in entries:
        if not entry.is_folder:
            form = "imagefolder" if entry.name.lower().endswith(IMAGE_SUFFIXES) else _form(entry.name) or ""
            by_form.setdefault(form, []).append(entry.name)
    present = {form for form in by_form if form in ("parquet", "webdataset")}
    if folders or "imagefolder" in by_form:
        present.add("imagefolder")
    if len(present) > 1:
        there = [f"{len(folders)} folder(s), first {folders[0]}"] if folders else []
        there += [f"{len(names)} file(s) like {names[0]}" for form, names in by_form.items() if form in present]
        raise InputError(
            f"{place.where}: holds images in several forms (split `{place.split}`): {', '.join(there)}; set "
            f"data.format to one of {', '.join(sorted(present))}"
        )
    if present:
        return present.pop()
    return "csv" if "csv" in by_form else "imagefolder"


# --- what lies where


def _ask(place: Place, call: Callable[[], Any]) -> Any:
    filesystem, _ = storage.locate(place.root)
    try:
        return storage.patiently(filesystem, place.address, call)
    except storage.StorageAway:
        raise
    except OSError as error:
        raise InputError(f"{place.where}: cannot be looked at ({error}); check the address and the rights") from error


def _kind(place: Place) -> fs.FileType:
    filesystem, path = storage.locate(place.address)
    return _ask(place, lambda: filesystem.get_file_info(path)).type


def _at_customary_places(place: Place) -> _Found:
    for form in _CUSTOMARY:
        pattern = form.format(glob.escape(place.relative))
        names = list(_matches(place.root, pattern)) if place.relative else []
        if names:
            shown = form.format(place.relative)
            note = f"there is no `{place.relative}`; {shown} is taken: {len(names)} file(s), first {min(names)}"
            return _Found(place._replace(relative=shown), names, note)
    return _Found(place, [])


def _matches(root: str, pattern: str, folder: str = "") -> Iterator[str]:
    """The files below the root that match a pattern, part by part; hidden ones and folders do not."""
    part, slash, rest = pattern.partition("/")
    if slash and not glob.has_magic(part):
        yield from _matches(root, rest, posixpath.join(folder, part))
        return
    matches = re.compile(fnmatch.translate(part)).match
    try:
        entries = list_folder(storage.join(root, folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if matches(entry.name) and entry.is_folder == bool(slash):
            path = posixpath.join(folder, entry.name)
            if slash:
                yield from _matches(root, rest, path)
            else:
                yield path


def _nothing(place: Place) -> InputError:
    what = "files match" if glob.has_magic(place.relative) else "such folder"
    return InputError(
        f"{place.where}: no {what} (split `{place.split}`); {_there(place.root)}; set data.root or data.splits"
    )


def _there(root: str) -> str:
    try:
        entries = list_folder(root)
    except FileNotFoundError:
        return "the data set's root does not exist"
    except NotADirectoryError:
        return f"{root} is a file"
    folders = [entry.name for entry in entries if entry.is_folder]
    files = [entry.name for entry in entries if not entry.is_folder]
    there = f"folders there: {', '.join(folders[:_SHOWN])}" if folders else "the data set's root has no folders"
    return f"{there}; files there: {', '.join(files[:_SHOWN])}" if files else there


def _some(names: list[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"there is {', '.join(names[:3])}{more}"
