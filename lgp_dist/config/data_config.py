"""Settings of the data, as `config` has them for all else."""

from dataclasses import dataclass, field
from typing import Any, Literal


def runtime_only(default: Any) -> Any:
    """A field that no stage's artifact depends on: it changes how a run computes, not what."""
    return field(default=default, metadata={"runtime_only": True})


@dataclass(frozen=True)
class AugmentConfig:
    """Training augmentation as timm's; crops while decoding, the rest on the device, each drawn for every sample."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop, as a share of the image."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter."""
    auto_augment: str = ""
    """timm's name of an automatic augmentation, e.g. rand-m9-mstd0.5-inc1; empty for none."""
    random_erase: float = 0.0
    """Probability of erasing a rectangle."""


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how an image becomes a tensor."""

    root: str = runtime_only("shards/imagenet")
    """Folder that holds manifest.json and the tars, or its http(s)://, s3://, gs:// or hf:// address; stages
    depend on what it holds, not on where it lies."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str = "validation"
    """Split to evaluate on."""
    image_size: int = 224
    """Side of the square input, pixels."""
    channels: int = 3
    """1 for grey, 3 for RGB images."""
    num_classes: int = 1000
    """Labels are 0 .. num_classes - 1."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, on a scale of 0 to 1."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, on a scale of 0 to 1."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Resampling for resize and crop."""
    crop_pct: float = 0.875
    """Share of the resized image that the evaluation's centre crop keeps."""
    augment: AugmentConfig = AugmentConfig()
    """Training augmentation."""
    window: int = 256
    """Shards that are shuffled together; about so many are in use at a time."""
    decoder: Literal["simplejpeg", "nvimgcodec"] = "simplejpeg"
    """Of JPEGs in training: libjpeg-turbo, or the extra nvimgcodec, which decodes only what a crop needs."""
    max_bad: int = runtime_only(0)
    """Images of an epoch, over all ranks, that may be bad; each is replaced and named, and one more stops the run."""
    threads: int = runtime_only(8)
    """Decoding threads per rank; 0 decodes in the training thread."""
    cache: str = runtime_only("")
    """Folder on a disk of this node for shards of a remote root; empty for $XDG_CACHE_HOME/lgp or ~/.cache/lgp."""
    cache_bytes: int = runtime_only(200_000_000_000)
    """Bytes that all shards in the cache may take; what was not asked for the longest is removed."""
    timeout_s: float = runtime_only(60.0)
    """Seconds in which a remote root must send 64 KiB, or the rest of a file; if not, the transfer has stalled."""
    retries: int = runtime_only(5)
    """Further tries after a transfer that failed in a way that may pass."""
