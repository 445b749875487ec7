"""Builds the sample shards from Debian's package of Fashion-MNIST."""

import gzip
import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from webdataset import TarWriter

from lgp_dist.data.index import index_shards
from lgp_dist.data.manifest import ShardManifest, write_file
from lgp_dist.data.order import position_to_sample
from lgp_dist.errors import UserError

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
_SPLITS = (("train", "train", "{:04d}"), ("test", "t10k", "{:02d}"))
"""Split, prefix of its idx files, form of the shard number."""


def build_fashion_mnist(
    source: Path,
    out: Path,
    train: int | None = None,
    test: int | None = None,
    per_shard: int = 1000,
    seed: int = 0,
    progress: Callable[[str], None] = print,
) -> ShardManifest:
    """Writes Fashion-MNIST as shards of grey PNGs with manifest, sidecars and LICENSE; returns the manifest.

    train, test: images of each split, None for all; they are shuffled once and the classes are equally frequent, to
    one image. A key such as train-00042 names the image's place in the idx file. The same arguments give the same
    bytes (with the same zlib). `out` must not exist or be empty, and is there complete or not at all.
    """
    source, out = Path(source), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: name another folder with --out, or remove it first.")
    if per_shard < 1:
        raise UserError(f"per_shard is {per_shard}: set it to 1 or more images in a shard.")
    wanted = {"train": train, "test": test}
    loaded = {split: _read_split(source, prefix) for split, prefix, _ in _SPLITS}
    chosen = {split: _choose(split, loaded[split][1], wanted[split], seed) for split in wanted}
    partial = out.parent / f".{out.name}.{os.getpid()}.tmp"
    partial.mkdir(parents=True)
    try:
        for split, _, form in _SPLITS:
            images, labels = loaded[split]
            for number, start in enumerate(range(0, len(chosen[split]), per_shard)):
                path = partial / f"fashion-mnist-{split}-{form.format(number)}.tar"
                _write_shard(path, split, chosen[split][start : start + per_shard], images, labels)
        ShardManifest(partial, CLASSES, {}, "https://github.com/zalandoresearch/fashion-mnist", "MIT").write()
        manifest = index_shards(partial, progress)
        write_file(partial / "LICENSE", LICENCE.encode())
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ShardManifest(out, manifest.classes, manifest.splits, manifest.source, manifest.licence)


def _read_split(source: Path, prefix: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images [n, 28, 28] and labels [n] of a split."""
    images = _read_idx(source / f"{prefix}-images-idx3-ubyte.gz", 3)
    labels = _read_idx(source / f"{prefix}-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels):
        raise UserError(f"{source} has {len(images)} images but {len(labels)} labels of {prefix}: install it again.")
    return images, labels


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array of an idx file of unsigned bytes; raises UserError if it is missing or something else."""
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
        raise UserError(
            f"{path} cannot be read as an idx file ({error}): install dataset-fashion-mnist again."
        ) from error
    if (zero, kind, found) != (0, 8, dimensions):
        raise UserError(
            f"{path} is no idx file of bytes in {dimensions} dimensions: install dataset-fashion-mnist again."
        )
    return array


def _choose(split: str, labels: NDArray[np.uint8], count: int | None, seed: int) -> NDArray[np.int64]:
    """`count` places in the idx file, shuffled, with equally many of each class (to one)."""
    count = len(labels) if count is None else count
    if not 0 < count <= len(labels):
        raise UserError(f"{count} images of split {split} were asked for: set --{split} to 1 .. {len(labels)}.")
    order = position_to_sample(seed, 0, len(labels))
    turn = np.empty(len(order), dtype=np.int64)
    for label in np.unique(labels):
        places = np.flatnonzero(labels[order] == label)
        turn[places] = np.arange(len(places))
    return order[np.sort(np.argsort(turn, kind="stable")[:count])]


def _write_shard(
    path: Path, split: str, places: NDArray[np.int64], images: NDArray[np.uint8], labels: NDArray[np.uint8]
) -> None:
    """One tar of PNG and cls, with nothing in it that changes between builds."""
    with (
        open(path, "wb") as stream,
        TarWriter(stream, user="lgp", group="lgp", mode=0o644, mtime=0, compress=False, encoder=False) as tar,
    ):
        for place in places.tolist():
            buffer = io.BytesIO()
            Image.fromarray(images[place]).save(buffer, format="PNG", optimize=True)
            sample = {"__key__": f"{split}-{place:05d}", "cls": str(labels[place]).encode(), "png": buffer.getvalue()}
            tar.write(sample)
