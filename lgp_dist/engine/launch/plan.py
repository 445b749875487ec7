"""What each node of a launch will run, computed by accelerate and torch themselves, without starting it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import patch_environment
from accelerate.utils.launch import (
    _filter_args,
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from torch.distributed import run as torchrun

from lgp_dist.errors import UserError


@dataclass(frozen=True)
class Given:
    """Options of `accelerate launch` that override the file's settings; None for an option that is not given."""

    num_machines: int | None = None
    num_processes: int | None = None
    machine_rank: int | None = None
    main_process_ip: str | None = None
    main_process_port: int | None = None
    zero_stage: int | None = None

    def settings(self) -> dict[str, Any]:
        """Returns the given options by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Node:
    """One node's part of a launch."""

    rank: int
    """Of the node."""
    command: tuple[str, ...]
    """Started on the node."""
    process: tuple[str, ...]
    """Started by the launcher for each rank."""
    ranks: tuple[int, int]
    """First and last of its ranks. With rendezvous c10d, nodes get their ranks in the order in which they arrive."""
    world: int
    """Ranks on all nodes."""
    rendezvous: str
    """How and where nodes meet; empty for one process without torch's launcher."""
    environment: dict[str, str]
    """Variables that the launcher adds or changes for every rank."""

    def rank_environment(self) -> dict[str, str]:
        """Returns the variables that the launcher sets for the node's first rank."""
        first, last = self.ranks
        local = {"WORLD_SIZE": str(self.world), "LOCAL_WORLD_SIZE": str(last - first + 1), "RANK": str(first)}
        return {**self.environment, **local}


def plan(path: Path, given: Given, nodes: int, arguments: Sequence[str]) -> list[Node]:
    """Returns each node's part, or the part of `given.machine_rank`. Raises UserError if accelerate refuses the file.

    path: a file without problems (file.py). nodes: their number. arguments: those of `lgp`.
    """
    ranks = range(nodes) if given.machine_rank is None else [given.machine_rank]
    try:
        return [_node(path, given, rank, nodes, arguments) for rank in ranks]
    except (ValueError, RuntimeError, OSError, AssertionError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(f"accelerate refuses {path} ({reason[0] if reason else type(error).__name__}).") from error


def _node(path: Path, given: Given, rank: int, nodes: int, arguments: Sequence[str]) -> Node:
    settings = given.settings() | ({"machine_rank": rank} if nodes > 1 else {})
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    call = ["--config_file", str(path), *options, "-m", "lgp_dist", *arguments]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(call))
    process: list[str] = []
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(args)
    elif args.multi_gpu:
        environment = prepare_multi_gpu_env(args)
    else:
        process, environment = prepare_simple_launcher_cmd_env(args)
    changed = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    command = ("accelerate", "launch", *call)
    if process:
        return Node(rank, command, tuple(process), (0, 0), 1, "", changed)
    script = ["--training_script", args.training_script, "--training_script_args", args.training_script_args]
    with patch_environment(**environment):
        config, python, rest = torchrun.config_from_args(_filter_args(args, torchrun.get_args_parser(), script))
    local = config.nproc_per_node
    ranks, rendezvous = (rank * local, rank * local + local - 1), f"{config.rdzv_backend} {config.rdzv_endpoint}"
    return Node(rank, command, (str(python), *rest), ranks, local * config.max_nodes, rendezvous, changed)
