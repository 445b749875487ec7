"""How fast samples' bytes come from shards: our index against webdataset's tar iterators, in CPU time, in one run."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from lgp_dist.data.compare import read_by_tarfile, read_by_webdataset
from lgp_dist.data.index import ShardIndex
from lgp_dist.data.manifest import ShardManifest
from lgp_dist.data.scan import hash_shard, scan_shard
from lgp_dist.errors import UserError

GOAL = 4.0
"""Times webdataset's tar iterators."""


def bench_index(root: str | Path, split: str, repeats: int = 5) -> dict[str, Any]:
    """Samples per CPU second of one process for each way of reading all images of a split, without decoding.

    `index_shuffled` is what training does: every image once, in random order over all shards, by offset; the label
    comes from the index. `index_sequential` takes them in the order of the tars. `webdataset` and `tarfile` read
    the same shards from their start. `build_headers` walks headers, labels and image sizes as `lgp shards index` does,
    `build_all` also hashes every byte. Ways alternate; each figure is the median of `repeats` rounds, after one that
    does not count and brings the shards into the page cache; `spread` is (largest - smallest) / median.
    `ratio` is index_shuffled / webdataset, the median of the rounds' own ratios. Raises UserError for a split that
    cannot be opened.
    """
    if repeats < 1:
        raise UserError(f"--repeats is {repeats}: set it to 1 or more.")
    manifest = ShardManifest.load(root)
    manifest.check(split)
    index = ShardIndex.load(manifest, split, np.iinfo(np.int64).max)
    paths = [manifest.path(entry) for entry in manifest.entries(split)]
    shuffled = np.random.Generator(np.random.Philox(0)).permutation(len(index))
    ways: dict[str, Callable[[], tuple[int, int]]] = {
        "webdataset": lambda: read_by_webdataset(paths),
        "tarfile": lambda: read_by_tarfile(paths),
        "index_sequential": lambda: _read(index, np.arange(len(index))),
        "index_shuffled": lambda: _read(index, shuffled),
        "build_headers": lambda: _scan(paths, hashed=False),
        "build_all": lambda: _scan(paths, hashed=True),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    wanted = (len(index), int(index.size.sum()))
    for number in range(repeats + 1):
        for name, way in ways.items():
            began = time.process_time()
            found = way()
            spent = time.process_time() - began
            if found != wanted:
                raise RuntimeError(f"{name} read {found} samples and bytes, not {wanted}")
            if number:
                rates[name].append(len(index) / max(spent, 1e-9))
    ratios = [a / b for a, b in zip(rates["index_shuffled"], rates["webdataset"], strict=True)]
    return {
        "what": "index",
        "data": str(root),
        "split": split,
        "samples": len(index),
        "image_bytes": wanted[1] / len(index),
        "repeats": repeats,
        "samples_per_cpu_second": {name: round(median(values), 1) for name, values in rates.items()},
        "spread": {name: round((max(v) - min(v)) / median(v), 3) for name, v in rates.items()},
        "ratio": round(median(ratios), 2),
        "ratio_spread": round((max(ratios) - min(ratios)) / median(ratios), 3),
        "goal": GOAL,
    }


def _read(index: ShardIndex, order: np.ndarray) -> tuple[int, int]:
    """Samples and bytes, in an order; the label is taken too."""
    rows = zip(*(getattr(index, name)[order].tolist() for name in ("shard", "offset", "size", "label")), strict=True)
    samples = size = 0
    for shard, offset, length, label in rows:
        size += len(index.files.read(shard, offset, length))
        samples += label >= 0
    return samples, size


def _scan(paths: list[Path], *, hashed: bool) -> tuple[int, int]:
    """Samples and bytes of images, as an index is built."""
    samples = size = 0
    for path in paths:
        found, _ = scan_shard(path)
        if hashed:
            hash_shard(path, found)
        samples += len(found)
        size += sum(sample.size for sample in found)
    return samples, size
