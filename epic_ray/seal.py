"""A digest inside each Parquet file: one changed byte anywhere in it is found, its footer's included.

Parquet's own checksums cover the pages alone, not the footer with its row counts, statistics and metadata. So between
the last page and the footer, where readers of Parquet do not look, lie a mark and the SHA-256 of all other bytes.
"""

import hashlib
import io
from typing import Any, BinaryIO

import pyarrow as pa

_MARK = b"EPICSEAL"
_DIGEST_BYTES = hashlib.sha256().digest_size
_END_BYTES = 8  # length of the footer, and Parquet's magic
_BLOCK_BYTES = 4 * 1024**2
_SEARCHED_BYTES = 1024**2  # from the end: far more than any footer of ours


class Sealing(io.RawIOBase):
    """A file for a Parquet writer, passing all on to `stream`: `hold` before the writer ends, `finish` after it."""

    def __init__(self, stream: pa.NativeFile) -> None:
        super().__init__()
        self._stream, self._digest = stream, hashlib.sha256()
        self._held: bytearray | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self._held is None:
            self._pass_on(data)
        else:
            self._held += data
        return len(data)

    def _pass_on(self, data: Any) -> None:
        self._digest.update(data)
        self._stream.write(data)

    def hold(self) -> None:
        """From here on the footer may come."""
        self._held = bytearray()

    def finish(self) -> None:
        held = bytes(self._held or b"")
        footer_bytes = int.from_bytes(held[-_END_BYTES : -_END_BYTES + 4], "little") + _END_BYTES
        self._pass_on(held[:-footer_bytes])
        self._pass_on(_MARK)
        self._digest.update(held[-footer_bytes:])
        self._stream.write(self._digest.digest())
        self._stream.write(held[-footer_bytes:])


def is_sealed(file: pa.NativeFile | BinaryIO) -> bool | None:
    """Whether a whole Parquet file is what was sealed: read to its end. None for one without a seal."""
    size = file.seek(0, io.SEEK_END)
    footer_bytes = int.from_bytes(_at(file, max(size - _END_BYTES, 0), 4), "little") + _END_BYTES
    place = size - footer_bytes - _DIGEST_BYTES - len(_MARK)
    found = _at(file, place, len(_MARK)) if place >= 0 else b""
    if found != _MARK:
        tail = _at(file, max(size - _SEARCHED_BYTES, 0), _SEARCHED_BYTES)
        # the mark itself, or the length that leads to it, is damaged
        alike = sum(mine == other for mine, other in zip(found, _MARK, strict=False)) >= len(_MARK) // 2
        return False if alike or _MARK in tail else None
    digest, end = hashlib.sha256(), place + len(_MARK)
    file.seek(0)
    while end and (block := file.read(min(_BLOCK_BYTES, end))):
        digest.update(block)
        end -= len(block)
    sealed = file.read(_DIGEST_BYTES)
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
    return bool(sealed == digest.digest())


def _at(file: pa.NativeFile | BinaryIO, place: int, count: int) -> bytes:
    file.seek(place)
    return bytes(file.read(count))
