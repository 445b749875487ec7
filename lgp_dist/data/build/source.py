"""A data set before it is built into shards: where each image lies, its key and its label."""

import importlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from types import ModuleType

from lgp_dist.data.shards.account import Account
from lgp_dist.data.shards.classes import class_numbers, wnid_of
from lgp_dist.data.shards.scan import IMAGE_EXTENSIONS
from lgp_dist.errors import UserError

MAX_KEY = 90
"""Longest key, bytes: with its extension it fits the 100 bytes of a plain tar header."""
IMAGE_SUFFIXES = frozenset(f".{extension}" for extension in IMAGE_EXTENSIONS)


@dataclass(frozen=True, slots=True)
class Item:
    """An image and its label."""

    key: str
    """Name in the shards, unique in its split."""
    label: int
    """Class number."""
    path: str
    """File that holds its bytes."""
    offset: int
    """First byte in that file."""
    size: int
    """Number of bytes."""


@dataclass(frozen=True)
class Source:
    """A data set."""

    name: str
    """Start of its shards' names."""
    splits: dict[str, list[Item]]
    """In an order that depends on names alone."""
    classes: tuple[str, ...] = ()
    """Names of labels 0, 1, ...; empty where they are not known."""
    origin: str = ""
    """Where the images come from."""
    licence: str = ""
    """Licence of the images."""
    texts: dict[str, str] = field(default_factory=dict)
    """Further files for the folder of shards, such as LICENSE."""


def clean_key(text: str) -> str:
    """A key from a file name without extension: no dot in its last part, one line, at most MAX_KEY bytes."""
    folder, slash, name = text.rpartition("/")
    plain = f"{folder}{slash}{name.replace('.', '_')}"
    plain = "".join("_" if unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn") or c == "\\" else c for c in plain)
    plain = re.sub(r"^__", "_", plain.strip().lstrip("/")) or "_"
    if len(plain.encode()) > MAX_KEY:
        digest = blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        plain = plain.encode()[: MAX_KEY - 17].decode("utf-8", "ignore") + "-" + digest
    return plain


def unique_keys(texts: Iterable[str]) -> list[str]:
    """clean_key of each name; where keys are equal, later ones get -2, -3, ..."""
    found: list[str] = []
    taken: set[str] = set()
    for text in texts:
        plain = key = clean_key(text)
        number = 1
        while key in taken:
            number += 1
            key = clean_key(f"{plain[: MAX_KEY - 8]}-{number}")
        taken.add(key)
        found.append(key)
    return found


def items_of(rows: Iterable[tuple[str, int, str, int, int]]) -> list[Item]:
    """Items of images with these names, labels, paths, offsets and sizes; the names become unique keys."""
    rows = list(rows)
    keys = unique_keys(name for name, *_ in rows)
    return [Item(key, *place) for key, (_, *place) in zip(keys, rows, strict=True)]


def optional(module: str, needed_for: str) -> ModuleType:
    """A module of the extra `imagenet`; the UserError for a missing one says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise UserError(
            f"{needed_for} needs the package {package}, which is not installed: `pip install {package}`,"
            " or install lgp_dist with the extra [imagenet]."
        ) from error


def want_folder(root: Path) -> None:
    """UserError unless root is a folder."""
    if not root.is_dir():
        raise UserError(f"There is no folder {root}: name the folder of the data set with --source.")


def reordered(source: Source, classes: tuple[str, ...], path: Path, account: Account) -> Source:
    """The source with its classes in the order of the file `path`; images of other classes go to the account.

    Where the source does not name its classes, the file names them. Raises UserError if no image is left.
    """
    if not source.classes:
        return replace(source, classes=classes)
    numbers, names, splits = class_numbers(classes), list(classes), dict[str, list[Item]]()
    new = [numbers.get(name, numbers.get(wnid_of(name), -1)) for name in source.classes]
    for old, number in enumerate(new):
        if number >= 0:
            names[number] = source.classes[old]
    for split, items in source.splits.items():
        kept = [replace(item, label=new[item.label]) for item in items if new[item.label] >= 0]
        account.leave(f"of split {split}, whose classes {path} does not name", "images", len(items) - len(kept))
        if kept:
            splits[split] = kept
    if not splits:
        raise UserError(f"{path} names no class of the source, such as {source.classes[0]}: give each class a line.")
    return replace(source, splits=splits, classes=tuple(names))
