"""What a file is by its content, where it is not what its name says."""

import io
from contextlib import suppress
from pathlib import Path

from PIL import Image

LFS = "a git-LFS pointer"
STARTS = {
    b"version https://git-lfs": LFS,
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"<": "HTML or XML",
    b"PAR1": "parquet",
}


def extension(content: bytes) -> str:
    """jpg, png or webp by the first bytes; empty for anything else."""
    if content[:3] == b"\xff\xd8\xff":
        return "jpg"
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else ""


def kind_of(content: bytes) -> str:
    """What a file with this content, or these first bytes, is: Pillow's name of its format, or another; or empty."""
    with suppress(Exception):  # Pillow's readers raise many kinds on bad bytes
        return Image.open(io.BytesIO(content)).format or ""
    return "empty" if not content else next((kind for start, kind in STARTS.items() if content.startswith(start)), "")


def mistaken(path: Path, wanted: str) -> str:
    """The sentence for a file that is something else than what is wanted; empty where that cannot be told."""
    with suppress(OSError), path.open("rb") as file:
        kind = kind_of(file.read(4096))
        if kind and kind != wanted:
            how = "run `git lfs pull` in its repository, or " if kind == LFS else ""
            return f"{path} is {kind}, not {wanted}: {how}copy the file again."
    return ""
