"""A configuration as flat keys, and which of them the artifact of a stage depends on."""

import dataclasses
import json
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from lgp_dist.config.run_config import ModelConfig, RowConfig, RunConfig


def flatten(config: Any, *, with_runtime_only: bool = True, prefix: str = "") -> dict[str, Any]:
    """Dotted keys and plain values of a dataclass tree; tuples of dataclasses get their index as key.

    with_runtime_only: also the fields that no artifact depends on.
    """
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        if item.metadata.get("runtime_only") and not with_runtime_only:
            continue
        value, key = getattr(config, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, with_runtime_only=with_runtime_only, prefix=key + "."))
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for index, part in enumerate(value):
                flat.update(flatten(part, with_runtime_only=with_runtime_only, prefix=f"{key}.{index}."))
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat


def unflatten(flat: Mapping[str, Any], default: Any = RunConfig(), prefix: str = "") -> Any:  # noqa: B008  frozen
    """The dataclass tree that `flatten` gave these keys and values; fields of missing keys are as in `default`."""
    hints, values = typing.get_type_hints(type(default)), {}
    for item in dataclasses.fields(default):
        value, key = getattr(default, item.name), prefix + item.name
        parts = [
            part
            for part in typing.get_args(hints[item.name])
            if isinstance(part, type) and dataclasses.is_dataclass(part)
        ]
        indices = {name.removeprefix(key + ".").split(".")[0] for name in flat if name.startswith(key + ".")}
        if dataclasses.is_dataclass(value):
            values[item.name] = unflatten(flat, value, key + ".")
        elif parts and indices:
            values[item.name] = tuple(_part(flat, parts[0], f"{key}.{index}.") for index in range(len(indices)))
        elif key in flat:
            values[item.name] = tuple(flat[key]) if isinstance(flat[key], list) else flat[key]
    return dataclasses.replace(default, **values)


def _part(flat: Mapping[str, Any], kind: Any, prefix: str) -> Any:
    """A dataclass of plain fields."""
    given = {item.name: flat[prefix + item.name] for item in dataclasses.fields(kind) if prefix + item.name in flat}
    return kind(**given)


SECTIONS = {
    "ancestry": ("seed", "data", "engine", "ancestry", "model.patch_size"),
    "distil": ("model.depth", "model.rows", "model.stages", "distil"),
    "pool": (
        *("model.depths", "model.widths", "model.final_norm"),
        *("model.stitch_sharing", "model.stitch_rank", "model.two_way", "pool"),
    ),
    "finetune": ("finetune",),
    "evaluate": ("evaluate",),
    "descend": ("budget",),
    "export": ("export",),
}
"""Parts of the configuration that each stage adds to those of the stages before it."""

STAGES = tuple(SECTIONS)


def up_to(stage: str) -> tuple[str, ...]:
    """The stages up to and including one; all for training that is none of them."""
    return STAGES[: STAGES.index(stage) + 1] if stage in STAGES else STAGES


def stage_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that artifacts depend on, flat, with the values that JSON reads back."""
    return json.loads(json.dumps(flatten(config, with_runtime_only=False)))


def depends_on(settings: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Those of flat settings that the artifact of a stage depends on: its own and those of the stages before it."""
    parts = tuple(part for name in up_to(stage) for part in SECTIONS[name])
    return {key: value for key, value in settings.items() if is_within(key, parts)}


def is_within(key: str, parts: Iterable[str]) -> bool:
    """Whether a dotted key is one of these settings, or lies in one of these sections."""
    return any(f"{key}.".startswith(f"{part}.") for part in parts)


def changed_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Sorted keys at which two flat configurations differ.

    A key that one of them lacks has its default there: a record written before a setting existed equals that setting's
    default.
    """
    defaults = flatten(RunConfig(model=ModelConfig(rows=(RowConfig(width=0, heads=0),))))

    def value(flat: Mapping[str, Any], key: str) -> Any:
        return flat.get(key, defaults.get(re.sub(r"^model\.rows\.\d+\.", "model.rows.0.", key)))

    return sorted(key for key in one.keys() | other.keys() if value(one, key) != value(other, key))


def differences(now: Mapping[str, Any], other: Mapping[str, Any], name: str) -> dict[str, str]:
    """What differs between flat configurations, apart from recipe and run directory: key -> "value (NAME value)".

    name: of the other configuration.
    """
    keys = [key for key in {**other, **now} if other.get(key) != now.get(key) and key not in ("recipe", "run_dir")]
    return {key: f"{shown(now.get(key))} ({name} {shown(other.get(key))})" for key in keys}


def shown(value: Any) -> str:
    """A value as on the command line; "none" if it is empty."""
    return (" ".join(map(str, value)) if isinstance(value, list) else str(value)) or "none"
