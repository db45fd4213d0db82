"""Folders and files, on a disk or on an object store, and work on them in threads."""

import errno
import io
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
from pyarrow import fs

from epic_ray import storage
from epic_ray.errors import InputError

_REMOTE_THREADS, _LOCAL_THREADS = 16, 4
_here = threading.local()

Item = TypeVar("Item")
Result = TypeVar("Result")


class Entry(NamedTuple):
    """What a folder holds; size_bytes is None for folders, and for links to nothing and what is no regular file."""

    name: str
    is_folder: bool
    size_bytes: int | None


def list_folder(address: str) -> list[Entry]:
    """The entries of a folder but the hidden ones, sorted by name; links are followed.

    Raises FileNotFoundError, NotADirectoryError, StorageAway; InputError where it cannot be listed.
    """
    filesystem, path = storage.locate(address)
    try:
        if storage.is_local(filesystem):
            with os.scandir(path) as found:
                entries = [_local_entry(entry) for entry in found if not entry.name.startswith(".")]
        else:
            infos = patiently(address, lambda: filesystem.get_file_info(fs.FileSelector(path)))
            entries = [
                Entry(info.base_name, info.type == fs.FileType.Directory, info.size)
                for info in infos
                if not info.base_name.startswith(".")
            ]
    except (FileNotFoundError, NotADirectoryError, storage.StorageAway):
        raise
    except OSError as error:
        raise _unlisted(address, error) from error
    return sorted(entries)


def list_below(address: str) -> list[tuple[tuple[str, ...], int]]:
    """(Parts of the path, bytes) of all files below a folder of an object store but the hidden ones, sorted."""
    filesystem, path = storage.locate(address)
    selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
    try:
        infos = patiently(address, lambda: filesystem.get_file_info(selector))
    except storage.StorageAway:
        raise
    except OSError as error:
        raise _unlisted(address, error) from error
    files = ((info.path[len(path) + 1 :], info.size) for info in infos if info.type == fs.FileType.File)
    return sorted((tuple(file.split("/")), size) for file, size in files if not f"/{file}".count("/."))


def _unlisted(address: str, error: OSError) -> InputError:
    return InputError(f"{address}: cannot be listed ({error}); check the address and the rights")


def _local_entry(entry: os.DirEntry[str]) -> Entry:
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        where, name = os.path.dirname(entry.path), os.fsencode(entry.name)
        raise InputError(f"{where}: holds a name that is no UTF-8 ({name!r}); rename it") from None
    try:
        if entry.is_dir():
            return Entry(entry.name, True, None)
        status = entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES):
            return Entry(entry.name, False, None)
        raise
    return Entry(entry.name, False, status.st_size if stat.S_ISREG(status.st_mode) else None)


class LocalFile(io.FileIO):
    """A file of a disk, readable at any place. Raises OSError, as for a folder, a pipe or a device."""

    def __init__(self, path: str) -> None:
        # a pipe that nobody writes to would be waited for
        super().__init__(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
        status = os.fstat(self.fileno())
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise OSError("is no regular file")
        self.size = status.st_size

    def read_at(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset` on; fewer at the end alone."""
        data = os.pread(self.fileno(), count, offset)
        while len(data) < count and (more := os.pread(self.fileno(), count - len(data), offset + len(data))):
            data += more
        return data


class RemoteFile(io.RawIOBase):
    """A file of an object store, readable at any place, by several threads too; opened at the first use.

    Raises StorageAway when the store stays away, and OSError, as `storage.patiently` does.
    """

    def __init__(self, uri: str) -> None:
        super().__init__()
        self._uri, self._position = uri, 0
        self._lock = threading.Lock()
        self._opened: tuple[pa.NativeFile, int] | None = None

    def _open(self) -> tuple[pa.NativeFile, int]:
        with self._lock:
            if self._opened is None:
                filesystem, path = storage.locate(self._uri)
                file = patiently(self._uri, lambda: filesystem.open_input_file(path))
                self._opened = file, int(file.size())
            return self._opened

    @property
    def size(self) -> int:
        return self._open()[1]

    def read_at(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset` on; fewer at the end alone."""
        file, size = self._open()
        count = min(count, size - offset)
        return patiently(self._uri, lambda: file.read_at(count, offset)) if count > 0 else b""

    def read(self, size: int | None = -1) -> bytes:
        data = self.read_at(self._position, self.size if size is None or size < 0 else size)
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def open_file(uri: str) -> LocalFile | RemoteFile:
    """The file at an address, readable at any place. Raises OSError."""
    return RemoteFile(uri) if storage.is_uri(uri) else LocalFile(uri)


# --- threads


def threads_for(address: str) -> int:
    """How many requests to a place are worth having at once."""
    return _REMOTE_THREADS if storage.is_uri(address) else _LOCAL_THREADS


def patiently(address: str, call: Callable[[], Result]) -> Result:
    """`storage.patiently`, which a thread of `in_order` leaves once nobody waits for its result any more."""

    def attempt() -> Result:
        if (unwanted := getattr(_here, "unwanted", None)) and unwanted.is_set():
            raise CancelledError
        return call()

    return storage.patiently(storage.locate(address)[0], address, attempt)


def in_order(call: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """The results of `call` in the items' order, at most `threads` under way or held; its threads end with it."""
    window: deque[Future[Result]] = deque()
    unwanted = threading.Event()
    with ThreadPoolExecutor(threads, initializer=setattr, initargs=(_here, "unwanted", unwanted)) as pool:
        try:
            for item in items:
                window.append(pool.submit(call, item))
                if len(window) == threads:
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        finally:
            unwanted.set()
            for future in window:
                future.cancel()
