"""The run folder: every path of a run, the atomic publishing of files, and the marks of finished stages.

Committed output is the only truth. A file is written under a temporary name beside its place and renamed (on an object
store: one put, which is whole or absent); a stage's mark is published last. Nothing reads a temporary name.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pyarrow as pa
from pyarrow import fs

from epic_ray.errors import ConfigError, InputError, ResultError

CONFIG, RUN = "config.yaml", "run.json"
BASIS, BASIS_CARD = "basis/basis.safetensors", "basis/README.md"
PICTURES = "pictures"
UNIT_MAPS, CHOSEN_MAPS = "unit-", "chosen-"
_TEMPORARY = ".tmp-"


def table_folder(table: str, split: str | None = None) -> str:
    return f"tables/{table}/{split}" if split else f"tables/{table}"


def table_file(table: str, split: str | None = None) -> str:
    return f"tables/{table}/{split}.parquet" if split else f"tables/{table}/{table}.parquet"


def unit_file(table: str, split: str, unit: int) -> str:
    return f"tables/{table}/{split}/unit-{unit:06d}.parquet"


def map_folder(split: str) -> str:
    return f"maps/{split}"


def split_files(run_dir: "RunDir", split: str) -> list[str]:
    """Every file of a run that belongs to one split alone."""
    found = []
    for file in run_dir.list("tables") + run_dir.list("maps") + run_dir.list(PICTURES):
        place = file.split("/")[2 if file.startswith("tables/") else 1]
        if place in (split, f"{split}.parquet"):
            found.append(file)
    return found


def unit_map_file(split: str, unit: int) -> str:
    return f"{map_folder(split)}/{UNIT_MAPS}{unit:06d}.arrow"


def chosen_map_file(split: str, key: str) -> str:
    return f"{map_folder(split)}/{CHOSEN_MAPS}{key}.arrow"


def round_file(number: int) -> str:
    return f"fit/round-{number:03d}.pt"


def mark_file(stage: str) -> str:
    return f"marks/{stage}.json"


def resolve_root(root: str) -> str:
    """An absolute path or URI for a path, `~` expanded; URIs stay as they are."""
    if root.startswith("file://"):
        root = unquote(urlparse(root).path)
    return root if is_uri(root) else str(Path(root).expanduser().absolute())


def is_uri(path: str) -> bool:
    return len(urlparse(path).scheme) > 1


def open_filesystem(root: str) -> tuple[fs.FileSystem, str]:
    """pyarrow's filesystem for a path or URI, and the path within it. Raises InputError for an unknown scheme."""
    try:
        filesystem, path = fs.FileSystem.from_uri(root if is_uri(root) else Path(root).as_uri())
        return filesystem, path
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{root}: no filesystem for this address ({error}); use a path, s3:// or gs://") from None


