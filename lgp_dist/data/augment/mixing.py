"""Mixup, CutMix and label smoothing. Each sample draws for itself and mixes with its neighbour in the global batch."""

import numpy as np
import torch
from torch import Tensor

from lgp_dist.config.run_config import TrainConfig
from lgp_dist.data.augment.keyed_random import Keys, Numbers, betas, uniforms

SWITCH = 0.5
"""Probability of CutMix where both are on; otherwise mixup. timm's default."""


class Mixer:
    """timm's Mixup in mode elem, with neighbours as partners: samples 2i and 2i + 1 of a micro-batch mix."""

    def __init__(self, train: TrainConfig, num_classes: int) -> None:
        self.mixup, self.cutmix = train.mixup, train.cutmix
        self.mixes = train.mixup > 0 or train.cutmix > 0
        self.smoothing, self.num_classes = train.label_smoothing, num_classes

    def __call__(self, images: Tensor, labels: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        """Mixed images and targets from images [B, C, H, W] float32 and labels [B] int64; keys: [B].

        Targets are [B, classes] float32, or the labels where nothing mixes or smooths. With mixing B must be even:
        `check_batch` ensures it.
        """
        if not self.mixes and not self.smoothing:
            return images, labels
        off = self.smoothing / self.num_classes
        targets = torch.full((len(labels), self.num_classes), off, device=images.device)
        targets.scatter_(1, labels[:, None], 1.0 - self.smoothing + off)
        if not self.mixes:
            return images, targets
        share, boxes = self._draw(keys, *images.shape[2:])
        lam = torch.from_numpy(share.astype(np.float32)).to(images.device)[:, None]
        top, bottom, left, right = torch.from_numpy(boxes).to(images.device).view(4, -1, 1, 1, 1)
        rows = torch.arange(images.shape[2], device=images.device).view(1, 1, -1, 1)
        columns = torch.arange(images.shape[3], device=images.device).view(1, 1, 1, -1)
        inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        keep = torch.where(bottom >= 0, (~inside).float(), lam.view(-1, 1, 1, 1))
        mixed = images * keep + _neighbours(images) * (1 - keep)
        return mixed, targets * lam + _neighbours(targets) * (1 - lam)

    def _draw(self, keys: Keys, height: int, width: int) -> tuple[Numbers, np.ndarray]:
        """Each sample's own share [B] and the box that its neighbour fills [4, B]: top, bottom, left, right.

        The box is -1 where mixup applies.
        """
        u = uniforms(keys, 3)
        cut = np.full(len(keys), self.cutmix > 0)
        if self.mixup > 0 and self.cutmix > 0:
            cut = u[:, 0] < SWITCH
        lam = np.empty(len(keys))
        for mine, alpha in ((cut, self.cutmix), (~cut, self.mixup)):
            if mine.any():
                lam[mine] = betas(keys[mine] ^ np.uint64(1), alpha)
        side = np.sqrt(1 - lam)
        ends = []
        for length, place in ((height, u[:, 1]), (width, u[:, 2])):
            cut_side, middle = (length * side).astype(np.int64), (place * length).astype(np.int64)
            ends += [np.clip(middle - cut_side // 2, 0, length), np.clip(middle + (cut_side + 1) // 2, 0, length)]
        boxes = np.where(cut, np.stack(ends), -1)
        area = (boxes[1] - boxes[0]) * (boxes[3] - boxes[2])
        return np.where(cut, 1 - area / (height * width), lam), boxes


def _neighbours(values: Tensor) -> Tensor:
    """Rows 2i and 2i + 1 exchanged."""
    return values.view(-1, 2, *values.shape[1:]).flip(1).view_as(values)
