"""Shared by the tests of data: keys of samples, generated photographs, JPEGs."""

import io

import numpy as np
from PIL import Image

from lgp_dist.data.augment.keyed_random import sample_keys


def keys_for(count: int, purpose: str = "test", epoch: int = 0) -> np.ndarray:
    """Keys of the first samples of an epoch."""
    return sample_keys(purpose, 0, np.full(count, epoch), np.arange(count))


def photograph(seed: int, width: int, height: int) -> Image.Image:
    """Smooth shapes with edges and a little noise: what a JPEG is made for."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    image = np.zeros((height, width, 3))
    for _ in range(12):
        a, b, c, d = rng.normal(size=4) * 6
        wave = np.sin(a * x + b * y + c) + 0.3 * np.sin(5 * a * x * y + d)
        image += wave[..., None] * rng.uniform(5, 25, 3)
        image += ((x - rng.random()) ** 2 + (y - rng.random()) ** 2 < rng.random() ** 2 / 8)[..., None] * rng.normal(
            0, 40, 3
        )
    image += 118 + rng.normal(0, 2, image.shape)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 95, **options})
    return buffer.getvalue()
