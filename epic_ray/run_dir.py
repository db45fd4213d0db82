"""The run folder: every path of a run, the atomic publishing of files, and the marks of finished stages.

Committed output is the only truth. A file is written under a temporary name beside its place and renamed (on an object
store: one put, which is whole or absent); a stage's mark is published last. Nothing reads a temporary name.
"""

import errno
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from epic_ray.errors import ConfigError, InputError, ResultError, RunFailed
from epic_ray.storage import StorageAway, is_local, is_uri, join, last_name, locate, patiently, resolve_root

CONFIG, RUN = "config.yaml", "run.json"
BASIS, BASIS_CARD = "basis/basis.safetensors", "basis/README.md"
PICTURES = "pictures"
LOCKS = "locks"
UNIT_MAPS, CHOSEN_MAPS = "unit-", "chosen-"
_TEMPORARY = ".tmp-"
_BLOCK_BYTES = 16 * 1024**2
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

Result = TypeVar("Result")


def table_folder(table: str, split: str | None = None) -> str:
    return f"tables/{table}/{split}" if split else f"tables/{table}"


def table_file(table: str, split: str | None = None) -> str:
    return f"tables/{table}/{split}.parquet" if split else f"tables/{table}/{table}.parquet"


def unit_file(table: str, split: str, unit: int) -> str:
    return f"tables/{table}/{split}/unit-{unit:06d}.parquet"


def unit_number(relative: str) -> int | None:
    """The number of the unit that a file belongs to; None for a file that is no unit's."""
    found = re.search(r"/unit-(\d{6,})\.(?:parquet|arrow)$", relative)
    return int(found[1]) if found else None


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


def round_number(relative: str) -> int | None:
    """The number of the round that a file holds; None for any other file."""
    found = re.fullmatch(r"fit/round-(\d+)\.pt", relative)
    return int(found[1]) if found else None


def mark_file(stage: str) -> str:
    return f"marks/{stage}.json"


def attempts_folder(stage: str, split: str | None = None, unit: int = 0) -> str:
    return f"attempts/{stage}/{split}-{unit:06d}" if split else f"attempts/{stage}"


