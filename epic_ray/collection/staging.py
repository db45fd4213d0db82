"""A local folder or file that appears whole, in place of an earlier one or of none, whenever its maker is killed.

It is made in a hidden folder beside its place, under a lock that ends with its process, and renamed into place. What
the dead have left is removed by the next maker.
"""

import ctypes
import errno
import fcntl
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from epic_ray.errors import ConfigError, InputError, RunFailed

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_OLD = "old"


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` to make it in; gone at the end, with what is left in it.

    Raises ConfigError where another process makes the same target, InputError where the place is not writable.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        _clear_up(target)
        folder = target.with_name(f".{target.name}.collecting-{uuid.uuid4().hex[:8]}")
        try:
            with writing(folder):
                folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Faults of the local disk in the library's own kinds: RunFailed where it is full, InputError for others."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFailed(f"{path}: no space left ({error}); free some, or name another place") from error
        raise InputError(f"{path}: cannot be written ({error}); check rights and free space") from error


def put_in_place(made: Path, target: Path) -> None:
    """Renames a whole file or folder, made below `staged(target)`, into its place; all of it is flushed to disk.

    A folder that is there is exchanged in one step where the system can do that, else in two.
    """
    with writing(target):
        _flush_all(made)
        if not target.is_dir():
            os.rename(made, target)
        elif not exchange(made, target):
            os.rename(target, made.with_name(_OLD))  # killed here, the next maker brings it back
            os.rename(made, target)
        with suppress(OSError):  # it stands; not every network disk flushes folders
            flush(target.parent)


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush_all(made: Path) -> None:
    """Of a folder, the folders: its files are flushed by who wrote them."""
    for folder in [Path(path) for path, _, _ in os.walk(made)] or [made]:
        flush(folder)


def exchange(one: Path, other: Path) -> bool:
    """Gives two paths each other's content in one step; False where system or disk cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _clear_up(target: Path) -> None:
    """Removes what dead makers of this target have left; one that died between two renames is undone."""
    ours = re.compile(rf"\.{re.escape(target.name)}\.collecting-[0-9a-f]{{8}}")
    for left in [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]:
        if (left / _OLD).exists() and not target.exists():
            with writing(target):
                os.rename(left / _OLD, target)
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One process at a time makes a target. The lock is the kernel's, so it ends with its process."""
    path = target.with_name(f".{target.name}.collecting")
    while True:
        with writing(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with writing(path):
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ConfigError(
                        f"{target}: another process is writing it; wait for it, stop it, or name another place"
                    ) from None
            if not _is_at(handle, path):  # the one before has removed it meanwhile
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
