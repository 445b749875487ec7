"""`lgp predict FOLDER IMAGE`: the most likely classes by an exported model, with images read as in evaluation."""

from collections.abc import Sequence
from pathlib import Path

import torch

from lgp_dist.commands.exported import data_of, read_config
from lgp_dist.config.run_config import DataConfig
from lgp_dist.data.augment.crops import Crop
from lgp_dist.data.augment.pixels import Pixels
from lgp_dist.data.shards.decode import BadImage, decode_pixels
from lgp_dist.errors import UserError, first_line
from lgp_dist.export.formats import FORMATS

Guess = tuple[str, float]
"""Name of a class and its probability."""


@torch.no_grad()
def predictions(folder: Path, images: Sequence[Path], count: int) -> list[list[Guess]]:
    """The most likely classes of each image, best first. UserError for a folder or an image that cannot be read."""
    described = read_config(folder)
    data = data_of(described, DataConfig())
    batch = torch.cat([_pixels(image, data) for image in images])
    try:
        logits = FORMATS["timm"].open(folder)(Pixels(data, torch.device("cpu")).normalise(batch))
    except Exception as error:  # timm and safetensors raise kinds of their own
        raise UserError(f"{folder} is damaged ({first_line(error)}): export it again, or copy it again.") from error
    names = described.get("label_names") or [f"class {number}" for number in range(logits.shape[-1])]
    values, places = logits.softmax(-1).topk(min(count, logits.shape[-1]))
    return [
        [(names[place], value) for value, place in zip(*row, strict=True)]
        for row in zip(values.tolist(), places.tolist(), strict=True)
    ]


def _pixels(image: Path, data: DataConfig) -> torch.Tensor:
    """The image as evaluation sees it, [1, C, size, size] uint8."""
    out = torch.empty((1, data.image_size, data.image_size, data.channels), dtype=torch.uint8).permute(0, 3, 1, 2)
    try:
        Crop(data).centre(decode_pixels(image.read_bytes(), data.channels, str(image)), out)
    except OSError as error:
        raise UserError(f"{image} cannot be read ({error.strerror}): name an image file.") from None
    except BadImage as error:
        raise UserError(f"{image} cannot be decoded ({error.reason}): name a JPEG, PNG or WebP file.") from None
    return out
