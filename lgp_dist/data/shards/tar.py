"""Walks the headers of an uncompressed tar, strictly: a bad header ends the walk with an error.

tarfile reads each header and checks its sum, but its own walk silently stops at a bad header after the first, and
follows any size. This walk stays inside the file, always moves forward, and allows only zeros after the end mark.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, TypedDict

BLOCK = 512
MAX_EXTENSION = 1 << 20
"""Largest long name or extended header that is read."""
_NO_DATA = frozenset(b"123456")
_PAX_RECORD = re.compile(rb"(\d{1,20}) ([^=]{1,200})=")
_ZEROS = bytes(BLOCK)


class TarError(ValueError):
    """What is wrong with a tar, and at which byte; the text is a clause without a full stop."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar."""

    name: str
    """As stored, with surrogates for bytes that are not UTF-8."""
    offset: int
    """First byte of its content."""
    size: int
    """Bytes of its content."""


class _Extended(TypedDict, total=False):
    """What a long name or an extended header says of the next file."""

    path: str
    size: int


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`, fewer at the end of the file; raises OSError."""
    file.seek(offset)
    return file.read(size)


def walk(file: BinaryIO, start: int, end: int) -> Iterator[Member]:
    """Regular files of the tar that fills bytes start .. end of a file, in order; raises TarError where it is wrong."""
    position = start
    extended = _Extended()
    while position + BLOCK <= end:
        header = read_at(file, position, BLOCK)
        if header == _ZEROS:
            _check_tail(file, position, end)
            return
        info = _parse(header, position)
        kind, offset = header[156], position + BLOCK
        if kind in b"xgLKS":
            content = _extension(file, kind, offset, info.size, end)
            position = offset + _padded(info.size)
            extended = extended | _extended(kind, content, offset)
            continue
        size, name = extended.get("size", info.size), extended.get("path", info.name)
        if kind not in _NO_DATA:
            if offset + size > end:
                raise TarError(f"it ends at byte {end} but a file in it, {_shown(name)}, goes on to {offset + size}")
            position = offset + _padded(size)
        else:
            position = offset
        if info.isreg() and not name.endswith("/"):
            yield Member(name, offset, size)
        extended = _Extended()
    raise TarError(f"it is cut off at byte {end}, before its end mark")


def _parse(header: bytes, position: int) -> tarfile.TarInfo:
    """A header whose checksum is right."""
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        found = None
    if found is None or found.size < 0:
        raise TarError(f"the header at byte {position} is damaged")
    return found


def _extension(file: BinaryIO, kind: int, offset: int, size: int, end: int) -> bytes:
    """Content of a long name or of an extended header."""
    if kind == ord("S"):
        raise TarError(f"it has a sparse file at byte {offset - BLOCK}")
    if size > MAX_EXTENSION or offset + size > end:
        raise TarError(f"the extended header at byte {offset - BLOCK} says that it has {size} bytes")
    return read_at(file, offset, size)


def _extended(kind: int, content: bytes, offset: int) -> "_Extended":
    """Content of a long name or an extended header."""
    if kind == ord("L"):
        return {"path": content.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    found = _Extended()
    position = 0
    while kind != ord("K") and position < len(content) and content[position]:
        match = _PAX_RECORD.match(content, position)
        length = int(match[1]) if match else 0
        if not match or position + length > len(content) or length <= match.end() - position:
            raise TarError(f"the extended header before byte {offset} is damaged")
        key, value = match[2], content[match.end() : position + length - 1]
        position += length
        if key.startswith(b"GNU.sparse"):
            raise TarError(f"it has a sparse file at byte {offset - BLOCK}")
        if key in (b"path", b"size") and kind == ord("g"):
            raise TarError(f"the header at byte {offset - BLOCK} gives one {key.decode()} to all files")
        if key == b"path":
            found["path"] = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            if not value.isdigit() or len(value) > 19:
                raise TarError(f"the extended header before byte {offset} is damaged")
            found["size"] = int(value)
    return found


def _check_tail(file: BinaryIO, position: int, end: int) -> None:
    """Raises TarError if anything but zeros follows the end mark."""
    while position < end:
        chunk = read_at(file, position, min(end - position, 1 << 20))
        if not chunk or chunk.strip(b"\0"):
            raise TarError(f"something follows its end mark at byte {position}")
        position += len(chunk)


def _padded(size: int) -> int:
    """Size of a content with its padding."""
    return -(-size // BLOCK) * BLOCK


def _shown(name: str) -> str:
    """A name for a sentence, whatever is in it."""
    return ascii(name if len(name) <= 80 else name[:77] + "...")
