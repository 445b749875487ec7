"""Width and height of an image from its first bytes, and smaller copies of images."""

import io
import struct

from PIL import Image

from lgp_dist.data.shards.decode import decode_image
from lgp_dist.errors import UserError

HEAD = 4096
"""First bytes of an image that say its size in nearly all files."""
_SIZED = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
"""JPEG markers whose segment has the size."""


def dimensions(content: bytes) -> tuple[int, int]:
    """Width and height as stored, from an image or its first bytes; (0, 0) if they do not say it."""
    try:
        if content[:2] == b"\xff\xd8":
            return _jpeg(content)
        if content[:8] == b"\x89PNG\r\n\x1a\n" and content[12:16] == b"IHDR":
            return struct.unpack_from(">II", content, 16)
        with Image.open(io.BytesIO(content), formats=("WEBP",)) as image:
            return image.size
    except Exception:  # Pillow's readers raise many kinds on bad bytes
        return 0, 0


def _jpeg(content: bytes) -> tuple[int, int]:
    """Width and height of a JPEG; raises IndexError or struct.error where the bytes end before they come."""
    position = 2
    while content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xFF:
            position += 1
        elif marker in _SIZED:
            height, width = struct.unpack_from(">HH", content, position + 5)
            return width, height
        elif marker in (0xD9, 0xDA):
            break
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:
            position += 2
        else:
            position += 2 + struct.unpack_from(">H", content, position + 2)[0]
    return 0, 0


def extension(content: bytes) -> str:
    """jpg, png or webp by the first bytes; empty for anything else."""
    if content[:3] == b"\xff\xd8\xff":
        return "jpg"
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else ""


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
        grey = stored.mode in ("1", "L", "LA", "I;16")
    if grey:
        image = image.convert("L")
    scale = short_side / min(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def check_shrink(short_side: int, quality: int) -> None:
    """Raises UserError unless both are in range; a short side of 0 keeps images as they are."""
    if short_side < 0 or short_side > 4096:
        raise UserError(f"--short-side is {short_side}: set it to 1 .. 4096 pixels, or 0 to keep the images.")
    if not 1 <= quality <= 95:
        raise UserError(f"--quality is {quality}: set it to 1 .. 95.")
