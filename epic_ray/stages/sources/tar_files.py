"""Tar files (ustar, GNU, pax), read at their headers alone."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from epic_ray.errors import InputError

_BLOCK = 512
_FILES, _LINKS, _WITHOUT_DATA, _EXTENDED, _SPARSE = b"\x0007", b"12", b"123456", b"LKxXg", b"S"
_MOST_EXTENDED_BYTES, _LOOKED_AT_AFTER_THE_END, _PIECE_BYTES = 1 << 20, 1 << 20, 1 << 16


class ReadAt(Protocol):
    """A file that is readable at any place."""

    @property
    def size(self) -> int: ...

    def read_at(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset` on; fewer at the end alone."""


class Member(NamedTuple):
    """A file inside a tar file, and where its data lie."""

    name: str
    offset: int
    size: int


def members(file: ReadAt, where: str) -> Iterator[Member]:
    """The files inside a tar file (ustar, GNU, pax), in order, read from their headers alone.

    Raises InputError, naming `where`, for what is no whole tar file, and for links and files with holes in it.
    """
    offset, extended = 0, dict[str, bytes]()
    while any(header := file.read_at(offset, _BLOCK)):
        name, size, kind = _parse(header, offset, where)
        start = offset + _BLOCK
        if kind in _EXTENDED:
            body = file.read_at(start, size) if size <= _MOST_EXTENDED_BYTES else b""
            if len(body) < size:
                raise _damaged(where, offset)
            extended |= _extensions(kind, body, where, offset)
        else:
            if kind in _SPARSE or any(key.startswith("GNU.sparse") for key in extended):
                raise InputError(f"{where}: holds a file with holes at byte {offset}; pack it without --sparse")
            name, size = extended.get("path", name), int(extended.get("size", size))
            extended = {}
            if kind in _LINKS:
                advice = "pack the files themselves (tar --dereference --hard-dereference)"
                raise InputError(f"{where}: `{_decoded(name, where)}` is a link, which is not followed; {advice}")
            size = 0 if kind in _WITHOUT_DATA else size
            if start + size > file.size:
                raise _truncated(where, file.size)
            if kind in _FILES and not name.endswith(b"/"):
                yield Member(_decoded(name, where), start, size)
        offset = start + -(-size // _BLOCK) * _BLOCK
    if len(header) < _BLOCK:
        raise _truncated(where, file.size)
    _demand_the_end(file, offset + _BLOCK, where)


def _parse(header: bytes, offset: int, where: str) -> tuple[bytes, int, bytes]:
    """Name, size and kind of a header."""
    if len(header) < _BLOCK:
        raise _damaged(where, offset) if offset == 0 else _truncated(where, offset + len(header))
    try:
        told = _octal(header[148:156])
        if told != 256 + sum(header) - sum(header[148:156]):
            raise ValueError
        name = header[:100].partition(b"\0")[0]
        if header[257:263] == b"ustar\0" and header[345]:
            name = header[345:500].partition(b"\0")[0] + b"/" + name
        field = header[124:136]
        size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)
    except ValueError:
        raise _damaged(where, offset, header) from None
    return name, size, header[156:157]


def _octal(field: bytes) -> int:
    number = int(field.partition(b"\0")[0].strip() or b"0", 8)
    if number < 0:
        raise ValueError
    return number


def _extensions(kind: bytes, body: bytes, where: str, offset: int) -> dict[str, bytes]:
    """What a header of headers says of the next file: records `length key=value` (pax), or its long name (GNU)."""
    if kind == b"L":
        return {"path": body.partition(b"\0")[0]}
    found: dict[str, bytes] = {}
    try:
        while kind in b"xX" and body.rstrip(b"\0"):
            length = int(body.partition(b" ")[0])
            key, equals, value = body[:length].partition(b" ")[2].partition(b"=")
            if length <= 0 or not equals or not value.endswith(b"\n"):
                raise ValueError
            found[key.decode()] = value[:-1]
            body = body[length:]
        if not found.get("size", b"0").isdigit():
            raise ValueError
    except ValueError:
        raise _damaged(where, offset) from None
    return found


def _decoded(name: bytes, where: str) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise InputError(f"{where}: holds a name that is no UTF-8 ({name!r}); rename it and pack it anew") from None


def _demand_the_end(file: ReadAt, offset: int, where: str) -> None:
    """Raises InputError where anything follows the end mark, as in tar files written one after the other."""
    end = min(file.size, offset + _LOOKED_AT_AFTER_THE_END)
    while offset < end:
        if any(piece := file.read_at(offset, min(_PIECE_BYTES, end - offset))):
            raise InputError(
                f"{where}: goes on after its end mark at byte {offset}; were tar files joined by cat? join them by "
                "tar --concatenate, or keep them apart"
            )
        offset += len(piece)


def _truncated(where: str, size: int) -> InputError:
    return InputError(f"{where}: ends early, after {size} bytes and without its end mark; copy or pack it anew")


def _damaged(where: str, offset: int, header: bytes = b"") -> InputError:
    if offset == 0:
        advice = "unpack it with gunzip" if header.startswith(b"\x1f\x8b") else "copy or pack it anew"
        return InputError(f"{where}: is no tar file; {advice}")
    return InputError(f"{where}: is damaged: no header at byte {offset}; copy or pack it anew")
