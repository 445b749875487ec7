"""Everything about a launch that can be known before it starts: all problems, each a sentence."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import DeepSpeedPlugin
from deepspeed.runtime.config import DeepSpeedConfig

from lgp_dist.config.run_config import EngineConfig, TrainConfig
from lgp_dist.engine.deepspeed_config import deepspeed_config
from lgp_dist.engine.launch.environment import Launch, check_launch
from lgp_dist.engine.launch.file import option_problems, read_launch_file, schema_problems, sound_settings
from lgp_dist.engine.launch.machine import addresses, free_bytes, is_loopback, port_free, shm_bytes
from lgp_dist.engine.launch.plan import Given, Node, plan
from lgp_dist.errors import UserError

PORT = 29500
"""What accelerate takes where the file has no main_process_port."""

SHM_BYTES = 2**30
"""/dev/shm for NCCL on a node, as its troubleshooting guide advises for containers (`--shm-size=1g`)."""


UNREAD = {"enable_cpu_affinity": False, "rdzv_backend": "static"}
"""Keys whose options have a default in accelerate's parser, so that what a file says is never read -> the default."""


@dataclass(frozen=True)
class Demand:
    """What a run asks of its launch."""

    engine: EngineConfig | None = None
    """The recipe's; None for one that fits."""
    train: TrainConfig | None = None
    """The training whose DeepSpeed configuration is built; None for one with a batch of one image for each rank."""
    arguments: tuple[str, ...] = ("run", "RECIPE")
    """Of `lgp`."""
    run_dir: Path | None = None
    run_bytes: int = 0
    """What the run directory has to take."""


@dataclass(frozen=True)
class Report:
    """What a check found."""

    file: Path
    nodes: list[Node] = field(default_factory=list)
    """What each node would run; empty where problems leave that open."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is worth knowing and stops nothing."""


def check_file(path: Path, given: Given, demand: Demand, *, here: bool = True) -> Report:
    """Checks a launch file with what the command line adds; UserError where it cannot be read at all.

    here: this machine is one of the nodes, so that its ports, GPUs, memory and disk count.
    """
    stored = read_launch_file(path)
    if problems := option_problems(given.settings()):
        return Report(path, problems=problems)
    problems = schema_problems(path, stored)
    settings = sound_settings(stored) | given.settings()
    problems += _traps(path, settings)
    if settings.get("num_machines", 1) > 1:
        problems += _several_nodes(path, settings, stored)
    if here:
        problems += _machine(settings, demand)
    if problems:
        return Report(path, problems=problems)
    try:
        nodes = plan(path, given, settings.get("num_machines", 1), demand.arguments)
    except UserError as error:
        return Report(path, problems=[str(error)])
    problems += _said(lambda: _fits(nodes[0], demand, here))
    return Report(path, nodes, problems, list(_notes(path, settings, nodes)))


