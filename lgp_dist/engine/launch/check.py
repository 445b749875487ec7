"""Everything about a launch that can be known before it starts: lists all problems, each in one sentence."""

import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import torch
from accelerate import DeepSpeedPlugin

from lgp_dist.config.run_config import EngineConfig, TrainConfig
from lgp_dist.engine.launch.environment import Launch, check_launch
from lgp_dist.engine.launch.file import read_launch_file
from lgp_dist.engine.launch.keys import DEEPSPEED, check_settings
from lgp_dist.engine.launch.machine import addresses, free_bytes, port_free, shm_bytes
from lgp_dist.engine.launch.plan import Given, Node, plan
from lgp_dist.engine.launch.validate import checked_config
from lgp_dist.errors import UserError

PORT = 29500
"""accelerate's port if the file has no main_process_port."""

SHM_BYTES = 2**30
"""/dev/shm for NCCL on a node, as its troubleshooting guide advises for containers (`--shm-size=1g`)."""

UNREAD = {"enable_cpu_affinity": False, "rdzv_backend": "static"}
"""Keys that accelerate never reads from a file, since its command line has a default for them -> that default."""


@dataclass(frozen=True)
class Demand:
    """What a run needs from its launch."""

    engine: EngineConfig | None = None
    """The recipe's; None for one that fits."""
    train: TrainConfig | None = None
    """The training whose DeepSpeed configuration is checked; None for one image per rank and step."""
    arguments: tuple[str, ...] = ("run", "RECIPE")
    """Of `lgp`."""
    run_dir: Path | None = None
    run_bytes: int = 0
    """What the run directory must hold."""


@dataclass(frozen=True)
class Report:
    """The result of a check."""

    file: Path
    nodes: list[Node] = field(default_factory=list)
    """What each node would run; empty if problems leave that open."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Worth knowing, but no reason to stop."""


def check_file(path: Path, given: Given, demand: Demand, *, here: bool = True) -> Report:
    """Checks a launch file together with options of the command line. Raises UserError if it cannot be read.

    here: this machine is one of the nodes, so its ports, GPUs, memory and disk are checked too.
    """
    stored = read_launch_file(path)
    problems, valid = check_settings(path, stored, given.settings())
    settings = {"num_machines": 1, "main_process_port": PORT} | valid
    problems += _traps(path, settings)
    kind, notes = settings.get("distributed_type"), list[str]()
    refused = "distributed_type" in stored.keys() - valid.keys()
    unread = sorted(settings.keys() & DEEPSPEED.keys()) if kind != "DEEPSPEED" and not refused else []
    for key in unread:
        told = notes if key in given.settings() else problems
        told.append(f"{path} has distributed_type {kind}, which does not read {key}: leave it out, or take DEEPSPEED.")
    if settings["num_machines"] > 1:
        problems += _several_nodes(path, settings, stored)
    if here:
        problems += _machine(settings, demand)
    if problems:
        return Report(path, problems=problems)
    try:
        nodes = plan(path, given, settings["num_machines"], demand.arguments)
    except UserError as error:
        return Report(path, problems=[str(error)])
    if settings["num_machines"] > 1 and "machine_rank" not in settings:
        notes += [f"Give each node its --machine_rank, as above: {path} sets none, and every node would be node 0."]
    try:
        notes += _check_fit(nodes[0], demand, here)
    except UserError as error:
        problems = [str(error)]
    return Report(path, nodes, problems, notes)


