"""Hashes of files, and files and folders that are complete or absent.

Readers and killed processes never see half a file. Nothing is flushed but by `flush`: after a power cut a new file may
be empty, so what must survive one (shards, checkpoints) is flushed before it gets its name.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from lgp_dist.errors import UserError

T = TypeVar("T")


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes; OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path in the same folder, which the block fills; it is renamed to `path` where the block ends
    well and removed where it raises. The temporary name is this process's own."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new. Makes missing folders.

    Raises UserError where the folder cannot be written to or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{path} cannot be written ({reason}): free space, or choose a folder that can be written to."
        ) from error


def write_json(path: Path, value: object) -> None:
    """`write_atomic` of a value as indented JSON."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def replace_folder(final: Path, fill: Callable[[Path], T]) -> T:
    """Makes a folder, or replaces one, and returns what `fill` returns. `fill` writes into a new folder next to it.

    Where `fill` raises, nothing has changed. A kill between the two renames leaves no folder, never half of one.
    """
    partial, old = (final.with_name(f".{final.name}.{word}") for word in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        result = fill(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    shutil.rmtree(old, ignore_errors=True)
    return result


def flush(path: Path) -> None:
    """Waits until what was written to a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
