"""From bytes in a shard to a PIL image."""

import io
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lgp_dist.errors import UserError

MAX_PIXELS = 80_000_000
"""Larger images are refused before they are decoded: they would take gigabytes."""
FORMATS = ("JPEG", "PNG", "WEBP")
OPEN_FILES = 64
"""Shards that a process keeps open."""


def open_file(path: Path) -> int:
    """Handle to read a file; raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


class ShardFiles:
    """Reads ranges of bytes from shards, which it opens at first use and keeps open, the latest OPEN_FILES of them.

    Reads name their offset and move no file position, so processes that share a handle by fork do not disturb each
    other; a pickled copy (spawn) starts with no open file. Not for several threads at once.
    """

    def __init__(self, paths: Sequence[Path], opener: Callable[[Path], int] = open_file) -> None:
        """opener: gives a handle to read a path; it may fetch the file first."""
        self.paths, self.opener = tuple(paths), opener
        self._handles: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` of shard number `shard`; raises UserError if the file has fewer or is missing."""
        try:
            handle = self._open(shard)
            content = os.pread(handle, size, offset)
            while 0 < len(content) < size:
                more = os.pread(handle, size - len(content), offset + len(content))
                if not more:
                    break
                content += more
        except OSError as error:
            raise UserError(
                f"Shard {self.paths[shard]} cannot be read ({error.strerror}): copy the file again."
            ) from error
        if len(content) != size:
            raise UserError(
                f"Shard {self.paths[shard]} ends before byte {offset + size}, where its index has an image:"
                " copy the file again, then start again."
            )
        return content

    def close(self) -> None:
        """Closes what is open; the next read opens again."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _open(self, shard: int) -> int:
        """Handle of a shard, now the latest used."""
        if shard in self._handles:
            self._handles.move_to_end(shard)
        else:
            if len(self._handles) >= OPEN_FILES:
                os.close(self._handles.popitem(last=False)[1])
            self._handles[shard] = self.opener(self.paths[shard])
        return self._handles[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handles": OrderedDict()}

    def __del__(self) -> None:
        self.close()


def decode_image(content: bytes, channels: int, where: str) -> Image.Image:
    """An image of mode L (channels 1) or RGB (channels 3), completely decoded.

    where: names shard and key, for the sentence of the UserError that is raised if the bytes are no whole image.
    """
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise UserError(f"data.channels is {channels}, which no image is read as: set it to 1 (grey) or 3 (RGB).")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            image.load()
            return image.convert(modes[channels])
    except Exception as error:  # Pillow's readers raise many kinds on bad bytes
        reason = "its bytes are no image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise UserError(
            f"The image of {where} cannot be decoded ({reason}): `lgp shards verify` lists all such samples,"
            " and the shard must be copied or built again."
        ) from error
