"""timm's RandAugment and colour jitter for batches on the device, each sample with its own draws.

A layer runs each operation once, on the images that drew it, each with its own level. Operations agree with Pillow's;
rotation, shear and shift resample bilinearly.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional

from lgp_dist.data.augment.keyed_random import Keys, Numbers, normals, uniforms
from lgp_dist.errors import UserError

Op = Callable[[Tensor, Tensor], Tensor]
"""Images as float32 of whole numbers 0 .. 255 [k, C, S, S] and levels [k] to images of 0 .. 255."""


def _grey(images: Tensor) -> Tensor:
    """Pillow's conversion to grey, [k, 1, S, S]."""
    if images.shape[1] == 1:
        return images
    weights = images.new_tensor([19595.0, 38470.0, 7471.0]).view(1, 3, 1, 1)
    return ((images * weights).sum(1, keepdim=True) + 32768).div(65536).floor()


def _blend(base: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    return (base + factor.view(-1, 1, 1, 1) * (images - base)).clamp(0, 255).floor()


def _colour(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(_grey(images).expand_as(images), images, factor)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    return _blend((_grey(images).mean((1, 2, 3), keepdim=True) + 0.5).floor(), images, factor)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(torch.zeros_like(images), images, factor)


def _sharpness(images: Tensor, factor: Tensor) -> Tensor:
    kernel = images.new_tensor([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]).expand(images.shape[1], 1, 3, 3)
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = (F.conv2d(images, kernel, groups=images.shape[1]) / 13 + 0.5).floor()
    return _blend(smooth, images, factor)


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    scale = 255.0 / (high - low).clamp(min=1)
    stretched = ((images.double() - low) * scale.double() + 1e-9).floor().clamp(0, 255).float()
    return torch.where(high > low, stretched, images)


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    return functional.equalize(images.to(torch.uint8)).float()


def _invert(images: Tensor, _: Tensor) -> Tensor:
    return 255 - images


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    unit = (2.0 ** (8 - bits)).view(-1, 1, 1, 1)
    return (images / unit).floor() * unit


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(images < threshold.view(-1, 1, 1, 1), images, 255 - images)


def _solarize_add(images: Tensor, add: Tensor) -> Tensor:
    return torch.where(images < 128, (images + add.view(-1, 1, 1, 1)).clamp(max=255), images)


def _affine(images: Tensor, theta: Tensor, fill: Tensor) -> Tensor:
    """theta [k, 2, 3] maps output to input coordinates, both from -1 to 1; outside is `fill` [C]."""
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    found = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside = (grid.abs() <= 1).all(-1)[:, None]
    return torch.where(inside, (found + 0.5).floor(), fill.view(1, -1, 1, 1))


def _theta(name: str, level: Tensor) -> Tensor:
    """Levels [k] of an operation of GEOMETRY to theta [k, 2, 3]: degrees, shear, or share of the side."""
    one, zero = torch.ones_like(level), torch.zeros_like(level)
    angle = level * (math.pi / 180)
    rows = {
        "rotate": (angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero),
        "shear_x": (one, level, level, zero, one, zero),
        "shear_y": (one, zero, zero, level, one, level),
        "shift_x": (one, zero, 2 * level, zero, one, zero),
        "shift_y": (one, zero, zero, zero, one, 2 * level),
    }[name]
    return torch.stack(rows, 1).view(-1, 2, 3)


GEOMETRY = ("rotate", "shear_x", "shear_y", "shift_x", "shift_y")
"""Operations that move pixels: `_theta`."""
OPS: dict[str, Op | None] = {
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": _invert,
    "rotate": None,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "colour": _colour,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    **dict.fromkeys(GEOMETRY[1:]),
}
"""Operations of timm's RandAugment, in its order; None for those of GEOMETRY."""
NAMES = tuple(OPS)


def apply_op(name: str, images: Tensor, levels: Tensor, fill: Tensor) -> Tensor:
    """One operation on images [k, C, S, S] uint8; levels: [k]. fill: [C], 0 .. 255, the colour outside the image."""
    values = images.float()
    operation = OPS[name]
    found = operation(values, levels) if operation else _affine(values, _theta(name, levels), fill)
    return found.clamp(0, 255).to(torch.uint8)


def apply_layer(images: Tensor, names: list[str], levels: Numbers, fill: Tensor) -> Tensor:
    """Applies each image's operation, "" for none. images: [B, C, S, S] uint8, which are overwritten."""
    chosen = np.array(names)
    for name in sorted(set(names) - {""}):
        places = np.flatnonzero(chosen == name)
        where = torch.from_numpy(places).to(images.device)
        level = torch.from_numpy(levels[places].astype(np.float32)).to(images.device)
        images[where] = apply_op(name, images[where], level, fill)
    return images


@dataclass(frozen=True)
class RandAugment:
    """timm's RandAugment: each layer applies one of NAMES with a probability."""

    magnitude: float = 9.0
    """0 to 10."""
    spread: float = 0.0
    """Standard deviation of the magnitude."""
    layers: int = 2
    """Operations in a row."""
    probability: float = 0.5
    """That a layer is applied."""
    increasing: bool = False
    """timm's inc1: a larger magnitude always changes more."""

    @classmethod
    def parse(cls, text: str) -> "RandAugment":
        """From timm's name, such as rand-m9-mstd0.5-inc1; UserError for another."""
        found = re.fullmatch(r"rand((?:-(?:mstd|m|n|p|inc)\d+(?:\.\d+)?)*)", text)
        parts = dict(re.findall(r"-(mstd|m|n|p|inc)(\d+(?:\.\d+)?)", found[1])) if found else {}
        whole = all(float(parts.get(name, 0)).is_integer() for name in ("n", "inc"))
        if found is None or not whole or float(parts.get("m", 9)) > 10 or float(parts.get("p", 0.5)) > 1:
            raise UserError(
                f"data.augment.auto_augment '{text}' is unknown: use a name such as rand-m9-mstd0.5-inc1 (m up to 10,"
                " mstd, n, p and inc0 or inc1), or leave it empty."
            )
        return cls(
            magnitude=float(parts.get("m", 9)),
            spread=float(parts.get("mstd", 0)),
            layers=int(float(parts.get("n", 2))),
            probability=float(parts.get("p", 0.5)),
            increasing=float(parts.get("inc", 0)) > 0,
        )

    def __call__(self, images: Tensor, keys: Keys, fill: Tensor) -> Tensor:
        """Augments images [B, C, S, S] uint8, which are overwritten; keys: [B]."""
        draws = uniforms(keys, 5 * self.layers).reshape(len(keys), self.layers, 5)
        for layer in range(self.layers):
            choice, apply, u, v, side = draws[:, layer].T
            numbers = (choice * len(NAMES)).astype(int)
            names = [NAMES[n] if yes else "" for n, yes in zip(numbers, apply < self.probability, strict=True)]
            magnitude = np.clip(self.magnitude + self.spread * normals(u, v), 0, 10) / 10
            levels = self.levels(names, magnitude, np.where(side < 0.5, -1.0, 1.0))
            apply_layer(images, names, levels, fill)
        return images

    def levels(self, names: list[str], magnitude: Numbers, sign: Numbers) -> Numbers:
        """timm's level of each operation; magnitude: [B] from 0 to 1, sign: [B] -1 or 1."""
        enhance = np.maximum(0.1, 1 + 0.9 * magnitude * sign) if self.increasing else 0.1 + 1.8 * magnitude
        whole = (4 * magnitude).astype(int), np.minimum(256, (256 * magnitude).astype(int))
        table = {
            "rotate": 30 * magnitude * sign,
            "shear_x": 0.3 * magnitude * sign,
            "shear_y": 0.3 * magnitude * sign,
            "shift_x": 0.45 * magnitude * sign,
            "shift_y": 0.45 * magnitude * sign,
            "posterize": 4 - whole[0] if self.increasing else whole[0],
            "solarize": 256 - whole[1] if self.increasing else whole[1],
            "solarize_add": np.minimum(128, (110 * magnitude).astype(int)),
            **dict.fromkeys(("colour", "contrast", "brightness", "sharpness"), enhance),
        }
        nothing = np.zeros_like(magnitude)
        return np.array([table.get(name, nothing)[place] for place, name in enumerate(names)], dtype=np.float64)


def colour_jitter(images: Tensor, strength: float, keys: Keys) -> Tensor:
    """torchvision's ColorJitter: brightness, contrast and saturation by 1 +- strength each, in a random order.

    images: [B, C, S, S] uint8, which are overwritten.
    """
    draws = uniforms(keys, 6)
    order = np.argsort(draws[:, :3], axis=1, kind="stable")
    low = max(0.0, 1 - strength)
    factors = low + (1 + strength - low) * draws[:, 3:]
    kinds = np.array(["brightness", "contrast", "colour"])
    for layer in range(3):
        levels = factors[np.arange(len(keys)), order[:, layer]]
        apply_layer(images, kinds[order[:, layer]].tolist(), levels, images.new_zeros(images.shape[1]).float())
    return images
