"""Reads an accelerate file and checks every key and value; accelerate itself only knows the names of top-level keys."""

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils.constants import DEEPSPEED_MULTINODE_LAUNCHERS

from lgp_dist.errors import UserError

Rule = type | tuple[Any, ...] | range
"""What a key may hold: any value of a type, one of several values, or a whole number within a range."""
MANY = 2**31

TOP: dict[str, Rule] = {
    "compute_environment": ("LOCAL_MACHINE",),
    "distributed_type": ("DEEPSPEED", "MULTI_GPU", "NO"),
    "num_machines": range(1, MANY),
    "num_processes": range(1, MANY),
    "machine_rank": range(MANY),
    "main_process_ip": str,
    "main_process_port": range(65536),
    "rdzv_backend": ("static", "c10d"),
    "same_network": bool,
    "gpu_ids": str,
    "use_cpu": bool,
    "mixed_precision": ("no", "fp16", "bf16"),
    "main_training_function": ("main",),
    "debug": bool,
    "enable_cpu_affinity": bool,
}
"""Top-level keys that launches of this project may have."""

DEEPSPEED: dict[str, Rule] = {
    "deepspeed_config_file": str,
    "deepspeed_multinode_launcher": tuple(DEEPSPEED_MULTINODE_LAUNCHERS),
    "deepspeed_hostfile": str,
    "deepspeed_exclusion_filter": str,
    "deepspeed_inclusion_filter": str,
    "deepspeed_moe_layer_cls_names": str,
    "zero_stage": (0, 1, 2, 3),
    "gradient_accumulation_steps": int,
    "gradient_clipping": float,
    "offload_optimizer_device": ("none", "cpu", "nvme"),
    "offload_optimizer_nvme_path": str,
    "offload_param_device": ("none", "cpu", "nvme"),
    "offload_param_nvme_path": str,
    "zero3_init_flag": bool,
    "zero3_save_16bit_model": bool,
}
"""Keys of the section `deepspeed_config`. Accelerate silently ignores any other."""

REFUSED = {field.name for field in fields(ClusterConfig)} | {"fp16", "dynamo_backend"}
REFUSED -= {*TOP, "deepspeed_config"}
"""Other keys that accelerate reads: engines that this project does not have, and what its recipes decide."""

NULL = {"main_process_ip", "main_process_port", "gpu_ids", "same_network", "rdzv_backend", "mixed_precision"}
"""Top-level keys for which accelerate takes null as missing; in `deepspeed_config` it does so for every key."""

UNUSED: tuple[Any, ...] = (None, False, {}, [], "", "no", "NO")
"""Values that `accelerate config` writes for a key that is not used."""


def read_launch_file(path: Path) -> dict[str, Any]:
    """Returns the file's settings unchecked. Raises UserError if it cannot be read or holds no settings."""
    try:
        text = path.read_text(encoding="utf-8")
        twice = list(_duplicates(yaml.compose(text, Loader=yaml.SafeLoader)))
        stored = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The launch file {path} cannot be read ({error}): name one of launch_configs/.") from error
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise UserError(f"The launch file {path} is not valid YAML ({where}): correct it there.") from error
    if not isinstance(stored, dict) or not all(isinstance(key, str) for key in stored):
        raise UserError(f"The launch file {path} holds no settings: write each as `name: value`.")
    if twice:
        raise UserError(f"{path} sets {twice[0]} twice, and only the last counts: remove one of them.")
    return stored


def _duplicates(node: yaml.Node | None, prefix: str = "") -> Iterator[str]:
    """Keys that occur twice in a mapping."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        if key.value in seen:
            yield f"{prefix}{key.value}"
        seen.add(key.value)
        yield from _duplicates(value, f"{prefix}{key.value}.")


def schema_problems(path: Path, stored: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each key that is missing, unknown, not supported here, or has a wrong value."""
    found = [
        f"{path} has no {key}, without which accelerate does not start: add it."
        for key in ("distributed_type", "num_processes")
        if key not in stored
    ]
    section = stored.get("deepspeed_config") or {}
    if not isinstance(section, dict):
        found.append(f"{path} has deepspeed_config {section!r}: write its settings below it as `name: value`.")
        section = {}
    for key, value in stored.items():
        found += _problem(path, "", key, value, TOP) if key != "deepspeed_config" else []
    for key, value in section.items():
        found += _problem(path, "deepspeed_config.", key, value, DEEPSPEED)
    return found


def option_problems(given: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each option of a command line with a value that its key in a file could not have."""
    rules = {**TOP, **DEEPSPEED}
    return [
        f"--{key} is {value!r}, but it must be {_wanted(rules[key])}."
        for key, value in given.items()
        if not _holds(rules[key], value)
    ]


def valid_settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of both levels that have a valid value, in one dictionary."""
    section = stored.get("deepspeed_config")
    levels = [(TOP, stored), (DEEPSPEED, section if isinstance(section, dict) else {})]
    return {
        key: value
        for rules, level in levels
        for key, value in level.items()
        if key in rules and _holds(rules[key], value)
    }


def _problem(path: Path, prefix: str, key: str, value: Any, rules: Mapping[str, Rule]) -> Iterator[str]:
    """The sentence about one key, if anything is wrong with it."""
    if key in rules:
        missing = value is None and (prefix or key in NULL)
        if not missing and not _holds(rules[key], value):
            yield f"{path} sets {prefix}{key} to {value!r}, but it must be {_wanted(rules[key])}{_hint(key, value)}."
    elif key in REFUSED and not prefix:
        if value not in UNUSED:
            yield f"{path} sets {key}, which this project does not support or leaves to the recipe: leave it out."
    elif key in DEEPSPEED:
        yield f"{path} sets {key}, which has no effect there: move it below deepspeed_config."
    elif key in TOP:
        yield f"{path} sets {prefix}{key}, which has no effect there: move it to the top level."
    else:
        near = difflib.get_close_matches(str(key), [*rules, "deepspeed_config"], n=1, cutoff=0.4)
        advice = f"write {near[0]} if that is meant, or leave it out" if near else "leave it out"
        effect = "takes without effect" if prefix else "does not know"
        yield f"{path} sets {prefix}{key}, which accelerate {effect}: {advice}."


def _holds(rule: Rule, value: Any) -> bool:
    """Whether a rule allows a value. An int passes as a float; a bool passes as neither."""
    if isinstance(rule, type):
        return type(value) is rule or rule is float and type(value) is int
    return type(value) is type(rule[0]) and value in rule


def _wanted(rule: Rule) -> str:
    """A rule in words."""
    if isinstance(rule, range):
        return (
            f"a whole number, {rule[0]} or more"
            if len(rule) > 65536
            else f"a whole number from {rule[0]} to {rule[-1]}"
        )
    if isinstance(rule, tuple):
        return " or ".join(json.dumps(choice) for choice in rule)
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text in quotes"}[rule]


def _hint(key: str, value: Any) -> str:
    """What to say about a value that YAML reads as something else."""
    if key in ("mixed_precision", "distributed_type") and value is False:
        return '; YAML reads no without quotes as false: write "no", or leave it out'
    return ""
