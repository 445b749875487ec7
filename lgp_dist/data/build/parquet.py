"""The hub's parquet files as a source: columns `image` (bytes and path) and `label`."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lgp_dist.data.build.source import Source, items_of, optional, want_folder
from lgp_dist.errors import UserError
from lgp_dist.files import replacing, write_atomic

ROWS = 64
"""Rows that are read at once."""
_NAME = re.compile(r"(train|val|validation|test)-\d+-of-\d+.*\.parquet")


def parquet(root: Path, spool: Path, progress: Callable[[str], None] = print) -> Source:
    """Folder (or tree) of SPLIT-00000-of-00294.parquet files, as on the hub; bytes of images stay as they are.

    The files are compressed in groups of rows, but shuffled samples need any row at any time. So each file is first
    copied, uncompressed, into the folder `spool` (as much disk as the images take), where the next try after an
    interruption finds it. A split whose labels are all -1, as ImageNet's test split, is ignored.
    """
    want_folder(root)
    reader = optional("pyarrow.parquet", "Reading parquet files")
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.parquet")):
        if match := _NAME.fullmatch(path.name):
            found.setdefault({"val": "validation"}.get(match[1], match[1]), []).append(path)
    if not found:
        raise UserError(f"{root} has no file such as train-00000-of-00294.parquet: name their folder with --source.")
    spool.mkdir(parents=True, exist_ok=True)
    splits, names = {}, []
    for split, paths in found.items():
        rows: list[tuple[str, int, str, int, int]] = []
        for place, path in enumerate(tqdm(paths, desc=f"read {split}", unit="file", disable=None)):
            target = spool / f"{split}-{place:05d}.bin"
            stored = _spooled(target) or _spool(reader, path, target)
            names = names or stored.classes
            rows += [(name, label, str(target), offset, size) for name, label, offset, size in stored.rows]
        if all(label == -1 for _, label, *_ in rows):
            progress(f"{split}: ignored, its {len(rows)} images have no labels")
            continue
        splits[split] = items_of(
            (name or f"{split}-{number:08d}", *place) for number, (name, *place) in enumerate(rows)
        )
    if not splits:
        raise UserError(f"The parquet files of {root} have no labels: name another folder with --source.")
    name = "imagenet1k" if len(names) == 1000 else re.sub(r"\W+", "_", root.resolve().name).strip("_") or "images"
    return Source(name, splits, tuple(names))


@dataclass(frozen=True)
class _Spooled:
    """The uncompressed copy of a parquet file's images, one after the other; stored next to it as JSON."""

    bytes: int
    """Size of the copy."""
    classes: list[str]
    rows: list[tuple[str, int, int, int]]
    """Name, label, offset and size of each image."""


def _spooled(target: Path) -> _Spooled | None:
    """An earlier run's complete copy, or None."""
    try:
        stored = _Spooled(**json.loads(target.with_suffix(".json").read_text(encoding="utf-8")))
        return stored if target.stat().st_size == stored.bytes else None
    except (OSError, ValueError, TypeError):
        return None


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
        raise UserError(
            f"{path} cannot be read as parquet with columns image (bytes, path) and label"
            f" ({str(error).splitlines()[0] if str(error) else type(error).__name__}): download the file again."
        ) from error
    stored = _Spooled(position, classes, rows)
    write_atomic(target.with_suffix(".json"), json.dumps(asdict(stored)).encode())
    return stored


def _class_names(metadata: dict[bytes, bytes]) -> list[str]:
    """Names of the classes in a file's metadata, where `datasets` stores them; empty if it has none."""
    try:
        label = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]
        return [str(name) for name in label["names"]]
    except (KeyError, ValueError, TypeError):
        return []
