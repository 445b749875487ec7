"""A configuration as flat keys, and which of them the artifact of a stage depends on."""

import dataclasses
import json
from typing import Any

from lgp_dist.config import RunConfig


def flatten(config: Any, *, with_free: bool = True, prefix: str = "") -> dict[str, Any]:
    """Dotted keys and plain values of a dataclass tree; tuples of dataclasses get their index as key.

    with_free: also the fields that do not belong to the meaning of a run.
    """
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        if item.metadata.get("free") and not with_free:
            continue
        value, key = getattr(config, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, with_free=with_free, prefix=key + "."))
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for index, part in enumerate(value):
                flat.update(flatten(part, with_free=with_free, prefix=f"{key}.{index}."))
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat


SECTIONS = {
    "ancestry": ("seed", "data", "engine", "ancestry", "model.patch_size"),
    "distil": ("model.depth", "model.rows", "model.stages", "distil"),
    "pool": ("model.depths", "model.final_norm", "pool"),
    "finetune": ("finetune",),
    "evaluate": ("evaluate",),
    "descend": ("budget",),
    "export": ("export",),
}
"""Parts of the configuration that each stage adds to those of the stages before it."""

STAGES = tuple(SECTIONS)


def meaning(config: RunConfig, stage: str) -> dict[str, Any]:
    """The settings that the artifact of a stage depends on: its own and those of the stages before it."""
    parts = [part for name in STAGES[: STAGES.index(stage) + 1] for part in SECTIONS[name]]
    flat = flatten(config, with_free=False)
    chosen = {key: value for key, value in flat.items() if any(key == p or key.startswith(p + ".") for p in parts)}
    return json.loads(json.dumps(chosen))
