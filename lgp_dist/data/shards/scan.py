"""Finds the samples of one shard by its headers."""

import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lgp_dist.data.shards.account import Account
from lgp_dist.data.shards.classes import class_numbers, wnid_of
from lgp_dist.data.shards.formats import mistaken
from lgp_dist.data.shards.sizes import HEAD, dimensions
from lgp_dist.data.shards.tar import Member, TarError, read_at, walk

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
JSON_LABELS = ("label", "cls")
"""Fields of a .json that may hold the class number where there is no .cls."""
MAX_LABEL, NAMED = 256, 4
"""Bytes of a label that are read, and members that a sentence names."""
MAX_JSON, MAX_IMAGE = 1 << 20, 1 << 26
"""Largest .json that is read, and largest image that is read whole where its first bytes do not state its size."""
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
"""Key and extension, split as webdataset splits them: at the first dot of the last part."""
_META = re.compile(r"__[^/]*__($|/)")
"""Names that webdataset skips."""


@dataclass(frozen=True)
class Reading:
    """Which members of a tar are images and labels."""

    image: str = ""
    """Ending of the image, as input.jpg; empty for the one of IMAGE_EXTENSIONS that is there."""
    label: str = ""
    """Ending of the label, or a field of .json; empty for cls or the fields JSON_LABELS."""
    classes: tuple[str, ...] = ()
    """Names of classes, which labels may be in place of their numbers."""


USUAL = Reading()


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


class _Scan(NamedTuple):
    """What all samples of a shard are read with."""

    reading: Reading
    numbers: dict[str, int]
    account: Account


class _Group(NamedTuple):
    """The members of a key."""

    key: str
    files: dict[str, list[Member]]
    """By extension, in lower case."""

    def dotted(self) -> list[tuple[str, str]]:
        """Extensions that have a dot, divided at the last one."""
        return [(stem, last) for stem, dot, last in (name.rpartition(".") for name in self.files) if dot]

    def members(self) -> str:
        """The first names, for a sentence, and where a dot seems to belong to the name, the rule that forbids it."""
        names = [shown_key(member.name) for members in self.files.values() for member in members]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        rule = "; a key ends at the first dot of a name, so write names without further dots" if self.dotted() else ""
        return f"its files are {', '.join(names[:NAMED])}{more}{rule}"


def scan_shard(path: Path, reading: Reading = USUAL, account: Account | None = None) -> tuple[list[Sample], list[Flaw]]:
    """All good samples of a tar in their order, without checksums, and what is wrong with the tar and with the others.

    Members that are neither images nor labels go to the account.

    Reads headers, labels and the first bytes of images. A label may be any whole number; the caller checks its range.
    At a damaged header the scan ends: what follows cannot be told from garbage.
    """
    groups: list[_Group] = []
    flaws: list[Flaw] = []
    results: list[Sample | Flaw] = []
    seen: set[str] = set()
    scan = _Scan(reading, class_numbers(reading.classes), account or Account(path.parent))
    try:
        with path.open("rb") as tar:
            try:
                for member in walk(tar, 0, os.fstat(tar.fileno()).st_size):
                    match = _NAME.fullmatch(member.name)
                    if not match or _META.match(member.name):
                        scan.account.leave("members that webdataset skips (no ending, or __name__)", member.name)
                        continue
                    key, extension = match[1], match[2].lower()
                    if not groups or groups[-1].key != key:
                        if key in seen:
                            flaws.append(_duplicate(path, key))
                        seen.add(key)
                        groups.append(_Group(key, {}))
                    groups[-1].files.setdefault(extension, []).append(member)
            except TarError as error:
                said = mistaken(path, "a tar") or f"{path} is damaged or cut off ({error}): copy the file again."
                flaws.append(Flaw("", f"Shard {said}"))
            results = [_sample(path, tar, group, scan) for group in groups]
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


