"""Processes and device of a run: how they are started, agree and end."""

import atexit
import contextlib
import gc
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from accelerate import PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor

from lgp_dist.config.run_config import EngineConfig, Precision
from lgp_dist.engine.deepspeed_workarounds import skip_operator_probes
from lgp_dist.engine.launch.environment import Launch, check_launch
from lgp_dist.engine.watch.watchdog import Watchdog, longest
from lgp_dist.errors import UserError

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others where no watchdog runs."""
LATER = timedelta(minutes=5)
"""How much longer it waits than the watchdog, which says for whom."""
FUSED = use_fused_attn(), use_fused_attn(experimental=True)
"""timm's choice, by its environment variables."""


def autocast(device_type: str, precision: Precision) -> contextlib.AbstractContextManager:
    """bf16 or fp16 computation; nothing for fp32.

    Without a cache of cast weights: a forward uses each of them once, and a cache would keep what ZeRO-3 releases.
    """
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device_type, dtype, enabled=dtype is not None, cache_enabled=False)


def choose_attention(device_type: str, precision: Precision) -> None:
    """How models that timm builds from now on compute attention: by torch's fused kernel, as timm's environment says.

    But in bf16 on a CPU, where the kernel's backward is slow, by products and a softmax: forward and backward of 17
    tokens take a tenth of the time, of 197 a third.
    """
    fused, experimental = FUSED
    set_fused_attn(fused and (device_type != "cpu" or precision == "fp32"), experimental)


@dataclass(frozen=True)
class Workers:
    """The processes of this run and the device of this one."""

    launch: Launch
    engine: EngineConfig
    rank: int
    world: int
    device: torch.device
    host: Any = None
    """Group of all ranks for what lies in this machine's memory; None for one process."""
    watchdog: Watchdog = field(default_factory=Watchdog.off)
    """Takes note of where this rank is."""

    @classmethod
    def start(cls, engine: EngineConfig, timeout_s: float = 0.0) -> "Workers":
        """Joins the other ranks; UserError where launch, recipe and machine do not fit together.

        timeout_s: the watchdog's, behind which waits for other ranks end; 0 for none.
        """
        launch = Launch.from_environment(os.environ)
        device_type = check_launch(launch, engine, torch.cuda.device_count())
        check_backend(engine.compile)
        _quiet()
        _keep_imports()
        if device_type == "cpu":
            skip_operator_probes()
            choose_attention(device_type, engine.precision)
            torch.set_num_threads(engine.threads or max(1, (os.cpu_count() or 1) // launch.local_world))
        patience = max(TIMEOUT, timedelta(seconds=longest(timeout_s)) + LATER) if timeout_s else TIMEOUT
        state = _join(launch, device_type, patience)
        several = state.num_processes > 1
        host = torch.distributed.new_group(backend="gloo", timeout=patience) if several else None
        return cls(launch, engine, state.process_index, state.num_processes, state.device, host)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager:
        """`autocast` on this process's device, at the recipe's precision."""
        return autocast(self.device.type, self.engine.precision)

    def agree(self, value: int) -> int:
        """Rank 0's value, on every rank: decisions about files are made once."""
        return int(self.sum(torch.tensor([int(value) if self.is_main else 0])).item())

    def highest(self, values: Sequence[float]) -> list[float]:
        """The highest of each value over ranks, on every rank, without waiting for the device. Exact to 2^53."""
        ends = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MAX, group=self.host)
        return ends.tolist()

    def equal(self, value: int) -> bool:
        """Whether it is the same on every rank. Exact to 2^53."""
        high, low = self.highest([value, -value])
        return high == -low

    def table(self, values: Sequence[int]) -> list[list[int]]:
        """The values of each rank, as many on all of them, on every rank."""
        mine = torch.tensor(values)
        rows = [torch.empty_like(mine) for _ in range(self.world)]
        if self.world > 1:
            torch.distributed.all_gather(rows, mine, group=self.host)
        return [row.tolist() for row in rows] if self.world > 1 else [mine.tolist()]

    @property
    def first_of_node(self) -> int:
        """The first rank on this rank's node."""
        return self.rank - self.rank % self.launch.local_world

    def gather(self, value: Any) -> list[Any]:
        """Each rank's value, on every rank: plain values, which JSON has."""
        if self.world == 1:
            return [value]
        text = json.dumps(value).encode()
        longest = int(self.highest([len(text)])[0])
        return [json.loads(bytes(row)) for row in self.table([*text.ljust(longest)])]

    def once_per_node(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on the first rank of this rank's node: a plain value. Every rank calls it.

        Where work fails on one node, all ranks end: the one that failed with its own error, the others with a UserError
        of the same sentence.
        """
        failure, result = None, None
        if self.rank == self.first_of_node:
            try:
                result = work()
            except Exception as error:
                failure = error
        told = self.gather([result, failure and (str(failure) or type(failure).__name__)])
        if failure:
            raise failure
        for _, problem in told:
            if problem:
                raise UserError(problem)
        return told[self.first_of_node][0]

    def barrier(self) -> None:
        """Waits for all ranks."""
        PartialState().wait_for_everyone()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, on every rank."""
        values = values.to(self.device, copy=True)
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def close(self) -> None:
        """Leaves the group."""
        if torch.distributed.is_initialized():
            PartialState().destroy_process_group()


def check_backend(name: str) -> None:
    """UserError where torch.compile has no such backend."""
    known = torch.compiler.list_backends(exclude_tags=())
    if name and name not in known:
        raise UserError(f"engine.compile names {name!r}, which torch.compile does not have: choose {', '.join(known)}.")


def _join(launch: Launch, device_type: str, patience: timedelta) -> PartialState:
    """The state of the group of processes: of DeepSpeed, of torch's DistributedDataParallel, or of one process."""
    options = {"backend": "gloo" if device_type == "cpu" else "nccl", "timeout": patience}
    _start_again(launch, options)
    if launch.deepspeed:
        return PartialState(**options)
    return PartialState(cpu=device_type == "cpu", **(options if launch.world > 1 else {}))


def _start_again(launch: Launch, options: dict[str, Any]) -> None:
    """Joins ranks of one node that their launcher starts again, apart from those of before.

    The launcher keeps its store, where new ranks would find the addresses of the old ones (pytorch#135712). Launchers
    of several nodes count starts each for itself, so that the count cannot tell starts apart there.
    """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if count != "0" and launch.world == launch.local_world > 1:
        store, rank, world = next(torch.distributed.rendezvous("env://"))
        fresh = torch.distributed.PrefixStore(f"start-{count}", store)
        torch.distributed.init_process_group(store=fresh, rank=rank, world_size=world, **options)


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


@cache
def _keep_imports() -> None:
    """Once in a process: what exists now, which imports made, is not searched for garbage again before the end.

    A full search of it takes a quarter of a second, on each rank at a time of its own, while the others wait.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # Triton's modules say what they leak otherwise
