"""Finds the samples of one shard by its headers."""

import json
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from lgp_dist.data.shards.sizes import HEAD, dimensions
from lgp_dist.data.shards.tar import Member, TarError, read_at, walk

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
JSON_LABELS = ("label", "cls")
"""Fields of a .json that may hold the class number where there is no .cls."""
MAX_JSON, MAX_IMAGE = 1 << 20, 1 << 26
"""Largest .json that is read, and largest image that is read whole where its first bytes do not state its size."""
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
"""Key and extension, split as webdataset splits them: at the first dot of the last part."""
_META = re.compile(r"__[^/]*__($|/)")
"""Names that webdataset skips."""


@dataclass(frozen=True, slots=True)
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
    width: int = 0
    """Pixels as stored; 0 where unknown."""
    height: int = 0
    """Likewise."""
    crc: int = -1
    """CRC-32 of the image's bytes; -1 where unknown."""


@dataclass(frozen=True, slots=True)
class Flaw:
    """Something wrong in a shard."""

    key: str
    """Of the sample; empty where it is the shard itself."""
    sentence: str
    """Names shard and key and says what to do."""


def scan_shard(path: Path) -> tuple[list[Sample], list[Flaw]]:
    """All good samples of a tar in their order, without checksums, and what is wrong with the tar and with the others.

    Reads headers, labels and the first bytes of images. A label may be any whole number; the caller checks its range.
    At a damaged header the scan ends: what follows cannot be told from garbage.
    """
    groups: list[tuple[str, dict[str, list[Member]]]] = []  # key, and its files by extension
    flaws: list[Flaw] = []
    results: list[Sample | Flaw] = []
    seen: set[str] = set()
    try:
        with path.open("rb") as tar:
            try:
                for member in walk(tar, 0, os.fstat(tar.fileno()).st_size):
                    match = _NAME.fullmatch(member.name)
                    if not match or _META.match(member.name):
                        continue
                    key, extension = match[1], match[2].lower()
                    if not groups or groups[-1][0] != key:
                        if key in seen:
                            flaws.append(_duplicate(path, key))
                        seen.add(key)
                        groups.append((key, {}))
                    groups[-1][1].setdefault(extension, []).append(member)
            except TarError as error:
                flaws.append(Flaw("", f"Shard {path} is damaged or cut off ({error}): copy the file again."))
            results = [_sample(path, tar, key, files) for key, files in groups]
    except OSError as error:
        flaws.append(Flaw("", f"Shard {path} cannot be read ({error.strerror}): copy the file again."))
    flaws += [result for result in results if isinstance(result, Flaw)]
    return [result for result in results if isinstance(result, Sample)], flaws


def hash_shard(path: Path, samples: Iterable[Sample]) -> tuple[str, list[Sample]]:
    """sha256 of the whole tar, 64 hex digits, and the samples with their checksums, in one pass; raises OSError."""
    digest, found = sha256(), []
    with path.open("rb") as tar:
        for sample in samples:
            digest.update(tar.read(sample.offset - tar.tell()))
            content = tar.read(sample.size)
            digest.update(content)
            found.append(replace(sample, crc=zlib.crc32(content)))
        while chunk := tar.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest(), found


def _sample(path: Path, tar: BinaryIO, key: str, files: dict[str, list[Member]]) -> Sample | Flaw:
    """The sample of a key, or what it lacks."""
    images = [member for extension in IMAGE_EXTENSIONS for member in files.get(extension, [])]
    labels, objects = files.get("cls", []), [member for member in files.get("json", []) if member.size <= MAX_JSON]
    start, end = f"Shard {path}, sample {shown_key(key)}", "build or copy the shard again."
    if not images:
        return Flaw(key, f"{start}, has no image (.{', .'.join(IMAGE_EXTENSIONS)}): {end}")
    if len(images) > 1 or len(labels) > 1 or (len(objects) > 1 and not labels):
        return _duplicate(path, key)
    text = None
    if labels:
        text = read_at(tar, labels[0].offset, min(labels[0].size, 64)).decode("utf-8", "replace").strip()
    elif objects:
        text = _json_label(read_at(tar, objects[0].offset, objects[0].size))
    if text is None:
        return Flaw(key, f"{start}, has no label (.cls, or a .json with {' or '.join(JSON_LABELS)}): {end}")
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        return Flaw(key, f"{start}, has the label {shown_key(text[:40])!r}, which is no whole number: {end}")
    image = images[0]
    width, height = dimensions(read_at(tar, image.offset, min(image.size, HEAD)))
    if not width and HEAD < image.size <= MAX_IMAGE:
        width, height = dimensions(read_at(tar, image.offset, image.size))
    return Sample(key, image.offset, image.size, int(text), width, height)


def _json_label(content: bytes) -> str | None:
    """The label that a .json holds, as text, or None."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    values = [found[name] for name in JSON_LABELS if name in found] if isinstance(found, dict) else []
    return str(values[0]) if values and isinstance(values[0], int) else None


def _duplicate(path: Path, key: str) -> Flaw:
    return Flaw(
        key, f"Shard {path} has sample {shown_key(key)} more than once: build or copy the shard again with unique keys."
    )


def shown_key(key: str) -> str:
    """A key for a sentence: one line of printable characters."""
    return key if key.isprintable() and key.isascii() else ascii(key)[1:-1]
