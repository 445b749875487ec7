"""Reads samples' bytes from shards without decoding: by this project's index and by other readers."""

import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import webdataset

from lgp_dist.data.shards.index import ShardIndex
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.data.shards.scan import hash_shard, scan_shard

Way = Callable[[ShardIndex, list[Path]], tuple[int, int]]
"""Reads all samples of an index's shards; returns the number of samples and the bytes of their images."""


def read_by_webdataset(paths: Sequence[Path]) -> tuple[int, int]:
    """Samples and bytes of images in tars, by webdataset's tar iterators, which group files into samples."""
    samples = size = 0
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList([str(path) for path in paths]), webdataset.tarfile_to_samples()
    )
    for sample in pipeline:
        samples += 1
        size += sum(len(content) for key, content in sample.items() if key in ("jpg", "jpeg", "png", "webp"))
    return samples, size


def read_by_tarfile(paths: Sequence[Path]) -> tuple[int, int]:
    """Labels and bytes of images in tars, by Python's tarfile."""
    samples = size = 0
    for path in paths:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stream = tar.extractfile(member)
                content = stream.read() if stream else b""
                if member.name.endswith(".cls"):
                    samples += 1
                elif member.name.lower().endswith((".jpg", ".jpeg", ".png", ".webp")):
                    size += len(content)
    return samples, size


def _shuffled(index: ShardIndex, paths: list[Path]) -> tuple[int, int]:
    """Every image once by its offset, in random order over all shards, as training reads them."""
    order = np.random.Generator(np.random.Philox(0)).permutation(len(index))
    rows = zip(*(getattr(index, name)[order].tolist() for name in ("shard", "offset", "size", "label")), strict=True)
    samples = size = 0
    for shard, offset, length, label in rows:
        size += len(index.files.read(shard, offset, length))
        samples += label >= 0
    return samples, size


def _build(paths: list[Path], *, hashed: bool) -> tuple[int, int]:
    """Headers, labels and image sizes, as needed for an index; hashed: every byte too, as `lgp shards index` reads."""
    samples = size = 0
    for path in paths:
        found, _ = scan_shard(path)
        if hashed:
            hash_shard(path, found)
        samples += len(found)
        size += sum(sample.size for sample in found)
    return samples, size


WAYS: dict[str, Way] = {
    "webdataset-index": lambda index, paths: read_by_webdataset(paths),
    "tarfile-index": lambda index, paths: read_by_tarfile(paths),
    "lgp-index": _shuffled,
    "lgp-index-build": lambda index, paths: _build(paths, hashed=False),
    "lgp-index-build-hash": lambda index, paths: _build(paths, hashed=True),
}
"""What is compared: webdataset's tar iterators, Python's tarfile, reading as in training, and building an index."""


def reader(name: str, folder: Path) -> Callable[[], int]:
    """A function that reads the split train by WAYS[name] and returns the number of samples; it has run once.

    RuntimeError where it reads other samples or bytes than the index says.
    """
    manifest = ShardManifest.load(folder)
    index = ShardIndex.load(manifest, "train", np.iinfo(np.int64).max)
    paths = [manifest.path(entry) for entry in manifest.entries("train")]
    wanted = (len(index), int(index.size.sum()))

    def run() -> int:
        found = WAYS[name](index, paths)
        if found != wanted:
            raise RuntimeError(f"{name} read {found} samples and bytes, not {wanted}")
        return found[0]

    run()
    return run
