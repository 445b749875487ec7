"""The options of `lgp shards build` and `reshard`."""

from dataclasses import dataclass
from typing import Literal

Layout = Literal["imagefolder", "imagenet", "kaggle", "parquet", "webdataset", "fashion-mnist"]
"""How a source's images lie."""


@dataclass(frozen=True)
class BuildOptions:
    """How images are arranged in shards."""

    train: int = 0
    """Images of split train, equally many of each class (give or take one); 0 for all."""
    test: int = 0
    """Images of every other split; 0 for all."""
    per_shard: int = 1000
    """Samples in a shard."""
    shards: int = 0
    """Shards of the largest split, the others in proportion; 0 to use --per-shard."""
    shard_mb: int = 0
    """Largest size of a shard with more than one image, MB (10^6 bytes); 0 to use --per-shard."""
    short_side: int = 0
    """Re-encode images whose short side is longer to this length, pixels, as JPEG; 0 keeps all bytes."""
    quality: int = 90
    """Quality of these JPEGs."""
    seed: int = 0
    """Seed of the shuffle."""
    workers: int = 0
    """Threads; 0 for one per core. Does not change a byte."""
