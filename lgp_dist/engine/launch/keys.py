"""Checks every key and value of an accelerate file; accelerate itself only knows the names of top-level keys."""

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.constants import DEEPSPEED_MULTINODE_LAUNCHERS

from lgp_dist.engine.launch.environment import FIELDS

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

_GROUP = next(group for group in launch_command_parser()._action_groups if group.title == "DeepSpeed Arguments")
DEEPSPEED: dict[str, Rule] = {action.dest: action.type for action in _GROUP._group_actions if action.dest in FIELDS} | {
    "deepspeed_multinode_launcher": tuple(DEEPSPEED_MULTINODE_LAUNCHERS),
    "zero_stage": (0, 1, 2, 3),
    "zero3_init_flag": bool,
    "zero3_save_16bit_model": bool,
}
"""Keys of the section `deepspeed_config` that reach a run, as accelerate's parser has them. Any other has no effect."""

REFUSED = {field.name for field in fields(ClusterConfig)} | {"fp16", "dynamo_backend"}
REFUSED -= {*TOP, "deepspeed_config"}
"""Other keys that accelerate reads: engines that this project does not have, and what its recipes decide."""

NULL = {field.name for field in fields(ClusterConfig) if type(None) in get_args(field.type)}
NULL |= {"mixed_precision", *DEEPSPEED}
"""Keys for which accelerate takes null as missing."""

UNUSED: tuple[Any, ...] = (None, False, {}, [], "", "no", "NO")
"""Values that `accelerate config` writes for a key that is not used."""


def check_settings(path: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Returns a sentence for each wrong key or value, and the valid settings of both levels and the command line.

    given: options of the command line, which override settings of the file.
    """
    keys = ("distributed_type", "num_processes")
    problems = [
        f"{path} has no {key}, without which accelerate does not start: add it." for key in keys if key not in stored
    ]
    valid: dict[str, Any] = {}
    top = {key: value for key, value in stored.items() if key != "deepspeed_config"}
    section = stored.get("deepspeed_config", {})
    if not isinstance(section, dict):
        if section is not None:
            problems.append(f"{path} has deepspeed_config {section!r}: write its settings below it as `name: value`.")
        section = {}
    for prefix, level, rules in (("", top, TOP), ("deepspeed_config.", section, DEEPSPEED)):
        for key, value in level.items():
            name = f"{prefix}{key}"
            if key not in rules:
                problems += _unknown(path, name, key, value)
            elif _holds(rules[key], value):
                valid[key] = value
            elif value is not None or key not in NULL:
                problems.append(f"{path} sets {name} to {value!r}, but it must be {_wanted(rules[key], value)}.")
    for key, value in given.items():
        rule = (TOP | DEEPSPEED)[key]
        if _holds(rule, value):
            valid[key] = value
        else:
            problems.append(f"--{key} is {value!r}, but it must be {_wanted(rule, value)}.")
    return problems, valid


def _unknown(path: Path, name: str, key: Any, value: Any) -> Iterator[str]:
    """The sentence about a key that launches of this project may not have at its place."""
    if name in REFUSED:
        if value not in UNUSED:
            yield f"{path} sets {name}, which this project does not support or leaves to the recipe: leave it out."
        return
    places = {**{known: f"deepspeed_config.{known}" for known in DEEPSPEED}, **{known: known for known in TOP}}
    near = difflib.get_close_matches(str(key), places, n=1)
    advice = f"write {places[near[0]]} if that is meant, or leave it out" if near else "leave it out"
    if key in {action.dest for action in _GROUP._group_actions}:  # of another launcher or engine
        advice = advice if key in DEEPSPEED else "leave it out"
    effect = "does not know" if name == key else "takes without effect"
    yield f"{path} sets {name}, which accelerate {effect}: {advice}."


def _holds(rule: Rule, value: Any) -> bool:
    """Whether a rule allows a value. An int passes as a float; a bool passes as neither."""
    if isinstance(rule, type):
        return type(value) is rule or rule is float and type(value) is int
    return type(value) is type(rule[0]) and value in rule


def _wanted(rule: Rule, value: Any) -> str:
    """A rule in words, for a person who wrote this value."""
    if isinstance(rule, range):
        return f"a whole number, {rule[0]} " + (f"to {rule[-1]}" if len(rule) < MANY - 1 else "or more")
    if isinstance(rule, tuple):
        hint = '; YAML reads no without quotes as false: write "no"' if value is False and "no" in rule else ""
        return " or ".join(map(json.dumps, rule)) + hint
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text in quotes"}[rule]
