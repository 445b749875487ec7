"""The options of `lgp shards build` and `reshard`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Layout = Literal["imagefolder", "imagenet", "kaggle", "parquet", "webdataset", "fashion-mnist"]
"""How a source's images lie."""


@dataclass(frozen=True)
class ReadOptions:
    """How a source is read."""

    classes: Path | None = None
    """File with the name of a class in each line, which numbers the classes 0, 1, ... in this order: a folder's name,
    a wnid, or what .cls files hold. Images of other classes are left out."""
    image: str = ""
    """Of tars: ending of the member that is a sample's image, such as input.jpg; empty for the usual ones."""
    label: str = ""
    """Of tars: ending of the member that is its label, or a field of its .json; empty for cls, or label of .json."""
    accept_missing: bool = False
    """Go on where files or samples are missing that a manifest, an _info.json or the names of files promise."""


@dataclass(frozen=True)
class BuildOptions(ReadOptions):
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
