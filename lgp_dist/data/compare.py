"""Other readers of the same shards, to measure ours against."""

import tarfile
from collections.abc import Sequence
from pathlib import Path

import webdataset


def read_by_webdataset(paths: Sequence[Path]) -> tuple[int, int]:
    """Samples and bytes of images in tars, by webdataset's tar iterators: files grouped to samples, not decoded."""
    samples = size = 0
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList([str(path) for path in paths]), webdataset.tarfile_to_samples()
    )
    for sample in pipeline:
        samples += 1
        size += sum(len(content) for key, content in sample.items() if key in ("jpg", "jpeg", "png", "webp"))
    return samples, size


def read_by_tarfile(paths: Sequence[Path]) -> tuple[int, int]:
    """Labels and bytes of images in tars, by Python's tarfile, which seeks past what it does not read."""
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
