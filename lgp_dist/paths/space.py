"""The paths of a run: those of a pool of rows, or models of several depths or widths."""

from typing import Any

from lgp_dist.config.run_config import RunConfig
from lgp_dist.paths.depths import DepthSpace
from lgp_dist.paths.nested import NestedSpace
from lgp_dist.paths.path import Space
from lgp_dist.paths.stitched import PathSpace


def space_of(config: RunConfig) -> Space:
    """The paths of a run; UserError if settings of the model contradict each other."""
    if config.model.widths:
        return NestedSpace.from_config(config)
    return DepthSpace.from_config(config) if config.model.stages else PathSpace.from_config(config)


def rows_space(config: RunConfig) -> Space:
    """The paths of the rows that stage distil makes: those of the run, or the whole ViT for nested widths."""
    space = space_of(config)
    return space.whole if isinstance(space, NestedSpace) else space


def heads_of(config: RunConfig) -> tuple[int, ...]:
    """Attention heads of each path's model, or of each row of a pool."""
    heads = tuple(row.heads for row in config.model.rows)
    if config.model.widths:
        return NestedSpace.from_config(config).heads
    return heads * len(config.model.depths) if config.model.stages else heads


def space_from(fields: dict[str, Any]) -> Space:
    """The space with these fields, from `dataclasses.asdict` or JSON made from it."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    kind = NestedSpace if "head_width" in fields else DepthSpace if "stages" in fields else PathSpace
    return kind(**values)
