"""A run as one file, for where the run folder cannot be seen from: written on the cluster, collected elsewhere.

An uncompressed tar. Its first member, `MANIFEST.json`, lists every other with size and SHA-256; its last holds the
manifest's own checksum. So an archive that was cut or altered on its way is told from a whole one.
"""

import hashlib
import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import epic_ray
from epic_ray.collection.check import COLLECTED, Finding, check_contents, check_standing, to_json
from epic_ray.collection.copying import (
    BLOCK_BYTES,
    CollectResult,
    FileFacts,
    Origin,
    begin,
    demand_apart,
    demand_equal,
    demand_replaceable,
    demand_unchanged,
    finish,
    list_files,
    local_path,
    refusal,
    write_copy,
)
from epic_ray.collection.staging import flush, put_in_place, staged, writing
from epic_ray.errors import ConfigError, InputError, ResultError
from epic_ray.logs import Reporter
from epic_ray.run_dir import RUN, RunDir

MANIFEST, MANIFEST_DIGEST = "MANIFEST.json", "MANIFEST.sha256"
_VERSION = 1
_UNKNOWN = "0" * 64  # as long as a digest: the manifest is written before its members are read, and once more after
_TAR_BLOCK, _TAR_RECORD = 512, 10_240
_READ_BYTES = 100 * _TAR_RECORD
_LONGEST_MANIFEST_BYTES = 1024**3


@dataclass(frozen=True)
class ArchiveFacts:
    """An archive: its files (without the manifest), its size, and why the run in it is half done."""

    path: Path
    files: int
    size_bytes: int
    whole: bool
    findings: tuple[str, ...]
    seconds: float


def write_archive(
    run_dir: RunDir,
    file: Path | str,
    *,
    everything: bool = False,
    partial: bool = False,
    reporter: Reporter | None = None,
) -> ArchiveFacts:
    """Writes what `collect` would copy of a run as one tar file, whole or not at all; reads each file of it once.

    Raises as `collect` does; a file there is replaced if it is an archive of a run.
    """
    start, target = time.monotonic(), local_path(file)
    demand_apart(run_dir, target)
    found = begin(run_dir, everything, partial)
    with staged(target) as staging:
        if target.exists() and not _is_archive(target):
            raise ConfigError(f"{target}: is there already and is no archive of a run; name another file")
        before = list_files(run_dir, everything)
        found += check_contents(run_dir, everything)
        if found and not partial:
            raise refusal(str(run_dir), found)
        left_out = {RUN, *(finding.file for finding in found if finding.damaged)} if found else set()
        texts = tuple(str(finding) for finding in found)
        values: dict[str, Any] = {
            "epic_ray_archive": _VERSION,
            "source": run_dir.root,
            "archived_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "epic_ray": epic_ray.__version__,
            "everything": everything,
            "whole": not found,
            "findings": texts,
            "files": {name: size for name, (size, _) in before.items() if name not in left_out},
        }
        made = staging / "run.tar"
        _write_tar(run_dir, made, values, reporter or Reporter())
        demand_unchanged(run_dir, everything, before)
        size_bytes = made.stat().st_size
        put_in_place(made, target)
    return ArchiveFacts(target, len(values["files"]), size_bytes, not found, texts, time.monotonic() - start)


def _write_tar(run_dir: RunDir, path: Path, values: dict[str, Any], reporter: Reporter) -> None:
    sizes: dict[str, int] = values["files"]
    facts = {name: FileFacts(size, _UNKNOWN) for name, size in sizes.items()}
    with writing(path):
        file = path.open("w+b")
    with file, reporter.stage("archive", len(sizes), "files") as meter:
        with writing(path):
            _add(file, MANIFEST, _manifest(values, facts))
        for name, size in sizes.items():
            with writing(path):
                file.write(_header(name, size))
            facts[name] = _append(run_dir, name, file, path)
            if facts[name].size_bytes != size:
                raise ResultError(f"{run_dir.show(name)}: changed while it was archived; run the command again")
            with writing(path):
                file.write(_padding(size))
            meter.advance()
        manifest = _manifest(values, facts)
        with writing(path):
            _add(file, MANIFEST_DIGEST, f"{hashlib.sha256(manifest).hexdigest()}\n".encode())
            file.write(bytes(2 * _TAR_BLOCK))
            file.write(bytes(-file.tell() % _TAR_RECORD))
            file.seek(0)
            _add(file, MANIFEST, manifest)
    with writing(path):
        flush(path)


