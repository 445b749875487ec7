"""The processes of a run and the device of each: how they join, agree and leave."""

import atexit
import gc
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import cache
from socket import AF_INET, AF_INET6
from typing import Any

import psutil
import torch
from accelerate import PartialState
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor

from lgp_dist.config.run_config import EngineConfig, Precision, TrainConfig
from lgp_dist.engine.deepspeed_config import PRINTED
from lgp_dist.engine.deepspeed_workarounds import skip_operator_probes
from lgp_dist.engine.launch.environment import Launch, check_launch, check_ranks, launcher
from lgp_dist.engine.launch.machine import threads_asked, usable_cpus
from lgp_dist.engine.launch.validate import checked_config
from lgp_dist.engine.watch.watchdog import Watchdog, longest
from lgp_dist.errors import RankExited, UserError
from lgp_dist.files import Holder
from lgp_dist.run.provenance import processor

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for other ranks without a watchdog."""
LATER = timedelta(minutes=5)
"""How much longer it waits than the watchdog, which names the rank that is waited for."""
ADDRESS = re.compile(r"\[([\da-fA-F.:]+)\]:\d")
"""Where gloo's messages name a peer."""
EXIT_S = 2.0
"""Seconds between the moment at which a process that exits closes its connections and the one at which it is gone."""
FUSED = use_fused_attn(), use_fused_attn(experimental=True)
"""timm's own choice, from its environment variables."""


def autocast(device_type: str, precision: Precision) -> torch.autocast:
    """Returns a context of bf16 or fp16 computation; it changes nothing for fp32.

    It does not cache cast weights: a forward uses each weight once, and a cache would keep what ZeRO-3 releases.
    """
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device_type, dtype, enabled=dtype is not None, cache_enabled=False)


def choose_attention(device_type: str, precision: Precision) -> None:
    """Makes models that timm builds from now on use torch's fused attention as timm's environment variables say.

    Not in 16 bits on a CPU, where the fused kernel's backward is slow: plain products and a softmax take a tenth of its
    time for forward and backward of 17 tokens, a third for 197 tokens.
    """
    fused, experimental = FUSED
    set_fused_attn(fused and (device_type != "cpu" or precision == "fp32"), experimental)


@dataclass(frozen=True)
class Workers:
    """The processes of this run, and the device of this process."""

    launch: Launch
    engine: EngineConfig
    rank: int
    world: int
    device: torch.device
    host: Any = None
    """Group of all ranks for tensors in host memory (gloo); None for one process."""
    watchdog: Watchdog = field(default_factory=Watchdog.off)
    """Notes where this rank is."""
    peers: Sequence[tuple[Holder, Sequence[str]]] = ()
    """The process of each rank, and the network addresses of its machine."""

    @classmethod
    def start(cls, engine: EngineConfig, timeout_s: float = 0.0) -> "Workers":
        """Joins the other ranks. Raises UserError if launch, recipe and machine do not fit together.

        timeout_s: the watchdog's; waits for other ranks end some time after it. 0 without a watchdog.
        """
        check_ranks(os.environ)
        launch = Launch.from_environment(os.environ)
        device_type = check_launch(launch, engine, torch.cuda.device_count())
        if launch.file:
            checked_config(launch.zero_stage, engine, TrainConfig(), 1, launch.file)
        check_backend(engine.compile)
        _quiet(prints=bool(PRINTED & launch.file.keys()))
        _keep_imports()
        if device_type == "cpu":
            skip_operator_probes()
            choose_attention(device_type, engine.precision)
            shared = max(1, usable_cpus() // launch.local_world)
            torch.set_num_threads(engine.threads or threads_asked(os.environ) or shared)
        patience = max(TIMEOUT, timedelta(seconds=longest(timeout_s)) + LATER) if timeout_s else TIMEOUT
        state = _join(launch, device_type, patience)
        several = state.num_processes > 1
        host = torch.distributed.new_group(backend="gloo", timeout=patience) if several else None
        workers = cls(launch, engine, state.process_index, state.num_processes, state.device, host)
        told = workers.gather([asdict(Holder.this_process()), addresses()])
        return replace(workers, peers=[(Holder(**holder), reached) for holder, reached in told])

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files of a run."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """Type and name of the device."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else processor()
        return f"{self.device.type}: {name}"

    def described(self) -> list[str]:
        """Launcher, world, engine and precision in a line; then a line for each node with its devices. Every rank
        calls it."""
        threads = f", {torch.get_num_threads()} thread(s) per rank" if self.device.type == "cpu" else ""
        told = self.gather(self.device_name + threads)
        lines = [f"launch: {launcher(os.environ)}, {self.launch}, precision {self.engine.precision}"]
        each = self.launch.local_world
        for first in range(0, self.world, each):
            devices = Counter(told[first : first + each])
            shown = ", ".join(f"{count} x {device}" for device, count in devices.items())
            lines.append(f"node {first // each} ({self.peers[first][0].host}): {shown}")
        return lines

    def autocast(self) -> torch.autocast:
        """`autocast` on this process's device in the recipe's precision."""
        return autocast(self.device.type, self.engine.precision)

    def agree(self, value: int) -> int:
        """Returns rank 0's value on every rank, so that decisions about files are made once."""
        return int(self.sum(torch.tensor([int(value) if self.is_main else 0])).item())

    def highest(self, values: Sequence[float]) -> list[float]:
        """Returns the maximum of each value over ranks, without waiting for the device. Exact up to 2^53."""
        ends = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MAX, group=self.host)
        return ends.tolist()

    def equal(self, value: int) -> bool:
        """Whether a value is the same on every rank. Exact up to 2^53."""
        high, low = self.highest([value, -value])
        return high == -low

    @property
    def first_of_node(self) -> int:
        """The first rank on this rank's node."""
        return self.rank - self.rank % self.launch.local_world

    def gather(self, value: Any) -> list[Any]:
        """Each rank's value, on every rank: plain values, which JSON has."""
        if self.world == 1:
            return [value]
        text = json.dumps(value).encode()
        mine = torch.tensor([*text.ljust(int(self.highest([len(text)])[0]))], dtype=torch.uint8)
        rows = [torch.empty_like(mine) for _ in range(self.world)]
        torch.distributed.all_gather(rows, mine, group=self.host)
        return [json.loads(bytes(row.tolist())) for row in rows]

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

    def exited(self, error: BaseException) -> RankExited:
        """Says which rank has exited, by gloo's message about it.

        On this machine a process shows that it is dead. On another, gloo's message has the address of the machine.
        """
        others = [rank for rank in range(len(self.peers)) if rank != self.rank]
        found, until = ADDRESS.search(str(error)), time.monotonic() + EXIT_S
        there = [rank for rank in others if found and found[1] in self.peers[rank][1]] or others
        while True:
            lives = {rank: self.peers[rank][0].lives(self.peers[self.rank][0]) for rank in there}
            if False in lives.values() or True not in lives.values() or time.monotonic() > until:
                break
            time.sleep(0.05)
        gone = [rank for rank in there if lives[rank] is False] or [rank for rank in there if lives[rank] is None]
        hosts = {self.peers[rank][0].host for rank in gone}
        who = "Another rank"
        if len(hosts) == 1:
            who = f"Rank {gone[0]}" if len(gone) == 1 else f"One of ranks {', '.join(map(str, gone))}"
            who += f" on {hosts.pop()}"
        why = "its own message or its launcher's says why, and the same command resumes the run"
        return RankExited(f"{who} has exited; {why}.")

    def barrier(self) -> None:
        """Waits for all ranks."""
        PartialState().wait_for_everyone()

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum over ranks, on this process's device."""
        values = values.to(self.device, copy=True)
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def close(self) -> None:
        """Leaves the process group."""
        if torch.distributed.is_initialized():
            PartialState().destroy_process_group()


