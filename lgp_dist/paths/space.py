"""The paths of a run: those of a pool of rows, or models of several depths."""

from typing import Any

from lgp_dist.config.run_config import RunConfig
from lgp_dist.paths.depths import DepthSpace
from lgp_dist.paths.path import Space
from lgp_dist.paths.stitched import PathSpace


def space_of(config: RunConfig) -> Space:
    """The paths of a run; UserError if settings of the model contradict each other."""
    return DepthSpace.from_config(config) if config.model.stages else PathSpace.from_config(config)


def heads_of(config: RunConfig) -> tuple[int, ...]:
    """Attention heads of each row of the run's pool; models of several depths all have the auxiliary net's."""
    heads = tuple(row.heads for row in config.model.rows)
    return heads * len(config.model.depths) if config.model.stages else heads


def space_from(fields: dict[str, Any]) -> Space:
    """The space with these fields, from `dataclasses.asdict` or JSON made from it."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return DepthSpace(**values) if "stages" in fields else PathSpace(**values)
