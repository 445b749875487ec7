"""From bytes in a shard to pixels: libjpeg-turbo decodes JPEGs, Pillow everything else and what it refuses."""

import io
import os
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from lgp_dist.data.shards.formats import kind_of
from lgp_dist.errors import UserError

MAX_PIXELS = 80_000_000
"""Larger images are refused before they are decoded: they would take gigabytes."""
FORMATS = ("JPEG", "PNG", "WEBP")
OPEN_FILES = 64
"""Shards that a process keeps open."""
MODES = {1: "L", 3: "RGB"}
_COLOURS = {1: ("GRAY", ("Gray",)), 3: ("RGB", ("Gray", "YCbCr", "RGB"))}
"""Channels -> libjpeg-turbo's colour space, and the JPEGs for which it agrees with Pillow."""


class BadImage(UserError):
    """Bytes that are no whole image; `data.max_bad` says how many are allowed."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(
            f"The image of {where} cannot be decoded ({reason}): `lgp shards verify` lists all such samples,"
            " and the shard must be copied or built again."
        )
        self.where, self.reason = where, reason


class LostBytes(UserError):
    """A local shard that was whole when the run began and has since lost an image's bytes."""

    def __init__(self, sentence: str, reason: str) -> None:
        super().__init__(sentence)
        self.reason = reason


class _Handle:
    """An open file, closed when its last user drops it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class ShardSource(Protocol):
    """Opens shards that may have to be fetched first."""

    def open(self, name: str) -> int:
        """Handle to read a shard, by its name in the manifest; raises UserError or OSError."""
        ...

    def prefetch(self, names: Sequence[str]) -> None:
        """Announces the shards that are read next, in this order; returns at once."""
        ...

    def counts(self) -> dict[str, int]:
        """Counts of this process so far, for the metrics."""
        ...


class ShardFiles:
    """Reads ranges of bytes from shards. Opens a shard at first use and keeps the latest OPEN_FILES open.

    Threads and forked processes may share it, since reads do not move the file position. A pickled copy (spawn) starts
    with no open file.
    """

    def __init__(self, paths: Sequence[Path], source: ShardSource | None = None) -> None:
        """source: opens the paths, which then are names in its manifest; None for files of this machine."""
        self.paths, self.source = tuple(paths), source
        files = self.paths  # not self: a cycle would keep files open until it is collected

        def opened(shard: int) -> _Handle:
            path = files[shard]
            return _Handle(source.open(path.as_posix()) if source else os.open(path, os.O_RDONLY | os.O_CLOEXEC))

        self._open = lru_cache(OPEN_FILES)(opened)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` of shard number `shard`; LostBytes if the file has fewer or is missing."""
        try:
            file = self._open(shard)  # held here, so that it stays open while another thread closes older ones
            content = _pread(file.number, offset, size)
        except OSError as error:
            raise LostBytes(
                f"Shard {self.paths[shard]} cannot be read ({error.strerror}): copy the file again.",
                f"its shard cannot be read: {error.strerror}",
            ) from error
        if len(content) != size:
            raise LostBytes(
                f"Shard {self.paths[shard]} ends before byte {offset + size}, where its index has an image:"
                " copy the file again, then start again.",
                f"its shard ends before byte {offset + size}",
            )
        return content

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "source": self.source}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


def _pread(handle: int, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`, fewer at the end of the file. Does not move the file position, unlike `read_at`."""
    content = os.pread(handle, size, offset)
    while len(content) < size and (more := os.pread(handle, size - len(content), offset + len(content))):
        content += more
    return content


def decode_image(content: bytes, channels: int, where: str) -> Image.Image:
    """An image of mode L (channels 1) or RGB (channels 3), completely decoded by Pillow.

    where: shard and key, for the sentence of the BadImage that is raised if the bytes are no whole image.
    """
    if channels not in MODES:
        raise UserError(f"data.channels is {channels}, which no image is read as: set it to 1 (grey) or 3 (RGB).")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            image.load()
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would cut off at 255
                high = np.asarray(image).astype(np.int64).clip(0, 65_535) >> 8
                return Image.fromarray(high.astype(np.uint8)).convert(MODES[channels])
            return image.convert(MODES[channels])
    except Exception as error:  # Pillow's readers raise many kinds on bad bytes
        unknown = f"it is {kind}" if (kind := kind_of(content)) else "its bytes are no image"
        reason = unknown if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise BadImage(where, reason) from error


_scratch = threading.local()
"""Each thread's buffer for the pixels of one image."""


def decode_pixels(content: bytes, channels: int, where: str) -> NDArray[np.uint8]:
    """Pixels [H, W, channels], perhaps in this thread's buffer: use them before the thread decodes again.

    Pillow decodes what is no JPEG and what libjpeg-turbo warns about, and says what is wrong. Raises BadImage.
    """
    if content[:2] == b"\xff\xd8" and channels in _COLOURS:
        pixels = _jpeg_pixels(content, *_COLOURS[channels])
        if pixels is not None:
            return pixels
    pixels = np.array(decode_image(content, channels, where))  # a copy: torch takes no array that is read-only
    return pixels.reshape(*pixels.shape[:2], channels)


def _jpeg_pixels(content: bytes, colour: str, sources: tuple[str, ...]) -> NDArray[np.uint8] | None:
    """Pixels of a JPEG, or None where Pillow must look at it."""
    try:
        height, width, found, _ = simplejpeg.decode_jpeg_header(content)
        if found not in sources or height * width > MAX_PIXELS:
            return None
        size = height * width * (3 if colour == "RGB" else 1)
        buffer = getattr(_scratch, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = _scratch.buffer = np.empty(max(size, 1 << 20), dtype=np.uint8)
        return simplejpeg.decode_jpeg(content, colour, buffer=buffer)
    except ValueError:
        return None