def _manifest(values: dict[str, Any], facts: dict[str, FileFacts]) -> bytes:
    return to_json(values | {"files": {name: vars(found) for name, found in facts.items()}})


def _append(run_dir: RunDir, name: str, file: BinaryIO, path: Path) -> FileFacts:
    start = file.tell()

    def copy() -> FileFacts:
        digest = hashlib.sha256()
        file.seek(start)  # a store that was away for a while: from its beginning again
        with run_dir.filesystem.open_input_stream(run_dir.path(name), compression=None) as source:
            while block := source.read(BLOCK_BYTES):
                digest.update(block)
                with writing(path):
                    file.write(block)
        return FileFacts(file.tell() - start, digest.hexdigest())

    try:
        return run_dir.ask(name, copy)
    except FileNotFoundError:
        raise ResultError(f"{run_dir.show(name)}: vanished while it was archived; run the command again") from None


def _add(file: BinaryIO, name: str, content: bytes) -> None:
    file.write(_header(name, len(content)) + content + _padding(len(content)))


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _padding(size: int) -> bytes:
    return bytes(-size % _TAR_BLOCK)


def _is_archive(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return tarfile.TarInfo.frombuf(file.read(_TAR_BLOCK), "utf-8", "surrogateescape").name == MANIFEST
    except (OSError, tarfile.TarError):
        return False


# --- collecting an archive


def collect_archive(
    file: Path | str | BinaryIO,
    destination: Path | str,
    *,
    partial: bool = False,
    reporter: Reporter | None = None,
) -> CollectResult:
    """Collects a run from its archive, a file or a stream that is read once: proved, whole or not at all.

    Raises ResultError for an archive that is cut, altered, or of a half-done run (unless partial), ConfigError as
    `collect` does, InputError where there is no such file.
    """
    start, folder = time.monotonic(), local_path(destination)
    reporter = reporter or Reporter()
    with _opened(file) as (stream, name), staged(folder) as staging:
        replaced = demand_replaceable(folder)
        inner = staging / "run"
        with writing(inner):
            inner.mkdir()
        values, copied = _Unpacking(stream, name, inner, partial, reporter).run()
        local = RunDir(str(inner))
        found = tuple(Finding("archive", text) for text in values["findings"])
        found = found or tuple(check_standing(local))
        origin = Origin(values["source"], values["everything"], found, name)
        return finish(inner, folder, copied, origin, partial, replaced, start)


@contextmanager
def _opened(file: Path | str | BinaryIO) -> Iterator[tuple[BinaryIO, str]]:
    if not isinstance(file, Path | str):
        yield file, str(getattr(file, "name", "archive"))
        return
    try:
        stream = Path(file).expanduser().open("rb")
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error})") from None
    with stream:
        yield stream, str(file)


