"""Writes one shard, and reads it back."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

from lgp_dist.data.build.source import Item
from lgp_dist.data.shards.index import IndexedShard, index_shard
from lgp_dist.data.shards.sizes import dimensions, extension, shrink
from lgp_dist.data.shards.tar import read_at
from lgp_dist.errors import UserError
from lgp_dist.files import flush, replacing


def write_shard(path: Path, items: list[Item], short_side: int = 0, quality: int = 90) -> IndexedShard:
    """Writes a tar of images and .cls files; equal items give equal bytes.

    Images keep their bytes, or become smaller JPEGs: see `shrink`. The tar is read back before it gets its name. The
    UserError for something that is no image, or cannot be read, names it.
    """
    with replacing(path) as partial:
        with tarfile.open(partial, "w") as tar:
            for item in items:
                content = _content(item, short_side, quality)
                _add(tar, f"{item.key}.cls", str(item.label).encode())
                _add(tar, f"{item.key}.{extension(content)}", content)
        made = index_shard(partial)
        if [sample.key for sample in made.samples] != [item.key for item in items]:
            raise RuntimeError(f"{path.name} does not read back as it was written")
        flush(partial)
    return replace(made, entry=replace(made.entry, name=path.name))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file whose owner and time never change."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = len(content), 0o644, "lgp", "lgp"
    tar.addfile(info, io.BytesIO(content))


def _content(item: Item, short_side: int, quality: int) -> bytes:
    """The bytes of an image in the shard."""
    where = f"{item.path}, image {item.key}" if item.offset else item.path
    try:
        with open(item.path, "rb") as file:
            content = read_at(file, item.offset, item.size)
    except OSError as error:
        raise UserError(f"{where}, cannot be read ({error.strerror}): copy it again.") from error
    if len(content) != item.size:
        raise UserError(f"{where}, ends after {len(content)} of {item.size} bytes: copy it again.")
    if not extension(content) or dimensions(content) == (0, 0):
        raise UserError(f"{where}, is no JPEG, PNG or WebP image: copy it again, or remove it from the source.")
    return shrink(content, short_side, quality, where) if short_side else content
