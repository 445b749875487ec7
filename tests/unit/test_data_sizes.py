"""Sizes of images from their first bytes, against Pillow."""

import io

import numpy as np
import pytest
from PIL import Image

from lgp_dist.data.shards.formats import extension
from lgp_dist.data.shards.sizes import HEAD, dimensions

PIXELS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8))


def saved(form: str, picture: Image.Image = PIXELS, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def exif(size: int) -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0" + bytes(size)


IMAGES = {
    "jpeg": saved("JPEG"),
    "progressive": saved("JPEG", progressive=True, optimize=True),
    "grey": saved("JPEG", PIXELS.convert("L")),
    "cmyk": saved("JPEG", PIXELS.convert("CMYK")),
    "exif": saved("JPEG", exif=exif(3000)),
    "long exif": saved("JPEG", exif=exif(60_000)),
    "profile": saved("JPEG", icc_profile=bytes(150_000)),
    "comment": saved("JPEG", comment=b"\xff\xd8\xff\xc0 no marker"),
    "restarts": saved("JPEG", restart_marker_rows=1),
    "fill bytes": saved("JPEG")[:2] + b"\xff\xff\xff" + saved("JPEG")[2:],
    "png": saved("PNG"),
    "webp": saved("WEBP"),
    "lossless webp": saved("WEBP", lossless=True),
    "webp with alpha": saved("WEBP", PIXELS.convert("RGBA")),
}


@pytest.mark.parametrize("name", IMAGES)
def test_size_is_pillows(name: str) -> None:
    content = IMAGES[name]
    with Image.open(io.BytesIO(content)) as picture:
        assert dimensions(content) == picture.size == (53, 37)
        assert extension(content) == {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[picture.format]
    if name not in ("long exif", "profile") and "webp" not in name:  # these are read whole
        assert dimensions(content[:HEAD]) == (53, 37)


@pytest.mark.parametrize("name", IMAGES)
def test_cut_bytes_give_the_size_or_none(name: str) -> None:
    content = IMAGES[name]
    for end in [*range(0, min(len(content), 700)), len(content) - 1]:
        assert dimensions(content[:end]) in ((0, 0), (53, 37))


@pytest.mark.parametrize(
    "content", [b"", b"GIF89a", b"\xff\xd8", b"\xff\xd8\xff", b"RIFF1234WEBP", b"\x89PNG\r\n\x1a\n"]
)
def test_no_image(content: bytes) -> None:
    assert dimensions(content) == (0, 0)
