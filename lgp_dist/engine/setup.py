"""Processes, device and precision: the only place that starts accelerate and DeepSpeed."""

import contextlib
import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from torch import Tensor, nn
from torch.optim import Optimizer

from lgp_dist.config import EngineConfig, TrainConfig
from lgp_dist.engine.launch import Launch, check_launch, deepspeed_config
from lgp_dist.errors import UserError

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others."""


@dataclass(frozen=True)
class Workers:
    """The processes of this run and the device of this one."""

    launch: Launch
    engine: EngineConfig
    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls, engine: EngineConfig) -> "Workers":
        """Joins the other ranks; UserError where launch, recipe and machine do not fit together."""
        launch = Launch.from_environment(os.environ)
        device_type = check_launch(launch, engine, torch.cuda.device_count())
        _quiet()
        if device_type == "cpu":
            # None of DeepSpeed's own operators is used on a CPU. Saying so spares a probe that compiles each of them,
            # and the shared-memory all-reduce (for inference), which leaves 69 MB in /dev/shm for each rank killed.
            deepspeed.ops.__compatible_ops__ = {}
            torch.set_num_threads(engine.threads or max(1, (os.cpu_count() or 1) // launch.local_world))
        backend = "gloo" if device_type == "cpu" else "nccl"
        state = PartialState(**({"backend": backend, "timeout": TIMEOUT} if launch.deepspeed else {}))
        return cls(launch, engine, state.process_index, state.num_processes, state.device)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager:
        """bf16 computation where the recipe asks for it."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.engine.precision == "bf16")

    def agree(self, value: int) -> int:
        """Rank 0's value, on every rank: decisions about files are made once."""
        return int(self.sum(torch.tensor([int(value) if self.is_main else 0])).item())

    def barrier(self) -> None:
        """Waits for all ranks."""
        PartialState().wait_for_everyone()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, on every rank."""
        values = values.to(self.device)
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def close(self) -> None:
        """Leaves the group."""
        if torch.distributed.is_initialized():
            PartialState().destroy_process_group()


class Trainer:
    """One model and optimizer, wrapped for these workers: backward, step, tracking."""

    def __init__(self, workers: Workers, train: TrainConfig, per_rank: int, trackers: tuple[str, ...], log_dir: Path):
        AcceleratorState._reset_state()  # each stage has a DeepSpeed configuration of its own; the group stays
        self.workers = workers
        self.clip_grad = train.clip_grad
        plugin = None
        if workers.launch.deepspeed:
            # The launch file's fields have been read and checked; accelerate refuses them beside a configuration.
            os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
            plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(workers.launch, workers.engine, train, per_rank))
        self.accelerator = Accelerator(
            mixed_precision="no",
            gradient_accumulation_steps=train.accumulate,
            deepspeed_plugin=plugin,
            log_with=list(check_trackers(trackers)) or None,
            project_dir=str(log_dir),
        )
        self.deepspeed = plugin is not None

    def prepare(self, module: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Any]:
        """The wrapped module and optimizer."""
        return self.accelerator.prepare(module, optimizer)

    def backward(self, loss: Tensor) -> None:
        """Adds gradients; under DeepSpeed also steps at the end of the accumulation."""
        self.accelerator.backward(loss)

    def step(self, module: nn.Module, optimizer: Any) -> None:
        """Clips and steps at the end of the accumulation; under DeepSpeed `backward` has done so."""
        if self.accelerator.sync_gradients and self.clip_grad and not self.deepspeed:
            self.accelerator.clip_grad_norm_(module.parameters(), self.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    def close(self) -> None:
        """Ends trackers and frees the engine; the group of processes stays for the next stage."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.free_memory()


def check_trackers(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names, where accelerate knows them all and what they need is installed."""
    known = sorted(str(name) for name in LoggerType.list() if name != "all")
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise UserError(f"trackers names {name!r}, which accelerate does not know: choose from {', '.join(known)}.")
        if name not in installed:
            raise UserError(
                f"trackers names {name!r}, which is not installed: run `pip install {name}`, or leave it out."
            )
    return names


def _quiet() -> None:
    """Keeps DeepSpeed's and accelerate's notes off the terminal; their warnings of errors stay."""
    for name in ("DeepSpeed", "accelerate", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
