"""Configurations by dotted keys: differences from the recipe, changes, and the options of a command line."""

from collections.abc import Mapping
from typing import Any, Literal

from lgp_dist.config.flat import flatten, unflatten
from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError
from lgp_dist.recipes import known_recipes


def changed_values(config: RunConfig) -> dict[str, Any]:
    """Values that differ from the configuration's own recipe, by dotted key. ValueError if the keys differ."""
    own, now = flatten(known_recipes()[config.recipe]()), flatten(config)
    if own.keys() != now.keys():
        raise ValueError(f"{config.recipe} has other settings: {sorted(own.keys() ^ now.keys())}")
    return {key: value for key, value in now.items() if value != own[key]}


def with_values(
    config: RunConfig, values: Mapping[str, Any], missing: Literal["raise", "ignore"] = "raise"
) -> RunConfig:
    """The configuration with these values under dotted keys. missing: what happens with keys that it does not have."""
    own = flatten(config)
    if missing == "raise" and values.keys() - own.keys():
        key = min(values.keys() - own.keys())
        raise UserError(f"{config.recipe} has no setting {key}, which a variant changes: study another recipe.")
    return unflatten(own | {key: value for key, value in values.items() if key in own}, config)


def arguments(config: RunConfig) -> list[str]:
    """The recipe's name and the options of `lgp STAGE` that give this configuration."""
    found = [config.recipe]
    for key, value in changed_values(config).items():
        option = key.replace("_", "-")
        if isinstance(value, bool):
            parent, _, name = option.rpartition(".")
            found.append(f"--{parent}{'.' * bool(parent)}{'' if value else 'no-'}{name}")
        elif isinstance(value, list):
            found += [f"--{option}", *map(str, value)]
        else:
            found += [f"--{option}", str(value)]
    return found
