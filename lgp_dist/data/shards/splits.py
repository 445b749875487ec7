"""The names of splits: of folders, shards and parquet files alike."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from lgp_dist.errors import UserError

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
}
"""Word in a name, in any case -> split."""
KNOWN = "train, training; val, valid, validation, dev; test, testing, eval"
_KEPT = {"train", "val", "validation", "test"}
"""Words that are a split's name in the manifest of shards from elsewhere."""
_FILLERS = {"", "set", "data", "images", "split"}
MOST = 1_000_000
"""Most files of a split that are counted by number: above it, numbers are something else, such as dates."""
_WORD = f"({'|'.join(sorted(SPLITS, key=len, reverse=True))})"
_NUMBER = r"[-_](\d+)(?:[-_]of[-_](\d+))?"
_TAR = re.compile(rf"(.*[-_.])?{_WORD}{_NUMBER}\.tar", re.IGNORECASE)
_PARQUET = re.compile(rf"(.*?[-_.])??{_WORD}(?:{_NUMBER})?(?:[-_.].*)?\.parquet", re.IGNORECASE)


class SplitFile(NamedTuple):
    """What the name of a shard or parquet file says."""

    prefix: str
    """What precedes the split, without separator."""
    word: str
    """The word that names the split, in lower case."""
    split: str
    number: int | None
    total: int | None
    """N of `-of-N`, the number of files of the split."""


def split_of(name: str) -> str:
    """The split that a folder's name says, as Training, val_ or test-set do; empty for any other name."""
    words = [word for word in re.split(r"[\W_]+", name.casefold()) if word not in _FILLERS]
    return SPLITS.get(words[0], "") if len(words) == 1 else ""


def tar_name(name: str) -> SplitFile | None:
    """What the name of a shard says, as in timm's imagenet1k-train-0000.tar; None for any other name."""
    match = _TAR.fullmatch(name)
    if not match:
        return None
    split = match[2] if match[2] in _KEPT else SPLITS[match[2].lower()]
    return _parts(match, split)


def parquet_name(name: str, folder: str) -> SplitFile | None:
    """What the name of a parquet file says, or else that of its folder; None if neither names a split."""
    match = _PARQUET.fullmatch(name)
    if match:
        return _parts(match, SPLITS[match[2].lower()])
    split = split_of(folder)
    return SplitFile("", folder.casefold(), split, None, None) if split else None


def _parts(match: re.Match[str], split: str) -> SplitFile:
    number, total = (int(text) if text else None for text in match.groups()[2:4])
    return SplitFile((match[1] or "").rstrip("-_."), match[2].lower(), split, number, total)


def check_words(root: Path, words: Mapping[str, str]) -> None:
    """UserError where two words name one split, as val and dev do. words: file or folder -> its word."""
    seen: dict[str, str] = {}
    for name, word in words.items():
        other = seen.setdefault(SPLITS.get(word) or split_of(word), name)
        if words[other] != word:
            raise UserError(f"{root}: {other} and {name} name one split: give them the same name, or move one away.")


def gaps(numbers: Collection[int], total: int | None) -> list[int]:
    """Numbers that are missing of 0 .. total - 1 (or 1 .. total), or between the first and last where total is None."""
    first = min(numbers) if total is None else int(total in numbers and 0 not in numbers)
    end = max(numbers) + 1 if total is None else first + total
    return sorted(set(range(first, end)) - set(numbers)) if end - first <= MOST else []