def _sample(path: Path, tar: BinaryIO, group: _Group, scan: _Scan) -> Sample | Flaw:
    """The sample of a key, or what it lacks."""
    key, files, reading = group.key, group.files, scan.reading
    start = f"Shard {path}, sample {shown_key(key)}"
    endings = (reading.image.lower(),) if reading.image else IMAGE_EXTENSIONS
    images = [member for extension in endings for member in files.get(extension, [])]
    labels = files.get(reading.label.lower() or "cls", [])
    objects = [] if labels else [member for member in files.get("json", []) if member.size <= MAX_JSON]
    if not images:
        how = f"or name the ending of the image with --image{_example(files, IMAGE_EXTENSIONS)}."
        return Flaw(key, f"{start}, has no image (.{', .'.join(endings)}): {group.members()}, {how}")
    if not reading.image and {stem for stem, last in group.dotted() if last == "cls"} & {
        stem for stem, last in group.dotted() if last in IMAGE_EXTENSIONS
    }:
        return Flaw(key, f"{start}, holds several samples: {group.members()}, or name the image to take with --image.")
    if len(images) > 1 or len(labels) > 1 or len(objects) > 1:
        return _duplicate(path, key)
    label = _label(tar, start, group, labels, objects, scan)
    if isinstance(label, Flaw):
        return label
    image = images[0]
    for extension, members in files.items():
        for member in members:
            if member not in (image, *labels, *objects):
                scan.account.leave(f"members .{extension} of samples", member.name)
    width, height = dimensions(read_at(tar, image.offset, min(image.size, HEAD)))
    if not width and HEAD < image.size <= MAX_IMAGE:
        width, height = dimensions(read_at(tar, image.offset, image.size))
    return Sample(key, image.offset, image.size, label, width, height)


def _label(
    tar: BinaryIO, start: str, group: _Group, labels: list[Member], objects: list[Member], scan: _Scan
) -> int | Flaw:
    """The class number that a .cls says, or else a .json."""
    name, value, there = scan.reading.label, None, ""
    if labels:
        value = read_at(tar, labels[0].offset, min(labels[0].size, MAX_LABEL)).decode("utf-8", "replace").strip()
    elif objects:
        value, there = _json_label(read_at(tar, objects[0].offset, objects[0].size), (name,) if name else JSON_LABELS)
    if value is None:
        wanted = f".{name} or that field of .json" if name else f".cls, or a .json with {' or '.join(JSON_LABELS)}"
        how = f"name its ending, or the field of .json, with --label{_example(group.files, ('cls', 'txt'))}"
        said = f"{group.members()}{there}; {how}, or build the shard again."
        return Flaw(group.key, f"{start}, has no label ({wanted}): {said}")
    number = _number(value, scan.numbers)
    if number is None:
        shown = shown_key(value if isinstance(value, str) else json.dumps(value))[:40]
        known = f" and none of the {len(scan.reading.classes)} classes" if scan.numbers else ""
        how = "list the classes that labels name in a file, one a line, for --classes, or " * isinstance(value, str)
        said = f"the label {shown!r}, which is no whole number below 10^18{known}"
        return Flaw(group.key, f"{start}, has {said}: {how}build the shard again.")
    return number


def _example(files: Iterable[str], lasts: Sequence[str]) -> str:
    """A member's ending to put after an option, with a space before it; empty where none suits."""
    return next((f" {extension}" for extension in files if extension.rpartition(".")[2] in lasts), "")


def _json_label(content: bytes, fields: Sequence[str]) -> tuple[object, str]:
    """The first of some fields of a .json that is not null, or None; and the names of its fields, for a sentence."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None, ", and the .json is not valid"
    if not isinstance(found, dict):
        return None, ", and the .json has no fields"
    value = next((found[name] for name in fields if found.get(name) is not None), None)
    return value, f", and the .json has the fields {shown_key(', '.join(found))[:80]}"


def _number(value: object, numbers: Mapping[str, int]) -> int | None:
    """The class number that a label says: a whole number, also as text or as 3.0, or the name of a class."""
    if isinstance(value, float) and value.is_integer():
        value = f"{value:.0f}"
    text = str(value).strip() if isinstance(value, int | str) and not isinstance(value, bool) else ""
    if match := re.fullmatch(r"(-?[0-9]{1,18})(\.0*)?", text):
        return int(match[1])
    return numbers.get(text, numbers.get(wnid_of(text)))


def _duplicate(path: Path, key: str) -> Flaw:
    return Flaw(
        key, f"Shard {path} has sample {shown_key(key)} more than once: build or copy the shard again with unique keys."
    )


def shown_key(key: str) -> str:
    """A key for a sentence: one line of printable characters."""
    return key if key.isprintable() and key.isascii() else ascii(key)[1:-1]
