"""The hub's parquet files as a source: columns `image` (bytes and path) and `label`."""

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lgp_dist.data.build.source import Item, Source, items_of, optional, want_folder
from lgp_dist.data.shards.account import Account
from lgp_dist.data.shards.formats import mistaken
from lgp_dist.data.shards.promises import missing
from lgp_dist.data.shards.splits import KNOWN, check_words, gaps, parquet_name
from lgp_dist.errors import UserError, first_line
from lgp_dist.files import replacing, write_atomic

ROWS = 64
"""Rows that are read at once."""


def parquet(root: Path, spool: Path, accept_missing: bool, account: Account) -> Source:
    """Folder (or tree) of SPLIT-00000-of-00294.parquet files, as on the hub; bytes of images stay as they are.

    The files are compressed in groups of rows, but shuffled samples need any row at any time. So each file is first
    copied, uncompressed, into the folder `spool` (as much disk as the images take), where the next try after an
    interruption finds it. A split whose labels are all -1, as ImageNet's test split, is left out.
    """
    want_folder(root)
    reader = optional("pyarrow.parquet", "Reading parquet files")
    spool.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[Item]] = {}
    names: dict[str, list[str]] = {}
    for split, paths in _parquet_files(root, accept_missing, account).items():
        rows: list[tuple[str, int, str, int, int]] = []
        for place, path in enumerate(tqdm(paths, desc=f"read {split}", unit="file", disable=None)):
            target = spool / f"{split}-{place:05d}.bin"
            stored = _spooled(target, path) or _spool(reader, path, target)
            names[str(path)] = stored.classes
            rows += [(name, label, str(target), offset, size) for name, label, offset, size in stored.rows]
        if all(label == -1 for _, label, *_ in rows):
            account.leave("images without labels (-1)", f"split {split}", len(rows))
            continue
        splits[split] = items_of(
            (name or f"{split}-{number:08d}", *place) for number, (name, *place) in enumerate(rows)
        )
    if not splits:
        raise UserError(f"The parquet files of {root} have no labels: name another folder with --source.")
    (one, classes), *others = sorted(names.items(), key=lambda named: not named[1])
    for path, other in others:
        if other and other != classes:
            raise UserError(f"{one} and {path} number their classes differently: name a folder of one data set.")
    name = "imagenet1k" if len(classes) == 1000 else re.sub(r"\W+", "_", root.resolve().name).strip("_") or "images"
    return Source(name, splits, tuple(classes))


def _parquet_files(root: Path, accept_missing: bool, account: Account) -> dict[str, list[Path]]:
    """The files of each split, sorted; UserError where one is missing or comes twice."""
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() == ".parquet" and path.is_file())
    named = {path: parts for path in paths if (parts := parquet_name(path.name, path.parent.name))}
    if not named:
        raise UserError(
            f"{root} has no file such as train-00000-of-00294.parquet, whose name or folder is one of {KNOWN}: name"
            " their folder with --source, or rename them."
        )
    check_words(root, {str(path.relative_to(root)): parts.word for path, parts in named.items()})
    account.rest(named, f"that are no parquet file of a split ({KNOWN})")
    found: dict[str, list[Path]] = {}
    numbers: dict[tuple[str, int], dict[int, Path]] = {}
    for path, parts in named.items():
        found.setdefault(parts.split, []).append(path)
        if parts.number is not None and parts.total is not None:
            same = numbers.setdefault((parts.split, parts.total), {}).setdefault(parts.number, path)
            if same != path:
                raise UserError(
                    f"{same} and {path} are both number {parts.number} of {parts.total} of split {parts.split}: name"
                    " one of their folders with --source, or remove one."
                )
    for (split, total), there in numbers.items():
        what = f"of the {total} parquet files that names of split {split} count"
        missing(what, [str(number) for number in gaps(there, total)], accept_missing, account)
    return found


@dataclass(frozen=True)
class _Spooled:
    """The uncompressed copy of a parquet file's images, one after the other; stored next to it as JSON."""

    bytes: int
    """Size of the copy."""
    classes: list[str]
    rows: list[tuple[str, int, int, int]]
    """Name, label, offset and size of each image."""
    source: str = ""
    """Path and size of the parquet file."""


def _spooled(target: Path, path: Path) -> _Spooled | None:
    """An earlier run's complete copy of a parquet file, or None."""
    try:
        stored = _Spooled(**json.loads(target.with_suffix(".json").read_text(encoding="utf-8")))
        whole = target.stat().st_size == stored.bytes and stored.source == _identity(path)
        return stored if whole else None
    except (OSError, ValueError, TypeError):
        return None


def _identity(path: Path) -> str:
    return f"{path}, {path.stat().st_size} bytes"


def _spool(reader: Any, path: Path, target: Path) -> _Spooled:
    """Copies the images of a parquet file; raises UserError."""
    rows: list[tuple[str, int, int, int]] = []
    position = 0
    try:
        with replacing(target) as partial, reader.ParquetFile(path) as table, open(partial, "wb") as stream:
            for batch in table.iter_batches(batch_size=ROWS, columns=["image", "label"]):
                for image, label in zip(batch["image"].to_pylist(), batch["label"].to_pylist(), strict=True):
                    content = image["bytes"]
                    rows.append((os.path.splitext(image.get("path") or "")[0], int(label), position, len(content)))
                    stream.write(content)
                    position += len(content)
            classes = _class_names(table.schema_arrow.metadata or {})
    except Exception as error:  # pyarrow raises many kinds on bad bytes; a wrong column gives KeyError or TypeError
        if isinstance(error, OSError) and error.errno is not None and error.filename != str(path):
            raise  # the disk, not the file
        said = (
            f"{path} cannot be read as parquet with columns image (bytes, path) and label"
            f" ({first_line(error)}): download the file again."
        )
        raise UserError(mistaken(path, "parquet") or said) from error
    stored = _Spooled(position, classes, rows, _identity(path))
    write_atomic(target.with_suffix(".json"), json.dumps(asdict(stored)).encode())
    return stored


def _class_names(metadata: dict[bytes, bytes]) -> list[str]:
    """Names of the classes in a file's metadata, where `datasets` stores them; empty if it has none."""
    try:
        label = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]
        return [str(name) for name in label["names"]]
    except (KeyError, ValueError, TypeError):
        return []
