"""Addresses and filesystems: local paths and object stores alike, and patience with a store that is away."""

import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlparse

import pyarrow as pa
from pyarrow import fs

from epic_ray import interrupts
from epic_ray.errors import ConfigError, InputError

PATIENCE_VARIABLE = "EPIC_RAY_PATIENCE_SECONDS"
_PATIENCE_SECONDS = 120.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 8.0
# what a store says for good: waiting changes nothing
_FINAL = (
    "ACCESS_DENIED",
    "NO_SUCH_BUCKET",
    "INVALID_ACCESS_KEY",
    "SIGNATURE_DOES_NOT_MATCH",
    "EXPIRED_TOKEN",
    "HTTP status 403",
)

Result = TypeVar("Result")


class StorageAway(OSError):
    """A store that could not be reached for as long as we wait; says nothing about the file that was asked for."""


def is_uri(path: str) -> bool:
    return len(urlparse(path).scheme) > 1


def resolve_root(root: str) -> str:
    """An absolute path or URI for a path, `~` expanded; URIs stay as they are. Raises ConfigError for credentials."""
    if root.startswith("file://"):
        root = unquote(urlparse(root).path)
    if not is_uri(root):
        return str(Path(root).expanduser().absolute())
    parts = urlparse(root)
    if parts.password is not None or (parts.scheme == "s3" and "@" in parts.netloc):
        shown = root.replace(urlparse(root).netloc.rsplit("@", 1)[0], "...")
        raise ConfigError(
            f"{shown}: holds credentials, and addresses are written into the run; give them in the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or in the store's own configuration file"
        )
    return root


def join(root: str, *parts: str) -> str:
    """The address of a path below another; signs with a meaning in a URI are escaped, and its `?...` stays last."""
    inner = [part.strip("/") for part in parts if part.strip("/") not in ("", ".")]
    if not is_uri(root):
        return "/".join([root.rstrip("/"), *inner]) or "/"
    base, mark, query = root.partition("?")
    escaped = [part.replace("%", "%25").replace("?", "%3F").replace("#", "%23") for part in inner]
    return "/".join([base.rstrip("/"), *escaped]) + mark + query


def last_name(root: str) -> str:
    """The last part of an address."""
    if not is_uri(root):
        return root.rstrip("/").rsplit("/", 1)[-1]
    return unquote(root.partition("?")[0].rstrip("/").rsplit("/", 1)[-1])


def open_filesystem(root: str) -> tuple[fs.FileSystem, str]:
    """pyarrow's filesystem for a path or URI, and the path within it. Raises InputError for an unknown scheme."""
    try:
        filesystem, path = fs.FileSystem.from_uri(root if is_uri(root) else Path(root).as_uri())
        return filesystem, path
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{root}: no filesystem for this address ({error}); use a path, s3:// or gs://") from None


def locate(uri: str) -> tuple[fs.FileSystem, str]:
    """`open_filesystem` for many addresses of one store: its client is made once a process."""
    if not is_uri(uri):
        return _local(), uri
    base, mark, query = uri.partition("?")
    scheme, rest = base.split("://", 1)
    bucket, _, _ = rest.partition("/")
    filesystem, place = _store(f"{scheme}://{bucket}{mark}{query}")
    return filesystem, place + unquote(rest[len(bucket) :])


@lru_cache(maxsize=1)
def _local() -> fs.FileSystem:
    return fs.LocalFileSystem()


@lru_cache(maxsize=64)
def _store(bucket: str) -> tuple[fs.FileSystem, str]:
    filesystem, place = open_filesystem(bucket)
    return filesystem, place.rstrip("/")


def is_local(filesystem: fs.FileSystem) -> bool:
    return isinstance(filesystem, fs.LocalFileSystem)


def patience_seconds() -> float:
    """How long a store may be away before the work fails."""
    return float(os.environ.get(PATIENCE_VARIABLE, _PATIENCE_SECONDS))


def patiently(filesystem: fs.FileSystem, what: str, call: Callable[[], Result]) -> Result:
    """The result of `call`, tried again while an object store is away.

    Raises at once what is final (an absent file, missing rights, any fault of a local disk), and StorageAway, naming
    `what`, when the store did not answer within `patience_seconds()`.
    """
    if is_local(filesystem):
        return call()
    end, pause = time.monotonic() + patience_seconds(), _FIRST_PAUSE_SECONDS
    while True:
        interrupts.check()  # also of a thread, which no signal reaches
        try:
            return call()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError):
            raise
        except OSError as error:
            if any(word in str(error) for word in _FINAL):
                raise
            if time.monotonic() + pause > end:
                waited = f"the store did not answer for {patience_seconds():.0f} s"
                raise StorageAway(f"{what}: {waited} ({error}); start again when it does") from error
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
