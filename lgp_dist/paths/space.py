"""Which paths a run has: those of a pool of rows, or models of several depths."""

from typing import Any

from lgp_dist.config.run_config import RunConfig
from lgp_dist.paths.depths import DepthPath, DepthSpace
from lgp_dist.paths.stitched import Path, PathSpace

AnyPath = Path | DepthPath
"""What a pool's forward takes."""
Space = PathSpace | DepthSpace
"""What a pool is built from: shapes of its rows (`widths`, `depths`, `class_token` and the input) and its paths, with
`by_key`, `cost`, `describe` and `stored_params`."""


def space_of(config: RunConfig) -> Space:
    """The paths of a run; UserError where the settings of the model do not fit each other."""
    return DepthSpace.from_config(config) if config.model.stages else PathSpace.from_config(config)


def heads_of(config: RunConfig) -> tuple[int, ...]:
    """Attention heads of each row of the run's pool; models of several depths all have the auxiliary net's."""
    heads = tuple(row.heads for row in config.model.rows)
    return heads * len(config.model.depths) if config.model.stages else heads


def space_from(fields: dict[str, Any]) -> Space:
    """The space of which `dataclasses.asdict`, and JSON in between, made these fields."""
    kind = DepthSpace if "stages" in fields else PathSpace
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
