"""Walks the headers of one tar and finds its samples."""

import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
BLOCK = 512
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
"""Key and extension, cut as webdataset cuts them: at the first dot of the last part."""


@dataclass(frozen=True)
class Sample:
    """Where an image lies in its tar, and its label."""

    key: str
    """Name without extension."""
    offset: int
    """First byte of the image in the tar."""
    size: int
    """Bytes of the image."""
    label: int
    """Content of the .cls file."""


@dataclass
class _Parts:
    """What was found of a sample so far."""

    images: list[tuple[int, int]] = field(default_factory=list)
    labels: list[bytes] = field(default_factory=list)


def scan_shard(path: Path) -> tuple[list[Sample], list[str]]:
    """All good samples of a tar in their order, and one sentence for each problem, which names shard and key.

    Reads headers and labels only. A label may be any whole number: its range is for the caller to judge.
    """
    groups: list[tuple[str, _Parts]] = []
    problems: list[str] = []
    seen: set[str] = set()
    try:
        with open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                match = _NAME.fullmatch(member.name)
                if not member.isreg() or member.issparse() or not match:
                    continue
                key, extension = match[1], match[2].lower()
                if not groups or groups[-1][0] != key:
                    if key in seen:
                        problems.append(_duplicate(path, key))
                    seen.add(key)
                    groups.append((key, _Parts()))
                if extension in IMAGE_EXTENSIONS:
                    groups[-1][1].images.append((member.offset_data, member.size))
                elif extension == "cls":
                    groups[-1][1].labels.append(_read(stream, member.offset_data, min(member.size, 64)))
            if not _ends(stream, tar.offset):
                problems.append(f"Shard {path} is damaged or cut off at byte {tar.offset}: copy the file again.")
    except (OSError, tarfile.TarError) as error:
        problems.append(f"Shard {path} cannot be read as an uncompressed tar ({error}): copy the file again.")
    results = [_sample(path, key, parts) for key, parts in groups]
    problems += [result for result in results if isinstance(result, str)]
    return [result for result in results if isinstance(result, Sample)], problems


def _sample(path: Path, key: str, parts: _Parts) -> Sample | str:
    """The sample, or the sentence that says what it lacks."""
    start, end = f"Shard {path}, sample {key}", "build or copy the shard again."
    if not parts.images:
        return f"{start}, has no image (.{', .'.join(IMAGE_EXTENSIONS)}): {end}"
    if not parts.labels:
        return f"{start}, has no label (.cls): {end}"
    if len(parts.images) > 1 or len(parts.labels) > 1:
        return _duplicate(path, key)
    text = parts.labels[0].decode("utf-8", "replace").strip()
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        return f"{start}, has the label '{text}', which is no whole number: {end}"
    offset, size = parts.images[0]
    return Sample(key, offset, size, int(text))


def _duplicate(path: Path, key: str) -> str:
    """The sentence for a key that comes twice."""
    return f"Shard {path} has sample {key} more than once: build or copy the shard again with unique keys."


def _read(stream: BinaryIO, offset: int, size: int) -> bytes:
    """Bytes of a small member; tarfile seeks before each header, so moving the position is harmless."""
    stream.seek(offset)
    return stream.read(size)


def _ends(stream: BinaryIO, offset: int) -> bool:
    """Whether the tar's end mark, a block of zeros, is where the headers end; tarfile stops silently without it."""
    return _read(stream, offset, BLOCK) == bytes(BLOCK)
