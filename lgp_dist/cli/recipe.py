"""A recipe as an argument, and the types of settings that tyro does not know."""

from typing import Annotated

import tyro

from lgp_dist.config.budget import Amount, parse_amount
from lgp_dist.config.run_config import RunConfig

Recipe = Annotated[RunConfig, tyro.conf.arg(name="")]
"""The type of a command's field that holds the recipe; its settings keep their dotted keys, as in `--distil.alpha`."""

REGISTRY = tyro.constructors.ConstructorRegistry()
"""For every call of tyro.cli."""


@REGISTRY.primitive_rule
def _amount(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    if info.type is not Amount:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="AMOUNT",
        instance_from_str=lambda words: parse_amount(words[0]),
        is_instance=lambda value: isinstance(value, float | int),
        str_from_instance=lambda value: [f"{value:.12g}"],
    )
