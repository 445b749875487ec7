"""Settings of shards, input and augmentation; run_config.py has all others."""

from dataclasses import dataclass, field
from typing import Any, Literal


def runtime_only(default: Any) -> Any:
    """A field that no stage's artifact depends on: it changes how a run computes, not what."""
    return field(default=default, metadata={"runtime_only": True})


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training images, as in timm, drawn for each sample."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of the random crop, as a share of the image."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter."""
    auto_augment: str = ""
    """Automatic augmentation by timm's name, such as rand-m9-mstd0.5-inc1; empty for none."""
    random_erase: float = 0.0
    """Probability of erasing a rectangle."""


@dataclass(frozen=True)
class DataConfig:
    """Shards, their splits, and how an image becomes a tensor."""

    root: str = runtime_only("shards/imagenet")
    """Folder of manifest.json and tars, or its http(s)://, s3://, gs:// or hf:// address; stages depend on content."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str = "validation"
    """Split to evaluate on."""
    image_size: int = 224
    """Side of the square input, pixels."""
    channels: int = 3
    """Channels of the input: 1 (grey) or 3 (RGB)."""
    num_classes: int = 1000
    """Number of classes; labels are 0 .. num_classes - 1."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, on a scale of 0 to 1."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, on a scale of 0 to 1."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Interpolation of resize and crop."""
    crop_pct: float = 0.875
    """Side of the centre crop in evaluation, as a share of the resized image's."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of training images."""
    window: int = 256
    """Shards whose images are shuffled together; about this many are open at a time."""
    decoder: Literal["simplejpeg", "nvimgcodec"] = "simplejpeg"
    """Decoder of training JPEGs: libjpeg-turbo, or the extra nvimgcodec, which decodes only the crop."""
    max_bad: int = runtime_only(0)
    """Unreadable images allowed per epoch, over all ranks; each is replaced and named, one more stops the run."""
    threads: int = runtime_only(8)
    """Decoding threads per rank; 0 decodes in the training thread."""
    cache: str = runtime_only("")
    """Folder on this node's disk for shards of a remote root; empty for the user's, or TMPDIR if home is shared."""
    cache_bytes: int = runtime_only(200_000_000_000)
    """Size limit of the cache, bytes; the least recently used shards are removed."""
    timeout_s: float = runtime_only(60.0)
    """Seconds in which a remote root must send 64 KiB, or the rest of a file, before the transfer counts as stalled."""
    retries: int = runtime_only(5)
    """Retries after a transfer that failed for a temporary reason."""