def addresses() -> list[str]:
    """Of this machine in networks that it shares with others."""
    entries = [entry for entries in psutil.net_if_addrs().values() for entry in entries]
    found = {entry.address.partition("%")[0] for entry in entries if entry.family in (AF_INET, AF_INET6)}
    return sorted(address for address in found if not address.startswith("127.") and address != "::1")


def check_backend(name: str) -> None:
    """Raises UserError if torch.compile has no such backend."""
    known = torch.compiler.list_backends(exclude_tags=())
    if name and name not in known:
        raise UserError(f"engine.compile names {name!r}, which torch.compile does not have: choose {', '.join(known)}.")


def _join(launch: Launch, device_type: str, patience: timedelta) -> PartialState:
    """Joins the process group, as DeepSpeed, torch's DistributedDataParallel or a single process needs it."""
    options = {"backend": "gloo" if device_type == "cpu" else "nccl", "timeout": patience}
    _separate_restarts(launch, options)
    if launch.deepspeed:
        return PartialState(**options)
    return PartialState(cpu=device_type == "cpu", **(options if launch.world > 1 else {}))


def _separate_restarts(launch: Launch, options: dict[str, Any]) -> None:
    """Keeps ranks that a launcher has restarted on one node apart from those before the restart.

    The launcher keeps its store, in which new ranks would find the addresses of the old ones (pytorch#135712). On
    several nodes each launcher counts its own restarts, so the count cannot tell starts apart there.
    """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if count != "0" and launch.world == launch.local_world > 1:
        store, rank, world = next(torch.distributed.rendezvous("env://"))
        store = torch.distributed.PrefixStore(f"start-{count}", store)
        torch.distributed.init_process_group(store=store, rank=rank, world_size=world, **options)


def _quiet(*, prints: bool) -> None:
    """Hides what DeepSpeed and accelerate log below errors; not DeepSpeed's log if its file asks for prints."""
    for name in ("accelerate", "torch.distributed", *(() if prints else ("DeepSpeed",))):
        logging.getLogger(name).setLevel(logging.ERROR)
    if prints:
        logging.getLogger("DeepSpeed").setLevel(logging.INFO)
        logging.getLogger("DeepSpeed").filters.clear()


@cache
def _keep_imports() -> None:
    """Excludes everything that imports have created from garbage collection, once per process.

    A full collection of it takes a quarter of a second, on each rank at another time, while the others wait.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # otherwise Triton's modules report leaks
