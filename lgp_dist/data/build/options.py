"""How images are laid out in shards: the options of `lgp shards build` and `reshard`."""

from dataclasses import dataclass
from typing import Literal

Layout = Literal["imagefolder", "imagenet", "kaggle", "parquet", "webdataset", "fashion-mnist"]
"""How a source's images lie."""


@dataclass(frozen=True)
class BuildOptions:
    """How a source becomes shards."""

    train: int = 0
    """Images of split train, equally many of each class (to one); 0 for all."""
    test: int = 0
    """Images of every other split; 0 for all."""
    per_shard: int = 1000
    """Samples in a shard."""
    shards: int = 0
    """Shards of the largest split, the others in proportion; 0 to go by --per-shard."""
    shard_mb: int = 0
    """Megabytes (10^6 bytes) of images in a shard, at most, where more than one fits; 0 to go by --per-shard."""
    short_side: int = 0
    """Re-encode images with a longer short side to this one, pixels, as JPEG; 0 keeps all bytes."""
    quality: int = 90
    """Of these JPEGs."""
    seed: int = 0
    """Of the shuffle."""
    workers: int = 0
    """Threads; 0 for one per core. Does not change a byte."""
