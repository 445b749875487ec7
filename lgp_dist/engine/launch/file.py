"""An accelerate file, every key and value checked: accelerate itself knows the keys of the top level alone."""

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lgp_dist.errors import UserError


@dataclass(frozen=True)
class Rule:
    """What a key may hold."""

    kind: type
    """Of the value; an int passes as a float, a bool as neither."""
    choices: tuple[Any, ...] = ()
    """The values there are; empty for all of its kind."""
    low: float = float("-inf")
    high: float = float("inf")

    def wanted(self) -> str:
        """In words."""
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text in quotes"}
        if self.choices:
            return " or ".join(json.dumps(choice) for choice in self.choices)
        if self.high < float("inf"):
            return f"{names[self.kind]} from {self.low:g} to {self.high:g}"
        return names[self.kind] + (f", {self.low:g} or more" if self.low > float("-inf") else "")

    def holds(self, value: Any) -> bool:
        """Whether a value keeps to it."""
        if isinstance(value, bool) != (self.kind is bool):
            return False
        if not isinstance(value, (int, float) if self.kind is float else self.kind):
            return False
        if self.choices:
            return value in self.choices
        return self.kind not in (int, float) or self.low <= value <= self.high


TOP: dict[str, Rule] = {
    "compute_environment": Rule(str, ("LOCAL_MACHINE",)),
    "distributed_type": Rule(str, ("DEEPSPEED", "MULTI_GPU", "NO")),
    "num_machines": Rule(int, low=1),
    "num_processes": Rule(int, low=1),
    "machine_rank": Rule(int, low=0),
    "main_process_ip": Rule(str),
    "main_process_port": Rule(int, low=0, high=65535),
    "rdzv_backend": Rule(str, ("static", "c10d")),
    "same_network": Rule(bool),
    "gpu_ids": Rule(str),
    "use_cpu": Rule(bool),
    "mixed_precision": Rule(str, ("no", "fp16", "bf16")),
    "main_training_function": Rule(str, ("main",)),
    "debug": Rule(bool),
    "enable_cpu_affinity": Rule(bool),
}
"""Keys of the top level that this project's launches may have."""

OFFLOAD = Rule(str, ("none", "cpu", "nvme"))
DEEPSPEED: dict[str, Rule] = {
    "deepspeed_config_file": Rule(str),
    "deepspeed_multinode_launcher": Rule(str, ("pdsh", "standard", "openmpi", "mvapich", "mpich", "nossh", "slurm")),
    "deepspeed_hostfile": Rule(str),
    "deepspeed_exclusion_filter": Rule(str),
    "deepspeed_inclusion_filter": Rule(str),
    "deepspeed_moe_layer_cls_names": Rule(str),
    "zero_stage": Rule(int, (0, 1, 2, 3)),
    "gradient_accumulation_steps": Rule(int, low=1),
    "gradient_clipping": Rule(float, low=0),
    "offload_optimizer_device": OFFLOAD,
    "offload_optimizer_nvme_path": Rule(str),
    "offload_param_device": OFFLOAD,
    "offload_param_nvme_path": Rule(str),
    "zero3_init_flag": Rule(bool),
    "zero3_save_16bit_model": Rule(bool),
}
"""Keys of the section `deepspeed_config`; accelerate takes any other without a word, and without effect."""

REFUSED = {
    "fsdp_config": "FSDP is no engine of this project",
    "megatron_lm_config": "Megatron-LM is no engine of this project",
    "parallelism_config": "data parallelism is all that this project has",
    "fp8_config": "the recipe decides precision (engine.precision)",
    "mpirun_config": "ranks are not started by mpirun",
    "dynamo_config": "the recipe decides compilation (engine.compile)",
    "dynamo_backend": "the recipe decides compilation (engine.compile)",
    "fp16": "the recipe decides precision (engine.precision)",
    "downcast_bf16": "there is no TPU engine",
    "tpu_name": "there is no TPU engine",
    "tpu_zone": "there is no TPU engine",
    "tpu_use_cluster": "there is no TPU engine",
    "tpu_use_sudo": "there is no TPU engine",
    "tpu_vm": "there is no TPU engine",
    "tpu_env": "there is no TPU engine",
    "command_file": "there is no TPU engine",
    "commands": "there is no TPU engine",
}
"""Other keys that accelerate knows -> why they are refused where they say anything."""