def attempt_file(stage: str, split: str, unit: int, name: str) -> str:
    return f"{attempts_folder(stage, split, unit)}/{name}"


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
        return last_name(self.root)

    @cached_property
    def _location(self) -> tuple[fs.FileSystem, str]:
        return locate(self.root)

    @property
    def filesystem(self) -> fs.FileSystem:
        return self._location[0]

    def path(self, relative: str) -> str:
        """The path of a file of the run within `filesystem`."""
        return f"{self._location[1].rstrip('/')}/{relative}"

    @property
    def is_local(self) -> bool:
        return is_local(self.filesystem)

    def show(self, relative: str) -> str:
        """The path as a person would type it."""
        return join(self.root, relative)

    def ask(self, relative: str, call: Callable[[], Result], done: str = "read") -> Result:
        """What a `call` on the filesystem gives, a store that is away waited for.

        Raises FileNotFoundError, InputError for what is not permitted, RunFailed where the store stays away.
        """
        where = self.show(relative)
        try:
            return patiently(self.filesystem, where, call)
        except FileNotFoundError:
            raise
        except StorageAway as error:
            raise RunFailed(str(error)) from error
        except OSError as error:
            raise InputError(f"{where}: cannot be {done} ({error}); check rights") from error

    # --- reading

    def _type(self, relative: str) -> fs.FileType:
        return self.ask(relative, lambda: self.filesystem.get_file_info(self.path(relative))).type

    def exists(self, relative: str) -> bool:
        return bool(self._type(relative) == fs.FileType.File)

    def list(self, folder: str) -> list[str]:
        """The published files of a folder and below, relative to the run, sorted; claims only where asked for."""
        selector = fs.FileSelector(self.path(folder), allow_not_found=True, recursive=True)
        infos = self.ask(folder, lambda: self.filesystem.get_file_info(selector))
        base = len(self.path(""))
        names = [info.path[base:] for info in infos if info.type == fs.FileType.File]
        if folder != LOCKS:
            names = [name for name in names if not name.startswith(f"{LOCKS}/")]
        return sorted(name for name in names if not name.rsplit("/", 1)[-1].startswith(_TEMPORARY))

    def open(self, relative: str) -> pa.NativeFile:
        """A published file, memory-mapped where the run is local. Raises ResultError if it is absent."""
        path = self.path(relative)
        try:
            return self.ask(
                relative, partial(pa.memory_map if self.is_local else self.filesystem.open_input_file, path)
            )
        except FileNotFoundError:
            raise ResultError(f"{self.show(relative)}: missing; run the stage that writes it again") from None

    def read_bytes(self, relative: str) -> bytes:
        def read() -> bytes:
            with self.open(relative) as file:
                return bytes(file.read())

        return self.ask(relative, read)

    def fetch(self, relative: str, path: Path) -> None:
        """Copies a published file to a local path. Raises as `open` does, and RunFailed where the disk is full."""

        def copy() -> None:
            with self.open(relative) as source, path.open("wb") as target:
                while block := source.read(_BLOCK_BYTES):
                    try:
                        target.write(block)
                    except OSError as error:  # of this disk, not of the store: nothing to wait for
                        raise RunFailed(f"{path}: cannot be written ({error}); free some space") from error

        self.ask(relative, copy)

    def read_json(self, relative: str) -> Any:
        try:
            return json.loads(self.read_bytes(relative))
        except ValueError as error:
            raise ResultError(f"{self.show(relative)}: is no JSON ({error}); remove it and run again") from None

    # --- publishing

    def publish(self, relative: str, write: Callable[[pa.NativeFile], None], durable: bool = True) -> int:
        """Writes a whole file or none; gives its size in bytes.

        A `durable` file on a local disk outlives a power cut. Raises InputError where the place is not writable,
        RunFailed where it is full or a store stays away.
        """
        where = self.show(relative)
        try:
            return self._write_and_rename(relative, write, durable) if self.is_local else self._put(relative, write)
        except StorageAway as error:
            raise RunFailed(str(error)) from error
        except OSError as error:
            if error.errno in _NO_SPACE:
                advice = "free some and start again; what is finished is kept"
                raise RunFailed(f"{where}: no space left ({error}); {advice}") from error
            raise InputError(f"{where}: cannot be written ({error}); check rights and free space") from error

    def _put(self, relative: str, write: Callable[[pa.NativeFile], None]) -> int:
        # closing a stream half-way would publish a torn object: the whole file is ready before the stream opens
        buffer = pa.BufferOutputStream()
        write(buffer)
        data = buffer.getvalue()

        def put() -> None:
            with self.filesystem.open_output_stream(self.path(relative)) as stream:
                stream.write(data)

        def put_in_thread() -> None:
            # no signal reaches a thread: an interrupt between opening and writing would publish an empty object
            with ThreadPoolExecutor(max_workers=1) as pool:
                pool.submit(put).result()

        patiently(self.filesystem, self.show(relative), put_in_thread)
        return len(data)

    def _write_and_rename(self, relative: str, write: Callable[[pa.NativeFile], None], durable: bool) -> int:
        final = Path(self.path(relative))
        temporary = final.with_name(f"{_TEMPORARY}{uuid.uuid4().hex[:8]}-{final.name}")
        self.filesystem.create_dir(str(final.parent), recursive=True)
        try:
            with self.filesystem.open_output_stream(str(temporary)) as stream:
                write(stream)
                size_bytes = int(stream.tell())
            if durable:
                _flush(temporary)
            self.filesystem.move(str(temporary), str(final))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            with suppress(OSError):  # the file stands; not every network disk flushes folders
                _flush(final.parent)
        return size_bytes

    def publish_bytes(self, relative: str, data: bytes) -> int:
        return self.publish(relative, lambda stream: stream.write(data) and None)

    def publish_json(self, relative: str, value: Any) -> int:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        return self.publish_bytes(relative, f"{text}\n".encode())

    # --- deleting

    def delete(self, relatives: Iterable[str]) -> None:
        """Deletes files; those that are already gone are no fault."""
        for relative in relatives:
            with suppress(FileNotFoundError):
                self.ask(relative, partial(self.filesystem.delete_file, self.path(relative)), "deleted")

    def delete_folder(self, folder: str) -> None:
        if self._type(folder) == fs.FileType.Directory:
            with suppress(FileNotFoundError):
                self.ask(folder, partial(self.filesystem.delete_dir, self.path(folder)), "deleted")

    def remove_temporaries(self) -> int:
        """Deletes what killed writers left in a local run, and gives how many files; only for who holds the run."""
        if not self.is_local:  # a store shows whole objects only
            return 0
        left = [file for file in Path(self.path("")).rglob(f"{_TEMPORARY}*") if file.parent.name != LOCKS]
        for file in left:
            self.ask(file.name, partial(file.unlink, missing_ok=True), "deleted")
        return len(left)

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
        self.delete([mark_file(stage)])


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_run(run: str | None, output_root: str) -> RunDir:
    """The run a command means: a folder, a URI, a name under `output_root`, or (None) the newest finished one there."""
    if run is not None:
        candidates = [RunDir(run)] if is_uri(run) or "/" in run else [RunDir(run), RunDir(join(output_root, run))]
        for candidate in candidates:
            if candidate.exists(CONFIG):
                return candidate
        raise ConfigError(
            f"{run}: no run there (a folder with {CONFIG}); `epic-ray train` makes one under {output_root}/"
        )
    filesystem, base = locate(resolve_root(output_root))
    selector = fs.FileSelector(base, allow_not_found=True)
    try:
        infos = patiently(filesystem, output_root, lambda: filesystem.get_file_info(selector))
    except StorageAway as error:
        raise RunFailed(str(error)) from error
    except OSError as error:
        raise ConfigError(
            f"{output_root}: cannot be searched for runs ({error}); name the folder that holds them"
        ) from None
    folders = [RunDir(join(output_root, info.base_name)) for info in infos if info.type == fs.FileType.Directory]
    finished = [(_finished_at(folder), folder.name, folder) for folder in folders if folder.exists(RUN)]
    if not finished:
        raise ConfigError(f"{output_root}: holds no finished run; `epic-ray train` makes one, or name the run's folder")
    return max(finished, key=lambda entry: entry[:2])[2]


def _finished_at(run_dir: RunDir) -> str:
    record = run_dir.read_json(RUN)
    if not isinstance(record, dict) or "finished_at" not in record:
        raise ResultError(f"{run_dir.show(RUN)}: is no record of a run; remove it, or name the run you mean")
    return str(record["finished_at"])
