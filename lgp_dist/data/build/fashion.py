"""Fashion-MNIST's idx files as a source."""

import gzip
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lgp_dist.data.build.source import Item, Source
from lgp_dist.data.shards.account import Account
from lgp_dist.data.shards.formats import mistaken
from lgp_dist.errors import UserError
from lgp_dist.files import replacing

DEFAULT_SOURCE = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the idx files."""
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
LICENCE = """\
The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
_SPLITS = (("train", "train"), ("test", "t10k"))
"""Split and prefix of its idx files."""


def fashion_mnist(source: Path, spool: Path, account: Account) -> Source:
    """The images of the four idx .gz files as PNGs, written one after the other into files of the folder `spool`.

    A key such as train-00042 is the image's number in the idx file. The same zlib gives the same bytes.
    """
    loaded = {split: _read_split(source, prefix) for split, prefix in _SPLITS}
    used = {source / f"{prefix}-{kind}-ubyte.gz" for _, prefix in _SPLITS for kind in ("images-idx3", "labels-idx1")}
    account.rest(used, "that layout fashion-mnist does not read")
    spool.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[Item]] = {}
    for split, (images, labels) in loaded.items():
        target, position = spool / f"{split}.bin", 0
        splits[split] = []
        with replacing(target) as partial, open(partial, "wb") as stream:
            for place, (pixels, label) in enumerate(zip(images, labels.tolist(), strict=True)):
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
                size = stream.write(buffer.getvalue())
                splits[split].append(Item(f"{split}-{place:05d}", label, str(target), position, size))
                position += size
    origin = "https://github.com/zalandoresearch/fashion-mnist"
    return Source("fashion-mnist", splits, CLASSES, origin, "MIT", {"LICENSE": LICENCE})


def _read_split(source: Path, prefix: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images [n, 28, 28] and labels [n] of a split."""
    images = _read_idx(source / f"{prefix}-images-idx3-ubyte.gz", 3)
    labels = _read_idx(source / f"{prefix}-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels):
        raise UserError(f"{source} has {len(images)} images but {len(labels)} labels of {prefix}: install it again.")
    return images, labels


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array in an idx file of unsigned bytes; raises UserError."""
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: install Debian's package dataset-fashion-mnist, or name the folder of the four"
            " idx .gz files with --source."
        )
    try:
        content = gzip.decompress(path.read_bytes())
        zero, kind, found, *shape = struct.unpack_from(f">HBB{dimensions}I", content)
        array = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        said = f"{path} cannot be read as an idx file ({error}): install dataset-fashion-mnist again."
        raise UserError(mistaken(path, "gzip") or said) from error
    if (zero, kind, found) != (0, 8, dimensions):
        raise UserError(
            f"{path} is no idx file of bytes in {dimensions} dimensions: install dataset-fashion-mnist again."
        )
    return array