class RunDir:
    """A run folder at a local path, a shared path or an object-store URI. Cheap to send to other processes."""

    def __init__(self, root: str) -> None:
        self.root = resolve_root(root)

    def __reduce__(self) -> tuple[type["RunDir"], tuple[str]]:
        return RunDir, (self.root,)

    def __str__(self) -> str:
        return self.root

    @property
    def name(self) -> str:
        return self.root.rstrip("/").rsplit("/", 1)[-1]

    @cached_property
    def _location(self) -> tuple[fs.FileSystem, str]:
        return open_filesystem(self.root)

    @property
    def filesystem(self) -> fs.FileSystem:
        return self._location[0]

    def path(self, relative: str) -> str:
        """The path of a file of the run within `filesystem`."""
        return f"{self._location[1].rstrip('/')}/{relative}"

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def show(self, relative: str) -> str:
        """The path as a person would type it."""
        return f"{self.root.rstrip('/')}/{relative}"

    # --- reading

    def exists(self, relative: str) -> bool:
        return bool(self.filesystem.get_file_info(self.path(relative)).type == fs.FileType.File)

    def list(self, folder: str) -> list[str]:
        """The published files of a folder and below, relative to the run, sorted."""
        selector = fs.FileSelector(self.path(folder), allow_not_found=True, recursive=True)
        base = len(self.path(""))
        names = (info.path[base:] for info in self.filesystem.get_file_info(selector) if info.type == fs.FileType.File)
        return sorted(name for name in names if not name.rsplit("/", 1)[-1].startswith(_TEMPORARY))

    def open(self, relative: str) -> pa.NativeFile:
        """A published file, memory-mapped where the run is local. Raises ResultError if it is absent."""
        try:
            if self.is_local:
                return pa.memory_map(self.path(relative))
            return self.filesystem.open_input_file(self.path(relative))
        except FileNotFoundError:
            raise ResultError(f"{self.show(relative)}: missing; run the stage that writes it again") from None

    def read_bytes(self, relative: str) -> bytes:
        with self.open(relative) as file:
            return bytes(file.read())

    def read_json(self, relative: str) -> Any:
        try:
            return json.loads(self.read_bytes(relative))
        except ValueError as error:
            raise ResultError(f"{self.show(relative)}: is no JSON ({error}); remove it and run again") from None

    # --- publishing

    def publish(self, relative: str, write: Callable[[pa.NativeFile], None]) -> int:
        """Writes a whole file or none; gives its size in bytes. Raises InputError where the place is not writable."""
        final = self.path(relative)
        folder, name = final.rsplit("/", 1)
        try:
            if not self.is_local:
                return self._put(final, write)
            self.filesystem.create_dir(folder, recursive=True)
            return self._write_and_rename(f"{folder}/{_TEMPORARY}{uuid.uuid4().hex[:8]}-{name}", final, write)
        except OSError as error:
            where = self.show(relative)
            raise InputError(f"{where}: cannot be written ({error}); check rights and free space") from error

    def _put(self, final: str, write: Callable[[pa.NativeFile], None]) -> int:
        # closing a stream half-way would publish a torn object: the whole file is ready before the stream opens
        buffer = pa.BufferOutputStream()
        write(buffer)
        data = buffer.getvalue()
        with self.filesystem.open_output_stream(final) as stream:
            stream.write(data)
        return len(data)

    def _write_and_rename(self, temporary: str, final: str, write: Callable[[pa.NativeFile], None]) -> int:
        try:
            with self.filesystem.open_output_stream(temporary) as stream:
                write(stream)
                size_bytes = int(stream.tell())
            self.filesystem.move(temporary, final)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return size_bytes

    def publish_bytes(self, relative: str, data: bytes) -> int:
        return self.publish(relative, lambda stream: stream.write(data) and None)

    def publish_json(self, relative: str, value: Any) -> int:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        return self.publish_bytes(relative, f"{text}\n".encode())

    def delete(self, relatives: Iterable[str]) -> None:
        for relative in relatives:
            self.filesystem.delete_file(self.path(relative))

    def delete_folder(self, folder: str) -> None:
        if self.filesystem.get_file_info(self.path(folder)).type == fs.FileType.Directory:
            self.filesystem.delete_dir(self.path(folder))

    # --- marks

    def read_mark(self, stage: str) -> dict[str, Any] | None:
        """The mark of a finished stage, or None."""
        return self.read_json(mark_file(stage)) if self.exists(mark_file(stage)) else None

    def write_mark(self, stage: str, fingerprint: str, seconds: float, **facts: Any) -> dict[str, Any]:
        """Declares a stage done, last of all: what it was made from, how long it took, and its figures."""
        finished_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        mark = {"stage": stage, "fingerprint": fingerprint, "seconds": round(seconds, 3), "finished_at": finished_at}
        self.publish_json(mark_file(stage), mark | facts)
        return mark | facts

    def drop_mark(self, stage: str) -> None:
        if self.exists(mark_file(stage)):
            self.delete([mark_file(stage)])


def find_run(run: str | None, output_root: str) -> RunDir:
    """The run a command means: a folder, a URI, a name under `output_root`, or (None) the newest finished one there."""
    if run is not None:
        candidates = [RunDir(run)] if is_uri(run) or "/" in run else [RunDir(run), RunDir(f"{output_root}/{run}")]
        for candidate in candidates:
            if candidate.exists(CONFIG):
                return candidate
        raise ConfigError(
            f"{run}: no run there (a folder with {CONFIG}); `epic-ray train` makes one under {output_root}/"
        )
    filesystem, base = open_filesystem(resolve_root(output_root))
    try:
        infos = filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True))
    except OSError as error:
        raise ConfigError(
            f"{output_root}: cannot be searched for runs ({error}); name the folder that holds them"
        ) from None
    folders = [RunDir(f"{output_root}/{info.base_name}") for info in infos if info.type == fs.FileType.Directory]
    finished = [(_finished_at(folder), folder.name, folder) for folder in folders if folder.exists(RUN)]
    if not finished:
        raise ConfigError(f"{output_root}: holds no finished run; `epic-ray train` makes one, or name the run's folder")
    return max(finished, key=lambda entry: entry[:2])[2]


def _finished_at(run_dir: RunDir) -> str:
    record = run_dir.read_json(RUN)
    if not isinstance(record, dict) or "finished_at" not in record:
        raise ResultError(f"{run_dir.show(RUN)}: is no record of a run; remove it, or name the run you mean")
    return str(record["finished_at"])
