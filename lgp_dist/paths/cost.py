"""What training a path costs: by arithmetic, or as `lgp bench paths` measured it on a machine."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError
from lgp_dist.paths.depths import DepthSpace
from lgp_dist.paths.path import Space
from lgp_dist.paths.space import rows_space
from lgp_dist.paths.stitched import PathSpace

TRAINING = 3
"""Cost of forward and backward in forwards: the backward computes twice as much as the forward."""


def path_costs(space: Space, file: str = "") -> dict[str, float]:
    """Cost of forward and backward by path key: 3 x FLOPs (multiply-adds of one image), or the seconds in `file`.

    The ancestry's forward is not included. It costs the same on every rank, so it only makes their work more equal.
    UserError if the file cannot be used.
    """
    if not file:
        return {path.key: float(TRAINING * space.cost(path).flops) for path in space.paths}
    table = read_costs(Path(file))
    missing = [path.key for path in space.paths if path.key not in table]
    if missing:
        raise UserError(
            f"finetune.costs {file} has no cost of {missing[0]!r} and lacks {len(missing)} of {len(space.paths)} "
            "paths: measure this pool with `lgp bench paths RECIPE --out FILE`."
        )
    return {path.key: table[path.key] for path in space.paths}


def read_costs(file: Path) -> dict[str, float]:
    """Seconds by path key from a file of `lgp bench paths`; UserError if it is not one."""
    again = "make it with `lgp bench paths RECIPE --out FILE`"
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"finetune.costs {file} cannot be read ({error.strerror}): name a readable file.") from None
    except ValueError as error:
        raise UserError(f"finetune.costs {file} is not valid JSON ({error}): {again}.") from None
    costs = content.get("costs") if isinstance(content, dict) else None
    if not isinstance(costs, dict):
        raise UserError(f"finetune.costs {file} has no object `costs` of keys and seconds: {again}.")
    return {key: _seconds(file, key, value) for key, value in costs.items()}


def _seconds(file: Path, key: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= sys.float_info.max:
        raise UserError(
            f"finetune.costs {file} says costs.{key} is {value!r}, but must be a finite number of seconds above 0: "
            "measure again with `lgp bench paths RECIPE --out FILE`."
        )
    return float(value)


def work(images: float, trained: float | None, frozen: float | None = 0.0) -> float | None:
    """Multiply-adds of training on this number of images; None if a size is unknown.

    trained: FLOPs of one image's forward through the trained modules. frozen: of those that only run forward.
    """
    return None if frozen is None or trained is None else images * (TRAINING * trained + frozen)


PLAIN = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24)}
"""Width and depth of plain ViTs by their size in timm's names."""


def trained_rows_flops(config: RunConfig) -> float:
    """FLOPs of one image's forward through all rows that stage distil trains."""
    space = rows_space(config)
    if isinstance(space, DepthSpace):
        return float(space.cost(space.auxiliary).flops)
    rows = zip(space.paths, config.model.rows, strict=False)  # the first paths are rows alone
    return float(sum(space.cost(path).flops for path, row in rows if row.trains))


def ancestry_forward(config: RunConfig) -> float | None:
    """FLOPs of the ancestry's forward in fine-tuning: 0 if it does not run, None if its size is unknown."""
    return ancestry_flops(config) if config.teaches_paths else 0.0


def ancestry_flops(config: RunConfig) -> float | None:
    """FLOPs of the ancestry's forward of one image; None if its size is unknown."""
    ancestry, data = config.ancestry, config.data
    size, patch = ancestry.image_size or data.image_size, config.model.patch_size
    width, depth = ancestry.width, ancestry.depth
    if ancestry.model != "vit":
        match = re.fullmatch(r"(?:vit|deit|deit3)_(tiny|small|base|large)_patch(\d+)_\d+", ancestry.model.split(".")[0])
        if not match:
            return None
        (width, depth), patch = PLAIN[match[1]], int(match[2])
    alone = PathSpace((width,), depth, size, patch, data.channels, data.num_classes)
    return float(alone.cost(alone.paths[0]).flops)
