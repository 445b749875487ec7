"""Format, width and height of an image from its first bytes, and smaller copies of images."""

import io
import struct

import simplejpeg
from PIL import Image

from lgp_dist.data.shards.decode import decode_image
from lgp_dist.data.shards.formats import extension

HEAD = 4096
"""First bytes of an image, which state its size in nearly all files."""


def dimensions(content: bytes) -> tuple[int, int]:
    """Width and height as stored, from an image or its first bytes; (0, 0) if they do not say it."""
    try:
        kind = extension(content)
        if kind == "jpg":
            height, width, *_ = simplejpeg.decode_jpeg_header(content)
            return width, height
        if kind == "png" and content[12:16] == b"IHDR":
            return struct.unpack_from(">II", content, 16)
        with Image.open(io.BytesIO(content), formats=("WEBP",)) as image:
            return image.size
    except Exception:  # the readers raise many kinds on bad bytes
        return 0, 0


def shrink(content: bytes, short_side: int, quality: int, where: str) -> bytes:
    """The image as a JPEG whose short side is `short_side` pixels; the same bytes if it is no larger than that.

    Grey images stay grey, all others become RGB. Raises UserError that names `where` if it cannot be decoded.
    """
    if 0 < min(dimensions(content)) <= short_side:
        return content
    image = decode_image(content, 3, where)
    if min(image.size) <= short_side:
        return content
    with Image.open(io.BytesIO(content)) as stored:
        if stored.mode in ("1", "L", "LA", "I;16"):
            image = image.convert("L")
    scale = short_side / min(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()