def _traps(path: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    """What accelerate accepts silently, and then starts something else than was meant."""
    nodes, rank, kind = settings["num_machines"], settings.get("machine_rank"), settings.get("distributed_type")
    processes = settings.get("num_processes", nodes)
    each, rest = divmod(processes, nodes)
    if settings.get("use_cpu") and kind != "NO":
        yield f'{path} sets use_cpu, which accelerate reads for one process alone: set gpu_ids to "" for the CPU.'
    for key, neutral in UNREAD.items():
        if settings.get(key, neutral) != neutral:
            yield f"{path} sets {key}, which accelerate reads from its command line alone: give --{key} there instead."
    if kind == "NO" and processes > 1:
        yield f"{path} has distributed_type NO, which starts one process, not {processes}: take DEEPSPEED or MULTI_GPU."
    if rest:
        yield (
            f"num_processes {processes} is not a multiple of num_machines {nodes}: accelerate would start {each} on "
            f"each, {each * nodes} in all, so take {each * nodes or nodes} or {(each + 1) * nodes}."
        )
    ids = _ids(settings.get("gpu_ids", "all"))
    if ids and ids not in (["all"], ["-1"]) and not rest and len(ids) != each:
        yield (
            f"gpu_ids names {len(ids)} GPU(s) of a node, but each of {nodes} node(s) starts {each} process(es): set "
            f"num_processes to {len(ids) * nodes}, or name as many GPUs."
        )
    if rank is not None and rank >= nodes:
        yield f"machine_rank is {rank}, but num_machines is {nodes}: nodes count from 0 to {nodes - 1}."


def _ids(text: str) -> list[str]:
    """The GPUs of a list with commas."""
    return [one.strip() for one in text.split(",") if one.strip()]


def _several_nodes(path: Path, settings: Mapping[str, Any], stored: Mapping[str, Any]) -> Iterator[str]:
    """Traps of launches on several nodes."""
    address, port = settings.get("main_process_ip"), settings["main_process_port"]
    kind, launcher = settings.get("distributed_type"), settings.get("deepspeed_multinode_launcher")
    if kind == "NO":
        yield f"{path} has distributed_type NO and several nodes: take DEEPSPEED or MULTI_GPU."
    if kind == "DEEPSPEED" and launcher != "standard":
        how = (
            f"sets deepspeed_multinode_launcher to {launcher}"
            if launcher
            else "has no deepspeed_multinode_launcher, which means pdsh"
        )
        yield (
            f"{path} {how}, which logs in to other nodes from this one: set deepspeed_multinode_launcher to standard "
            "below deepspeed_config, and start each node by itself."
        )
    if address is None:
        yield (
            f"{path} has several nodes and no main_process_ip, so nodes would look for None:{port}: give the address "
            "of node 0, as --main_process_ip to accelerate and as --address here."
        )
    elif any(ip_address(found.partition("%")[0]).is_loopback for found in addresses(address)) and not (
        address == socket.gethostname() and "GLOO_SOCKET_IFNAME" in os.environ  # another address on other nodes
    ):
        yield (
            f"main_process_ip {address} is a loopback address here ({', '.join(addresses(address))}), so other nodes "
            "would connect to themselves: give the address of node 0 in the network that nodes share."
        )
    if port == 0:
        yield "main_process_port 0 lets every node choose its own: name one port for all nodes."
    if stored.get("main_process_ip") is not None and "machine_rank" not in settings:
        yield (
            f"{path} has an address and no machine_rank, so every node would be node 0: leave both to the command line "
            "of each node, or give --rank here and --machine_rank to accelerate."
        )


def _machine(settings: Mapping[str, Any], demand: Demand) -> Iterator[str]:
    """What this machine lacks."""
    nodes, port, address = settings["num_machines"], settings["main_process_port"], settings.get("main_process_ip")
    named, visible = _ids(settings.get("gpu_ids", "all")), _ids(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    if visible and named not in ([], ["all"], ["-1"]) and set(named) != set(visible):
        yield (
            f"gpu_ids {','.join(named)} replaces CUDA_VISIBLE_DEVICES, which is {','.join(visible)} here, so that this "
            "run would take GPUs of other jobs: set gpu_ids to all."
        )
    if settings.get("machine_rank", 0) == 0 and not port_free(port):
        instead = "0 for any free port" if nodes == 1 else "one that is free on node 0"
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


def _check_fit(node: Node, demand: Demand, here: bool) -> list[str]:
    """Notes. Raises UserError if launch, recipe and machine do not fit together, or if DeepSpeed refuses its
    configuration.

    DeepSpeed's configuration and accelerate's plugin are built as the trainer builds them.
    """
    launch = Launch.from_environment(node.rank_environment())
    wanted = launch.local_world if launch.gpu_ids not in ("", "-1") else 0
    engine = demand.engine or EngineConfig(precision="fp16" if launch.precision == "fp16" else "bf16")
    check_launch(launch, engine, min(wanted, torch.cuda.device_count()) if here else wanted)
    if not launch.deepspeed:
        return []
    train = demand.train or TrainConfig(batch_size=launch.world)
    per_rank = max(1, train.batch_size // (launch.world * train.accumulate))
    DeepSpeedPlugin(hf_ds_config=checked_config(launch.zero_stage, engine, train, per_rank, launch.file))
    staged = "ACCELERATE_DEEPSPEED_ZERO_STAGE" in node.environment or "stage" in launch.file.get(
        "zero_optimization", {}
    )
    return [] if staged else ["No file names a ZeRO stage: stage 1 is taken."]