def _traps(path: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    """What accelerate takes without a word, and starts something else than was meant."""
    nodes = settings.get("num_machines", 1)
    processes, rank = settings.get("num_processes", nodes), settings.get("machine_rank")
    if settings.get("use_cpu") and settings.get("distributed_type") != "NO":
        yield f'{path} sets use_cpu, which accelerate reads for one process alone: set gpu_ids to "" for the CPU.'
    for key, neutral in UNREAD.items():
        if settings.get(key, neutral) != neutral:
            yield f"{path} sets {key}, which accelerate takes from its command line alone: give --{key} there instead."
    if settings.get("distributed_type") == "NO" and processes > 1:
        yield f"{path} has distributed_type NO, which starts one process, not {processes}: take DEEPSPEED or MULTI_GPU."
    if processes % nodes:
        yield (
            f"num_processes {processes} does not divide into num_machines {nodes}: accelerate would start "
            f"{processes // nodes} on each, {processes // nodes * nodes} in all, so take "
            f"{processes // nodes * nodes or nodes} or {(processes // nodes + 1) * nodes}."
        )
    ids = [one for one in str(settings.get("gpu_ids", "all")).split(",") if one.strip()]
    if ids and ids not in (["all"], ["-1"]) and not processes % nodes and len(ids) != processes // nodes:
        yield (
            f"gpu_ids names {len(ids)} GPU(s) of a node, but each of {nodes} node(s) starts {processes // nodes} "
            f"process(es): set num_processes to {len(ids) * nodes}, or name as many GPUs."
        )
    if rank is not None and rank >= nodes:
        yield f"machine_rank is {rank}, but num_machines is {nodes}: nodes count from 0 to {nodes - 1}."


def _several_nodes(path: Path, settings: Mapping[str, Any], stored: Mapping[str, Any]) -> Iterator[str]:
    address, port = settings.get("main_process_ip"), settings.get("main_process_port", PORT)
    if settings.get("distributed_type") == "NO":
        yield f"{path} has distributed_type NO and several nodes: take DEEPSPEED or MULTI_GPU."
    launcher = settings.get("deepspeed_multinode_launcher", "pdsh")
    if settings.get("distributed_type") == "DEEPSPEED" and launcher != "standard":
        how = (
            "sets" if "deepspeed_multinode_launcher" in settings else "has no deepspeed_multinode_launcher, which means"
        )
        yield (
            f"{path} {how} {launcher}, which logs in to other nodes from this one: set deepspeed_multinode_launcher to "
            "standard below deepspeed_config, and start each node by itself."
        )
    if address is None:
        yield (
            f"{path} has several nodes and no main_process_ip, so that accelerate would meet at None:{port}: give the "
            "address of node 0, --main_process_ip for accelerate and --address here."
        )
    elif any(map(is_loopback, addresses(address))):
        yield (
            f"main_process_ip {address} is a loopback address here ({', '.join(addresses(address))}), where other "
            "nodes would meet themselves: give the address of node 0 in the network that nodes share."
        )
    if port == 0:
        yield "main_process_port 0 lets every node choose its own: name one port for all nodes."
    if stored.get("main_process_ip") is not None and "machine_rank" not in settings:
        yield (
            f"{path} has an address and no machine_rank, so that every node would be node 0: leave both to the command "
            "line of each node, or give --rank here and --machine_rank to accelerate."
        )


def _machine(settings: Mapping[str, Any], demand: Demand) -> Iterator[str]:
    """What this machine lacks."""
    nodes, port = settings.get("num_machines", 1), settings.get("main_process_port", PORT)
    rank, address = settings.get("machine_rank"), settings.get("main_process_ip")
    if rank in (0, None) and not port_free(port):
        instead = "0 for any that is free" if nodes == 1 else "another that is free on node 0"
        yield f"Port {port} is in use on this machine: set main_process_port to {instead}."
    if address is not None and nodes != 1 and not addresses(address):
        yield f"main_process_ip {address} has no address on this machine: check the name and the network of nodes."
    on_gpus = settings.get("gpu_ids", "all") not in ("", "-1") and settings.get("num_processes", nodes) > nodes
    if on_gpus and 0 < shm_bytes() < SHM_BYTES:
        yield (
            f"/dev/shm has {shm_bytes() / 2**20:.0f} MiB, but NCCL wants {SHM_BYTES / 2**20:.0f}: start the container "
            "with --shm-size=1g, or mount a memory volume there."
        )
    if demand.run_dir is not None and free_bytes(demand.run_dir) < demand.run_bytes:
        yield (
            f"The run directory {demand.run_dir} needs {demand.run_bytes / 1e9:.1f} GB for checkpoints, but its file "
            f"system has {free_bytes(demand.run_dir) / 1e9:.1f} GB left: free space, or choose another --run-dir."
        )


def _fits(node: Node, demand: Demand, here: bool) -> None:
    """UserError where launch, recipe and machine do not fit together, or DeepSpeed refuses what comes of them."""
    launch = Launch.from_environment(node.rank_environment())
    asked = launch.local_world if launch.gpu_ids not in ("", "-1") else 0
    engine = demand.engine or EngineConfig(precision="fp16" if launch.precision == "fp16" else "bf16")
    check_launch(launch, engine, min(asked, torch.cuda.device_count()) if here else asked)
    if launch.deepspeed:
        _deepspeed(launch, engine, demand.train or TrainConfig(batch_size=launch.world))


def _deepspeed(launch: Launch, engine: EngineConfig, train: TrainConfig) -> None:
    """Builds DeepSpeed's configuration and accelerate's plugin as the trainer does; UserError where one refuses."""
    per_rank = max(1, train.batch_size // (launch.world * train.accumulate))
    config = deepspeed_config(launch.zero_stage, 1, engine, train, per_rank, launch.file)
    try:
        DeepSpeedPlugin(hf_ds_config=config)
        DeepSpeedConfig(config)
    except (ValueError, AssertionError, KeyError, TypeError) as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
        named = f" with {json.dumps(launch.file)} of its DeepSpeed file" if launch.file else ""
        raise UserError(f"DeepSpeed refuses the configuration of this launch{named} ({reason}).") from error


def _said(check: Callable[[], None]) -> list[str]:
    """The sentence of a check, if it has one."""
    try:
        check()
    except UserError as error:
        return [str(error)]
    return []


def _notes(path: Path, settings: Mapping[str, Any], nodes: list[Node]) -> Iterator[str]:
    if nodes[0].rendezvous and settings.get("num_machines", 1) > 1 and "machine_rank" not in settings:
        yield (
            f"{path} leaves machine_rank to the command line of each node, as above: without it every node is node 0."
        )
