"""From uint8 pixels to normalised images on the device. All draws are keyed by (seed, epoch, sample)."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lgp_dist.config.data_config import DataConfig
from lgp_dist.config.ranges import check_data
from lgp_dist.data.augment.keyed_random import Keys, Numbers, device_normals, uniforms
from lgp_dist.data.augment.randaugment import RandAugment, colour_jitter

ERASE_AREA, ERASE_RATIO, ERASE_TRIES = (0.02, 1 / 3), (0.3, 1 / 0.3), 10
"""timm's rectangle: share of the image, height / width, and tries to find one that fits."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """Augmentation and normalisation of a configuration. UserError if a setting of the data is out of range."""

    data: DataConfig
    device: torch.device

    def __post_init__(self) -> None:
        check_data(self.data)
        _ = self.policy  # a wrong name fails here

    @cached_property
    def policy(self) -> RandAugment | None:
        """RandAugment, where the configuration names one."""
        name = self.data.augment.auto_augment
        return RandAugment.parse(name) if name else None

    @cached_property
    def _constants(self) -> tuple[Tensor, Tensor, Tensor]:
        """Factor and offset that normalise 0 .. 255, and the mean colour, [C] each."""
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.data.mean, self.data.std))
        parts = (1 / (255 * std), mean / std, (255 * mean).round())
        return tuple(part.float().to(self.device) for part in parts)  # type: ignore[return-value]

    def normalise(self, images: Tensor) -> Tensor:
        """Images [B, C, S, S] of 0 .. 255 as contiguous float32, normalised by the configured mean and deviation."""
        factor, offset, _ = self._constants
        values = images.to(torch.float32, memory_format=torch.contiguous_format)
        return values.mul_(factor.view(1, -1, 1, 1)).sub_(offset.view(1, -1, 1, 1))

    def augment(self, images: Tensor, keys: Keys) -> Tensor:
        """Flip, RandAugment or colour jitter, normalisation, erasing; each sample has its own draws.

        images: [B, C, S, S] uint8, which may be overwritten. keys: [B]. Returns float32.
        """
        augment = self.data.augment
        draws = uniforms(keys, 1 + 3 * ERASE_TRIES + 1)
        if augment.hflip:
            flip = torch.from_numpy(draws[:, 0] < augment.hflip).to(self.device)
            images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
        if self.policy:
            images = self.policy(images, keys ^ np.uint64(1), self._constants[2])
        elif augment.color_jitter:
            images = colour_jitter(images, augment.color_jitter, keys ^ np.uint64(2))
        values = self.normalise(images)
        if augment.random_erase:
            self._erase(values, keys ^ np.uint64(3), draws[:, 1:])
        return values

    def _erase(self, images: Tensor, keys: Keys, draws: Numbers) -> None:
        """timm's RandomErasing of mode pixel: a rectangle of normal noise."""
        chosen = np.flatnonzero(draws[:, 0] < self.data.augment.random_erase)
        if not len(chosen):
            return
        channels, height, width = images.shape[1:]
        boxes = [erase_box(height, width, draws[place, 1:].tolist()) for place in chosen]
        top, left, h, w = (torch.tensor(column, device=self.device).view(-1, 1, 1, 1) for column in zip(*boxes))  # noqa: B905
        rows = torch.arange(height, device=self.device).view(1, 1, -1, 1)
        columns = torch.arange(width, device=self.device).view(1, 1, 1, -1)
        inside = (rows >= top) & (rows < top + h) & (columns >= left) & (columns < left + w)
        bits = torch.from_numpy(keys[chosen].view(np.int64)).to(self.device)
        noise = device_normals(bits, channels * height * width).view(-1, channels, height, width)
        where = torch.from_numpy(chosen).to(self.device)
        images[where] = torch.where(inside, noise, images[where])


def erase_box(height: int, width: int, draws: list[float]) -> tuple[int, int, int, int]:
    """Top, left, height and width of timm's random rectangle; empty where none of the tries fits.

    draws: 3 * ERASE_TRIES numbers; three of each try: area, ratio, and place (its two halves of 26 bits).
    """
    low, high = math.log(ERASE_RATIO[0]), math.log(ERASE_RATIO[1])
    for area, ratio, place in zip(draws[::3], draws[1::3], draws[2::3], strict=True):
        target = (ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * area) * height * width
        aspect = math.exp(low + (high - low) * ratio)
        h, w = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if h < height and w < width:
            first = place * (height - h + 1)
            return int(first), int((first % 1.0) * (width - w + 1)), h, w
    return 0, 0, 0, 0