NULL = {"main_process_ip", "main_process_port", "gpu_ids", "same_network", "rdzv_backend", "mixed_precision"}
"""Keys of the top level at which accelerate takes null as if they were left out; so it does in `deepspeed_config`."""

NOTHING = (None, False, {}, [], "", "no", "NO")
"""Values by which `accelerate config` says that a key is not used."""


def read_launch_file(path: Path) -> dict[str, Any]:
    """The file's settings as they stand; UserError where it cannot be read or holds no settings."""
    try:
        text = path.read_text(encoding="utf-8")
        twice = list(_twice(yaml.compose(text, Loader=yaml.SafeLoader)))
        stored = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The launch file {path} cannot be read ({error}): name one of launch_configs/.") from error
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise UserError(f"The launch file {path} is no YAML ({where}): correct it there.") from error
    if not isinstance(stored, dict) or not all(isinstance(key, str) for key in stored):
        raise UserError(f"The launch file {path} holds no settings: write each as `name: value`.")
    if twice:
        raise UserError(f"{path} sets {twice[0]} twice, of which the last counts: leave one of them.")
    return stored


def _twice(node: yaml.Node | None, prefix: str = "") -> Iterator[str]:
    """Keys that stand twice in one mapping."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        if key.value in seen:
            yield f"{prefix}{key.value}"
        seen.add(key.value)
        yield from _twice(value, f"{prefix}{key.value}.")


def schema_problems(path: Path, stored: Mapping[str, Any]) -> list[str]:
    """One sentence for each key that is unknown, not this project's, or holds what it cannot."""
    found = [
        f"{path} has no {key}, without which accelerate does not start: add it."
        for key in ("distributed_type", "num_processes")
        if key not in stored
    ]
    section = stored.get("deepspeed_config")
    if section is not None and not isinstance(section, dict):
        found.append(f"{path} has deepspeed_config {section!r}: write its settings below it as `name: value`.")
    known = [*TOP, *REFUSED, "deepspeed_config"]
    top = {key: value for key, value in stored.items() if key != "deepspeed_config"}
    found += _section(path, "", top, TOP, known)
    if isinstance(section, dict):
        found += _section(path, "deepspeed_config.", section, DEEPSPEED, list(DEEPSPEED))
    return found


def option_problems(given: Mapping[str, Any]) -> list[str]:
    """One sentence for each option of a command line that holds what its key in a file could not."""
    rules = {**TOP, **DEEPSPEED}
    return [
        f"--{key} is {value!r}, but it must be {rules[key].wanted()}."
        for key, value in given.items()
        if not rules[key].holds(value)
    ]


def sound_settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings of both levels that hold what they may, in one dictionary."""
    section = stored.get("deepspeed_config")
    pairs = [(TOP, stored), (DEEPSPEED, section if isinstance(section, dict) else {})]
    return {
        key: value for rules, part in pairs for key, value in part.items() if key in rules and rules[key].holds(value)
    }


def _section(
    path: Path, prefix: str, section: Mapping[Any, Any], rules: Mapping[str, Rule], known: list[str]
) -> Iterator[str]:
    for key, value in section.items():
        if key in rules:
            unset = value is None and (prefix or key in NULL)
            if not unset and not rules[key].holds(value):
                wanted = rules[key].wanted() + _hint(key, value)
                yield f"{path} sets {prefix}{key} to {value!r}, but it must be {wanted}."
        elif key in REFUSED and not prefix:
            if not any(value == nothing and type(value) is type(nothing) for nothing in NOTHING):
                yield f"{path} sets {key}, but {REFUSED[key]}: leave it out."
        else:
            effect = "which accelerate takes without effect" if prefix else "which accelerate does not know"
            yield f"{path} sets {prefix}{key}, {effect}: {_instead(str(key), prefix, known)}."


def _instead(key: str, prefix: str, known: list[str]) -> str:
    """What to do about an unknown key."""
    if key in DEEPSPEED and not prefix:
        return "move it below deepspeed_config"
    if key in TOP and prefix:
        return "move it to the top level"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    return f"write {near[0]} if that is meant, or leave it out" if near else "leave it out"


def _hint(key: str, value: Any) -> str:
    """What to say of values that YAML reads as something else."""
    if key in ("mixed_precision", "distributed_type") and value is False:
        return ', where YAML reads no without quotes as false: write "no", or leave it out'
    return ""