class _Counted(io.RawIOBase):
    """A stream that counts what was read of it."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream, self.count = stream, 0

    def read(self, size: int = -1) -> bytes:
        block = self._stream.read(size)
        self.count += len(block)
        return block


class _Unpacking:
    """One reading of an archive into a folder."""

    def __init__(self, stream: BinaryIO, name: str, inner: Path, partial: bool, reporter: Reporter) -> None:
        self._stream, self._name, self._inner = _Counted(stream), name, inner
        self._partial, self._reporter = partial, reporter

    def run(self) -> tuple[dict[str, Any], dict[str, FileFacts]]:
        """The manifest, and what was written."""
        try:
            with closing(tarfile.open(fileobj=self._stream, mode="r|", bufsize=_READ_BYTES)) as tar:
                return self._unpack(tar)
        except (tarfile.TarError, EOFError, UnicodeError) as error:
            raise self._altered(f"is no whole tar file ({error})") from None

    def _altered(self, what: str) -> ResultError:
        return ResultError(f"{self._name}: {what}; the archive was cut or altered, or is none: fetch it again")

    def _unpack(self, tar: tarfile.TarFile) -> tuple[dict[str, Any], dict[str, FileFacts]]:
        first = tar.next()
        if first is None or first.name != MANIFEST or first.size > _LONGEST_MANIFEST_BYTES:
            raise self._altered(f"does not begin with {MANIFEST}")
        content = self._read(tar, first)
        values, expected = self._parse(content)
        if values["findings"] and not self._partial:
            raise refusal(self._name, values["findings"])
        copied: dict[str, FileFacts] = {}
        with self._reporter.stage("collect", len(expected), "files") as meter:
            for name, facts in expected.items():
                copied[name] = self._extract(tar, name, facts)
                meter.advance()
        last = tar.next()
        if last is None or last.name != MANIFEST_DIGEST or last.size > _TAR_BLOCK:
            raise self._altered(f"does not end with {MANIFEST_DIGEST}")
        if self._read(tar, last) != f"{hashlib.sha256(content).hexdigest()}\n".encode():
            raise self._altered(f"{MANIFEST} is not what was written")
        if tar.next() is not None:
            raise self._altered("goes on after its last member")
        self._demand_end(last.offset_data + _TAR_BLOCK)
        return values, copied

    def _demand_end(self, end_of_members: int) -> None:
        while self._stream.read(BLOCK_BYTES):
            pass
        if self._stream.count % _TAR_RECORD or self._stream.count < end_of_members + 2 * _TAR_BLOCK:
            raise self._altered("lacks its end")

    def _parse(self, content: bytes) -> tuple[dict[str, Any], dict[str, FileFacts]]:
        try:
            values = json.loads(content)
            if values["epic_ray_archive"] != _VERSION:
                raise self._altered(f"is of version {values['epic_ray_archive']!r}, this epic-ray reads {_VERSION}")
            expected = {name: FileFacts(**facts) for name, facts in values["files"].items()}
            kinds = [(values["source"], str), (values["everything"], bool), (values["findings"], list)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._altered(f"{MANIFEST} cannot be read ({error!r})") from None
        if any(not isinstance(value, kind) for value, kind in kinds):
            raise self._altered(f"{MANIFEST} cannot be read")
        for name in expected:
            self._demand_inside(name)
        return values, expected

    def _demand_inside(self, name: str) -> None:
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts or str(path) != name or "\0" in name:
            raise self._altered(f"holds {name!r}, which is no path below the run")
        if name == COLLECTED:
            raise self._altered(f"holds {name!r}, which is no file of a run")

    def _member(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> Callable[[], bytes]:
        source = tar.extractfile(info) if info.isreg() else None
        if source is None:
            raise self._altered(f"{info.name!r} is no plain file")

        def read() -> bytes:
            return source.read(BLOCK_BYTES)

        return read

    def _read(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
        return b"".join(iter(self._member(tar, info), b""))

    def _extract(self, tar: tarfile.TarFile, name: str, facts: FileFacts) -> FileFacts:
        info = tar.next()
        if info is None or info.name != name:
            raise self._altered(
                f"{name!r} is missing" if info is None else f"holds {info.name!r} in the place of {name!r}"
            )
        if info.size != facts.size_bytes:
            raise self._altered(f"{name!r} has {info.size} bytes, {facts.size_bytes} are listed")
        target = self._inner / name
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        if write_copy(self._member(tar, info), target) != facts:
            raise self._altered(f"{name!r} is not what was written")
        demand_equal(target, facts)
        return facts
