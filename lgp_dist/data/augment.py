"""Augmentation and mixing whose randomness depends on sample and position only."""

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.mixup import one_hot
from torch import Tensor

from lgp_dist.config import DataConfig, TrainConfig
from lgp_dist.data.order import stream_key
from lgp_dist.errors import UserError

Transform = Callable[[Image.Image], Tensor]
"""From a PIL image to [C, H, W] float32, normalised."""


def train_transform(data: DataConfig) -> Transform:
    """timm's training transform; draws from the global generators: call it inside sample_rng.

    Raises UserError for constants that do not fit the channels and for an augmentation that timm does not know.
    """
    _check(data)
    augment = data.augment
    try:
        return create_transform(
            input_size=data.image_size,
            is_training=True,
            scale=augment.crop_scale,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter or None,
            auto_augment=augment.auto_augment or None,
            interpolation=data.interpolation,
            mean=data.mean,
            std=data.std,
            re_prob=augment.random_erase,
            re_mode="pixel",
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"timm cannot make the augmentation data.augment.auto_augment '{augment.auto_augment}' ({error}): use a"
            " name such as rand-m9-mstd0.5-inc1, or leave it empty."
        ) from error


def eval_transform(data: DataConfig) -> Transform:
    """timm's evaluation transform: resize, centre crop, normalise. Draws nothing."""
    _check(data)
    return create_transform(
        input_size=data.image_size,
        is_training=False,
        interpolation=data.interpolation,
        mean=data.mean,
        std=data.std,
        crop_pct=data.crop_pct,
    )


def sample_rng(seed: int, epoch: int, sample: int) -> AbstractContextManager[None]:
    """Inside, Python's, numpy's and torch's global CPU generators give numbers that depend on the arguments only.

    On exit all three go on as if nothing had happened.
    """
    return _seeded(stream_key("augment", seed, epoch, sample))


@contextmanager
def _seeded(key: int) -> Iterator[None]:
    """The global CPU generators, seeded by a key of up to 128 bits; their states come back on exit."""
    words = np.array([(key >> shift) & 0xFFFFFFFF for shift in (0, 32, 64, 96)], dtype=np.uint32)
    python, legacy, generator = random.getstate(), np.random.get_state(), torch.default_generator
    state = generator.get_state()
    try:
        random.seed(key)
        np.random.seed(words)
        generator.manual_seed(key & (2**63 - 1))
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        generator.set_state(state)


class Mixer:
    """timm's Mixup, CutMix and label smoothing for a batch; mixes each image with its mirror place in the batch."""

    def __init__(self, train: TrainConfig, num_classes: int) -> None:
        self.mixes = train.mixup > 0 or train.cutmix > 0
        self.smoothing = train.label_smoothing
        self.num_classes = num_classes
        self._mixup = Mixup(
            mixup_alpha=train.mixup,
            cutmix_alpha=train.cutmix,
            label_smoothing=train.label_smoothing,
            num_classes=num_classes,
        )

    def __call__(self, images: Tensor, targets: Tensor, key: int) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] float32, which may be overwritten, and labels [B] int64 to images and targets.

        Targets are [B, classes] float32; with no mixing and no smoothing they are the labels unchanged. The draw
        depends on `key` only. Raises UserError for an odd B with mixing.
        """
        if self.mixes:
            if len(images) % 2:
                raise UserError(
                    f"A micro-batch of {len(images)} images is odd, which mixup and cutmix cannot pair:"
                    " set batch_size to an even number per rank and micro-step, or both to 0."
                )
            with _seeded(key):
                return self._mixup(images, targets)
        if self.smoothing > 0:
            off = self.smoothing / self.num_classes
            return images, one_hot(targets, self.num_classes, on_value=1.0 - self.smoothing + off, off_value=off)
        return images, targets


def _check(data: DataConfig) -> None:
    """Raises UserError for values that timm would take and turn into wrong pixels or an obscure error."""
    if data.channels not in (1, 3):
        raise UserError(f"data.channels is {data.channels}, which no image has: set it to 1 (grey) or 3 (RGB).")
    for key, values in (("mean", data.mean), ("std", data.std)):
        if len(values) != data.channels:
            raise UserError(
                f"data.{key} has {len(values)} numbers but data.channels is {data.channels}: give one per channel."
            )
    if min(data.std) <= 0:
        raise UserError(f"data.std is {data.std}, but each standard deviation must be more than 0.")
    if data.image_size < 1:
        raise UserError(f"data.image_size is {data.image_size}: set it to the side of the input in pixels.")
    if not 0 < data.crop_pct <= 1:
        raise UserError(f"data.crop_pct is {data.crop_pct}: set it to a share above 0 and up to 1.")
    low, high = data.augment.crop_scale
    if not 0 < low <= high <= 1:
        raise UserError(f"data.augment.crop_scale is ({low}, {high}): give two shares with 0 < low <= high <= 1.")
