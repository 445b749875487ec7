"""Crop and resize straight into a batch of uint8 pixels, with torchvision's results for Pillow images."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lgp_dist.config.run_config import DataConfig

TRIES = 10
"""Boxes that are tried before the crop falls back to the middle of the image."""
DRAWS = 2 * TRIES + 2
"""Uniform numbers that `random_box` takes."""
RATIO = (3 / 4, 4 / 3)
"""Width / height of a random crop."""

_RESIZE = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}
"""torch's antialiased uint8 kernels, ports of Pillow's, that write into a given tensor."""


def random_box(width: int, height: int, scale: tuple[float, float], draws: list[float]) -> tuple[int, int, int, int]:
    """Left, top, width and height of torchvision's RandomResizedCrop for an image; draws: DRAWS numbers in [0, 1)."""
    area, low, high = width * height, math.log(RATIO[0]), math.log(RATIO[1])
    for number in range(TRIES):
        target = area * (scale[0] + (scale[1] - scale[0]) * draws[2 * number])
        ratio = math.exp(low + (high - low) * draws[2 * number + 1])
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[-2] * (width - w + 1)), int(draws[-1] * (height - h + 1)), w, h
    ratio = min(max(width / height, RATIO[0]), RATIO[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (width - w) // 2, (height - h) // 2, w, h


@dataclass(frozen=True)
class Crop:
    """Image to square input, as the configuration says."""

    data: DataConfig

    def random(self, pixels: NDArray[np.uint8], draws: list[float], out: Tensor) -> None:
        """A random crop of pixels [H, W, C], resized into out [1, C, size, size] uint8. draws: for `random_box`."""
        height, width, _ = pixels.shape
        left, top, w, h = random_box(width, height, self.data.augment.crop_scale, draws)
        self.fit(pixels[top : top + h, left : left + w], out)

    def fit(self, pixels: NDArray[np.uint8], out: Tensor) -> None:
        """All of pixels [h, w, C], resized into out [1, C, size, size] uint8."""
        size = self.data.image_size
        self._resize(pixels, (size, size), out)

    def centre(self, pixels: NDArray[np.uint8], out: Tensor) -> None:
        """timm's evaluation: the short side resized to size / pct, then the middle, into out [1, C, size, size]."""
        (height, width, channels), size = pixels.shape, self.data.image_size
        short = math.floor(size / self.data.crop_pct)
        if height <= width:
            h, w = short, int(short * width / height)
        else:
            h, w = int(short * height / width), short
        if (h, w) == (size, size):
            self.fit(pixels, out)
            return
        whole = torch.empty((1, h, w, channels), dtype=torch.uint8).permute(0, 3, 1, 2)
        self._resize(pixels, (h, w), whole)
        top, left = round((h - size) / 2), round((w - size) / 2)
        out.copy_(whole[:, :, top : top + size, left : left + size])

    def _resize(self, pixels: NDArray[np.uint8], size: tuple[int, int], out: Tensor) -> None:
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        _RESIZE[self.data.interpolation](image, size, False, None, None, out=out)
